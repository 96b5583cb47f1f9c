"""From a recipe to a plan: what is kept, in which types, how large, at what expected cost; nothing is written."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from gguf import GGMLQuantizationType as Type

from slimoe.converter.budget.candidates import Candidate, SizedPlans, best_of_fewer, freedoms, ways_to_fewer
from slimoe.converter.budget.hints import with_fallbacks, with_hints, with_low_weights, with_main_uses
from slimoe.converter.budget.named_types import (
    NamedTypes,
    are_priced,
    check_importance,
    check_width,
    plan_kinds,
    priced,
    smaller_copies_advice,
    with_low_copies,
    with_named_types,
)
from slimoe.converter.budget.structure import Structure, build_structure, with_order
from slimoe.converter.budget.trial import Trial, make_trial
from slimoe.converter.budget.types import too_large
from slimoe.converter.budget.widths import all_narrowed, has_open_widths
from slimoe.converter.layout.metadata import llamacpp_problem
from slimoe.converter.layout.plan import MERGED, CompressPlan
from slimoe.converter.quant.mixes import find_recipe, fits, fitting_type
from slimoe.converter.recipe.recipe import DEFAULT_EXPERT, Recipe
from slimoe.converter.recipe.toml_file import recipe_text
from slimoe.converter.source.model_source import MatrixKey, ModelSource
from slimoe.converter.source.tasks import Task, task_key
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.type_costs import (
    CANDIDATES,
    LOSSLESS,
    TypeCosts,
    priced_matrices,
    statistics_costs,
    stored_costs,
)
from slimoe.converter.write.feedback_time import costs_with_feedback
from slimoe.offload.errors import DoesNotFitError, UnsupportedModelError, UsageError
from slimoe.offload.gguf.header import Value
from slimoe.offload.resources.memory import available_bytes

Progress = Callable[[str, int, int], None]
"""Called with the name of the step, and with how much of it is done, of how much."""

TRYING = "trying what it loses"
_SOON = 120
"""Seconds for which a plan may wait for the neurons of merged experts, so that it knows what they lose."""
_MOVED = 0.023
"""What tokens that move to other experts cost, over the square root of the rest; of two trained models, one of 24 small
experts and one of 8, in types of 3 to 6 bits."""


def expected_loss(source: ModelSource, loss: float) -> float:
    """The KL divergence in nats per token to expect of a file, from what its types and removals are foretold to cost.

    These cost what is estimated as long as all tokens keep their experts. An error in a router's input moves those that
    are nearly undecided: their number grows with the size of errors, not with its square, and what each costs does not
    depend on it. So nearly all of the loss is of moved tokens where types have many bits.
    """
    moves = source.spec.n_expert > source.spec.n_expert_used
    return loss + _MOVED * math.sqrt(loss) if moves else loss


def plan_compression(
    source: ModelSource,
    statistics: Statistics | None,
    recipe: Recipe,
    *,
    n_threads: int = 1,
    costs: TypeCosts | None = None,
    is_open: bool = False,
    on_progress: Progress = lambda _what, _done, _total: None,
) -> CompressPlan:
    """What a recipe makes of a model. `costs` are measured if they are needed and not given.

    With `is_open` the neurons of merged experts stay to be chosen, by `with_joined_neurons`, where that takes long and
    so what they lose would: sizes do not depend on it.

    Raises UsageError for what cannot be done, or not without statistics, DoesNotFitError for a size that no plan meets,
    which names the least, and UnsupportedModelError for what the format cannot hold.
    """
    if recipe.format == "stock" and (problem := llamacpp_problem(source.spec)):
        raise UnsupportedModelError(source.path, problem, "Leave --stock out.")
    job = _Job(source, statistics, recipe, n_threads, on_progress, make_trial(source, statistics))
    structure, budget = job.structure(), target_bytes(source, recipe)
    if budget is None:
        plan, costs = job.with_named_types(job.open_plan(structure), structure, costs)
    else:
        job, plan, costs = job.with_best_types(structure, costs, budget)
    return job.with_expectation(job.joined(job.completed(plan, costs), is_open=is_open), costs)


def plan_removal(
    source: ModelSource,
    statistics: Statistics | None,
    recipe: Recipe,
    on_progress: Progress = lambda _what, _done, _total: None,
    *,
    is_open: bool = False,
) -> CompressPlan:
    """What a recipe leaves of a model, all of it in F32; the recipe's types, size and fit are of no account.

    Merged experts get a row of the router for each, as in the stock format; with `is_open` their neurons stay to be
    chosen. Raises UsageError for what cannot be done, or not without statistics.
    """
    job = _Job(source, statistics, replace(recipe, format="stock"), 1, on_progress, make_trial(source, statistics))
    plan = job.open_plan(job.structure())
    output = Type.F32 if MatrixKey("output.weight") in source.shapes else None
    plan = replace(plan, output_type=output, feedback=False, refit=False)
    return job.with_expectation(job.joined(plan, is_open=is_open), None)


@dataclass(frozen=True, slots=True)
class _Job:
    """The steps from a recipe to a plan: what is left, types by name or by size, expected loss, copies and hints."""

    source: ModelSource
    statistics: Statistics | None
    recipe: Recipe
    n_threads: int
    on_progress: Progress
    trial: Trial | None

    def structure(self) -> Structure:
        """What is left of the model, its experts trimmed if the recipe says so; of merged ones neurons stay open."""
        source, statistics, experts = self.source, self.statistics, self.recipe.experts
        structure, width = build_structure(source, statistics, self.recipe), experts.width
        if experts.main is not None:
            from slimoe.converter.budget.compressed_experts import with_compressed_experts

            return with_compressed_experts(source, statistics, structure, experts.main, self.on_progress)
        if width is None or width == source.spec.n_ff or statistics is None:
            return structure
        check_width(source, self.recipe, width)
        return self.trimmed(all_narrowed(statistics, structure, width))

    def trimmed(self, structure: Structure) -> Structure:
        """The structure with the neurons chosen of experts that have a width only."""
        # torch is heavy, and most plans do without.
        from slimoe.converter.budget.trimming import trimmed

        assert self.statistics is not None
        return trimmed(self.source, self.statistics, structure, self.on_progress)

    def joined(self, plan: CompressPlan, *, is_open: bool = False) -> CompressPlan:
        """The plan with the neurons of merged experts chosen; with `is_open` only if that is soon done."""
        if not plan.is_open:
            return plan
        from slimoe.converter.budget.merging import joining_seconds, with_joined_neurons

        assert self.statistics is not None
        if is_open and (self.trial is None or joining_seconds(self.source, self.statistics, plan) > _SOON):
            return plan
        return with_joined_neurons(self.source, self.statistics, plan, self.on_progress)

    def open_plan(self, structure: Structure) -> CompressPlan:
        """The plan before types are chosen."""
        is_known = self.statistics is not None
        return CompressPlan(
            self.recipe.format,
            structure.layers,
            Type.F32,
            None,
            recipe_text(self.recipe),
            importance=self.recipe.fit.importance and is_known,
            feedback=self.recipe.fit.feedback,
            refit=self.recipe.fit.refit,
            expected_kl=structure.kl if is_known else None,
            n_main=self.recipe.experts.main or 0,
            provenance=self.provenance(),
        )

    def provenance(self) -> dict[str, Value]:
        """The key of the task that experts are merged for, if the recipe names one."""
        statistics, text = self.statistics, self.recipe.specialise
        if text is None or statistics is None:
            return {}
        return task_key(self.source.metadata, text, Task(statistics.n_tokens, statistics.text_hash))

    def with_named_types(
        self, plan: CompressPlan, structure: Structure, costs: TypeCosts | None
    ) -> tuple[CompressPlan, TypeCosts | None]:
        """The plan with the types that the recipe names, and what types cost, if that can be known."""
        names = NamedTypes(self.source, self.recipe, len(structure.layers))
        default = find_recipe(self.recipe.types.expert or DEFAULT_EXPERT)
        low = self.recipe.types.low
        has_copies = low is not None
        plan = with_named_types(self.source, plan, names.of, default.name, default.base, has_copies=has_copies)
        whole = plan
        if low is not None:
            whole = with_low_copies(self.source, plan, lambda _name, _copy: Type[low])
            if not any(expert.low_types for layer in whole.layers for expert in layer.experts):
                advice = smaller_copies_advice(self.source, plan, Type[low])
                raise UsageError(f"Second copies in {low} would be no smaller than the first. {advice}")
        check_importance(whole)
        costs = self.with_feedback(costs or self._named_costs(whole))
        return priced(plan, costs), costs

    def with_feedback(self, costs: TypeCosts | None) -> TypeCosts | None:
        """What types cost with feedback for all matrices, if the recipe has it; with a time, which ones is yet open."""
        return costs_with_feedback(costs) if costs is not None and self.recipe.fit.feedback is True else costs

    def _named_costs(self, plan: CompressPlan) -> TypeCosts | None:
        """What the types cost that a plan has; None without the sensitivities that say it."""
        statistics = self.statistics
        if statistics is None or any(layer.sensitivity is None for layer in statistics.layers):
            return None
        names = sorted(kind.name for kind in plan_kinds(plan) - set(LOSSLESS))
        stored = stored_costs(statistics, names)
        if not names or (stored is not None and are_priced(plan, stored)):
            return stored
        return statistics_costs(self.source, statistics, names, self.n_threads, self.on_progress)

    def with_best_types(
        self, structure: Structure, costs: TypeCosts | None, budget: int
    ) -> tuple["_Job", CompressPlan, TypeCosts]:
        """The plan that loses least within `budget` bytes, improved by search, and what types cost.

        Where nothing fits more is left out than the recipe says: the plan is then that of the job that comes with it.
        """
        source, statistics = self.source, self.statistics
        if statistics is None:
            raise UsageError("A size is met by statistics. Run slimoe calibrate first, and give --stats FILE.")
        types = candidate_types(source, self.recipe)
        known = costs or statistics_costs(source, statistics, types, self.n_threads, self.on_progress)
        known = self.with_feedback(known) or known
        try:
            job, found = self, self.best_candidate(self.sized(known, budget), structure)
        except DoesNotFitError as error:
            job, found = self.with_fewer(known, budget, error)
        return job, job.refined(found) if self.recipe.search is not None else found.plan, known

    def sized(self, costs: TypeCosts, budget: int) -> SizedPlans:
        """What makes candidates of a size."""
        assert self.statistics is not None
        complete = partial(self.completed, costs=costs)
        return SizedPlans(self.source, self.statistics, costs, budget, self.open_plan, complete)

    def with_fewer(self, costs: TypeCosts, budget: int, refused: DoesNotFitError) -> tuple["_Job", Candidate]:
        """The best candidate that leaves out more than the recipe says, and the job that it is of.

        Raises DoesNotFitError with the least of all, and as it was `refused` where nothing else can be left out.
        """
        sizes: list[int] = []

        def fits(recipe: Recipe) -> bool:
            job = replace(self, recipe=recipe)
            try:
                sizes.append(job.sized(costs, budget).least(recipe, job.structure()))
            except (UnsupportedModelError, UsageError):
                return False
            return sizes[-1] <= budget

        def attempt(recipe: Recipe) -> tuple[float, tuple[_Job, Candidate]]:
            job = replace(self, recipe=recipe)
            found = job.best_candidate(job.sized(costs, budget), job.structure())
            plan = job.joined(found.plan, is_open=True)
            if plan.is_open:
                raise UsageError("Whether to merge experts cannot be known soon enough.")
            loss = job.tried(plan, costs) if self.trial is not None else plan.expected_kl or 0.0
            return loss, (job, replace(found, plan=plan))

        # torch is heavy, and most plans do without.
        from slimoe.converter.budget.merging import joining_bytes

        may_merge = self.trial is not None and joining_bytes(self.source) <= available_bytes()
        found = best_of_fewer(ways_to_fewer(self.source, self.recipe, may_merge=may_merge), fits, attempt)
        if found is None:
            raise too_large(min(sizes), budget) if sizes else refused
        return found

    def refined(self, found: Candidate) -> CompressPlan:
        """The candidate's plan improved by search."""
        from slimoe.converter.budget.refinement import refine

        assert self.statistics is not None
        assert self.recipe.search is not None
        plan, _ = refine(
            self.source,
            self.statistics,
            found.allocator,
            # Candidates are evaluated, which takes their values.
            self.joined(self.open_plan(found.structure)),
            found.allocation,
            budget=found.room,
            seconds=self.recipe.search,
            n_threads=self.n_threads,
            on_progress=lambda generation, kl: self.on_progress(f"searching: {kl:.5f} nats", generation, 0),
        )
        return plan

    def best_candidate(self, sized: SizedPlans, structure: Structure) -> Candidate:
        """The candidate that loses least in a trial, or in a large model by what statistics foretell."""
        best, least, ways = None, math.inf, freedoms(self.recipe, self.source.spec.n_ff)
        for recipe in ways:
            try:
                found = sized.best(recipe, structure)
            except DoesNotFitError:
                if best is None:
                    raise
                continue
            if has_open_widths(found.structure):
                found = sized.with_neurons(recipe, found, self.trimmed(found.structure))
            if self.trial is None or len(ways) == 1:
                return found
            loss = self.tried(found.plan, sized.costs)
            if loss < least:
                best, least = found, loss
        assert best is not None
        return best

    def with_expectation(self, plan: CompressPlan, costs: TypeCosts | None) -> CompressPlan:
        """The plan with the loss to expect, and what it does not cover."""
        if plan.expected_kl is None:
            return plan
        if self.trial is not None and not plan.is_open:
            return replace(plan, expected_kl=self.tried(plan, costs))
        experts = self.recipe.experts
        uncounted = {
            MERGED: plan.is_open or experts.merge in ("m-smoe", "hc-smoe"),
            "trimmed experts": experts.width is not None,
            "compressed experts": experts.main is not None,
        }
        lacks = tuple(what for what, is_there in uncounted.items() if is_there)
        loss = expected_loss(self.source, plan.expected_kl)
        return replace(plan, expected_kl=loss, uncounted=plan.uncounted + lacks)

    def tried(self, plan: CompressPlan, costs: TypeCosts | None) -> float:
        """What the plan loses in a trial."""
        assert self.trial is not None
        self.on_progress(TRYING, 0, 1)
        loss = self.trial.divergence(plan, costs)
        self.on_progress(TRYING, 1, 1)
        return loss

    def completed(self, plan: CompressPlan, costs: TypeCosts | None) -> CompressPlan:
        """The plan with second copies and hints."""
        source, statistics, recipe = self.source, self.statistics, self.recipe
        if recipe.types.low is not None:
            low = Type[recipe.types.low]
            plan = with_low_copies(source, plan, lambda _name, _copy: low)
        if recipe.experts.order == "co-selection":
            plan = self.with_neighbours(plan)
        if not recipe.hints or recipe.format != "native" or statistics is None:
            return plan
        if plan.n_main:
            layers = tuple(with_main_uses(statistics, layer, plan.n_main) for layer in plan.layers)
            return replace(plan, layers=layers)
        layers = plan.layers
        if recipe.free_constants or recipe.experts.replacement == "constant":
            layers = tuple(with_fallbacks(statistics, layer) for layer in layers)
        hinted = [with_hints(source, statistics, layer, costs) for layer in layers]
        # The format has hints for all layers or for none.
        known = tuple(layer for layer in hinted if layer is not None)
        if len(known) < len(hinted):
            return plan
        return replace(plan, layers=with_low_weights(source, statistics, known))

    def with_neighbours(self, plan: CompressPlan) -> CompressPlan:
        """The plan with experts that are selected together next to each other."""
        if self.statistics is None:
            raise UsageError("An order by co-selection needs statistics. Run slimoe calibrate, and give --stats FILE.")
        routers = [self.statistics.layers[layer.block].router for layer in plan.layers]
        pairs = zip(plan.layers, routers, strict=True)
        return replace(plan, layers=tuple(one if sums is None else with_order(one, sums) for one, sums in pairs))


def candidate_types(source: ModelSource, recipe: Recipe) -> tuple[str, ...] | None:
    """The types that must have a price: those that are named, and what stands in for them where rows do not fit them.

    None for what calibration tries. It tries no types of small blocks on rows that need none, as narrower ones may.
    """
    named, width = recipe.types, recipe.experts.width
    needs_small = width is not None and fits(Type.Q4_K, source.spec.n_ff) and not fits(Type.Q4_K, width)
    if not named.candidates and not needs_small:
        return None
    others = (named.expert, named.low, named.attention, named.token, named.output)
    asked = (*(named.candidates or CANDIDATES), *(name for name in others if name in CANDIDATES))
    widths = {source.shapes[key][1] for key in priced_matrices(source)} | ({width} if width is not None else set())
    fitting = (fitting_type(Type[name], n_per_row).name for name in asked for n_per_row in sorted(widths))
    return tuple(dict.fromkeys((*asked, *fitting)))


def target_bytes(source: ModelSource, recipe: Recipe) -> int | None:
    """The file's bytes at most, None where the recipe names types instead."""
    if recipe.target_bpw is not None:
        n_weights = sum(map(math.prod, source.shapes.values()))
        return int(recipe.target_bpw * n_weights / 8)
    return recipe.target_size
