"""What can be known to be impossible of merging experts before anything is measured or joined, which takes long.

The sizes of a file do not depend on which experts are merged with which, so that a plan whose groups are made by number
has all of them.
"""

from dataclasses import replace

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from slimoe.converter.budget.compress import target_bytes
from slimoe.converter.budget.named_types import NamedTypes, with_named_types
from slimoe.converter.budget.structure import whole_layer
from slimoe.converter.layout.offsets import plan_bytes
from slimoe.converter.layout.plan import CompressPlan, LayerPlan
from slimoe.converter.methods.expert_groups import groups_by_number, joined_groups
from slimoe.converter.methods.merged_routes import keep_rows
from slimoe.converter.quant.mixes import find_recipe, fitting_type
from slimoe.converter.recipe.recipe import DEFAULT_EXPERT, Recipe
from slimoe.converter.source.model_source import MatrixKey, ModelSource, block_key, expert_key, expert_width
from slimoe.converter.stats.type_costs import candidates
from slimoe.offload.errors import DoesNotFitError, UnsupportedModelError, UsageError
from slimoe.offload.resources.memory import available_bytes, human

_TOKENS, _OUTPUT = "token_embd.weight", "output.weight"


def check_merge(source: ModelSource, recipe: Recipe, available: int | None = None) -> CompressPlan:
    """Refuses what merging cannot make of a model; gives a plan of the same sizes in F32, whose groups mean nothing.

    `available` are bytes of memory, by default what the system has. Raises UsageError for a number of experts that
    cannot be left, UnsupportedModelError for experts of different widths and types that fit no rows, and
    DoesNotFitError for a size that no types meet and for too little memory to choose neurons in.
    """
    if recipe.experts.merge == "neurons":
        _check_memory(source, available_bytes() if available is None else available)
    layers = tuple(_merged(source, recipe, block) for block in range(source.spec.n_layer))
    output = Type.F32 if MatrixKey(_OUTPUT) in source.shapes else None
    plan = CompressPlan(recipe.format, layers, Type.F32, output, "")
    budget, names = target_bytes(source, recipe), NamedTypes(source, recipe, len(layers))
    if budget is None:
        default, has_copies = find_recipe(recipe.types.expert or DEFAULT_EXPERT), recipe.types.low is not None
        with_named_types(source, plan, names.of, default.name, default.base, has_copies=has_copies)
    elif not (recipe.free_layers or recipe.drop_ffn or recipe.drop_attention or recipe.drop_blocks):
        least = plan_bytes(_smallest(source, plan, recipe), source)
        if least > budget:
            message = f"The smallest file that this can become has more than {least:,} bytes, but the target allows"
            hint = "Ask for more, or for fewer experts with --keep-experts."
            raise DoesNotFitError(f"{message} {budget:,}. {hint}", required_bytes=least, available_bytes=budget)
    return plan


def _check_memory(source: ModelSource, available: int) -> None:
    # torch is heavy, and most plans do without.
    from slimoe.converter.budget.merging import joining_bytes

    needed = joining_bytes(source)
    if needed > available:
        problem = f"Choosing the neurons of merged experts takes {human(needed)} of memory, and {human(available)} are"
        hint = "Free some memory, or leave experts out or make them narrower: --keep-experts alone, or --width."
        raise DoesNotFitError(f"{problem} available. {hint}", required_bytes=needed, available_bytes=available)


def _merged(source: ModelSource, recipe: Recipe, block: int) -> LayerPlan:
    """A layer with experts merged by number; raises as `check_merge` does."""
    layer, n_stored, keep = whole_layer(source, block), source.layers[block].n_stored, recipe.experts.keep
    if not n_stored:
        return layer
    assert keep is not None
    n_used = source.spec.n_expert_used
    if keep < n_used:
        raise UsageError(f"Merging down to {keep} experts is not possible: a token selects {n_used}.")
    if keep >= n_stored:
        problem = f"Merging down to {keep} experts merges none: layer {block} has {n_stored}."
        raise UsageError(f"{problem} Keep {n_used} to {n_stored - 1} with --keep-experts.")
    widths = {expert_width(source, block, expert) for expert in range(n_stored)}
    if len(widths) > 1:
        problem = f"layer {block} has experts of {min(widths)} to {max(widths)} neurons, which cannot be merged."
        raise UnsupportedModelError(source.path, problem, "Merge experts of the model that it was made of.")
    target, is_native = source.layers[block].target, recipe.format == "native"
    groups = groups_by_number(n_stored, keep, 1 if is_native else source.spec.experts.n_group)
    layer = replace(layer, experts=joined_groups(groups, layer.experts[0].types))
    routes = keep_rows(target, groups)
    if is_native:
        return replace(layer, rows=routes.rows, target=routes.target)
    firsts = tuple(routes.target.index(group) for group in range(keep))
    return replace(layer, rows=firsts, target=tuple(range(keep)))


def _smallest(source: ModelSource, plan: CompressPlan, recipe: Recipe) -> CompressPlan:
    """The plan in the types that the recipe names, and else in the smallest that fit."""
    names, n_embd = NamedTypes(source, recipe, len(plan.layers)), source.spec.n_embd
    kinds = [Type[name] for name in recipe.types.candidates or candidates(source)]

    def kind(name: str, n_per_row: int) -> Type:
        named = names.of(name)
        fitting = (fitting_type(one, n_per_row) for one in (kinds if named is None else [named]))
        return min(fitting, key=lambda one: GGML_QUANT_SIZES[one][1] / GGML_QUANT_SIZES[one][0])

    layers = []
    for index, layer in enumerate(plan.layers):
        types = {
            role: kind(block_key(index, role).name, source.shapes[block_key(layer.block, role)][-1])
            for role in layer.types
        }
        kinds_of_experts = tuple(
            kind(expert_key(index, name, 0).name, source.spec.n_ff if name == "down" else source.spec.n_embd_expert)
            for name in source.spec.architecture.projections
        )
        experts = tuple(replace(expert, types=kinds_of_experts) for expert in layer.experts)
        layers.append(replace(layer, types=types, experts=experts))
    output = None if plan.output_type is None else kind(_OUTPUT, n_embd)
    return replace(plan, layers=tuple(layers), token_type=kind(_TOKENS, n_embd), output_type=output)
