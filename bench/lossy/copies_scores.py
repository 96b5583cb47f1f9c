"""Scores an engine against given logits, token by token, with its cache of experts live and room for some of them."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bench.baselines.stepping import kl_divergence
from slimoe.offload.cache.slots import LowSlots, TierPlan, plan_tiers
from slimoe.offload.engine import Engine
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.lossy.elastic import share_within
from slimoe.offload.lossy.modes import with_resident
from slimoe.offload.plan.engine_config import EngineConfig, changed
from slimoe.offload.plan.engine_plan import EnginePlan, plan_engine

PASSES = ("cold", "warm")


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids and the logits to compare with, float32 [n_tokens, n_vocab]; the second half is scored."""

    tokens: tuple[int, ...]
    reference: np.ndarray

    @property
    def begin(self) -> int:
        """The first token whose logits count."""
        return len(self.tokens) // 2


def score(config: EngineConfig, texts: Sequence[Text], room_bytes: int) -> dict[str, Any]:
    """Divergences and bytes per token, cold and warm, with slots for `room_bytes` of experts, or the fewest possible.

    Raises as `Engine.open` does.
    """
    plan = planned(config, room_bytes)
    assert plan.tiers is not None
    sizes = selected_bytes(config)
    figures: dict[str, Any] = {"file_bytes": config.model.stat().st_size, "slot_bytes": plan.tiers.host_pool}
    with closing(Engine(config, plan, lambda done, total: None)) as engine:
        for name in PASSES:
            before = engine.counters()
            rows = [row for text in texts for row in read(engine, text)]
            counters = {key: value - before.get(key, 0.0) for key, value in engine.counters().items()}
            n_tokens = sum(len(text.tokens) for text in texts)
            per_token = {key: value / n_tokens for key, value in counters.items()}
            figures[name] = divergences(rows) | bytes_per_token(sizes, per_token) | {"counters": per_token}
    return figures


def planned(config: EngineConfig, room_bytes: int) -> EnginePlan:
    """The plan with so many bytes of slots, however much memory there is; an elastic file has the mix for them."""
    if config.loss.lossy == "elastic":
        layers = plan_engine(changed(config, {"lossy": None, "max_kl": None})).layers
        share = share_within(layers, room_bytes, 0, str(config.model))
        config = changed(config, {"lossy": f"elastic:{share}"})
    plan = plan_engine(config)
    try:
        tiers = tiers_within(plan, room_bytes)
    except DoesNotFitError as error:
        tiers = tiers_within(plan, error.required_bytes)
    lossy = plan.lossy and with_resident(plan.lossy, plan.layers, tiers, plan.priors)
    return replace(plan, tiers=tiers, lossy=lossy)


def tiers_within(plan: EnginePlan, budget: int) -> TierPlan:
    """Slots for a budget that has nothing else to hold; raises DoesNotFitError."""
    low: LowSlots = "none" if plan.lossy is None else plan.lossy.chooser.low_slots
    tiers = plan_tiers(plan.layers, budget, program=0, weights=0, kv=0, compute=0, what="The model", low=low)
    return replace(tiers, is_final=True)


def read(engine: Engine, text: Text) -> list[tuple[float, bool]]:
    """The divergence at each scored token, and whether the likeliest next token is the same."""
    engine.truncate(0)
    rows = []
    for index, token in enumerate(text.tokens):
        logits = engine.decode(token)
        if index >= text.begin:
            expected = text.reference[index]
            rows.append((max(0.0, kl_divergence(logits, expected)), bool(logits.argmax() == expected.argmax())))
    return rows


def divergences(rows: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """The figures that llama.cpp's perplexity tool reports of a comparison."""
    kl = np.array([row[0] for row in rows])
    return {
        "kl_mean": float(kl.mean()),
        "kl_median": float(np.median(kl)),
        "kl_99.9%": float(np.quantile(kl, 0.999)),
        "kl_max": float(kl.max()),
        "same_top": float(np.mean([row[1] for row in rows])),
    }


def expert_bytes(plan: EnginePlan, copy: int) -> float:
    """The mean bytes of an expert in its copy of that number, -1 for the smallest."""
    sizes = [copies[copy].n_bytes for layer in plan.layers if layer is not None for copies in layer.experts]
    return float(np.mean(sizes))


@dataclass(frozen=True, slots=True)
class SelectedBytes:
    """How many experts a token selects in all layers, and an expert's mean bytes in its best and in its last copy."""

    n_selected: int
    high: float
    low: float


def selected_bytes(config: EngineConfig) -> SelectedBytes:
    """The experts' bytes as the file has them, whatever the mode."""
    plan = plan_engine(changed(config, {"lossy": None, "max_kl": None}))
    n_selected = sum(layer.n_expert_used for layer in plan.layers if layer is not None)
    return SelectedBytes(n_selected, expert_bytes(plan, 0), expert_bytes(plan, -1))


def bytes_per_token(sizes: SelectedBytes, per_token: dict[str, float]) -> dict[str, float]:
    """Bytes of experts multiplied for a token, and bytes that were read from disk for it and used."""
    left_out = per_token.get("skipped_selected", 0.0) + per_token.get("constant_selected", 0.0)
    saved = per_token.get("low_selected", 0.0) * (sizes.high - sizes.low) + left_out * sizes.high
    read = per_token.get("bytes_read", 0.0) - per_token.get("bytes_wasted", 0.0)
    return {"expert_bytes": sizes.n_selected * sizes.high - saved, "saved_bytes": saved, "missed_bytes": read}
