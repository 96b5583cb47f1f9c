"""A GGUF file that the engine takes: one place decides it, for files that are opened and for those to be written.

One that is opened must hold no NaN or infinity in its small tensors. One such value in a norm, a router or its bias
spoils every token; without the name a person would only learn that the file is damaged. Matrices are not read here:
they are large, and what they spoil is told when logits are sampled.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type

from slimoe.offload.errors import ModelFileError
from slimoe.offload.files.regular_file import reason, regular_descriptor
from slimoe.offload.gguf.header import GGUFFile, parse_gguf
from slimoe.offload.gguf.keys import TOKENS
from slimoe.offload.gguf.metadata_keys import AGAIN
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensor_list import check_tensors, with_listed_shapes
from slimoe.offload.model.tensors import LayerSources, LinearSource, ModelSources, WeightSource
from slimoe.offload.model.weight_reader import model_sources

_EXPONENTS = {Type.F32: ("<u4", 0x7F800000), Type.F16: ("<u2", 0x7C00), Type.BF16: ("<u2", 0x7F80)}
"""The bits of a value's exponent, which all are set in NaN and infinity alone."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file's header, the model's sizes in it, and where its weights lie."""

    gguf: GGUFFile
    spec: ModelSpec
    sources: ModelSources

    @classmethod
    def of(cls, gguf: GGUFFile) -> "ModelFile":
        """Raises ModelFileError or UnsupportedModelError for whatever the engine would not run."""
        spec = ModelSpec.from_gguf(gguf)
        gguf = with_listed_shapes(gguf, spec)
        check_tensors(gguf, spec)
        tokens = gguf.metadata.get(TOKENS)
        if isinstance(tokens, list) and len(tokens) != spec.n_vocab:
            problem = f"the tokenizer has {len(tokens)} tokens, the model {spec.n_vocab}."
            hint = "Convert the model again, with the tokenizer that belongs to it."
            raise ModelFileError(gguf.path, problem, hint)
        return cls(gguf, spec, model_sources(gguf, spec))


def has_tokenizer(gguf: GGUFFile) -> bool:
    """Whether the file carries a vocabulary; without one only token ids go in and out."""
    return TOKENS in gguf.metadata


def check_header(path: Path, header: bytes, n_bytes: int) -> None:
    """Whether a file of `n_bytes` that begins with `header` would be opened; raises as `ModelFile.of` does.

    `path` is what errors name: the source of what is to be written.
    """
    ModelFile.of(parse_gguf(path, header, n_bytes))


def check_numbers(gguf: GGUFFile, sources: ModelSources) -> None:
    """Raises ModelFileError that names the first norm, bias, router, scale or divisor that holds NaN or infinity."""
    whole = [one for one in sources.whole if one not in (sources.token_embd, sources.output.weight)]
    descriptors = list[int]()
    try:
        for path in gguf.paths:
            descriptors.append(regular_descriptor(path))
        for source in whole:
            _check(gguf, descriptors, source, "the model")
        for layer, parts in enumerate(sources.layers):
            for source in _small(parts):
                _check(gguf, descriptors, source, f"layer {layer}")
    except OSError as error:
        raise ModelFileError(gguf.path, f"the file cannot be read ({reason(error)}).") from None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _small(layer: LayerSources) -> Iterator[WeightSource]:
    yield from layer.vectors
    linears: tuple[LinearSource | None, ...] = (*layer.matrices, *layer.gate_up, layer.down)
    yield from (one.bias for one in linears if one and one.bias)
    if layer.buckets and layer.buckets.constants:
        yield layer.buckets.constants


def _check(gguf: GGUFFile, descriptors: list[int], source: WeightSource, where: str) -> None:
    if source.type not in _EXPONENTS:
        return
    dtype, exponent = _EXPONENTS[source.type]
    for span in source.spans:
        data = os.pread(descriptors[span.shard], span.n_bytes, span.offset)
        # A file that has become shorter is refused when it is loaded.
        bits = np.frombuffer(data, dtype, len(data) // np.dtype(dtype).itemsize)
        # A finite sum of squares has finite terms only, and costs a fraction of looking at each value.
        if source.type is Type.F32:
            values = bits.view(np.float32)
            with np.errstate(over="ignore", invalid="ignore"):
                if np.isfinite(np.dot(values, values)):
                    continue
        n_bad = np.count_nonzero((bits & exponent) == exponent)
        if n_bad:
            problem = f"tensor {source.name} of {where} holds NaN or infinity, {n_bad} of {bits.size} values."
            raise ModelFileError(gguf.paths[span.shard], problem, AGAIN)
