"""Refuses recipes whose parts contradict each other, before anything is read of a model."""

from collections.abc import Callable
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from slimoe.converter.quant.mixes import RECIPES
from slimoe.converter.recipe.recipe import DEFAULT_EXPERT, Recipe
from slimoe.converter.recipe.words import Words
from slimoe.offload.errors import UsageError

Holds = Callable[[Recipe], bool]


def _has_target(recipe: Recipe) -> bool:
    return recipe.target_size is not None or recipe.target_bpw is not None


def _bits(name: str) -> float:
    kind = RECIPES[name].base if name in RECIPES else Type[name]
    n_weights, n_bytes = GGML_QUANT_SIZES[kind]
    return float(8 * n_bytes / n_weights)


def _low_is_no_smaller(recipe: Recipe) -> bool:
    low, best = recipe.types.low, recipe.types.expert or (None if _has_target(recipe) else DEFAULT_EXPERT)
    return low is not None and best is not None and _bits(low) >= _bits(best)


_CHANGES: dict[str, Holds] = {
    "keep": lambda recipe: recipe.experts.keep is not None,
    "width": lambda recipe: recipe.experts.width is not None,
    "drop_ffn": lambda recipe: recipe.drop_ffn > 0,
    "drop_attention": lambda recipe: recipe.drop_attention > 0,
    "drop_blocks": lambda recipe: recipe.drop_blocks > 0,
    "free_constants": lambda recipe: recipe.free_constants,
    "free_layers": lambda recipe: recipe.free_layers,
    "refit": lambda recipe: recipe.fit.refit,
}
"""What changes the parts of a model that compressed experts are fitted to, by the recipe's key."""


@dataclass(frozen=True, slots=True)
class _Fault:
    """A reason to refuse recipes for which `holds`: `problem` is a sentence for `Words`, `keys` are those at fault."""

    holds: Holds
    keys: tuple[str, ...]
    problem: str


def _beside_main(key: str, holds: Holds) -> _Fault:
    """Refuses compressed experts in a recipe that also changes what they are fitted to, by its `key`."""
    problem = f"{{main}} fits vectors to the model's own experts and layers, which {{{key}}} changes. Leave one out."
    return _Fault(lambda recipe: recipe.experts.main is not None and holds(recipe), ("main", key), problem)


