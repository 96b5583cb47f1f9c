"""From a recipe to a plan: what is kept, in which types, how large, at what expected cost; nothing is written."""

from collections.abc import Callable
from dataclasses import replace

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from converter.allocation import Allocation
from converter.model_source import ModelSource
from converter.recipe import Recipe
from converter.recipe_file import recipe_text
from converter.refinement import refine
from converter.slim_hints import with_hints
from converter.slim_plan import SlimPlan, Types
from converter.slim_types import Choices, TypeAllocator, apply
from converter.statistics import Statistics
from converter.structure import ROLES, Structure, build_structure
from converter.trimming import Progress, trimmed
from converter.type_costs import CANDIDATES, TypeCosts, measure_type_costs, stored_costs
from converter.type_recipe import find_recipe
from offload.errors import UsageError

_DEFAULT_TYPE = "Q4_K_M"


def plan_slim(
    source: ModelSource,
    statistics: Statistics | None,
    recipe: Recipe,
    *,
    n_threads: int = 1,
    costs: TypeCosts | None = None,
    search_seconds: float = 0.0,
    on_progress: Progress = lambda _what, _done, _total: None,
) -> SlimPlan:
    """What a recipe makes of a model. `costs` are measured if they are needed and not given. The types that meet a size
    are improved by measured divergence for `search_seconds`.

    Raises UsageError for what cannot be done, or not without statistics, DoesNotFitError for a size that no plan meets,
    which names the least, and UnsupportedModelError for what the format cannot hold.
    """
    structure = build_structure(source, statistics, recipe)
    if recipe.experts.width is not None:
        structure = trimmed(source, statistics, structure, recipe.experts.width, on_progress)
    plan = SlimPlan(
        recipe.format,
        structure.layers,
        Type.F32,
        None,
        recipe_text(recipe),
        importance=recipe.fit.importance and statistics is not None,
        feedback=recipe.fit.feedback,
        refit=recipe.fit.refit,
        expected_kl=structure.nats if statistics is not None else None,
    )
    budget = target_bytes(source, recipe)
    if budget is None:
        plan = apply(plan, named_types(source, structure, recipe), source, statistics)
    else:
        if statistics is None:
            raise UsageError("A size is met by statistics. Run slimoe calibrate first, and give --stats FILE.")
        costs = costs or statistics_costs(source, statistics, recipe, n_threads, on_progress)
        allocator = TypeAllocator(source, statistics, costs, recipe, structure)
        fitted, allocation, room = _within(
            budget, allocator, plan, lambda typed: _completed(source, statistics, recipe, typed, costs)
        )
        if search_seconds:
            fitted, _ = refine(
                source,
                statistics,
                allocator,
                plan,
                allocation,
                budget=room,
                seconds=search_seconds,
                n_threads=n_threads,
                on_progress=lambda generation, nats: on_progress(f"searching: {nats:.5f} nats", generation, 0),
            )
        plan = fitted
    return _completed(source, statistics, recipe, plan, costs)


def _completed(
    source: ModelSource, statistics: Statistics | None, recipe: Recipe, plan: SlimPlan, costs: TypeCosts | None
) -> SlimPlan:
    """The plan with second copies and hints."""
    if recipe.types.low is not None:
        plan = with_low_copies(plan, Type[recipe.types.low])
    if not recipe.hints or recipe.format != "native" or statistics is None:
        return plan
    hinted = [with_hints(source, statistics, layer, costs) for layer in plan.layers]
    # The format has hints for all layers or for none.
    layers = [layer for layer in hinted if layer is not None]
    return replace(plan, layers=tuple(layers)) if len(layers) == len(hinted) else plan


def _within(
    budget: int, allocator: TypeAllocator, plan: SlimPlan, complete: Callable[[SlimPlan], SlimPlan]
) -> tuple[SlimPlan, Allocation, int]:
    """The plan which completed has at most `budget` bytes, its allocation, and the bytes that it has before that."""
    room = budget
    while True:
        typed, allocation = allocator.fit(plan, room)
        excess = allocator.size.of(complete(typed)) - budget
        if excess <= 0:
            return typed, allocation, room
        room -= excess


def statistics_costs(
    source: ModelSource, statistics: Statistics, recipe: Recipe, n_threads: int, on_progress: Progress
) -> TypeCosts:
    """What the recipe's candidates cost, if the statistics have no answer; raises as `measure_type_costs` does."""
    types = recipe.types.candidates or CANDIDATES
    return stored_costs(statistics, types) or measure_type_costs(
        source,
        statistics,
        types=types,
        n_threads=n_threads,
        on_progress=lambda done, total: on_progress("measuring what each type costs", done, total),
    )


def target_bytes(source: ModelSource, recipe: Recipe) -> int | None:
    """The file's bytes at most, None where the recipe names types instead."""
    if recipe.target_bpw is not None:
        n_weights = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in source.shapes.values())
        return int(recipe.target_bpw * n_weights / 8)
    return recipe.target_size


def named_types(source: ModelSource, structure: Structure, recipe: Recipe) -> Choices:
    """The types that a recipe names, those of `slimoe convert --type` where it leaves some open."""
    named = recipe.types
    default = find_recipe(named.expert or _DEFAULT_TYPE)
    n_layer, is_tied = len(structure.layers), not any(key.name == "output.weight" for key in source.shapes)

    def kind(name: str, override: str | None = None) -> Type:
        chosen = default.type_of(name, n_layer, moe=True, tied=is_tied)
        return Type[override] if override else chosen

    experts: dict[tuple[int, int], Types | None] = {}
    roles: dict[tuple[int, str], Type] = {}
    for index, layer in enumerate(structure.layers):
        gate, up, down = (kind(f"blk.{index}.ffn_{name}_exps.weight") for name in ("gate", "up", "down"))
        experts |= {(index, number): (gate, up, down) for number in range(len(layer.experts))}
        roles |= {(index, role): kind(f"blk.{index}.{role}.weight", named.attention) for role in ROLES}
    output = None if is_tied else kind("output.weight", named.output)
    return Choices(experts, roles, kind("token_embd.weight", named.token), output)


def with_low_copies(plan: SlimPlan, low: Type) -> SlimPlan:
    """The plan with second copies of all experts whose first ones are larger."""
    types: Types = (low, low, low)
    sized = [
        replace(
            layer,
            experts=tuple(
                replace(expert, low_types=types if _is_smaller(types, expert.types) else None)
                for expert in layer.experts
            ),
        )
        for layer in plan.layers
    ]
    return replace(plan, layers=tuple(sized))


def _is_smaller(low: Types, high: Types) -> bool:
    bits = [sum(GGML_QUANT_SIZES[kind][1] / GGML_QUANT_SIZES[kind][0] for kind in types) for types in (low, high)]
    return bool(bits[0] < bits[1])
