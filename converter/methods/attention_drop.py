"""Attention Drop: leaving out the attention of blocks, those first behind which the stream points as before.

Source: LLM-Drop (arXiv 2406.15786). It saves few weights of a model of experts, but the keys and values of a layer.
"""

from collections.abc import Sequence

from slimoe.converter.methods.removal import Removal, ranked
from slimoe.converter.source.model_source import SourceLayer
from slimoe.converter.stats.statistics import LayerStatistics, Statistics


def attention_removals(statistics: Statistics, layers: Sequence[SourceLayer]) -> tuple[Removal, ...]:
    """Every attention, the most dispensable first; `layers` are the source's."""
    pairs = enumerate(zip(statistics.layers, layers, strict=True))
    return ranked(
        Removal("attention", index, one.similarity.attention_cosine / statistics.n_tokens, _nats(one))
        for index, (one, layer) in pairs
        if layer.has_attention
    )


def _nats(layer: LayerStatistics) -> float | None:
    return None if layer.removals is None else layer.removals.attention
