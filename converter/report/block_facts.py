"""What a written file has of each block of its source: types, experts and bytes, read from the file itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from slimoe.converter.quant.mixes import layer_and_role
from slimoe.converter.report.alignment import LayerMap
from slimoe.converter.source.model_source import PROJECTIONS, ModelSource
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import LayerSources, WeightSource
from slimoe.offload.model.weight_reader import model_sources

Stacks = tuple[WeightSource, ...]
"""The tensors with one expert's gate, up and down."""


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What a row of the source's router means in the file: a stored expert, a constant, or neither if it was dropped.

    `types` are those of the expert's gate, up and down, `low_types` those of its low-bit copy; `width` is its number of
    neurons.
    """

    stored: int | None = None
    is_constant: bool = False
    types: tuple[str, ...] = ()
    low_types: tuple[str, ...] = ()
    width: int = 0

    @property
    def bits(self) -> float | None:
        """Bits per weight of the best copy; None if no expert is stored."""
        if not self.types:
            return None
        sizes = [GGML_QUANT_SIZES[Type[name]] for name in self.types]
        return float(sum(8 * n_bytes / n for n, n_bytes in sizes) / len(sizes))


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """What the file has of one block of the source; `layer` is its number in the file, None if it was dropped.

    `rows` are those of the source's router, empty if the file does not say which ones it has. `attention` are the types
    of the attention's matrices by role, `dense` those of a dense layer or of shared experts, and `n_bytes` the bytes by
    part, as `PARTS` names them.
    """

    block: int
    layer: int | None
    rows: tuple[RowFacts, ...]
    attention: dict[str, str]
    n_bytes: dict[str, int]
    dense: dict[str, str] = field(default_factory=dict)


_DENSE = frozenset(f"ffn_{name}{suffix}" for name in PROJECTIONS for suffix in ("", "_shexp"))
PARTS = ("attention", "experts", "second copies", "other")
"""Parts of a block by which bytes are counted; second copies are all copies of experts after the first."""


def block_facts(path: Path, source: ModelSource, layer_map: LayerMap | None) -> tuple[BlockFacts, ...]:
    """Reads the facts of every block of `source`; without `layer_map` of every layer of the file.

    Raises ModelFileError.
    """
    gguf = read_gguf(path)
    spec = ModelSpec.from_gguf(gguf)
    layers = model_sources(gguf, spec).layers
    blocks = range(len(source.layers)) if layer_map else range(len(layers))
    numbers = layer_map.blocks if layer_map else tuple(blocks)
    found = {}
    for layer, (block, parts) in enumerate(zip(numbers, layers, strict=True)):
        rows = layer_map.rows[layer] if layer_map else ()
        n_row = len(source.layers[block].target)
        facts = (
            _rows(parts, rows, n_row) if rows else (RowFacts(),) * (n_row if layer_map and not parts.ffn_norm else 0)
        )
        attention, dense, sizes = {}, {}, dict.fromkeys(PARTS, 0)
        for name, tensor in gguf.tensors.items():
            number, role = layer_and_role(name)
            if number != layer:
                continue
            kind = "attention" if role.startswith("attn") else "experts" if "_exps" in name else "other"
            sizes[kind] += tensor.n_bytes
            if kind == "attention" and name.endswith(".weight") and len(tensor.ne) > 1:
                attention[role] = tensor.type.name
            elif kind == "other" and role in _DENSE:
                dense[role] = tensor.type.name
        if parts.buckets:
            sizes["second copies"] = sum(
                sum(stack.n_bytes // stack.ne[2] for stack in parts.buckets.buckets[bucket])
                for copies in parts.buckets.layout.buckets
                for bucket in copies[1:]
            )
            sizes["experts"] -= sizes["second copies"]
        found[block] = BlockFacts(block, layer, facts, attention, sizes, dense)
    gone = dict.fromkeys(PARTS, 0)
    return tuple(
        found.get(block) or BlockFacts(block, None, (RowFacts(),) * len(source.layers[block].target), {}, gone)
        for block in blocks
    )


def _rows(parts: LayerSources, rows: tuple[int, ...], n_row: int) -> tuple[RowFacts, ...]:
    """The facts of all `n_row` rows of the source's router, of which a layer of the file has `rows`."""
    # The tensors with each stored expert, by copy.
    copies: list[list[Stacks]]
    if parts.buckets:
        target = parts.buckets.layout.target
        copies = [[parts.buckets.buckets[bucket] for bucket in one] for one in parts.buckets.layout.buckets]
    else:
        assert parts.down
        target = tuple(range(len(rows)))
        copies = [[tuple(linear.weight for linear in (*parts.gate_up, parts.down))]] * len(rows)
    facts = [RowFacts()] * n_row
    for row, meant in zip(rows, target, strict=True):
        if meant < 0:
            facts[row] = RowFacts(is_constant=True)
        else:
            best, *low = (tuple(stack.type.name for stack in stacks) for stacks in copies[meant])
            facts[row] = RowFacts(meant, False, best, low[0] if low else (), copies[meant][0][-1].ne[0])
    return tuple(facts)


def reported_layer_map(blocks: Sequence[BlockFacts]) -> LayerMap | None:
    """The layer map that a report's facts of blocks tell; None if they do not tell it."""
    kept = sorted((facts for facts in blocks if facts.layer is not None), key=lambda facts: facts.layer or 0)
    numbers = tuple(facts.block for facts in kept)
    if list(numbers) != sorted(set(numbers)):
        return None
    rows = (tuple(n for n, row in enumerate(facts.rows) if row.stored is not None or row.is_constant) for facts in kept)
    return LayerMap(numbers, tuple(rows))
