"""Scores an engine against given logits, token by token, with its cache of experts live and room for some of them."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bench.stepping import kl_divergence
from offload.engine import Engine
from offload.engine_plan import EngineConfig, EnginePlan, plan_engine

LOW_PICKS, SKIPPED_PICKS = "low_picks", "skipped_picks"
"""The engine's counters of picks that were answered by the smaller copy, or not at all."""
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
    """Divergences and bytes per token, cold and warm, with slots for `room_bytes` of experts besides the least.

    Raises as `Engine.open` does.
    """
    config = replace(config, ram=f"{least_bytes(config) + room_bytes}B")
    figures: dict[str, Any] = {"file_bytes": config.model.stat().st_size}
    with closing(Engine.open(config)) as engine:
        for name in PASSES:
            before = engine.counters()
            rows = [row for text in texts for row in read(engine, text)]
            counters = {key: value - before.get(key, 0.0) for key, value in engine.counters().items()}
            n_tokens = sum(len(text.tokens) for text in texts)
            per_token = {key: value / n_tokens for key, value in counters.items()}
            figures[name] = divergences(rows) | bytes_per_token(engine.plan, per_token) | {"counters": per_token}
    return figures


def least_bytes(config: EngineConfig) -> int:
    """The smallest budget that a model can be opened with."""
    plan = plan_engine(replace(config, ram="1B"))
    assert plan.shortfall is not None
    return plan.shortfall.required_bytes


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


def bytes_per_token(plan: EnginePlan, per_token: dict[str, float]) -> dict[str, float]:
    """Bytes of experts multiplied for a token, and bytes that were read from disk for it and used."""
    high, low = expert_bytes(plan, 0), expert_bytes(plan, -1)
    n_picks = sum(layer.n_expert_used for layer in plan.layers if layer is not None)
    saved = per_token.get(LOW_PICKS, 0.0) * (high - low) + per_token.get(SKIPPED_PICKS, 0.0) * high
    read = per_token.get("bytes_read", 0.0) - per_token.get("bytes_wasted", 0.0)
    return {"expert_bytes": n_picks * high - saved, "saved_bytes": saved, "missed_bytes": read}
