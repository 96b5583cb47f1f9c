"""What other limits of memory cost while an answer is being written, and what it costs to look on.

Greedy answers are computed twice: in peace, and with the limits changed again and again between two steps; tokens
must be the same. Told are the pause of each change, the bytes that were read for it and the most that the process held
meanwhile. Then the same answer again while a snapshot is taken four times a second, as for a page that shows the map of
experts. The last line of stdout is one JSON document.

    python -m bench.rebudget --shape design8 --sizes least,+50%,100%
"""

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import click
import msgspec
import psutil

from bench.baselines.stepping import random_tokens
from bench.limits import machine
from bench.models.random_model import random_model_file
from bench.models.shapes import MODELS
from slimoe.offload.engine import Engine
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.plan.engine_config import ContextConfig, DeviceConfig, EngineConfig, MemoryConfig
from slimoe.offload.resources.processors import default_threads
from slimoe.offload.text.generation import GenerationRequest, SamplingParams, TokenStep

N_PROMPT, LOOKS_PER_SECOND = 64, 4


def answer(engine: Engine, n_tokens: int, before: Callable[[int], None] = lambda n: None) -> tuple[list[int], float]:
    """The tokens of a greedy answer, with `before` called ahead of each, and seconds per token without these calls."""
    prompt = tuple(random_tokens(N_PROMPT, engine.spec.n_vocab))
    engine.submit(GenerationRequest(prompt, n_tokens, SamplingParams(temperature=0), ignore_eos=True))
    tokens: list[int] = []
    seconds = 0.0
    while not engine.is_idle:
        before(len(tokens))
        begin = time.perf_counter()
        events = engine.step()
        if tokens:
            seconds += time.perf_counter() - begin
        tokens += [event.token for _, event in events if isinstance(event, TokenStep)]
    return tokens, seconds / max(1, len(tokens) - 1)


def changes(engine: Engine, sizes: list[str], n_tokens: int) -> tuple[list[int], list[dict[str, Any]]]:
    """The tokens of an answer during which the limits become one size after the other, and what each change cost."""
    told: list[dict[str, Any]] = []
    left, process = list(sizes), psutil.Process()

    def change(n: int) -> None:
        if not left or n < (len(told) + 1) * n_tokens // (len(sizes) + 1):
            return
        size = left.pop(0)
        peak, is_over = [0], threading.Event()

        def watch() -> None:
            while not is_over.wait(0.002):
                peak[0] = max(peak[0], process.memory_info().rss)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        begin = time.perf_counter()
        done = engine.rebudget(size, ())
        pause = time.perf_counter() - begin
        is_over.set()
        thread.join()
        told.append(
            {
                "ram": size,
                "pause_ms": round(1000 * pause, 1),
                "loaded_bytes": done.loaded_bytes,
                "is_kept": done.is_kept,
                "peak_bytes": peak[0],
            }
        )

    tokens, _ = answer(engine, n_tokens, change)
    return tokens, told


def looked_on(engine: Engine, n_tokens: int) -> tuple[float, float]:
    """Seconds per token while a snapshot is taken again and again, and seconds that one takes."""
    is_over, taken = threading.Event(), list[float]()

    def look() -> None:
        while not is_over.wait(1 / LOOKS_PER_SECOND):
            begin = time.perf_counter()
            msgspec.json.encode(engine.snapshot())
            taken.append(time.perf_counter() - begin)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    _, seconds = answer(engine, n_tokens)
    is_over.set()
    thread.join()
    return seconds, statistics.median(taken) if taken else 0.0


def least_size(engine: Engine) -> int:
    """The smallest limit that the engine takes now."""
    try:
        engine.rebudget("1MiB", ())
    except DoesNotFitError as error:
        return error.required_bytes
    raise AssertionError("a model in 1 MiB")


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="File to measure (default: a random one).")
@click.option("--shape", type=click.Choice(MODELS), default="design8", show_default=True, help="Its shape.")
@click.option(
    "--sizes",
    default="least,+50%,+75%,+25%,100%",
    show_default=True,
    help="Limits, one after the other; +25% is the least that is taken and a quarter of the experts.",
)
@click.option("--tokens", "n_tokens", default=120, show_default=True, help="Tokens of each answer.")
@click.option("--threads", "n_threads", type=int, help="Threads to compute with.")
@click.option("--smoke", is_flag=True, help="A tiny model and few tokens, to see that everything runs.")
def main(model: Path | None, shape: str, sizes: str, n_tokens: int, n_threads: int | None, smoke: bool) -> None:
    """Measure pauses, bytes and exactness of changed limits, and the cost of looking on."""
    shape, n_tokens = ("smoke", 24) if smoke else (shape, n_tokens)
    with ExitStack() as opened:
        path = model or opened.enter_context(random_model_file(shape, "Q4_K"))
        config = EngineConfig(
            path,
            n_threads=n_threads or default_threads(),
            context=ContextConfig(n_ctx=1024, n_batch=128),
            memory=MemoryConfig(ram="100%"),
            devices=DeviceConfig(device="none"),
        )
        with closing(Engine.open(config)) as engine:
            expected, in_peace = answer(engine, n_tokens)
        with closing(Engine.open(config)) as engine:
            experts = sum(c[0].n_bytes for layer in engine.plan.layers if layer for c in layer.experts)
            least = least_size(engine)
            named = {f"+{part}%": least + experts * part // 100 for part in (25, 50, 75)} | {"least": least}
            wanted = [str(named.get(size, size)) for size in sizes.split(",")]
            tokens, told = changes(engine, wanted, n_tokens)
        with closing(Engine.open(config)) as engine:
            # Each in turn, since the machine is not alone.
            pairs = [(answer(engine, n_tokens)[1], looked_on(engine, n_tokens)) for _ in range(1 if smoke else 3)]
        alone, watched = statistics.median(a for a, _ in pairs), statistics.median(w for _, (w, _) in pairs)
        document = {
            "bench": "rebudget",
            "model": path.name,
            "machine": machine.describe(),
            "experts_bytes": experts,
            "is_exact": tokens == expected,
            "changes": told,
            "token_ms": round(1000 * in_peace, 3),
            "watched_token_ms": round(1000 * watched, 3),
            "unwatched_token_ms": round(1000 * alone, 3),
            "snapshot_ms": round(1000 * statistics.median(s for _, (_, s) in pairs), 3),
        }
    print(json.dumps(document))
    sys.exit(0 if tokens == expected else 1)


if __name__ == "__main__":
    main()
