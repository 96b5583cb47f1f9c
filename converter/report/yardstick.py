"""The baseline of a compressed file: the same whole model in plain types, at as many bytes.

No plain type has exactly the file's bytes, so the nearest ones on both sides are taken, and the KL divergence between
them is interpolated, its logarithm linearly in bytes. Small models are quantised and evaluated; the divergence of large
ones is predicted from statistics.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from gguf import GGMLQuantizationType as Type

from slimoe.converter.budget.compress import expected_loss
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
"""The least divergence; smaller ones are rounding errors, whose logarithm means nothing."""


@dataclass(frozen=True, slots=True)
class PlainModel:
    """The whole model in one of the types of `slimoe convert --type`, and its bytes.

    Its KL divergences are in nats per token: `expected_kl` is predicted from statistics, `measured_kl` by evaluation;
    None if it is not known.
    """

    type: str
    n_bytes: int
    expected_kl: float | None
    measured_kl: float | None

    @property
    def kl(self) -> float | None:
        """The measured KL divergence, or else the expected one."""
        return self.expected_kl if self.measured_kl is None else self.measured_kl


@dataclass(frozen=True, slots=True)
class Yardstick:
    """The largest plain model that is no larger than the file, if there is one, and the smallest that is larger.

    `kl` is the KL divergence of plain types at the file's bytes, interpolated between both. If one is missing or
    unknown, it is that of the other, if that is no larger than the file, and else None.
    """

    models: tuple[PlainModel, ...]
    kl: float | None
    is_measured: bool


@dataclass(frozen=True, slots=True)
class PlainPlan:
    """The plan of a plain model, and its bytes."""

    type: str
    plan: CompressPlan
    n_bytes: int


def plain_neighbours(source: ModelSource, statistics: Statistics | None, n_bytes: int) -> tuple[PlainPlan, ...]:
    """The plain models that are nearest to `n_bytes` bytes, at most one on each side."""
    found = sorted(_plain_plans(source, statistics), key=lambda one: one.n_bytes)
    below, above = ([one for one in found if (one.n_bytes <= n_bytes) is is_below] for is_below in (True, False))
    return (*below[-1:], *above[:1])


def _plain_plans(source: ModelSource, statistics: Statistics | None) -> Iterator[PlainPlan]:
    """All plain models that can be made; if any costs are known, only those whose cost is known."""
    size = PlanSize(source)
    has_costs = statistics is not None and statistics.matrix_costs is not None
    form: Format = "native" if source.spec.is_native else "stock"
    for name in RECIPES:
        if statistics is None and name in FOR_IMPORTANCE:
            continue
        recipe, mix = Recipe(types=StorageRecipe(expert=name), hints=False), find_recipe(name)
        try:
            structure = build_structure(source, None, recipe)
            plan = CompressPlan(form, structure.layers, Type.F32, None, "", importance=statistics is not None)
            types = NamedTypes(source, recipe, len(plan.layers))
            plan = with_named_types(source, plan, types.of, mix.name, mix.base)
            lossy = sorted(kind.name for kind in plan_kinds(plan) - set(LOSSLESS))
            costs = None if statistics is None else stored_costs(statistics, lossy)
            expected = priced(plan, costs).expected_kl
            # Types of 16 bits or more lose nothing, whether or not there are statistics.
            if not lossy or (expected is not None and math.isfinite(expected)):
                plan = replace(plan, expected_kl=expected_loss(source, expected or 0.0))
            if plan.expected_kl is not None or not has_costs:
                yield PlainPlan(name, plan, size.of(plan))
        except (UnsupportedModelError, UsageError):
            continue  # its blocks divide no rows


def planned_source(
    source: ModelSource, statistics: Statistics | None, plan: CompressPlan, n_threads: int
) -> ModelSource:
    """The model that a plan describes, whose matrices are quantised as they are read; reading raises as quantising
    does.
    """
    quantiser = chosen_quantiser(source, plan, statistics, n_threads)
    return PlannedSource(source, plan, FittedMatrices(source, quantiser, _CACHE_BYTES))


def make_yardstick(
    plans: Sequence[PlainPlan], n_bytes: int, measure: Callable[[PlainPlan], float] | None
) -> Yardstick | None:
    """The yardstick for a file of `n_bytes` bytes; None if the model can be in no plain type.

    `measure` evaluates a plain model; without it the KL divergences are those predicted from statistics.
    """
    models = tuple(
        PlainModel(one.type, one.n_bytes, one.plan.expected_kl, None if measure is None else measure(one))
        for one in plans
    )
    return Yardstick(models, kl_at(models, n_bytes), measure is not None) if models else None


def kl_at(models: Sequence[PlainModel], n_bytes: int) -> float | None:
    """The KL divergence of plain types at `n_bytes` bytes, from one or two models of ascending bytes, if known."""
    first = models[0]
    if len(models) == 1 or models[1].kl is None or first.kl is None:
        return first.kl if first.n_bytes <= n_bytes else None
    part = (n_bytes - first.n_bytes) / (models[1].n_bytes - first.n_bytes)
    ends = [math.log(max(_LEAST_KL, one.kl or 0.0)) for one in models]
    return math.exp(ends[0] + part * (ends[1] - ends[0]))
