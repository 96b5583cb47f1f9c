"""What a native file tells the engine of its experts: use, cost of each copy, thresholds of the lossy modes."""

from dataclasses import replace

import numpy as np

from slimoe.converter.layout.plan import LayerPlan
from slimoe.converter.methods.constant_experts import constant_vectors
from slimoe.converter.methods.expert_drop import Survivors
from slimoe.converter.methods.gram_policy import gram_of_block
from slimoe.converter.methods.layer_hints import SkipRules, hints_for
from slimoe.converter.methods.skip_thresholds import gate_thresholds, low_share, skip_ratio
from slimoe.converter.source.model_source import PROJECTIONS, ModelSource, expert_key
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.type_costs import TypeCosts

_FIELDS = (
    *("use", "share_square", "skip_error", "fallback", "fallback_error"),
    *("sensitivity", "skip_ratio", "low_share"),
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
    # One expert a token leaves nothing for a gate to choose by.
    low_weight = low_share(gate_thresholds(statistics.layers)) if source.spec.n_expert_used > 1 else None
    # The number of each expert's own constant, behind those of experts that are gone.
    n_stand, n_all = -min((0, *layer.target)), 0 if layer.constants is None else len(layer.constants)
    fallbacks = tuple(range(n_stand, n_all)) if n_all > n_stand else None
    rules = SkipRules(skip_ratio(one.router), low_weight, fallbacks)
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
                    for name, kind in zip(PROJECTIONS, types, strict=True)
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
