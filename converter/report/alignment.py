"""Which blocks and router rows of a model come from which ones of the model that it was made of, its ancestor."""

from dataclasses import dataclass

import numpy as np

from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.source.model_source import ModelSource
from slimoe.offload.gguf import keys
from slimoe.offload.gguf.header import read_gguf


@dataclass(frozen=True, slots=True)
class LayerMap:
    """The ancestor's block of each block of the model, ascending, and the ancestor's router rows of each, in `rows`."""

    blocks: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        assert list(self.blocks) == sorted(set(self.blocks)), self.blocks
        assert len(self.rows) == len(self.blocks)


def planned_layer_map(plan: CompressPlan) -> LayerMap:
    """The layer map that a plan makes."""
    return LayerMap(tuple(layer.block for layer in plan.layers), tuple(layer.rows for layer in plan.layers))


def likely_layer_map(model: ModelSource, ancestor: ModelSource) -> LayerMap | None:
    """The layer map of a model, from its number of blocks or from what its file says of this ancestor, else None.

    If both have equally many blocks, they correspond one to one. So do the router rows of a block; if their numbers
    differ, they are unknown, and empty.
    """
    blocks = _blocks(model, ancestor)
    if blocks is None:
        return None
    counts = [
        (len(one.target), len(ancestor.layers[block].target)) for one, block in zip(model.layers, blocks, strict=True)
    ]
    rows = tuple(tuple(range(n_row)) if n_row == n_old else () for n_row, n_old in counts)
    return LayerMap(blocks, rows)


def _blocks(model: ModelSource, ancestor: ModelSource) -> tuple[int, ...] | None:
    """The ancestor's block of each block of the model; None if it is unknown."""
    n_layer = len(ancestor.layers)
    if len(model.layers) == n_layer:
        return tuple(range(n_layer))
    metadata = read_gguf(model.path).metadata if model.path.is_file() else {}
    said = metadata.get(keys.SOURCE_BLOCKS)
    if said is None or metadata.get(keys.SOURCE_HASH) != ancestor.source_hash:
        return None
    blocks = tuple(int(block) for block in np.asarray(said))
    is_sound = len(blocks) == len(model.layers) and list(blocks) == sorted(set(blocks) & set(range(n_layer)))
    return blocks if is_sound else None
