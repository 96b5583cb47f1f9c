"""Dropping whole parts of blocks: the parts that could go, ordered by how little they change the residual stream.

Layer Drop and Block Drop (arXiv 2406.02500) leave out feed-forward parts with their norms, or whole blocks. Attention
Drop (LLM-Drop, arXiv 2406.15786) leaves out attention, which has few of the weights of a mixture-of-experts model, but
all of a layer's KV cache. Layer Drop's cosine is between the residual stream m before a part and m + y after it; the
cosine between the part's input and y does not tell how dispensable it is. Only single blocks are ranked, since cosines
across a span of blocks do not follow from those of its blocks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from slimoe.converter.source.model_source import SourceLayer
from slimoe.converter.stats.statistics import Statistics
from slimoe.offload.errors import UsageError

Part = Literal["ffn", "attention", "block"]
TOGETHER = 2.0
"""What removed parts cost over what gradients foretell to second order, measured on trained models: the errors of a
part's tokens, and of layers, go together. In the first layer it is more."""


@dataclass(frozen=True, slots=True)
class Removal:
    """One part of a layer that could be dropped, and its `similarity`.

    That is the mean cosine between the residual stream before and after the part: 1 for a part that changes nothing.
    `nats` is the expected KL divergence in nats per token without the part; None if the statistics do not have it.
    """

    part: Part
    layer: int
    similarity: float
    nats: float | None = None


def layer_removals(statistics: Statistics, layers: Sequence[SourceLayer]) -> tuple[Removal, ...]:
    """Ranks every feed-forward part, of experts or dense, the most dispensable first; `layers` are the source's."""
    return _removals("ffn", statistics, layers)


def attention_removals(statistics: Statistics, layers: Sequence[SourceLayer]) -> tuple[Removal, ...]:
    """Ranks every attention, the most dispensable first; `layers` are the source's."""
    return _removals("attention", statistics, layers)


def block_removals(statistics: Statistics, layers: Sequence[SourceLayer]) -> tuple[Removal, ...]:
    """Ranks every block that has any part, the most dispensable first; `layers` are the source's."""
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
    """Sorts removals, the most dispensable first; of equal ones the deeper layer, as published orders mostly do."""
    return tuple(sorted(removals, key=lambda one: (-one.similarity, -one.layer)))


def first(ranking: Sequence[Removal], n: int) -> tuple[Removal, ...]:
    """The first `n` parts of a ranking that can be removed together: a block takes the place of its parts.

    Raises UsageError if there are fewer.
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
    """The difference in similarity between the n-th part of a ranking and the next one.

    Near 0 the choice between the two is arbitrary; it is infinite if all parts or none are chosen.
    """
    return ranking[n - 1].similarity - ranking[n].similarity if 0 < n < len(ranking) else float("inf")
