"""A GGUF file as a source of matrices: any that the engine reads, stock or native, in one file or several."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from slimoe.converter.gguf.bytes import add_samples, read_bytes
from slimoe.converter.source.model_source import (
    Blocks,
    MatrixKey,
    ScatteredBlocks,
    SourceLayer,
    constant_key,
    expert_key,
)
from slimoe.converter.source.stored_model import StoredModel, no_mtp_block
from slimoe.converter.source.stored_rows import BlockRows, StoredMatrix
from slimoe.offload.errors import UnsupportedModelError
from slimoe.offload.gguf import keys
from slimoe.offload.gguf.header import GGUFFile, Value, read_gguf
from slimoe.offload.model.model_file import ModelFile
from slimoe.offload.model.mtp_block import mtp_block
from slimoe.offload.model.regrouped import expert_matrices, stacked_matrix
from slimoe.offload.model.tensor_list import with_listed_shapes
from slimoe.offload.model.tensors import LayerSources, WeightSource
from slimoe.offload.text.tokenizer import Tokenizer

_OF_THE_FILE = ("architecture", "alignment", "file_type", "quantization_version", "size_label")
"""What general.* says of a file and not of its model."""
_CARRIED = (*keys.OF_THE_TOKENIZER, *keys.CARRIED)


def gguf_source(path: Path, copy: int = 0, *, keeps_mtp: bool = False) -> StoredModel:
    """Opens a GGUF file by its name, or by that of its first shard; only headers are read now.

    Of an expert with several copies number `copy` counts, or its last one; 0 is the best. With `keeps_mtp` the block
    that predicts a further token is the last layer. The digest covers all headers
    and the first 4096 bytes of every tensor: files of different types made of one checkpoint are different sources.
    Raises ModelFileError and UnsupportedModelError as the engine does that would run the file.
    """
    file = ModelFile.of(read_gguf(path))
    gguf, spec, sources = file.gguf, file.spec, file.sources
    if spec.architecture.has_indexer:
        problem = f"the architecture {spec.architecture.name!r} is run, but not converted: its indexer would be lost."
        raise UnsupportedModelError(path, problem)
    if keys.TOKENS in gguf.metadata:
        Tokenizer.open(gguf).close()
    found: dict[MatrixKey, StoredMatrix] = {}
    block, blocks = mtp_block(gguf, spec, sources) if keeps_mtp else None, sources.layers
    if block is not None:
        gguf, spec, blocks = with_listed_shapes(gguf, block.spec), block.spec, block.sources.layers
        found |= {MatrixKey(weight.name): _matrix(gguf, weight) for weight in block.own.values()}
    elif keeps_mtp:
        raise no_mtp_block(path)
    for weight in sources.whole:
        found[MatrixKey(weight.name)] = _matrix(gguf, weight)
    layers, projections = [], spec.architecture.projections
    for index, layer in enumerate(blocks):
        found |= {key: _matrix(gguf, weight) for key, weight in _layer_weights(index, layer, projections, copy)}
        n_expert = layer.router.weight.ne[1] if layer.router else 0
        stored = len(layer.buckets.layout.buckets) if layer.buckets else n_expert
        target = layer.buckets.layout.target if layer.buckets else tuple(range(n_expert))
        layers.append(SourceLayer(stored, target, layer.attn_norm is not None, layer.ffn_norm is not None))
    return StoredModel(path, spec, _digest(gguf), _metadata(gguf.metadata, path.stem), tuple(layers), found)


def _layer_weights(
    index: int, layer: LayerSources, projections: Sequence[str], copy: int
) -> Iterator[tuple[MatrixKey, WeightSource]]:
    for weight in (*layer.vectors, *(part for linear in layer.matrices for part in linear.parts)):
        yield MatrixKey(weight.name), weight
    if layer.buckets:
        layout, constants = layer.buckets.layout, layer.buckets.constants
        for expert, number, bucket, slot in layout.slots():
            if number == min(copy, len(layout.buckets[expert]) - 1):
                for projection, stack in zip(projections, layer.buckets.buckets[bucket], strict=True):
                    yield expert_key(index, projection, expert), stacked_matrix(stack, slot)
        if constants:
            n_embd, n_constant = constants.ne
            vectors = replace(constants, ne=(n_embd, 1, n_constant))
            for number in range(n_constant):
                yield constant_key(index, number), replace(stacked_matrix(vectors, number), ne=(n_embd,))
    elif layer.router:
        assert layer.down is not None
        for expert in range(layer.router.weight.ne[1]):
            matrices = expert_matrices(layer.gate_up, layer.down, expert, len(projections))
            for projection, matrix in zip(projections, matrices, strict=True):
                yield expert_key(index, projection, expert), matrix
    else:
        for linear in (*layer.gate_up, *((layer.down,) if layer.down else ())):
            yield from ((MatrixKey(weight.name), weight) for weight in linear.parts)


def _matrix(gguf: GGUFFile, weight: WeightSource) -> StoredMatrix:
    span, *others = weight.spans
    assert all(other.shard == span.shard for other in others), weight.name
    path = gguf.paths[span.shard]
    if others:
        blocks: Blocks = ScatteredBlocks.of(weight.type, path, [(one.offset, one.n_bytes) for one in weight.spans])
    else:
        blocks = Blocks(weight.type, path, span.offset, span.n_bytes)
    n_rows = math.prod(weight.ne[1:])
    return StoredMatrix(weight.ne[::-1], BlockRows(weight.name, blocks, n_rows, weight.ne[0]))


def _metadata(metadata: Mapping[str, Value], name: str) -> dict[str, Value]:
    left = {f"general.{name}" for name in _OF_THE_FILE}
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in metadata.items()}
    carried = {
        key: value
        for key, value in plain.items()
        if (key.startswith(("general.", "tokenizer.")) or key in _CARRIED) and key not in left and value != []
    }
    return {"general.type": "model", "general.name": name} | carried


def _digest(gguf: GGUFFile) -> str:
    digest = hashlib.sha256()
    tensors = list(gguf.tensors.values())
    for shard, path in enumerate(gguf.paths):
        begin = min((tensor.offset for tensor in tensors if tensor.shard == shard), default=path.stat().st_size)
        digest.update(read_bytes(path, 0, begin).tobytes())
    add_samples(digest, ((gguf.paths[tensor.shard], tensor.offset, tensor.n_bytes) for tensor in tensors))
    return digest.hexdigest()
