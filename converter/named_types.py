"""Types that a recipe names itself: for every matrix, with what they cost, and why they cannot be had."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from converter.model_source import PROJECTIONS, MatrixKey, ModelSource, block_key, expert_key
from converter.quantize import needs_importance
from converter.recipe import Recipe
from converter.slim_plan import SlimPlan, Types
from converter.slim_types import Choices
from converter.statistics import Statistics
from converter.structure import ROLES, Structure
from converter.type_costs import LOSSLESS, stored_costs
from converter.type_recipe import find_recipe
from offload.errors import UsageError

_DEFAULT_TYPE = "Q4_K_M"


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


def check_width(source: ModelSource, recipe: Recipe, width: int) -> None:
    """Raises UsageError for a width that is no multiple of the blocks of its types, before neurons are chosen."""
    if recipe.types.expert is None and recipe.types.candidates:
        kinds = [Type[name] for name in recipe.types.candidates]
    else:
        kinds = [find_recipe(recipe.types.expert or _DEFAULT_TYPE).base]
    block = min(int(GGML_QUANT_SIZES[kind][0]) for kind in kinds)
    if width % block == 0 or source.spec.n_ff % block:
        return
    below, above = width // block * block, -(-width // block) * block
    near = " or ".join(str(one) for one in dict.fromkeys((below, above)) if 0 < one <= source.spec.n_ff)
    raise UsageError(
        f"Experts of {width} neurons do not divide into blocks of {block}, as {kinds[0].name} has them. "
        f"Keep {near}, or name a type of smaller blocks, such as Q8_0 (--type Q8_0)."
    )


def check_importance(plan: SlimPlan, low: str | None) -> None:
    """Raises UsageError for types that cannot be made without knowing which weights matter."""
    asked = _kinds(plan) | ({Type[low]} if low else set())
    kinds = sorted(kind.name for kind in asked if needs_importance(kind))
    if kinds and not plan.importance:
        problem = f"{', '.join(kinds)} cannot be made: it is not known which weights matter."
        raise UsageError(f"{problem} Give --stats, or use IQ3_S or larger.")


def priced(plan: SlimPlan, statistics: Statistics | None) -> SlimPlan:
    """The plan with what its types cost, if the statistics know it of all of them."""
    outer = {MatrixKey("token_embd.weight"): plan.token_type, MatrixKey("output.weight"): plan.output_type}
    kinds = {kind.name for kind in _kinds(plan) - set(LOSSLESS)}
    if not kinds:
        return plan
    costs = None if statistics is None else stored_costs(statistics, tuple(kinds))
    if costs is None:
        return replace(plan, uncounted=("types",))
    pairs = ((key, kind) for key, kind in _plan_types(plan, outer) if key in costs.costs and kind not in LOSSLESS)
    nats = sum(costs.of(key, kind) for key, kind in pairs)
    return replace(plan, expected_kl=(plan.expected_kl or 0.0) + nats)


def _plan_types(plan: SlimPlan, outer: Mapping[MatrixKey, Type | None]) -> Iterator[tuple[MatrixKey, Type]]:
    """The source's matrices that are kept, and their types; of merged experts all that read the mean."""
    yield from ((key, kind) for key, kind in outer.items() if kind is not None)
    for layer in plan.layers:
        yield from ((block_key(layer.block, role), kind) for role, kind in layer.types.items())
        for expert in layer.experts:
            for name, kind in zip(PROJECTIONS, expert.types, strict=True):
                yield from ((expert_key(layer.block, name, member), kind) for member in expert.members)


def _kinds(plan: SlimPlan) -> set[Type]:
    """All types of a plan's best copies."""
    kinds = {kind for layer in plan.layers for expert in layer.experts for kind in expert.types}
    kinds |= {kind for layer in plan.layers for kind in layer.types.values()}
    return kinds | ({plan.token_type, plan.output_type} - {None})
