"""Plans of compressed models, from one that changes nothing to random ones, and statistics that they may ask for."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type

from slimoe.converter.forward.texts import CalibrationText
from slimoe.converter.layout.plan import CompressPlan, ExpertPlan, Format, LayerPlan, Types
from slimoe.converter.quant.mixes import find_recipe
from slimoe.converter.source.model_source import MatrixKey, ModelSource, expert_key
from slimoe.converter.stats.forward_pass import CalibrationSettings, calibrate
from slimoe.converter.stats.observer import Samples
from slimoe.converter.stats.statistics import InputSums, LayerStatistics, MatrixCosts, SimilaritySums, Statistics
from slimoe.converter.stats.type_costs import CANDIDATES, measure_type_costs, packed_costs

ROLES = ("attn_q", "attn_k", "attn_v", "attn_output")
SMALL_ROWS = (Type.F32, Type.F16, Type.Q8_0)
"""Types that any row of 32 weights takes, the largest first."""


def same_plan(source: ModelSource, type_name: str, form: Format = "stock") -> CompressPlan:
    """Everything is kept, in the types of a recipe."""
    recipe, tied = find_recipe(type_name), MatrixKey("output.weight") not in source.shapes

    def kind(name: str) -> Type:
        return recipe.type_of(name, source.spec.n_layer, moe=True, tied=tied)

    layers = tuple(_same_layer(source, layer, kind) for layer in range(source.spec.n_layer))
    output = None if tied else kind("output.weight")
    return CompressPlan(form, layers, kind("token_embd.weight"), output, f"type = {type_name!r}")


def _same_layer(source: ModelSource, layer: int, kind: Callable[[str], Type]) -> LayerPlan:
    gate, up, down = (kind(expert_key(layer, name, 0).name) for name in ("gate", "up", "down"))
    stored = source.layers[layer]
    return LayerPlan(
        block=layer,
        experts=tuple(ExpertPlan((expert,), (gate, up, down)) for expert in range(stored.n_stored)),
        rows=tuple(range(len(stored.target))),
        target=stored.target,
        types={role: kind(f"blk.{layer}.{role}.weight") for role in ROLES},
        has_attention=stored.has_attention,
    )


def with_layers(plan: CompressPlan, layers: dict[int, LayerPlan]) -> CompressPlan:
    """The plan with some layers replaced."""
    return replace(plan, layers=tuple(layers.get(n, layer) for n, layer in enumerate(plan.layers)))


class RandomPlans:
    """Draws native plans for a source: counts, aliases, constant experts, widths, types, copies, missing parts."""

    def __init__(self, source: ModelSource, seed: int, types: Sequence[Type] = SMALL_ROWS, multiple: int = 32) -> None:
        self.source, self.types, self.multiple = source, types, multiple
        self.rng = np.random.default_rng(seed)

    def draw(self) -> CompressPlan:
        blocks = self.rng.permutation(self.source.spec.n_layer)[: self.rng.integers(1, self.source.spec.n_layer + 1)]
        layers = [self._layer(int(block)) for block in sorted(blocks)]
        # A model has attention and experts somewhere.
        layers[0] = replace(layers[0], has_attention=True)
        if not any(layer.rows for layer in layers):
            layers[-1] = self._with_experts(layers[-1])
        tied = MatrixKey("output.weight") not in self.source.shapes
        return CompressPlan("native", tuple(layers), self._type(), None if tied else self._type(), "random")

    def _type(self) -> Type:
        return self.types[int(self.rng.integers(len(self.types)))]

    def _types(self) -> Types:
        return self._type(), self._type(), self._type()

    def _chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def _layer(self, block: int) -> LayerPlan:
        layer = LayerPlan(block, (), (), (), {role: self._type() for role in ROLES}, not self._chance(0.3))
        return layer if self._chance(0.2) else self._with_experts(layer)

    def _with_experts(self, layer: LayerPlan) -> LayerPlan:
        stored, n_used = self.source.layers[layer.block], self.source.spec.n_expert_used
        n_rows = int(self.rng.integers(n_used, len(stored.target) + 1))
        rows = np.sort(self.rng.permutation(len(stored.target))[:n_rows])
        n_constant = int(self.rng.integers(0, n_rows - 1)) if self._chance(0.3) else 0
        n_expert = int(self.rng.integers(max(1, n_used - n_constant), n_rows - n_constant + 1))
        means = [*range(-n_constant, n_expert)]
        target = self.rng.permutation([*means, *self.rng.choice(means, n_rows - len(means))])
        constants = self.rng.standard_normal((n_constant, self.source.spec.n_embd), np.float32) if n_constant else None
        experts = tuple(self._expert(layer.block) for _ in range(n_expert))
        changes: dict[str, Any] = {"rows": tuple(rows.tolist()), "target": tuple(target.tolist())}
        return replace(layer, experts=experts, constants=constants, **changes)

    def _expert(self, block: int) -> ExpertPlan:
        n_stored, spec = self.source.layers[block].n_stored, self.source.spec
        types, low = self._types(), None
        if self._chance(0.3) and types != (self.types[-1],) * 3:
            low = (self.types[-1],) * 3
        plan = ExpertPlan((int(self.rng.integers(n_stored)),), types, low)
        if self._chance(0.3):
            members = tuple(self.rng.permutation(n_stored)[:2].tolist())
            plan = replace(plan, members=members, weights=(0.75, 0.25), neurons=(self.rng.permutation(spec.n_ff),))
        if self._chance(0.3):
            n_kept = int(self.rng.integers(1, spec.n_ff // self.multiple)) * self.multiple
            kept = np.sort(self.rng.permutation(spec.n_ff)[:n_kept])
            plan = replace(plan, kept=kept)
            if self._chance(0.5):
                plan = replace(plan, down=self.rng.standard_normal((spec.n_embd, n_kept), np.float32) / np.float32(8))
        return plan


def random_sequences(n_sequences: int, length: int, n_vocab: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    rng = np.random.default_rng(seed)
    return tuple(tuple(map(int, rng.integers(3, n_vocab, length))) for _ in range(n_sequences))


def learnt(source: ModelSource, directory: Path, n_sequences: int = 6, length: int = 48) -> Statistics:
    """Statistics of random tokens, with all that a plan may ask for."""
    text = CalibrationText(random_sequences(n_sequences, length, source.spec.n_vocab), ("random",) * n_sequences)
    settings = CalibrationSettings(Samples(types=()), n_sensitivity=n_sequences * length, prices=True)
    return calibrate(source, text, settings, directory / "partial")


def few_prices(source: ModelSource, directory: Path, types: tuple[str, ...] = ("Q2_K", "Q4_K", "Q6_K")) -> Statistics:
    """Statistics in which few types have prices: trying all of them takes seconds."""
    text = CalibrationText(random_sequences(4, 16, source.spec.n_vocab), ("random",) * 4)
    settings = CalibrationSettings(Samples(types=()), n_sensitivity=64)
    found = calibrate(source, text, settings, directory / "partial")
    some = packed_costs(measure_type_costs(source, found, types=types))
    others = tuple(name for name in CANDIDATES if name not in some.types)
    nats = np.hstack([some.nats, np.full((len(some.matrices), len(others)), np.inf)])
    return replace(found, matrix_costs=MatrixCosts(some.types + others, some.matrices, nats))


def statistics_of(source: ModelSource, seed: int = 0) -> Statistics:
    """Importance as a calibration would know it; expert 1 of layer 0 was never selected."""
    rng, spec = np.random.default_rng(seed), source.spec

    def squares(*shape: int) -> np.ndarray:
        return rng.exponential(1, shape).astype(np.float32)

    layers: list[LayerStatistics] = []
    for layer in source.layers:
        n, d = layer.n_stored, spec.n_embd
        expert, hidden = squares(n, d), squares(n, spec.n_ff)
        expert[1], hidden[1] = (0, 0) if not layers else (1, 1)
        sums = InputSums(expert, hidden, squares(d), squares(spec.n_head * spec.n_embd_head), squares(d))
        layers.append(LayerStatistics(SimilaritySums(0, 0, 0, 0, 0), sums))
    count = np.zeros(spec.n_vocab, np.int64)
    return Statistics(source.source_hash, "ab" * 32, ((1, 2, 3),), ("x",), tuple(layers), squares(d), count)
