"""What a slimmed file is to be better than: the same model whole, in plain types, at as many bytes.

No plain type has exactly the file's bytes, so that the nearest ones on both sides are taken, and the divergence between
them where its logarithm is linear in bytes. Small models are quantised and evaluated; statistics foretell large ones.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from gguf import GGMLQuantizationType as Type

from slimoe.converter.budget.compress import BEYOND
from slimoe.converter.budget.named_types import NamedTypes, plan_kinds, priced, with_named_types
from slimoe.converter.budget.planned_source import FittedMatrices, PlannedSource
from slimoe.converter.budget.structure import build_structure
from slimoe.converter.layout.offsets import PlanSize
from slimoe.converter.layout.plan import CompressPlan, Format
from slimoe.converter.quant.mixes import FOR_IMPORTANCE, RECIPES, find_recipe
from slimoe.converter.recipe.recipe import Recipe, StorageRecipe
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.type_costs import LOSSLESS, stored_costs
from slimoe.converter.write.writer import chosen_quantiser
from slimoe.offload.errors import UnsupportedModelError, UsageError

_CACHE_BYTES = 1 << 26
_LEAST_KL = 1e-9
"""Divergences below it are rounding, and have no logarithm worth drawing a line by."""


@dataclass(frozen=True, slots=True)
class PlainModel:
    """The whole model in one of the types of `slimoe convert --type`, its bytes, and KL in nats per token: what the
    statistics foretell and what was measured, None where that is not known.
    """

    type: str
    n_bytes: int
    expected_kl: float | None
    measured_kl: float | None

    @property
    def kl(self) -> float | None:
        """The better known of both."""
        return self.expected_kl if self.measured_kl is None else self.measured_kl


@dataclass(frozen=True, slots=True)
class Yardstick:
    """The largest plain model that is no larger than the file, if there is one, and the smallest that is larger.

    `kl` is what plain types would have at the file's bytes: between both, or the one's where the other is missing or
    unknown and the one is no larger than the file. None where that is not known.
    """

    models: tuple[PlainModel, ...]
    kl: float | None
    is_measured: bool


@dataclass(frozen=True, slots=True)
class PlainPlan:
    """A plain model before it is made."""

    type: str
    plan: CompressPlan
    n_bytes: int


def plain_neighbours(source: ModelSource, statistics: Statistics | None, n_bytes: int) -> tuple[PlainPlan, ...]:
    """Of all plain types the nearest by bytes, at most one on each side."""
    found = sorted(_plain_plans(source, statistics), key=lambda one: one.n_bytes)
    below, above = ([one for one in found if (one.n_bytes <= n_bytes) is is_below] for is_below in (True, False))
    return (*below[-1:], *above[:1])


def _plain_plans(source: ModelSource, statistics: Statistics | None) -> Iterator[PlainPlan]:
    """Those that can be made, and whose cost is known where any is."""
    size = PlanSize(source)
    has_prices = statistics is not None and statistics.matrix_costs is not None
    for name in RECIPES:
        if statistics is None and name in FOR_IMPORTANCE:
            continue
        try:
            plan = _with_cost(_plain_plan(source, statistics, name), statistics)
            if plan.expected_kl is not None or not has_prices:
                yield PlainPlan(name, plan, size.of(plan))
        except (UnsupportedModelError, UsageError):
            continue  # its blocks divide no rows


def _plain_plan(source: ModelSource, statistics: Statistics | None, name: str) -> CompressPlan:
    recipe = Recipe(types=StorageRecipe(expert=name), hints=False)
    structure = build_structure(source, None, recipe)
    form: Format = "native" if source.spec.is_native else "stock"
    plan = CompressPlan(form, structure.layers, Type.F32, None, "", importance=statistics is not None)
    mix = find_recipe(name)
    return with_named_types(source, plan, NamedTypes(source, recipe, len(plan.layers)).of, mix.name, mix.base)


def _with_cost(plan: CompressPlan, statistics: Statistics | None) -> CompressPlan:
    """The plan with what the statistics foretell: nothing is lost in types of 16 bits."""
    types = sorted(kind.name for kind in plan_kinds(plan) - set(LOSSLESS))
    costs = None if statistics is None else stored_costs(statistics, types)
    found = priced(plan, costs)
    is_known = not types or (costs is not None and found.expected_kl is not None and math.isfinite(found.expected_kl))
    kl = BEYOND * (found.expected_kl or 0.0) if is_known else None
    return replace(plan, expected_kl=kl)


def planned_source(
    source: ModelSource, statistics: Statistics | None, plan: CompressPlan, n_threads: int
) -> ModelSource:
    """A plain model as one to read, quantised matrix by matrix; raises as fitting does."""
    quantiser = chosen_quantiser(source, plan, statistics, n_threads)
    return PlannedSource(source, plan, FittedMatrices(source, quantiser, _CACHE_BYTES))


def make_yardstick(
    plans: Sequence[PlainPlan], n_bytes: int, measure: Callable[[PlainPlan], float] | None
) -> Yardstick | None:
    """The yardstick for a file of so many bytes; `measure` evaluates a plain model, None leaves it to what is foretold.

    None where no plain type can be had.
    """
    models = tuple(
        PlainModel(one.type, one.n_bytes, one.plan.expected_kl, None if measure is None else measure(one))
        for one in plans
    )
    return Yardstick(models, kl_at(models, n_bytes), measure is not None) if models else None


def kl_at(models: Sequence[PlainModel], n_bytes: int) -> float | None:
    """KL of plain types at a file's bytes, from one model or two of ascending bytes; None where it is not known."""
    first = models[0]
    if len(models) == 1 or models[1].kl is None or first.kl is None:
        return first.kl if first.n_bytes <= n_bytes else None
    share = (n_bytes - first.n_bytes) / (models[1].n_bytes - first.n_bytes)
    ends = [math.log(max(_LEAST_KL, one.kl or 0.0)) for one in models]
    return math.exp(ends[0] + share * (ends[1] - ends[0]))
