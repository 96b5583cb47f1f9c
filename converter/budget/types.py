"""Types for every matrix of a structure: those that a recipe names, or the ones that cost least within a budget.

What alignment and the header take is found by asking for the size of the whole file, until it is no larger than the
budget.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from gguf import GGMLQuantizationType as Type

from slimoe.converter.budget.knapsack import Allocation, allocate, least_bytes
from slimoe.converter.budget.options import ATTENTION, OptionParts
from slimoe.converter.budget.structure import Structure, with_constants, without_ffn
from slimoe.converter.layout.offsets import PlanSize
from slimoe.converter.layout.plan import CompressPlan, LayerPlan, Types
from slimoe.converter.recipe.recipe import Recipe
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.type_costs import TypeCosts
from slimoe.offload.errors import DoesNotFitError

_ROUNDS = 8
_NEAR = 2000
"""A file within such a part of its budget is large enough."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What is stored how: types by (layer of the result, expert) or (layer, role), of the table and of the output."""

    experts: Mapping[tuple[int, int], Types | None]
    roles: Mapping[tuple[int, str], Type]
    token: Type
    output: Type | None
    without_ffn: frozenset[int] = frozenset()
    without_attention: frozenset[int] = frozenset()


def apply(plan: CompressPlan, choices: Choices, source: ModelSource, statistics: Statistics | None) -> CompressPlan:
    """The plan with these types; experts without types become constants, layers that have nothing left disappear."""
    layers = []
    for index, layer in enumerate(plan.layers):
        one = layer
        if index in choices.without_ffn:
            one = without_ffn(layer)
        elif layer.experts:
            types = [choices.experts[index, number] for number in range(len(layer.experts))]
            one = _with_types(layer, types, source, statistics)
        if index in choices.without_attention:
            one = replace(one, has_attention=False, types={})
        if one.rows or one.has_attention or not (layer.rows or layer.has_attention):
            layers.append(replace(one, types={role: choices.roles[index, role] for role in one.types}))
    return replace(plan, layers=tuple(layers), token_type=choices.token, output_type=choices.output)


def _with_types(
    layer: LayerPlan, types: Sequence[Types | None], source: ModelSource, statistics: Statistics | None
) -> LayerPlan:
    kept = [(expert, kinds) for expert, kinds in zip(layer.experts, types, strict=True) if kinds is not None]
    base = layer
    if len(kept) < len(layer.experts):
        assert statistics is not None
        base = with_constants(source, statistics, layer.block, [expert.members[0] for expert, _ in kept])
        base = replace(base, types=layer.types, has_attention=layer.has_attention)
    return replace(base, experts=tuple(replace(expert, types=kinds) for expert, kinds in kept))


def too_large(least: int, budget: int) -> DoesNotFitError:
    """What to raise when the smallest file has `least` bytes."""
    message = f"The smallest file that this can become has {least:,} bytes, but the target allows {budget:,}."
    hint = "Ask for more, or leave more out (slimoe convert --help says how)."
    return DoesNotFitError(f"{message} {hint}", required_bytes=least, available_bytes=budget)


class TypeAllocator:
    """Spends a budget on one structure; holds what does not depend on the budget."""

    def __init__(
        self, source: ModelSource, statistics: Statistics, costs: TypeCosts, recipe: Recipe, structure: Structure
    ) -> None:
        self._source, self._statistics, self._recipe = source, statistics, recipe
        self._layers = structure.layers
        self.size = PlanSize(source, statistics)
        parts = OptionParts(source, statistics, costs, recipe, structure.layers)
        self.parts, self._groups = parts.parts(), parts.groups()

    def fit(self, plan: CompressPlan, budget: int) -> tuple[CompressPlan, Allocation]:
        """The plan with the types that cost least, its file of at most `budget` bytes, and what was allocated.

        Raises DoesNotFitError, which says the least that is possible.
        """
        goal, step = budget, max(1, budget // _NEAR)
        while (best := self._near(plan, goal, budget)) is None:
            # Alignment and the header go up and down with what is chosen: the goal falls until the file fits.
            goal, step = goal - step, 2 * step
        return best

    def _near(self, plan: CompressPlan, goal: int, budget: int) -> tuple[CompressPlan, Allocation] | None:
        """The best of some tries to come close to a file of `goal` bytes; None if all were larger."""
        room, best = goal, None
        for _ in range(_ROUNDS):
            try:
                found = allocate(self.parts, room, self._groups)
            except DoesNotFitError as error:
                return best or self._least(error, plan, goal, budget)
            typed = self.typed(plan, found)
            n_bytes = self.size.of(typed)
            if n_bytes <= goal and (best is None or found.cost <= best[1].cost):
                best = typed, found
            if best is not None and 0 <= goal - n_bytes < goal // _NEAR:
                break
            room += goal - n_bytes
        return best

    def smallest(self, plan: CompressPlan) -> CompressPlan:
        """The plan with the fewest bytes."""
        return self.typed(plan, allocate(self.parts, least_bytes(self.parts, self._groups), self._groups))

    def _least(
        self, error: DoesNotFitError, plan: CompressPlan, goal: int, budget: int
    ) -> tuple[CompressPlan, Allocation]:
        """The smallest of all, if it fits."""
        assert error.required_bytes is not None
        found = allocate(self.parts, error.required_bytes, self._groups)
        typed = self.typed(plan, found)
        least = self.size.of(typed)
        if least <= budget:
            return typed, found
        raise too_large(least, budget) from None

    def typed(self, plan: CompressPlan, found: Allocation) -> CompressPlan:
        """The plan with the types, constants and feed-forward parts of an allocation."""
        chosen = {name: option.choice for name, option in found.chosen.items()}
        experts: dict[tuple[int, int], Types | None] = {}
        for index, layer in enumerate(self._layers):
            if index in found.given_up:
                continue
            for number in range(len(layer.experts)):
                experts[index, number] = self._chosen_types(chosen, index, number)
        numbers = range(len(self._layers))
        without_ffn = frozenset(index for index in numbers if index in found.given_up)
        without_attention = frozenset(index for index in numbers if (ATTENTION, index) in found.given_up)
        roles = {
            (index, role): chosen[index, role]
            for index in numbers
            if index not in without_attention
            for role in self._layers[index].types
        }
        token, output = chosen["token"], chosen.get("output")
        assert isinstance(token, Type)
        assert output is None or isinstance(output, Type)
        choices = Choices(experts, roles, token, output, without_ffn, without_attention)
        typed = apply(plan, choices, self._source, self._statistics)
        return replace(typed, expected_kl=(plan.expected_kl or 0.0) + found.cost)

    def _chosen_types(self, chosen: Mapping[Hashable, object], index: int, number: int) -> Types | None:
        if self._recipe.format == "stock":
            gate, up, down = (chosen[index, name] for name in ("gate", "up", "down"))
            return gate, up, down
        types = chosen[index, number]
        return types if isinstance(types, tuple) else None
