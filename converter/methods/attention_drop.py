"""Attention Drop: leaving out the attention of blocks, those first behind which the stream points as before.

Source: LLM-Drop (arXiv 2406.15786). It saves few weights of a model of experts, but the keys and values of a layer.
"""

from collections.abc import Sequence

from converter.methods.removal import Removal, ranked
from converter.model_source import SourceLayer
from converter.statistics import Statistics


def attention_removals(statistics: Statistics, layers: Sequence[SourceLayer]) -> tuple[Removal, ...]:
    """Every attention, the most dispensable first; `layers` are the source's. What it costs in nats is not known."""
    pairs = enumerate(zip(statistics.layers, layers, strict=True))
    return ranked(
        Removal("attention", index, one.similarity.attention_cosine / statistics.n_tokens)
        for index, (one, layer) in pairs
        if layer.has_attention
    )
