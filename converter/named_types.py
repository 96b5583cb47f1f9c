"""Types that a recipe names itself: for every matrix, with what they cost, and why they cannot be had."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from converter.model_source import PROJECTIONS, MatrixKey, ModelSource, block_key, expert_key
from converter.quantize import needs_importance
from converter.recipe import DEFAULT_EXPERT, Recipe
from converter.slim_plan import SlimPlan, Types
from converter.slim_types import Choices
from converter.structure import ROLES, Structure
from converter.type_costs import LOSSLESS, TypeCosts
from converter.type_recipe import find_recipe
from offload.errors import UsageError

_SMALL_BLOCK = 32
"""Weights in a block of the types that divide most rows."""


def named_types(source: ModelSource, structure: Structure, recipe: Recipe) -> Choices:
    """The types that a recipe names, those of `slimoe convert --type` where it leaves some open."""
    named = recipe.types
    default = find_recipe(named.expert or DEFAULT_EXPERT)
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
    kinds = _width_kinds(recipe)
    kind = max(kinds, key=lambda one: int(GGML_QUANT_SIZES[one][0]))
    block = int(GGML_QUANT_SIZES[kind][0])
    if width % block == 0 or source.spec.n_ff % block:
        return
    below, above = width // block * block, -(-width // block) * block
    near = " or ".join(str(one) for one in dict.fromkeys((below, above)) if 0 < one <= source.spec.n_ff)
    is_free = block > _SMALL_BLOCK and recipe.target_size is None and recipe.target_bpw is None
    smaller = ", or name types of smaller blocks, such as Q8_0 (--type Q8_0)" if is_free else ""
    raise UsageError(
        f"Experts of {width} neurons do not divide into blocks of {block}, as {kind.name} has them. "
        f"Keep {near}{smaller}."
    )


def _width_kinds(recipe: Recipe) -> list[Type]:
    """Types of which all must divide the rows of trimmed experts, or of candidates the one that does so best."""
    low = [Type[recipe.types.low]] if recipe.types.low is not None else []
    if recipe.types.expert is None and recipe.types.candidates:
        best = min((Type[name] for name in recipe.types.candidates), key=lambda one: int(GGML_QUANT_SIZES[one][0]))
        return [best, *low]
    return [find_recipe(recipe.types.expert or DEFAULT_EXPERT).base, *low]


def check_importance(plan: SlimPlan, low: str | None) -> None:
    """Raises UsageError for types that cannot be made without knowing which weights matter."""
    asked = plan_kinds(plan) | ({Type[low]} if low else set())
    kinds = sorted(kind.name for kind in asked if needs_importance(kind))
    if kinds and not plan.importance:
        problem = f"{', '.join(kinds)} cannot be made: it is not known which weights matter."
        raise UsageError(f"{problem} Give --stats, or use IQ3_S or larger.")


def priced(plan: SlimPlan, costs: TypeCosts | None) -> SlimPlan:
    """The plan with what its types cost, if that is known."""
    outer = {MatrixKey("token_embd.weight"): plan.token_type, MatrixKey("output.weight"): plan.output_type}
    if not plan_kinds(plan) - set(LOSSLESS):
        return plan
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


def plan_kinds(plan: SlimPlan) -> set[Type]:
    """All types of a plan's best copies."""
    kinds = {kind for layer in plan.layers for expert in layer.experts for kind in expert.types}
    kinds |= {kind for layer in plan.layers for kind in layer.types.values()}
    return kinds | ({plan.token_type, plan.output_type} - {None})