_CONTRADICTIONS: tuple[_Fault, ...] = (
    _Fault(
        lambda recipe: recipe.target_size is not None and recipe.target_bpw is not None,
        ("target_size", "target_bpw"),
        "{target_size} and {target_bpw} are two budgets. Give one of them.",
    ),
    _Fault(
        lambda recipe: recipe.experts.merge is not None and recipe.experts.replacement == "constant",
        ("merge", "replacement"),
        "{merge} leaves no expert out, and {replacement} puts constants in place of those. Leave one of them out.",
    ),
    _Fault(
        lambda recipe: recipe.experts.merge is not None and recipe.free_constants,
        ("merge", "free_constants"),
        "{free_constants} puts constants in place of experts, which {merge} merges. Leave one of them out.",
    ),
    _Fault(
        lambda recipe: recipe.experts.merge is not None and recipe.experts.keep is None,
        ("merge",),
        "{merge} needs the number of experts to merge down to. Give {give_keep}.",
    ),
    _Fault(
        lambda recipe: recipe.experts.merge is not None and recipe.experts.width is not None,
        ("merge", "width"),
        "{merge} merges experts, which {width} cannot trim as well. Leave one of them out.",
    ),
    _Fault(
        lambda recipe: recipe.experts.replacement == "constant" and recipe.experts.keep is None,
        ("replacement",),
        "{replacement} puts constants in place of dropped experts, and none is dropped. Give {give_keep}, or "
        "{give_free_constants} with {give_target_size}.",
    ),
    _Fault(
        lambda recipe: recipe.experts.overall and recipe.experts.keep is None,
        ("overall",),
        "{overall} ranks the experts to drop, and none is dropped. Give {give_keep}.",
    ),
    _Fault(
        lambda recipe: recipe.experts.overall and recipe.experts.merge is not None,
        ("overall", "merge"),
        "{overall} ranks the experts to drop, and {merge} drops none. Leave one of them out.",
    ),
    _Fault(
        lambda recipe: (
            _has_target(recipe)
            and recipe.types.expert is not None
            and not (recipe.free_constants or recipe.free_layers)
        ),
        ("expert",),
        "{expert} sets the type of all experts, which a target size leaves to the allocator. Give one of them.",
    ),
    _Fault(
        lambda recipe: _has_target(recipe) and recipe.types.expert in set(RECIPES) - set(Type.__members__),
        ("expert",),
        "{expert} is a mix of types, which a target size does not allow. Name a single type.",
    ),
    _Fault(
        lambda recipe: recipe.free_constants and not _has_target(recipe),
        ("free_constants",),
        "{free_constants} puts constants in place of experts to reach a target size, and there is none. "
        "Give {give_target_size} or {give_target_bpw}.",
    ),
    _Fault(
        lambda recipe: recipe.free_layers and not _has_target(recipe),
        ("free_layers",),
        "{free_layers} leaves out parts of layers to reach a target size, and there is none. "
        "Give {give_target_size} or {give_target_bpw}.",
    ),
    _Fault(
        lambda recipe: bool(recipe.types.candidates) and not _has_target(recipe),
        ("candidates",),
        "{candidates} are types to choose from to reach a target size, and there is none. "
        "Give {give_target_size} or {give_target_bpw}.",
    ),
    _Fault(
        lambda recipe: recipe.search is not None and not _has_target(recipe),
        ("search",),
        "{search} improves types that a target leaves open, and there is none. "
        "Give {give_target_size} or {give_target_bpw}.",
    ),
    _Fault(
        _low_is_no_smaller,
        ("low",),
        "{low} is the type of low-bit copies, which would be no smaller than the first copies. Name a smaller type.",
    ),
    *(_beside_main(key, holds) for key, holds in _CHANGES.items()),
)
_NOT_IN_STOCK: tuple[_Fault, ...] = (
    _Fault(
        lambda recipe: recipe.experts.replacement == "constant",
        ("replacement",),
        "constants in place of experts ({replacement})",
    ),
    _Fault(
        lambda recipe: recipe.free_constants, ("free_constants",), "constants in place of experts ({free_constants})"
    ),
    _Fault(lambda recipe: recipe.experts.main is not None, ("main",), "compressed experts ({main})"),
    _Fault(lambda recipe: recipe.types.low is not None, ("low",), "low-bit copies of experts ({low})"),
    _Fault(lambda recipe: recipe.drop_ffn > 0, ("drop_ffn",), "layers without experts ({drop_ffn})"),
    _Fault(lambda recipe: recipe.free_layers, ("free_layers",), "layers without experts ({free_layers})"),
    _Fault(
        lambda recipe: recipe.drop_attention > 0, ("drop_attention",), "layers without attention ({drop_attention})"
    ),
    _Fault(lambda recipe: recipe.experts.order != "router", ("order",), "experts in another order ({order})"),
    _Fault(
        lambda recipe: recipe.experts.overall, ("overall",), "layers that differ in their number of experts ({overall})"
    ),
)


def check_recipe(recipe: Recipe, words: Words) -> None:
    """Raises UsageError, in `words`, for a recipe that contradicts itself or that a stock file cannot hold."""
    for fault in _CONTRADICTIONS:
        if fault.holds(recipe):
            raise UsageError(words.message(fault.keys, fault.problem.format_map(words)))
    missing = [fault for fault in _NOT_IN_STOCK if fault.holds(recipe)]
    if recipe.format == "stock" and missing:
        what = " or ".join(fault.problem for fault in missing)
        problem = f"{{format}} keeps to what llama.cpp loads, which cannot hold {what}. Leave one of them out."
        keys = ["format", *(key for fault in missing for key in fault.keys)]
        raise UsageError(words.message(keys, problem.format_map(words)))


def needs_statistics(recipe: Recipe) -> bool:
    """Whether a plan of the recipe needs the statistics of a calibration."""
    drops = recipe.drop_ffn, recipe.drop_attention, recipe.drop_blocks, recipe.experts.keep, recipe.experts.width
    fits = recipe.fit.feedback, recipe.fit.refit, recipe.fit.heal, recipe.experts.main
    return _has_target(recipe) or any(drops) or any(fits) or recipe.experts.order != "router"
