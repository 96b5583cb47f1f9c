"""The tensors of a compressed checkpoint, by the names that its source has for them, and how each is made."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.converter.hf.packed import GROUP, pack, packed_shape
from slimoe.converter.layout.layer import CHOICE_BIAS, ROUTER, Matrix, layer_shape, matrix_width
from slimoe.converter.layout.plan import CompressPlan, ExpertPlan, LayerPlan
from slimoe.converter.methods.expert_matrices import merged_matrix, merged_vectors
from slimoe.converter.quant.quantize import BadWeightsError, quantize_rows
from slimoe.converter.source.checkpoint import Checkpoint
from slimoe.converter.source.families.config import ModelConfig
from slimoe.converter.source.families.family import Family
from slimoe.converter.source.hf_tensors import kept_tensors, matrices_of
from slimoe.converter.source.model_source import MatrixKey, ModelSource, expert_key
from slimoe.converter.source.stored_rows import StoredMatrix, TensorRows
from slimoe.converter.write.quantiser import Importance
from slimoe.offload.errors import ModelFileError, UnsupportedModelError

_LAYER = re.compile(r"(model\.layers\.)(\d+)(\..+)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_PACKED_ROLE = re.compile(r"blk\.\d+\.ffn_(gate|up|down)(_exps|_shexp)?\.weight")
"""What is quantised: the feed-forward parts. The router and attention are few bytes that decide much."""
_BLOCKS = "_blocks"
"""What the name of an MXFP4 tensor ends with, and that of its values does not."""
_CHUNK_WEIGHTS = 1 << 22

Make = Callable[[], NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class ResultTensor:
    """A tensor of the result: name, safetensors' dtype, shape in numpy's order."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of one value."""
        return {"I64": 8, "I32": 4, "F32": 4}.get(self.dtype, 2)

    @property
    def n_bytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.item_bytes


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tensors that are made together and lie one behind the other; `parts` are (bytes, what makes them), in order.

    Parts may be made by any thread in any order; they raise ModelFileError.
    """

    tensors: tuple[ResultTensor, ...]
    parts: tuple[tuple[int, Make], ...] = field(repr=False)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors)


def matrix_dtype(stored: StoredMatrix) -> Type:
    """The type of a matrix of the result: 16 bits wide, and F16 only where the source has that."""
    return Type.F16 if _dtype(stored) is Type.F16 else Type.BF16


def _dtype(stored: StoredMatrix) -> Type:
    """The type in which small things stay as they are; BF16 of what was quantised."""
    dtype = stored.rows.tensor.dtype if isinstance(stored.rows, TensorRows) else "BF16"
    return Type.F32 if dtype == "F64" else Type[dtype]


class ResultTensors:
    """Lists the tensors that `plan` makes of a checkpoint, in the order of its files.

    Feed-forward matrices are packed with `n_bits` below 16, fitted to their columns' `importance`.
    """

    def __init__(
        self,
        source: ModelSource,
        checkpoint: Checkpoint,
        family: Family,
        config: ModelConfig,
        plan: CompressPlan,
        n_bits: int,
        importance: Importance,
    ) -> None:
        self._source, self._family, self._config = source, family, config
        self._kept = kept_tensors(checkpoint, family, config)
        self._layers = {layer.block: (index, layer) for index, layer in enumerate(plan.layers)}
        self._n_bits, self._importance = n_bits, importance

    def all(self) -> Iterator[Stretch]:
        """Every tensor. Raises UnsupportedModelError for what cannot be packed."""
        for name, stored in self._kept.items():
            matrices = matrices_of(name, stored, self._family, self._config)
            match = _LAYER.fullmatch(name)
            if match is None:
                yield self._whole(name, stored, next(iter(matrices)), -1)
            elif int(match[2]) in self._layers:
                index, layer = self._layers[int(match[2])]
                yield from self._of_layer(f"{match[1]}{index}{match[3]}", match[3][1:], layer, stored, matrices)

    def _of_layer(
        self, name: str, inner: str, layer: LayerPlan, stored: StoredMatrix, matrices: Mapping[MatrixKey, StoredMatrix]
    ) -> Iterator[Stretch]:
        key, *_ = keys = list(matrices)
        role = key.name.split(".")[2]
        if role in (ROUTER, CHOICE_BIAS):
            yield self._router(name, key, layer, stored)
        elif not role.endswith("_exps"):
            yield self._whole(name, stored, key, layer.block)
        elif key.expert < 0:
            yield self._biases(name, keys, layer, stored)
        elif inner in self._family.joined:
            yield self._stack(name, list(dict.fromkeys(one.name for one in keys)), layer, stored)
        elif key.expert == 0:
            # Those of the others follow from it: they are alike.
            for number, expert in enumerate(layer.experts):
                yield self._expert(_EXPERT.sub(str(number), name), key, number, layer, expert, stored)

    # --- what a layer is reduced by ---------------------------------------------------------------------------

    def _expert(
        self, name: str, key: MatrixKey, number: int, layer: LayerPlan, expert: ExpertPlan, stored: StoredMatrix
    ) -> Stretch:
        projection = _projection(key.name)
        shape = self._expert_shape(layer, expert, projection)
        read = partial(merged_matrix, self._source, layer.block, expert, projection)
        own = expert_key(self._layers[layer.block][0], projection, number)
        matrix = Matrix(own, own.name, number, shape, matrix_dtype(stored), block=layer.block, expert=expert)
        return self._matrix(name, read, matrix, stored.rows.path)

    def _stack(self, name: str, of_all: Sequence[str], layer: LayerPlan, stored: StoredMatrix) -> Stretch:
        """All experts in one tensor, matrices below each other, or transposed with columns that take turns."""
        if self._n_bits < 16:
            problem = f"{name} has all experts of a layer, and compressed-tensors has no form for such tensors."
            raise UnsupportedModelError(self._source.path, problem, "Leave --hf-bits out.")
        projections, kind, first = [_projection(one) for one in of_all], matrix_dtype(stored), layer.experts[0]
        n_rows, n_per_row = self._expert_shape(layer, first, projections[0])
        shape = (len(projections) * n_rows, n_per_row)
        shape = shape[::-1] if self._family.alternates else shape

        def make(expert: ExpertPlan) -> NDArray[np.float32]:
            each = [merged_matrix(self._source, layer.block, expert, one) for one in projections]
            if not self._family.alternates:
                return np.concatenate(each)
            return np.stack([one.T for one in each], axis=-1).reshape(shape)

        tensor = ResultTensor(name.removesuffix(_BLOCKS), kind.name, (len(layer.experts), *shape))
        n_bytes = tensor.n_bytes // len(layer.experts)
        made = (partial(_encoded, partial(make, one), kind, stored.rows.path, name) for one in layer.experts)
        return Stretch((tensor,), tuple((n_bytes, one) for one in made))

    def _biases(self, name: str, keys: Sequence[MatrixKey], layer: LayerPlan, stored: StoredMatrix) -> Stretch:
        """What the products of all experts have added; elements of several matrices take turns."""
        is_down = _projection(keys[0].name) == "down"
        n = self._source.spec.n_embd_expert if is_down else layer_shape(self._source, layer).n_ff

        def make() -> NDArray[np.float32]:
            each = [merged_vectors(self._source, key, layer.experts, n) for key in keys]
            return np.stack(each, axis=-1).reshape(len(layer.experts), -1)

        return _one(name, (len(layer.experts), n * len(keys)), make, _dtype(stored), stored.rows.path)

    def _router(self, name: str, key: MatrixKey, layer: LayerPlan, stored: StoredMatrix) -> Stretch:
        """The router's rows that are left, or the biases of its choice, in the precision that they have."""
        n, is_matrix = len(layer.rows), key.name.endswith(f"{ROUTER}.weight")
        shape = (n, *stored.shape[1:]) if is_matrix else (*stored.shape[:-1], n)

        def make() -> NDArray[np.float32]:
            given = layer.router if is_matrix else layer.router_biases.get(key.name.split(".")[2])
            return given if given is not None else self._source.read(key)[list(layer.rows)]

        return _one(name, shape, make, _dtype(stored), stored.rows.path)

    # --- what stays -------------------------------------------------------------------------------------------

    def _whole(self, name: str, stored: StoredMatrix, key: MatrixKey, block: int) -> Stretch:
        """All of a stored tensor, some rows at a time."""
        rows, is_matrix = stored.rows, len(stored.shape) > 1 and stored.shape[0] > 1
        kind = matrix_dtype(stored) if is_matrix else _dtype(stored)
        if self._n_bits < 16 and _PACKED_ROLE.fullmatch(key.name):
            own = MatrixKey(key.name)
            matrix = Matrix(own, own.name, 0, (rows.n_rows, rows.n_per_row), kind, block=block, origin=key)
            return self._matrix(name, partial(rows.read, 0, rows.n_rows), matrix, rows.path)
        n_at_once = max(1, _CHUNK_WEIGHTS // (rows.n_per_row * rows.step)) * rows.step
        parts = []
        for first in range(0, rows.n_rows, n_at_once):
            n = min(n_at_once, rows.n_rows - first)
            n_bytes = n * rows.n_per_row * GGML_QUANT_SIZES[kind][1]
            parts.append((n_bytes, partial(_encoded, partial(rows.read, first, n), kind, rows.path, name)))
        return Stretch((ResultTensor(name, kind.name, stored.shape),), tuple(parts))

    # --- how it is stored -------------------------------------------------------------------------------------

    def _matrix(self, name: str, read: Callable[[], NDArray[np.float32]], matrix: Matrix, origin: Path) -> Stretch:
        """A feed-forward matrix: 16 bits wide, or packed; sizes of packed ones are multiples of 128, and so aligned."""
        kind, shape = matrix.type, matrix.shape
        if self._n_bits == 16:
            return _one(name, shape, read, kind, origin)
        if shape[1] % GROUP:
            problem = f"{name} would have rows of {shape[1]}, which is no multiple of {GROUP}, as --hf-bits needs."
            raise UnsupportedModelError(self._source.path, problem, "Leave --hf-bits out, or choose another --width.")
        tensors = (
            ResultTensor(f"{name}_packed", "I32", packed_shape(shape, self._n_bits)),
            ResultTensor(f"{name}_scale", kind.name, (shape[0], shape[1] // GROUP)),
        )
        numbers = np.array(shape, "<i8").view(np.uint8)

        def make() -> NDArray[np.uint8]:
            try:
                return pack(read(), self._n_bits, kind, self._importance(matrix))
            except BadWeightsError as error:
                raise ModelFileError(origin, f"tensor {name} {error}.") from None

        n_bytes = sum(tensor.n_bytes for tensor in tensors)
        sizes = ResultTensor(f"{name}_shape", "I64", (len(shape),))
        return Stretch((sizes, *tensors), ((numbers.nbytes, lambda: numbers), (n_bytes, make)))

    def _expert_shape(self, layer: LayerPlan, expert: ExpertPlan, projection: str) -> tuple[int, int]:
        width, n_embd = matrix_width(self._source, layer.block, expert), self._source.spec.n_embd_expert
        return (n_embd, width) if projection == "down" else (width, n_embd)


def unpacked_modules(stretches: Iterable[Stretch]) -> tuple[str, ...]:
    """What compressed-tensors calls the modules whose matrices are not packed: their names, or patterns of those.

    The output is one of them where its matrix is the token table, too, and so no tensor of its own.
    """
    found = []
    for tensor in (tensor for stretch in stretches for tensor in stretch.tensors):
        if len(tensor.shape) == 2 and tensor.name.endswith(".weight"):
            module = tensor.name.removesuffix(".weight")
            match = _LAYER.fullmatch(module)
            found.append(rf"re:.*\.layers\.\d+{re.escape(match[3])}$" if match else module)
    return tuple(dict.fromkeys((*found, "lm_head")))


def _projection(name: str) -> str:
    """gate, up or down of `blk.0.ffn_gate_exps.weight`."""
    return name.split("_")[1]


def _one(
    name: str, shape: tuple[int, ...], read: Callable[[], NDArray[np.float32]], kind: Type, origin: Path
) -> Stretch:
    """A tensor that is made at once."""
    tensor = ResultTensor(name, kind.name, shape)
    return Stretch((tensor,), ((tensor.n_bytes, partial(_encoded, read, kind, origin, name)),))


def _encoded(read: Callable[[], NDArray[np.float32]], kind: Type, origin: Path, name: str) -> NDArray[np.uint8]:
    """The bytes of values; raises ModelFileError for NaN, infinity and what is too large for the type."""
    values = np.ascontiguousarray(read(), np.float32)
    try:
        return quantize_rows(values.reshape(-1, values.shape[-1]), kind).reshape(-1)
    except BadWeightsError as error:
        raise ModelFileError(origin, f"tensor {name} {error}.") from None
