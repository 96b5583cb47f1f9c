"""What a model is read from, whatever its files look like: matrices by their names in a stock GGUF file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from slimoe.converter.gguf.bytes import read_bytes
from slimoe.offload.gguf.header import Value
from slimoe.offload.model.architecture import PROJECTIONS as PROJECTIONS
from slimoe.offload.model.native_format import constants_name
from slimoe.offload.model.spec import ModelSpec


@dataclass(frozen=True, slots=True, order=True)
class MatrixKey:
    """One matrix or vector: a tensor's name in a stock GGUF file, and the stored expert where the tensor is a stack."""

    name: str
    expert: int = -1

    def __str__(self) -> str:
        return self.name if self.expert < 0 else f"{self.name}[{self.expert}]"


def parse_key(text: str) -> MatrixKey:
    """Makes a key of the text that `str` made of it."""
    name, _, expert = text.rstrip("]").partition("[")
    return MatrixKey(name, int(expert) if expert else -1)


def expert_key(layer: int, projection: str, expert: int) -> MatrixKey:
    """One of the matrices of a stored expert."""
    return MatrixKey(f"blk.{layer}.ffn_{projection}_exps.weight", expert)


def vectors_key(layer: int, projection: str, kind: str) -> MatrixKey:
    """What the products of all stored experts have beside their matrices: a "bias" [n_stored, n_out] that is added to
    them, where experts that are narrower have the first of each, or a "scale" [n_stored] of the product.
    """
    return MatrixKey(f"blk.{layer}.ffn_{projection}_exps.{kind}")


def constant_key(layer: int, number: int) -> MatrixKey:
    """The vector of a constant expert, which stands in place of the output of stored ones."""
    return MatrixKey(constants_name(layer), number)


def block_key(layer: int, role: str, kind: str = "weight") -> MatrixKey:
    """A block's matrix or vector outside the experts, such as attn_q; some vectors have names without a `kind`."""
    return MatrixKey(f"blk.{layer}.{role}.{kind}" if kind else f"blk.{layer}.{role}")


def expert_width(source: "ModelSource", layer: int, expert: int) -> int:
    """The number of a stored expert's neurons."""
    return source.shapes[expert_key(layer, "up", expert)][0]


def shared_suffix(source: "ModelSource", layer: int) -> str:
    """What the roles of a layer's matrices that every token passes end with: `_shexp`, or nothing for dense ones."""
    shared = source.spec.architecture.shared
    return "" if not source.layers[layer].target or (shared is not None and not shared.suffix) else "_shexp"


def choice_bias_key(layer: int) -> MatrixKey:
    """What is added to a router's scores [n_row] to select experts, but not to their weights."""
    return block_key(layer, "exp_probs_b", "bias")


@dataclass(frozen=True, slots=True)
class Blocks:
    """Where a matrix lies that is stored as ggml blocks already, rows [n_rows, n_per_row]."""

    type: GGMLQuantizationType
    path: Path
    offset: int
    n_bytes: int

    def read(self, begin: int, n_bytes: int) -> NDArray[np.uint8]:
        """`n_bytes` bytes of the blocks from byte `begin` of them on; raises ModelFileError."""
        return read_bytes(self.path, self.offset + begin, n_bytes)


@dataclass(frozen=True, slots=True)
class ScatteredBlocks(Blocks):
    """Blocks that lie apart in one file: the `stretches` (offset, bytes) follow each other, from `offset` on."""

    stretches: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, kind: GGMLQuantizationType, path: Path, stretches: Sequence[tuple[int, int]]) -> "ScatteredBlocks":
        """All bytes of these stretches."""
        return cls(kind, path, stretches[0][0], sum(n_bytes for _, n_bytes in stretches), tuple(stretches))

    def read(self, begin: int, n_bytes: int) -> NDArray[np.uint8]:
        """`n_bytes` bytes of the blocks from byte `begin` of them on; raises ModelFileError."""
        parts, end = list[NDArray[np.uint8]](), begin + n_bytes
        for offset, n in self.stretches:
            first, last = max(begin, 0), min(end, n)
            if first < last:
                parts.append(read_bytes(self.path, offset + first, last - first))
            begin, end = begin - n, end - n
        return np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class SourceLayer:
    """A layer's experts. `target` says for each router row which stored expert it means, or -1 - n for constant n.

    Both are 0 and empty in a layer without experts; `has_ffn` then tells a dense layer from one without that part.
    """

    n_stored: int = 0
    target: tuple[int, ...] = ()
    has_attention: bool = True
    has_ffn: bool = True


class ModelSource(Protocol):
    """A model to read. Everything here can be asked by several threads at once.

    `source_hash` tells checkpoints apart, `metadata` has the keys to carry over: general.*, tokenizer.* and provenance,
    no sizes. `shapes` are (n_rows, n_per_row) of matrices, (n,) of vectors. Query and key rows are in ggml's order of
    rotation. Constant expert n is the vector `constant_key(layer, n)`.
    """

    @property
    def path(self) -> Path:
        """The path by which a person names the model."""
        ...

    @property
    def spec(self) -> ModelSpec:
        """The model's sizes and constants."""
        ...

    @property
    def source_hash(self) -> str:
        """A digest that tells checkpoints apart."""
        ...

    @property
    def metadata(self) -> Mapping[str, Value]:
        """The keys that a file made of the model carries over."""
        ...

    @property
    def layers(self) -> Sequence[SourceLayer]:
        """What each layer has."""
        ...

    @property
    def shapes(self) -> Mapping[MatrixKey, tuple[int, ...]]:
        """All matrices and vectors, in the order of use."""
        ...

    def read(self, key: MatrixKey) -> NDArray[np.float32]:
        """The values, of the shape that `shapes` says.

        Raises ModelFileError, also for weights that are NaN or infinite.
        """
        ...

    def blocks(self, key: MatrixKey) -> Blocks | None:
        """Where the matrix lies in ggml's own blocks; None where it is stored otherwise."""
        ...


def active_weights(source: ModelSource) -> int:
    """The weights that a token is multiplied with or looks up: all but those of experts that it does not use.

    Experts of a layer that differ in size count with the mean over the router's rows.
    """
    spec, n = source.spec, 0.0
    for key, shape in source.shapes.items():
        if key.expert < 0:
            n += math.prod(shape) if ".ffn_aux_" not in key.name else spec.n_expert_aux * shape[-1]
    for block, layer in enumerate(source.layers):
        for expert in layer.target:
            parts = (
                [expert_key(block, projection, expert) for projection in spec.architecture.projections]
                if expert >= 0
                else [constant_key(block, -1 - expert)]
            )
            n += spec.n_expert_used / len(layer.target) * sum(math.prod(source.shapes.get(key, (0,))) for key in parts)
    return round(n)
