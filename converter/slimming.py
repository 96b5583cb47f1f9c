"""From a recipe to a plan: what is kept, in which types, how large, at what expected cost; nothing is written."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from converter.allocation import Allocation
from converter.model_source import PROJECTIONS, MatrixKey, ModelSource, block_key, expert_key
from converter.quantize import needs_importance
from converter.recipe import Recipe
from converter.recipe_file import recipe_text
from converter.slim_hints import with_hints
from converter.slim_plan import SlimPlan, Types
from converter.slim_types import Choices, TypeAllocator, apply, too_large
from converter.statistics import Statistics
from converter.structure import ROLES, Structure, build_structure
from converter.type_costs import CANDIDATES, LOSSLESS, TypeCosts, joined_costs, measure_type_costs, stored_costs
from converter.type_recipe import find_recipe
from offload.errors import DoesNotFitError, UsageError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much is done."""

_DEFAULT_TYPE = "Q4_K_M"
_BEYOND = 2.0
"""So many times what the statistics foretell to second order is what slimming costs, measured on a trained model, types
and parts left out alike: errors of layers go together, and tokens move to other experts. In the first layer it is more.
"""


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
        _check_width(source, recipe, recipe.experts.width)
        # torch is heavy, and most plans do without.
        from converter.trimming import trimmed

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
        _check_importance(plan, recipe.types.low)
        plan = _priced(plan, statistics)
    else:
        if statistics is None:
            raise UsageError("A size is met by statistics. Run slimoe calibrate first, and give --stats FILE.")
        costs = costs or statistics_costs(source, statistics, recipe, n_threads, on_progress)
        allocator = TypeAllocator(source, statistics, costs, recipe, structure)
        fitted, allocation, room = _within(
            budget, allocator, plan, lambda typed: _completed(source, statistics, recipe, typed, costs)
        )
        if search_seconds:
            from converter.refinement import refine

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
    if plan.expected_kl is not None:
        plan = replace(plan, expected_kl=_BEYOND * plan.expected_kl, uncounted=plan.uncounted + _uncounted(recipe))
    return _completed(source, statistics, recipe, plan, costs)


def _check_width(source: ModelSource, recipe: Recipe, width: int) -> None:
    """Raises UsageError for a width that is no multiple of the blocks of its types, before neurons are chosen."""
    if recipe.types.expert is None and recipe.types.candidates:
        kinds = [Type[name] for name in recipe.types.candidates]
    else:
        kinds = [
            find_recipe(recipe.types.expert or _DEFAULT_TYPE).type_of(
                "blk.0.ffn_down_exps.weight", 1, moe=True, tied=False
            )
        ]
    block = min(int(GGML_QUANT_SIZES[kind][0]) for kind in kinds)
    if width % block == 0 or source.spec.n_ff % block:
        return
    below, above = width // block * block, -(-width // block) * block
    near = " or ".join(str(one) for one in dict.fromkeys((below, above)) if 0 < one <= source.spec.n_ff)
    raise UsageError(
        f"Experts of {width} neurons do not divide into blocks of {block}, as {kinds[0].name} has them. "
        f"Keep {near}, or name a type of smaller blocks, such as Q8_0 (--type Q8_0)."
    )


def _check_importance(plan: SlimPlan, low: str | None) -> None:
    """Raises UsageError for types that cannot be made without knowing which weights matter."""
    asked = _kinds(plan) | ({Type[low]} if low else set())
    kinds = sorted(kind.name for kind in asked if needs_importance(kind))
    if kinds and not plan.importance:
        problem = f"{', '.join(kinds)} cannot be made: it is not known which weights matter."
        raise UsageError(f"{problem} Give --stats, or use IQ3_S or larger.")


def _kinds(plan: SlimPlan) -> set[Type]:
    """All types of a plan's best copies."""
    kinds = {kind for layer in plan.layers for expert in layer.experts for kind in expert.types}
    kinds |= {kind for layer in plan.layers for kind in layer.types.values()}
    return kinds | ({plan.token_type, plan.output_type} - {None})


def _priced(plan: SlimPlan, statistics: Statistics | None) -> SlimPlan:
    """The plan with what its types cost, if the statistics know it of all of them."""
    outer = {MatrixKey("token_embd.weight"): plan.token_type, MatrixKey("output.weight"): plan.output_type}
    kinds = {kind.name for kind in _kinds(plan) - set(LOSSLESS)}
    if not kinds:
        return plan
    costs = None if statistics is None else stored_costs(statistics, tuple(kinds))
    if costs is None:
        return replace(plan, uncounted=("types",))
    pairs = ((key, kind) for key, kind in plan_types(plan, outer) if key in costs.costs and kind not in LOSSLESS)
    nats = sum(costs.of(key, kind) for key, kind in pairs)
    return replace(plan, expected_kl=(plan.expected_kl or 0.0) + nats)


def plan_types(plan: SlimPlan, outer: Mapping[MatrixKey, Type | None]) -> Iterator[tuple[MatrixKey, Type]]:
    """The source's matrices that are kept, and their types; of merged experts all that read the mean."""
    yield from ((key, kind) for key, kind in outer.items() if kind is not None)
    for layer in plan.layers:
        yield from ((block_key(layer.block, role), kind) for role, kind in layer.types.items())
        for expert in layer.experts:
            for name, kind in zip(PROJECTIONS, expert.types, strict=True):
                yield from ((expert_key(layer.block, name, member), kind) for member in expert.members)


def _uncounted(recipe: Recipe) -> tuple[str, ...]:
    """What nothing is known of."""
    done = {"merged experts": recipe.experts.merge is not None, "trimmed experts": recipe.experts.width is not None}
    return tuple(what for what, is_there in done.items() if is_there)


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
    """The plan which completed has at most `budget` bytes, its allocation, and the bytes that it has before that.

    Raises DoesNotFitError with the bytes of the smallest one when it is complete.
    """
    room = budget
    while True:
        try:
            typed, allocation = allocator.fit(plan, room)
        except DoesNotFitError as error:
            smallest, _ = allocator.fit(plan, error.required_bytes or 0)
            raise too_large(allocator.size.of(complete(smallest)), budget) from None
        excess = allocator.size.of(complete(typed)) - budget
        if excess <= 0:
            return typed, allocation, room
        room -= excess


def statistics_costs(
    source: ModelSource, statistics: Statistics, recipe: Recipe, n_threads: int, on_progress: Progress
) -> TypeCosts:
    """What the recipe's candidates cost, measured where the statistics have no answer; raises as
    `measure_type_costs` does.
    """
    types = recipe.types.candidates or CANDIDATES
    known = statistics.matrix_costs.types if statistics.matrix_costs is not None else ()
    missing = tuple(name for name in types if name not in known)
    stored = stored_costs(statistics, tuple(name for name in types if name in known))
    if not missing and stored is not None:
        return stored
    what = f"measuring what {', '.join(missing)} cost" if stored is not None else "measuring what each type costs"
    measured = measure_type_costs(
        source,
        statistics,
        types=missing,
        n_threads=n_threads,
        on_progress=lambda done, total: on_progress(what, done, total),
    )
    return measured if stored is None else joined_costs(stored, measured)


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
