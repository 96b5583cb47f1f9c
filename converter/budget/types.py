"""Types for every matrix of a structure: the ones that cost least within a budget of bytes.

What alignment and the header take is found by asking for the size of the whole file, until it is no larger than the
budget.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

from slimoe.converter.budget.knapsack import Allocation, allocate, least_bytes
from slimoe.converter.budget.options import ATTENTION, CONSTANT, OptionParts
from slimoe.converter.budget.structure import Structure, with_constants, without_attention, without_ffn
from slimoe.converter.budget.widths import Narrower, narrowed
from slimoe.converter.layout.offsets import PlanSize
from slimoe.converter.layout.plan import CompressPlan, ExpertPlan, LayerPlan, Types
from slimoe.converter.recipe.recipe import Recipe
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.type_costs import TypeCosts
from slimoe.offload.errors import DoesNotFitError

_ROUNDS = 8
_NEAR = 2000
"""A file within such a part of its budget is large enough."""


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
                if best is not None:
                    return best
                # The smallest of all may fit, although its parts have more bytes than the goal.
                found = allocate(self.parts, error.required_bytes or 0, self._groups)
                typed = self.typed(plan, found)
                if self.size.of(typed) > budget:
                    raise too_large(self.size.of(typed), budget) from None
                return typed, found
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

    def typed(self, plan: CompressPlan, found: Allocation) -> CompressPlan:
        """The plan with the types, constants and feed-forward parts of an allocation.

        Experts without types become constants, layers that have nothing left disappear.
        """
        chosen: dict[Hashable, Any] = {name: option.choice for name, option in found.chosen.items()}
        layers = []
        for index, layer in enumerate(plan.layers):
            one = layer
            if index in found.given_up:
                one = without_ffn(layer)
            elif layer.experts:
                stacks = tuple(chosen.get((index, name)) for name in layer.experts[0].projections)
                is_stock, numbers = self._recipe.format == "stock", range(len(layer.experts))
                one = self._with_types(layer, [stacks if is_stock else chosen[index, number] for number in numbers])
            if (ATTENTION, index) in found.given_up:
                one = without_attention(one)
            if one.rows or one.has_attention or not (layer.rows or layer.has_attention):
                layers.append(replace(one, types={role: chosen[index, role] for role in one.types}))
        return replace(
            plan,
            layers=tuple(layers),
            token_type=chosen["token"],
            output_type=chosen.get("output"),
            expected_kl=(plan.expected_kl or 0.0) + found.cost,
        )

    def _with_types(self, layer: LayerPlan, types: Sequence[Any]) -> LayerPlan:
        """The layer with these types and widths of its experts; of those that have none constants are left."""
        kept = [_sized(expert, kinds) for expert, kinds in zip(layer.experts, types, strict=True) if kinds != CONSTANT]
        base = layer
        if len(kept) < len(layer.experts):
            members = [expert.members[0] for expert, _ in kept]
            base = with_constants(self._source, self._statistics, layer.block, members)
            base = replace(base, types=layer.types, has_attention=layer.has_attention)
        return replace(base, experts=tuple(replace(expert, types=kinds) for expert, kinds in kept))


def _sized(expert: ExpertPlan, choice: Any) -> tuple[ExpertPlan, Types]:
    """The expert, narrower if that was chosen, and the types of its matrices."""
    if isinstance(choice, Narrower):
        return narrowed(expert, choice.width), choice.types
    return expert, choice
