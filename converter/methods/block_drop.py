"""Block Drop: leaving out whole blocks, those first behind which the stream points as before.

Source: arXiv 2406.02500. Spans of blocks that follow each other would need cosines across the span, which do not follow
from those of single blocks and are not among the statistics: only single blocks are ranked.
"""

from collections.abc import Sequence

from slimoe.converter.methods.removal import Removal, ranked
from slimoe.converter.source.model_source import SourceLayer
from slimoe.converter.stats.statistics import LayerStatistics, Statistics


def block_removals(statistics: Statistics, layers: Sequence[SourceLayer]) -> tuple[Removal, ...]:
    """Every block that has anything, the most dispensable first."""
    pairs = enumerate(zip(statistics.layers, layers, strict=True))
    return ranked(
        Removal("block", index, one.similarity.block_cosine / statistics.n_tokens, _nats(one))
        for index, (one, layer) in pairs
        if layer.has_ffn or layer.has_attention
    )


def _nats(layer: LayerStatistics) -> float | None:
    return None if layer.removals is None else layer.removals.block
