"""Leaving out whole parts of blocks: what could go, ordered by how little it changes the residual stream.

Layer Drop and Block Drop (arXiv 2406.02500) leave out feed-forward parts with their norms, or whole blocks; Attention
Drop (LLM-Drop, arXiv 2406.15786) leaves out attention, which saves few weights of a model of experts, but a layer's
keys and values. Layer Drop's cosine is between m and m + y: that of the part's input and y says nothing. Only single
blocks are ranked, since cosines across a span of blocks do not follow from those of its blocks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from slimoe.converter.source.model_source import MatrixKey, SourceLayer
from slimoe.converter.stats.statistics import Statistics
from slimoe.offload.errors import UsageError

Part = Literal["ffn", "attention", "block"]
_PREFIXES: dict[Part, str] = {"ffn": "ffn_", "attention": "attn_", "block": ""}


@dataclass(frozen=True, slots=True)
class Removal:
    """One part of a layer and the mean cosine between the stream before and after it: 1 for what does nothing.

    `nats` is the expected rise of the KL divergence, nats per token; None where the statistics cannot say it.
    """

    part: Part
    layer: int
    similarity: float
    nats: float | None = None


def layer_removals(statistics: Statistics, layers: Sequence[SourceLayer]) -> tuple[Removal, ...]:
    """Every feed-forward part, experts or dense, the most dispensable first; `layers` are the source's."""
    return _removals("ffn", statistics, layers)


def attention_removals(statistics: Statistics, layers: Sequence[SourceLayer]) -> tuple[Removal, ...]:
    """Every attention, the most dispensable first; `layers` are the source's."""
    return _removals("attention", statistics, layers)


def block_removals(statistics: Statistics, layers: Sequence[SourceLayer]) -> tuple[Removal, ...]:
    """Every block that has anything, the most dispensable first; `layers` are the source's."""
    return _removals("block", statistics, layers)


def _removals(part: Part, statistics: Statistics, layers: Sequence[SourceLayer]) -> tuple[Removal, ...]:
    found = []
    for index, (one, layer) in enumerate(zip(statistics.layers, layers, strict=True)):
        has = {"ffn": layer.has_ffn, "attention": layer.has_attention, "block": layer.has_ffn or layer.has_attention}
        if has[part]:
            similarity = getattr(one.similarity, f"{part}_cosine") / statistics.n_tokens
            nats = None if one.removals is None else getattr(one.removals, part)
            found.append(Removal(part, index, similarity, nats))
    return ranked(found)


def ranked(removals: Iterable[Removal]) -> tuple[Removal, ...]:
    """What to remove first comes first; of equals the deeper layer, as published orders mostly begin deep."""
    return tuple(sorted(removals, key=lambda one: (-one.similarity, -one.layer)))


def removed_keys(removal: Removal, keys: Iterable[MatrixKey]) -> tuple[MatrixKey, ...]:
    """Those of a source's matrices and vectors that would go, norms included: what to count bytes of."""
    prefix = f"blk.{removal.layer}.{_PREFIXES[removal.part]}"
    return tuple(key for key in keys if key.name.startswith(prefix))


def first(ranking: Sequence[Removal], n: int) -> tuple[Removal, ...]:
    """The first `n` that can be removed together: a block takes the place of its parts.

    Raises UsageError when there are not so many.
    """
    chosen: list[Removal] = []
    for removal in ranking:
        if len(chosen) == n:
            break
        if any(one.layer == removal.layer and one.part == "block" for one in chosen):
            continue
        if removal.part == "block":
            chosen = [one for one in chosen if one.layer != removal.layer]
        chosen.append(removal)
    if len(chosen) < n:
        raise UsageError(f"Only {len(chosen)} parts of the model can be removed, not {n}. Ask for fewer.")
    return tuple(chosen)


def margin(ranking: Sequence[Removal], n: int) -> float:
    """How much more similar the last of the first `n` is than the next one; about 0 says that the choice is a toss."""
    return ranking[n - 1].similarity - ranking[n].similarity if 0 < n < len(ranking) else float("inf")
