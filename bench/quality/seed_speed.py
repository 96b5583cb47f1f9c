"""Apart: how fast files decode over F16, in turn in one process, so that a machine that slows down slows both."""

import statistics
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from bench.baselines.stepping import WARM_STEPS, time_decode
from bench.quality.seed_rows import N_CTX
from slimoe.offload.engine import Engine
from slimoe.offload.plan.engine_config import ContextConfig, DeviceConfig, EngineConfig


def open_engine(path: Path, n_threads: int) -> Engine:
    """Our engine on the processor alone; raises as `Engine.open` does."""
    context, devices = ContextConfig(n_ctx=N_CTX), DeviceConfig("none")
    return Engine.open(EngineConfig(path, n_threads=n_threads, context=context, devices=devices))


def decode_ratio(whole: Engine, path: Path, tokens: Sequence[int], n_rounds: int) -> dict[str, float]:
    """How many times as fast a file decodes as `whole` does, and its milliseconds per token: medians of the rounds.

    `tokens` are read one by one. Who begins changes from round to round. Raises as `Engine.open` does.
    """
    with closing(open_engine(path, whole.plan.n_threads)) as engine:
        for one in (whole, engine):
            time_decode(one, tokens[:WARM_STEPS])
        steps = dict[Engine, list[float]]({whole: [], engine: []})
        for number in range(n_rounds):
            for one in (whole, engine) if number % 2 else (engine, whole):
                steps[one].append(statistics.median(time_decode(one, tokens)))
        ratios = [theirs / ours for theirs, ours in zip(steps[whole], steps[engine], strict=True)]
        return {"decode_vs_f16": statistics.median(ratios), "decode_ms": 1e3 * statistics.median(steps[engine])}
