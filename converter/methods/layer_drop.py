"""Layer Drop: leaving out feed-forward parts, the norm included, those first behind which the stream points as before.

Source: arXiv 2406.02500. The cosine is between m and m + y; that of the part's input x and y says nothing. The
attention of the block stays.
"""

from collections.abc import Sequence

from converter.methods.layer_weight import layer_weight
from converter.methods.removal import Removal, ranked
from converter.methods.sketch_policy import layer_sketch
from converter.model_source import SourceLayer
from converter.statistics import LayerStatistics, Statistics
from offload.model_spec import ExpertSpec


def layer_removals(statistics: Statistics, layers: Sequence[SourceLayer], experts: ExpertSpec) -> tuple[Removal, ...]:
    """Every feed-forward part, experts or dense, the most dispensable first; `layers` and `experts` are the source's.

    Raises UsageError as `layer_sketch` does.
    """
    pairs = enumerate(zip(statistics.layers, layers, strict=True))
    return ranked(
        Removal("ffn", index, one.similarity.ffn_cosine / statistics.n_tokens, _nats(one, layer, experts))
        for index, (one, layer) in pairs
        if layer.has_ffn
    )


def _nats(layer: LayerStatistics, source: SourceLayer, experts: ExpertSpec) -> float | None:
    """Half the sensitivity times |y|^2."""
    if layer.sketch is None or layer.sensitivity is None:
        return None
    sketch = layer_sketch(layer, source.target, experts)
    profile = None if layer.outputs is None else layer.outputs.output_square.sum(0)
    return layer_weight(layer, profile).cost(float(sketch.error(sketch.nothing()).mean()))
