"""What takes long while a plan of a compressed model is made, and how long: told before it begins."""

import math

from slimoe.converter.budget.candidates import freedoms
from slimoe.converter.budget.compress import TRYING, candidate_types
from slimoe.converter.budget.trial import make_trial
from slimoe.converter.budget.widths import may_narrow, width_costs
from slimoe.converter.recipe.recipe import Recipe
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.type_costs import PRICING, priced_matrices, priced_types, sampled_weights
from slimoe.server.telling import tell
from slimoe.server.terminal.progress_bars import duration

LITTLE_WORK = 1 << 36
"""Products of a model's weights and tokens that take moments, which nobody needs to be told."""


def planning_seconds(
    source: ModelSource, statistics: Statistics | None, recipe: Recipe, n_threads: int, little_work: int
) -> dict[str, float]:
    """Estimates the seconds of a plan's steps, each tried for a moment, by the names that progress has for them.

    All freedoms of a size are counted, though some plans need fewer; without what takes moments. Raises ModelFileError.
    """
    n_weights = sum(map(math.prod, source.shapes.values()))
    if statistics is None or n_weights * statistics.n_tokens < little_work:
        return {}
    # torch is heavy, and some plans do without.
    from slimoe.converter.budget import compressed_experts, trimming
    from slimoe.converter.forward.block import read_tensor
    from slimoe.converter.stats.estimate import price_seconds

    experts, seconds, n_ff = recipe.experts, dict[str, float](), source.spec.n_ff
    is_sized = recipe.target_size is not None or recipe.target_bpw is not None
    missing = priced_types(source, statistics, candidate_types(source, recipe))[1] if is_sized else ()
    if missing:
        priced = priced_matrices(source)
        matrix = read_tensor(source, next((key for key in priced if key.expert >= 0), priced[0]))
        n_priced = sum(sampled_weights(source.shapes[key]) for key in priced)
        seconds[PRICING] = price_seconds(matrix.reshape(-1, matrix.shape[-1]), missing) * n_priced / n_threads
    if experts.main is not None:
        seconds[compressed_experts.STEP] = compressed_experts.fitting_seconds(source, statistics)
    narrows = may_narrow(recipe) and any(width_costs(layer) for layer in statistics.layers)
    if narrows or experts.width not in (None, n_ff):
        seconds[trimming.STEP] = trimming.trimming_seconds(source, statistics)
    trial, n_ways = make_trial(source, statistics), len(freedoms(recipe, n_ff)) if is_sized else 1
    if trial is not None and experts.merge is None:
        seconds[TRYING] = trial.seconds(1 + (n_ways if n_ways > 1 else 0))
    return seconds


def tell_planning(
    source: ModelSource, statistics: Statistics | None, recipe: Recipe, n_threads: int
) -> dict[str, float] | None:
    """Tells how long planning takes, if it does; returns the seconds by step. Raises ModelFileError."""
    seconds = planning_seconds(source, statistics, recipe, n_threads, LITTLE_WORK)
    if not seconds:
        return None
    parts = ", ".join(f"{step} {duration(one)}" for step, one in seconds.items())
    tell(f"Planning takes up to about {duration(sum(seconds.values()))}: {parts}.")
    return seconds
