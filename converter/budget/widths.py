"""How wide experts are: narrower ones compete with types of fewer bits for the same bytes.

A width that is chosen stands in a plan as so many neurons that are yet to be chosen; `trimming` chooses them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from slimoe.converter.budget.knapsack import Allocation
from slimoe.converter.budget.structure import Structure
from slimoe.converter.layout.plan import ExpertPlan, Types
from slimoe.converter.methods.constant_experts import variances
from slimoe.converter.methods.layer_weight import layer_weight, outputs_of, routed_tokens
from slimoe.converter.methods.removal import TOGETHER
from slimoe.converter.recipe.recipe import Recipe
from slimoe.converter.stats.statistics import Double, LayerStatistics, Statistics


@dataclass(frozen=True, slots=True)
class Narrower:
    """The option that leaves an expert `width` neurons, in these types."""

    types: Types
    width: int


def may_narrow(recipe: Recipe) -> bool:
    """Whether a recipe leaves it open how wide experts are."""
    experts = recipe.experts
    has_size = recipe.target_size is not None or recipe.target_bpw is not None
    return has_size and experts.width is None and experts.merge is None and experts.main is None


def width_costs(layer: LayerStatistics) -> dict[int, Double]:
    """KL divergence in nats per token [E] of each expert alone if it were narrower, by width; empty if not measured."""
    if layer.widths is None or layer.sensitivity is None:
        return {}
    weights = [layer_weight(layer, profile).per_square for profile in variances(outputs_of(layer))]
    costs = TOGETHER * layer.widths.error * weights / max(1, routed_tokens(layer))
    return dict(zip(layer.widths.widths.tolist(), costs, strict=True))


def type_share(layer: LayerStatistics, expert: int, width: int, n_ff: int) -> float:
    """What types cost an expert of `width` of its `n_ff` neurons, over what they cost the whole.

    That is more than the part of neurons that is left, since these are the ones that matter.
    """
    if layer.widths is None:
        return width / n_ff
    widths, shares = layer.widths.widths.tolist(), layer.widths.type_share[:, expert].tolist()
    return float(np.interp(width, [0, *widths, n_ff], [0.0, *shares, 1.0]))


def narrowed(expert: ExpertPlan, width: int) -> ExpertPlan:
    """The expert with so many neurons, which are yet to be chosen."""
    return replace(expert, kept=np.arange(width), down=None)


def has_open_widths(structure: Structure) -> bool:
    """Whether neurons are yet to be chosen."""
    experts = (expert for layer in structure.layers for expert in layer.experts)
    return any(expert.kept is not None and expert.down is None for expert in experts)


def common_widths(statistics: Statistics, structure: Structure) -> list[int]:
    """The widths that were measured in all layers with experts, ascending."""
    measured = [set(width_costs(statistics.layers[layer.block])) for layer in structure.layers if layer.experts]
    return sorted(set.intersection(*measured)) if measured else []


def all_narrowed(statistics: Statistics, structure: Structure, width: int) -> Structure:
    """The structure with experts that are all as wide, as stock files need them; a width not measured costs nothing."""
    numbers = ((index, number) for index, layer in enumerate(structure.layers) for number in range(len(layer.experts)))
    return _with_widths(statistics, structure, dict.fromkeys(numbers, width))


def with_chosen_widths(statistics: Statistics, structure: Structure, found: Allocation) -> Structure:
    """The structure with the widths of an allocation."""
    choices = ((name, option.choice) for name, option in found.chosen.items())
    widths = {name: one.width for name, one in choices if isinstance(one, Narrower) and isinstance(name, tuple)}
    return _with_widths(statistics, structure, widths)


def _with_widths(statistics: Statistics, structure: Structure, widths: Mapping[tuple[int, int], int]) -> Structure:
    """The structure with widths of experts, by the layer's number in it and the expert's number in the layer."""
    layers, kl = [], structure.kl
    for index, layer in enumerate(structure.layers):
        costs, experts = width_costs(statistics.layers[layer.block]), list(layer.experts)
        for number, expert in enumerate(layer.experts):
            if (width := widths.get((index, number))) is not None:
                experts[number] = narrowed(expert, width)
                kl += float(costs[width][expert.members[0]]) if width in costs else 0.0
        layers.append(replace(layer, experts=tuple(experts)))
    return Structure(tuple(layers), kl)
