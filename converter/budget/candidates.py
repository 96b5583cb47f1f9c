"""What meets a size: structures that compete for the same bytes, each with the types that then cost least.

Where neither types nor widths meet it, there are ways to have fewer experts or fewer blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from slimoe.converter.budget.knapsack import Allocation
from slimoe.converter.budget.structure import Structure
from slimoe.converter.budget.types import TypeAllocator, too_large
from slimoe.converter.budget.widths import Narrower, all_narrowed, common_widths, may_narrow, with_chosen_widths
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.recipe.recipe import Recipe
from slimoe.converter.source.model_source import ModelSource, expert_width
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.type_costs import TypeCosts
from slimoe.offload.errors import DoesNotFitError, SlimoeError, UnsupportedModelError

_STEPS = 8
"""Numbers of experts that are tried."""
Way = Sequence[Recipe]
"""Recipes of one kind, from what leaves out least to what leaves out most."""
Found = TypeVar("Found")


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

    def least(self, recipe: Recipe, structure: Structure) -> int:
        """The bytes of the smallest candidate; raises UnsupportedModelError as laying out does."""
        if recipe.format == "stock" and may_narrow(recipe):
            for width in common_widths(self.statistics, structure)[:1]:
                structure = all_narrowed(self.statistics, structure, width)
        allocator = TypeAllocator(self.source, self.statistics, self.costs, recipe, structure)
        return allocator.size.of(self.complete(allocator.smallest(self.open_plan(structure))))

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
    """The recipe, and the same with fewer freedoms: without constants, without narrower experts, with types alone."""
    kinds = recipe, as_wide(recipe, n_ff)
    bound = [replace(one, free_constants=False, free_layers=False) for one in kinds]
    return list(dict.fromkeys((recipe, bound[0], kinds[1], bound[1])))


def ways_to_fewer(source: ModelSource, recipe: Recipe, *, may_merge: bool) -> list[Way]:
    """The ways to leave out more than a recipe for a size says; what it says of experts and layers itself stays.

    In native files constants may stand for experts, and parts of layers may go; in either format experts are pruned or,
    if they `may_merge`, joined; in stock files whole blocks go.
    """
    experts, is_native, ways = recipe.experts, recipe.format == "native", list[Way]()
    if experts.main is not None or experts.merge is not None:
        return ways
    if is_native and not (recipe.free_constants and recipe.free_layers):
        ways.append((replace(recipe, free_constants=True, free_layers=True),))
    if experts.keep is None:
        fewer = [replace(recipe, experts=replace(experts, keep=n)) for n in _counts(source)]
        ways.append(fewer)
        if may_merge and experts.width is None and not recipe.free_constants and _are_alike(source):
            ways.append([replace(one, experts=replace(one.experts, merge="neurons")) for one in fewer])
    if not is_native and not recipe.drop_blocks:
        ways.append([replace(recipe, drop_blocks=n) for n in range(1, source.spec.n_layer)])
    return ways


def _counts(source: ModelSource) -> list[int]:
    """The numbers of experts to keep that are tried, the most first; groups that a router selects stay equal."""
    n_stored = min((layer.n_stored for layer in source.layers if layer.n_stored), default=0)
    n_group, least = source.spec.experts.n_group or 1, source.spec.n_expert_used
    step = n_group * max(1, n_stored // (_STEPS * n_group))
    return [n for n in range(n_stored - step, 0, -step) if n >= least]


def _are_alike(source: ModelSource) -> bool:
    """Whether the experts of each layer have as many neurons, so that they can be joined."""
    return all(
        len({expert_width(source, block, expert) for expert in range(layer.n_stored)}) <= 1
        for block, layer in enumerate(source.layers)
    )


def best_of_fewer(
    ways: Sequence[Way], fits: Callable[[Recipe], bool], attempt: Callable[[Recipe], tuple[float, Found]]
) -> Found | None:
    """What an attempt found that loses least; None if nothing fits.

    Of each way the first recipe that fits is tried, and then those that leave out more as long as they lose less: what
    is left then has more bits. An `attempt` gives the loss and what it found, and raises an error where there is none.
    """
    best, least = None, float("inf")
    for way in ways:
        low, high = 0, len(way)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(way[middle]) else (middle + 1, high)
        before = float("inf")
        for recipe in way[low:]:
            try:
                loss, found = attempt(recipe)
            except SlimoeError:
                continue
            if loss < least:
                best, least = found, loss
            if loss >= before:
                break
            before = loss
    return best
