"""What meets a size: structures that compete for the same bytes, each with the types that then cost least."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from slimoe.converter.budget.knapsack import Allocation
from slimoe.converter.budget.structure import Structure
from slimoe.converter.budget.types import TypeAllocator, too_large
from slimoe.converter.budget.widths import Narrower, all_narrowed, common_widths, may_narrow, with_chosen_widths
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.recipe.recipe import Recipe
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.type_costs import TypeCosts
from slimoe.offload.errors import DoesNotFitError, SlimoeError, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Candidate:
    """A structure and the plan with its types; `room` is what of the budget is left for it without hints and copies."""

    structure: Structure
    allocator: TypeAllocator
    plan: CompressPlan
    allocation: Allocation
    room: int

    @property
    def cost(self) -> float:
        """What the statistics foretell that it costs, moved tokens left out."""
        return self.plan.expected_kl or 0.0


@dataclass(frozen=True, slots=True)
class SizedPlans:
    """Makes candidates of at most `budget` bytes.

    `open_plan` makes the plan of a structure before types are chosen, `complete` adds what else is in the file.
    """

    source: ModelSource
    statistics: Statistics
    costs: TypeCosts
    budget: int
    open_plan: Callable[[Structure], CompressPlan]
    complete: Callable[[CompressPlan], CompressPlan]

    def best(self, recipe: Recipe, structure: Structure) -> Candidate:
        """The candidate that is foretold to cost least, its neurons yet to be chosen where it is narrower.

        Raises DoesNotFitError with the bytes of the smallest one.
        """
        if recipe.format == "native" or not may_narrow(recipe):
            one = self.typed(recipe, structure)
            return replace(one, structure=with_chosen_widths(self.statistics, structure, one.allocation))
        found, refused = list[Candidate](), list[SlimoeError]()
        widths = common_widths(self.statistics, structure)
        for some in (structure, *(all_narrowed(self.statistics, structure, width) for width in reversed(widths))):
            try:
                found.append(self.typed(recipe, some))
            except (DoesNotFitError, UnsupportedModelError) as error:
                refused.append(error)
        if not found:
            raise next((one for one in refused if not isinstance(one, DoesNotFitError)), refused[-1])
        return min(found, key=lambda one: one.cost)

    def typed(self, recipe: Recipe, structure: Structure) -> Candidate:
        """The candidate of a structure, with the types that cost least; raises as `best` does."""
        allocator = TypeAllocator(self.source, self.statistics, self.costs, recipe, structure)
        plan, room = self.open_plan(structure), self.budget
        while True:
            try:
                typed, allocation = allocator.fit(plan, room)
            except DoesNotFitError:
                least = allocator.size.of(self.complete(allocator.smallest(plan)))
                raise too_large(least, self.budget) from None
            excess = allocator.size.of(self.complete(typed)) - self.budget
            if excess <= 0:
                return Candidate(structure, allocator, typed, allocation, room)
            room = min(room, allocator.size.of(typed)) - excess

    def with_neurons(self, recipe: Recipe, found: Candidate, structure: Structure) -> Candidate:
        """The same candidate after neurons were chosen in its `structure`: types stay, and no width is open."""
        allocator = TypeAllocator(
            self.source, self.statistics, self.costs, as_wide(recipe, self.source.spec.n_ff), structure
        )
        kinds = {name: option.choice for name, option in found.allocation.chosen.items()}
        kinds = {name: one.types if isinstance(one, Narrower) else one for name, one in kinds.items()}
        chosen = {
            part.name: next(option for option in part.options if option.choice == kinds[part.name])
            for part in allocator.parts
            if part.name in kinds
        }
        allocation = replace(found.allocation, chosen=chosen)
        plan = allocator.typed(self.open_plan(structure), allocation)
        return Candidate(structure, allocator, plan, allocation, found.room)


def as_wide(recipe: Recipe, n_ff: int) -> Recipe:
    """The recipe that leaves no expert's width open; `n_ff` is the source's."""
    return replace(recipe, experts=replace(recipe.experts, width=n_ff)) if may_narrow(recipe) else recipe


def freedoms(recipe: Recipe, n_ff: int) -> list[Recipe]:
    """The recipe, and the same with fewer freedoms: without narrower experts, and with types alone."""
    wide = as_wide(recipe, n_ff)
    return list(dict.fromkeys((recipe, wide, replace(wide, free_constants=False, free_layers=False))))
