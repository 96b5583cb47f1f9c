"""What a native file tells the engine of its experts: use, cost of each copy, thresholds of the lossy modes."""

from dataclasses import dataclass, replace

import numpy as np

from slimoe.converter.layout.layer import matrix_width, native_layer, type_bits
from slimoe.converter.layout.plan import LayerPlan
from slimoe.converter.methods.constant_experts import constant_vectors
from slimoe.converter.methods.expert_drop import Survivors
from slimoe.converter.methods.gram_policy import gram_of_block
from slimoe.converter.methods.layer_hints import SkipRules, hints_for, price_of_bytes, skip_ratio
from slimoe.converter.source.model_source import ModelSource, expert_key
from slimoe.converter.stats.statistics import Double, Int, Statistics
from slimoe.converter.stats.type_costs import TypeCosts

_ALWAYS = 1e6
"""More than any expert weight."""
_FIELDS = (
    *("use", "share_square", "skip_error", "fallback", "fallback_error"),
    *("sensitivity", "skip_ratio"),
)


def with_hints(
    source: ModelSource, statistics: Statistics, layer: LayerPlan, costs: TypeCosts | None
) -> LayerPlan | None:
    """The layer with what the engine's caches and lossy modes want to know.

    None where that is not known, as of merged experts.
    """
    one, target = statistics.layers[layer.block], source.layers[layer.block].target
    if not layer.experts:
        return layer
    if one.outputs is None or one.router is None or any(expert < 0 for expert in target):
        return None
    if any(len(expert.members) > 1 for expert in layer.experts):
        return None
    kept = tuple(expert.members[0] for expert in layer.experts)
    gone = sorted({expert for expert in target if expert >= 0} - set(kept))
    replaced = tuple(gone) if min(layer.target) < 0 else ()
    survivors = Survivors(kept, layer.rows, layer.target, replaced)
    gram = gram_of_block(one, source, layer.block) if one.sketch is not None else None
    # The number of each expert's own constant, behind those of experts that are gone.
    n_stand, n_all = -min((0, *layer.target)), 0 if layer.constants is None else len(layer.constants)
    fallbacks = tuple(range(n_stand, n_all)) if n_all > n_stand else None
    rules = SkipRules(skip_ratio(one.router), fallbacks)
    hints = hints_for(one, survivors, gram, rules)
    found = {name: getattr(hints, name) for name in _FIELDS}
    values: dict[str, object] = {name: value for name, value in found.items() if value is not None}
    if costs is not None:
        # The KL divergence per token if all tokens used a copy, for each copy.
        values["error"] = tuple(
            tuple(
                sum(
                    costs.of(expert_key(layer.block, name, expert.members[0]), kind)
                    if kind.name in costs.types
                    else 0.0
                    for name, kind in zip(expert.projections, types, strict=True)
                )
                for types in (expert.types, expert.low_types)
                if types is not None
            )
            for expert in layer.experts
        )
    return replace(layer, hints=values)


def with_fallbacks(statistics: Statistics, layer: LayerPlan) -> LayerPlan:
    """The layer with a constant for each expert that it keeps, behind those that stand for experts already."""
    one, stands = statistics.layers[layer.block], layer.constants is None and min(layer.target, default=0) < 0
    if not layer.experts or one.outputs is None or stands or any(len(expert.members) > 1 for expert in layer.experts):
        return layer
    vectors = constant_vectors(one)[[expert.members[0] for expert in layer.experts]]
    return replace(layer, constants=vectors if layer.constants is None else np.concatenate([layer.constants, vectors]))


def with_main_uses(statistics: Statistics, layer: LayerPlan, n_main: int) -> LayerPlan:
    """The layer with how often each expert is among the first `n_main` of a token, which alone are computed."""
    router = statistics.layers[layer.block].router
    if router is None or not layer.experts:
        return layer
    by_row = router.rank_count[:, :n_main].sum(1) / max(1, int(router.rank_count[:, 0].sum()))
    uses = np.zeros(len(layer.experts))
    for row, expert in zip(layer.rows, layer.target, strict=True):
        if expert >= 0:
            uses[expert] += by_row[row]
    return replace(layer, hints={"use": tuple(uses.tolist())})


@dataclass(frozen=True, slots=True, eq=False)
class _LowCosts:
    """What low-bit copies of a layer lose and save.

    By stored expert: `rates` in nats per squared expert weight, and `saved` bytes. `experts` and `squares` [n] are the
    stored expert and the squared weight of every selection of the calibration's tokens.
    """

    rates: Double
    saved: Double
    experts: Int
    squares: Double


def with_low_weights(
    source: ModelSource, statistics: Statistics, layers: tuple[LayerPlan, ...]
) -> tuple[LayerPlan, ...]:
    """The layers with the expert weights below which low-bit copies serve, at one price of a byte for all experts.

    Without low-bit copies, or where it is not known what they cost, the layers stay as they are.
    """
    found = {index: _low_costs(source, statistics, layer) for index, layer in enumerate(layers) if layer.experts}
    known = {index: one for index, one in found.items() if one is not None}
    if len(known) < len(found) or not any(one.saved.any() for one in known.values()):
        return layers
    losses = np.concatenate([one.rates[one.experts] * one.squares for one in known.values()])
    price = price_of_bytes(losses, np.concatenate([one.saved[one.experts] for one in known.values()]))
    result = list(layers)
    for index, one in known.items():
        squares = np.divide(price * one.saved, one.rates, out=np.full(one.rates.size, np.inf), where=one.rates > 0)
        weights = np.where(one.saved > 0, np.minimum(np.sqrt(squares), _ALWAYS), 0.0)
        result[index] = replace(layers[index], hints={**layers[index].hints, "low_weight": tuple(weights.tolist())})
    return tuple(result)


def _low_costs(source: ModelSource, statistics: Statistics, layer: LayerPlan) -> _LowCosts | None:
    """None where errors, uses or the routing of every token are not known."""
    hints, trace = native_layer(source, layer).hints, statistics.layers[layer.block].trace
    if trace is None or hints.low_error is None or hints.use is None or hints.share_square is None:
        return None
    squares = np.array(hints.use) * np.array(hints.share_square)
    rates = np.divide(np.array(hints.low_error), squares, out=np.zeros(squares.size), where=squares > 0)
    # An expert that was never selected counts as the worst.
    rates = np.where(squares > 0, rates, rates.max(initial=0.0))
    n_weights = [source.spec.n_embd_expert * matrix_width(source, layer.block, one) for one in layer.experts]
    bits = [type_bits(one.types) - type_bits(one.low_types or one.types) for one in layer.experts]
    target = np.array(source.layers[layer.block].target)
    place = np.full(1 + int(target.max()), -1)
    place[[one.members[0] for one in layer.experts]] = np.arange(len(layer.experts))
    means = target[trace.picks]
    experts = np.where(means >= 0, place[means], -1)
    is_stored = experts >= 0
    return _LowCosts(
        rates, np.array(bits) * n_weights / 8, experts[is_stored], trace.shares[is_stored].astype(np.float64) ** 2
    )
