"""What a native file tells the engine of its experts: use, cost of each copy, thresholds of the lossy modes."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from slimoe.converter.layout.plan import LayerPlan, Types
from slimoe.converter.methods.constant_experts import constant_vectors
from slimoe.converter.methods.expert_drop import Survivors
from slimoe.converter.methods.gram_policy import layer_gram
from slimoe.converter.methods.layer_hints import SkipRules, hints_for
from slimoe.converter.methods.skip_thresholds import gate_thresholds, low_share, skip_ratio
from slimoe.converter.source.model_source import ModelSource, expert_key
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
    gram = layer_gram(one, target, source.spec) if one.sketch is not None else None
    # One pick a token leaves nothing for a gate to choose by.
    share = low_share(gate_thresholds(statistics.layers)) if source.spec.n_expert_used > 1 else None
    rules = SkipRules(skip_ratio(one.router), share, _fallbacks(layer))
    hints = hints_for(one, survivors, gram, rules)
    found = {name: getattr(hints, name) for name in _FIELDS}
    values: dict[str, object] = {name: value for name, value in found.items() if value is not None}
    if costs is not None:
        values["error"] = tuple(
            _copy_errors(layer.block, costs, expert.members[0], (expert.types, expert.low_types))
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


def _fallbacks(layer: LayerPlan) -> tuple[int, ...] | None:
    """The number of each expert's own constant; None where only experts that are gone have one."""
    n_stand = -min((0, *layer.target))
    n_all = 0 if layer.constants is None else len(layer.constants)
    return tuple(range(n_stand, n_all)) if n_all > n_stand else None


def _copy_errors(block: int, costs: TypeCosts, expert: int, copies: Sequence[Types | None]) -> tuple[float, ...]:
    """Nats per token if all picks used a copy, for each copy."""
    return tuple(
        sum(
            costs.of(expert_key(block, name, expert), kind) if kind.name in costs.types else 0.0
            for name, kind in zip(("gate", "up", "down"), types, strict=True)
        )
        for types in copies
        if types is not None
    )
