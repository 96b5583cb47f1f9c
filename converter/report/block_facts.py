"""What a written file holds in place of each block of the model that it was made of: read from the file itself."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from slimoe.converter.quant.mixes import layer_and_role
from slimoe.converter.report.alignment import LayerMap
from slimoe.converter.source.model_source import ModelSource
from slimoe.offload.gguf.header import GGUFFile, read_gguf
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import LayerSources, WeightSource, model_sources

Stacks = tuple[WeightSource, ...]
"""Of one expert's gate, up and down."""


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What a row of the source's router means in the file: a stored expert, `novice` a constant, or neither: dropped.

    `types` are those of gate, up and down, `low_types` of a second copy; `width` its neurons.
    """

    stored: int | None = None
    is_novice: bool = False
    types: tuple[str, ...] = ()
    low_types: tuple[str, ...] = ()
    width: int = 0

    @property
    def bits(self) -> float | None:
        """Bits per weight of the best copy; None without one."""
        return _bits(self.types) if self.types else None


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """One block of the source. `layer` is its number in the file, None if it is not there.

    `rows` are those of its router, empty where the file does not say which they are. `n_bytes` by part: attention,
    experts (copies after the first under second copies), other. `attention` are the types of its matrices by role.
    """

    block: int
    layer: int | None
    rows: tuple[RowFacts, ...]
    attention: dict[str, str]
    n_bytes: dict[str, int]


PARTS = ("attention", "experts", "second copies", "other")


def block_facts(path: Path, source: ModelSource, layer_map: LayerMap | None) -> tuple[BlockFacts, ...]:
    """Of every block of `source`; without `layer_map` of every layer of the file. Raises ModelFileError."""
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
        found[block] = BlockFacts(block, layer, facts, _attention(gguf, layer), _bytes(gguf, layer, parts))
    gone = dict.fromkeys(PARTS, 0)
    return tuple(
        found.get(block) or BlockFacts(block, None, (RowFacts(),) * len(source.layers[block].target), {}, gone)
        for block in blocks
    )


def _rows(parts: LayerSources, rows: tuple[int, ...], n_row: int) -> tuple[RowFacts, ...]:
    stacks = list(_stacks(parts, len(rows)))
    target = parts.buckets.layout.target if parts.buckets else tuple(range(len(rows)))
    facts = [RowFacts()] * n_row
    for row, meant in zip(rows, target, strict=True):
        facts[row] = RowFacts(is_novice=True) if meant < 0 else _expert(meant, stacks[meant])
    return tuple(facts)


def _stacks(parts: LayerSources, n_expert: int) -> Iterator[list[Stacks]]:
    """The stacks that hold each stored expert, by copy."""
    if parts.buckets:
        for copies in parts.buckets.layout.buckets:
            yield [parts.buckets.buckets[bucket] for bucket in copies]
    else:
        assert parts.down
        yield from [[tuple(linear.weight for linear in (*parts.gate_up, parts.down))]] * n_expert


def _expert(stored: int, copies: list[Stacks]) -> RowFacts:
    best, *low = (tuple(stack.type.name for stack in stacks) for stacks in copies)
    return RowFacts(stored, False, best, low[0] if low else (), copies[0][-1].ne[0])


def reported_layer_map(blocks: Sequence[BlockFacts]) -> LayerMap | None:
    """Which blocks and rows of their source a report's file has; None where it does not say."""
    kept = sorted((facts for facts in blocks if facts.layer is not None), key=lambda facts: facts.layer or 0)
    numbers = tuple(facts.block for facts in kept)
    if list(numbers) != sorted(set(numbers)):
        return None
    rows = (tuple(n for n, row in enumerate(facts.rows) if row.stored is not None or row.is_novice) for facts in kept)
    return LayerMap(numbers, tuple(rows))


def _attention(gguf: GGUFFile, layer: int) -> dict[str, str]:
    found = {layer_and_role(name): tensor for name, tensor in gguf.tensors.items() if name.endswith(".weight")}
    return {
        role: tensor.type.name
        for (number, role), tensor in found.items()
        if number == layer and role.startswith("attn") and len(tensor.ne) > 1
    }


def _bytes(gguf: GGUFFile, layer: int, parts: LayerSources) -> dict[str, int]:
    sizes = dict.fromkeys(PARTS, 0)
    for name, tensor in gguf.tensors.items():
        number, role = layer_and_role(name)
        if number == layer:
            kind = "attention" if role.startswith("attn") else "experts" if "_exps" in name else "other"
            sizes[kind] += tensor.n_bytes
    if parts.buckets:
        second = sum(
            sum(stack.n_bytes // stack.ne[2] for stack in parts.buckets.buckets[bucket])
            for copies in parts.buckets.layout.buckets
            for bucket in copies[1:]
        )
        sizes["experts"] -= second
        sizes["second copies"] = second
    return sizes


def _bits(types: tuple[str, ...]) -> float:
    sizes = [GGML_QUANT_SIZES[Type[name]] for name in types]
    return float(sum(8 * n_bytes / n for n, n_bytes in sizes) / len(sizes))
