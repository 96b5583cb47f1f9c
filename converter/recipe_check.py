"""Recipes whose parts contradict each other, refused before anything is read of a model."""

from collections.abc import Callable

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from converter.recipe import Recipe
from converter.type_recipe import RECIPES
from offload.errors import UsageError

Holds = Callable[[Recipe], bool]


def _has_target(recipe: Recipe) -> bool:
    return recipe.target_size is not None or recipe.target_bpw is not None


def _bits(name: str) -> float:
    kind = RECIPES[name].base if name in RECIPES else Type[name]
    n_weights, n_bytes = GGML_QUANT_SIZES[kind]
    return float(8 * n_bytes / n_weights)


def _low_is_no_smaller(recipe: Recipe) -> bool:
    types = recipe.types
    return types.low is not None and types.expert is not None and _bits(types.low) >= _bits(types.expert)


_CONTRADICTIONS: tuple[tuple[Holds, str], ...] = (
    (
        lambda recipe: recipe.target_size is not None and recipe.target_bpw is not None,
        "target_size and target_bpw are two budgets. Give one of them.",
    ),
    (
        lambda recipe: recipe.experts.merge is not None and recipe.experts.replacement == "novice",
        "merge leaves no expert out that a novice could stand in for. Merge, or replace.",
    ),
    (
        lambda recipe: recipe.experts.merge is not None and recipe.free_novices,
        "free_novices would put constants in place of what merge has just joined. Leave one of them out.",
    ),
    (
        lambda recipe: recipe.experts.merge is not None and recipe.experts.keep is None,
        "merge does not say how many experts are to be left. Give keep.",
    ),
    (
        lambda recipe: recipe.experts.replacement == "novice" and recipe.experts.keep is None,
        "a novice stands in for a dropped expert, and none is dropped. Give keep, or free_novices with a target.",
    ),
    (
        lambda recipe: recipe.experts.overall and recipe.experts.keep is None,
        "overall says how experts are ranked that are dropped, and none is. Give keep.",
    ),
    (
        lambda recipe: recipe.experts.overall and recipe.experts.merge is not None,
        "overall ranks experts that are dropped, and merge drops none. Leave one of them out.",
    ),
    (
        lambda recipe: recipe.experts.overall and recipe.experts.score == "subset",
        "the score subset finds the best set of each layer by itself, and overall ranks all layers' experts together. "
        "Name another score.",
    ),
    (
        lambda recipe: (
            _has_target(recipe) and recipe.types.expert is not None and not (recipe.free_novices or recipe.free_layers)
        ),
        "types.expert names the type of all experts, and a target leaves types to the budget. Give one of them.",
    ),
    (
        lambda recipe: _has_target(recipe) and recipe.types.expert in set(RECIPES) - set(Type.__members__),
        "types.expert is a mix of types, which has no place under a target. Name a plain type.",
    ),
    (
        lambda recipe: (recipe.free_novices or recipe.free_layers) and not _has_target(recipe),
        "free_novices and free_layers say what may make room for a target, and there is none. "
        "Give target_size or target_bpw.",
    ),
    (
        lambda recipe: bool(recipe.types.candidates) and not _has_target(recipe),
        "types.candidates are to choose from for a target, and there is none. Give target_size or target_bpw.",
    ),
    (_low_is_no_smaller, "the second copies in types.low are not smaller than the first. Name a smaller type."),
)
_NOT_IN_STOCK: tuple[tuple[Holds, str], ...] = (
    (lambda recipe: recipe.experts.replacement == "novice" or recipe.free_novices, "novices in place of experts"),
    (lambda recipe: recipe.types.low is not None, "second copies of experts"),
    (lambda recipe: recipe.drop_ffn > 0 or recipe.free_layers, "layers without experts"),
    (lambda recipe: recipe.drop_attention > 0, "layers without attention"),
    (lambda recipe: recipe.experts.overall, "layers that differ in their number of experts"),
)


def check_recipe(recipe: Recipe, origin: str) -> None:
    """Raises UsageError, which begins with `origin`, for what contradicts itself or what a stock file cannot hold."""
    for holds, problem in _CONTRADICTIONS:
        if holds(recipe):
            raise UsageError(f"{origin}: {problem}")
    missing = [what for holds, what in _NOT_IN_STOCK if holds(recipe)]
    if recipe.format == "stock" and missing:
        problem = f"the stock format, which llama.cpp loads, cannot hold {' or '.join(missing)}."
        raise UsageError(f"{origin}: {problem} Leave that out, or write the native format.")


def needs_statistics(recipe: Recipe) -> bool:
    """Whether a plan of it can be made only with what a calibration has learnt."""
    drops = recipe.drop_ffn, recipe.drop_attention, recipe.drop_blocks, recipe.experts.keep, recipe.experts.width
    fits = recipe.fit.feedback, recipe.fit.refit
    return _has_target(recipe) or any(drops) or any(fits)
