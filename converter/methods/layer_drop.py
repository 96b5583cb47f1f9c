"""Layer Drop: leaving out feed-forward parts, the norm included, those first behind which the stream points as before.

Source: arXiv 2406.02500. The cosine is between m and m + y; that of the part's input x and y says nothing. The
attention of the block stays.
"""

from collections.abc import Sequence

from slimoe.converter.methods.removal import Removal, ranked
from slimoe.converter.source.model_source import SourceLayer
from slimoe.converter.stats.statistics import LayerStatistics, Statistics


def layer_removals(statistics: Statistics, layers: Sequence[SourceLayer]) -> tuple[Removal, ...]:
    """Every feed-forward part, experts or dense, the most dispensable first; `layers` are the source's."""
    pairs = enumerate(zip(statistics.layers, layers, strict=True))
    return ranked(
        Removal("ffn", index, one.similarity.ffn_cosine / statistics.n_tokens, _nats(one))
        for index, (one, layer) in pairs
        if layer.has_ffn
    )


def _nats(layer: LayerStatistics) -> float | None:
    return None if layer.removals is None else layer.removals.ffn
