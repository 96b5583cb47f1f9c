"""How long the first token takes after a restart, with the prompt's keys and values on disk, and without.

A prompt is computed by one engine, and by another one that keeps nothing on disk; a third one reads what the first has
written. Each is opened in a process of its own, and the files are dropped from the system's page cache before they are
read, if the system lets us. Told are the times to the first token, their ratio, what was read, how long the first
engine took to write the rest when it was idle, how long tokens took while it wrote, and how many tokens of the answers
are equal: the end of the prompt is computed in another batch, whose sums are rounded elsewhere. The last line of stdout
is one JSON document.

    python -m bench.api.kept_prompts --shape design8 --tokens 4096
    python -m bench.api.kept_prompts --smoke
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import click

from bench.baselines.stepping import random_tokens
from bench.limits import machine
from bench.models.random_model import random_model_file
from bench.models.shapes import MODELS
from slimoe.offload.engine import Engine
from slimoe.offload.plan.engine_config import EngineConfig, changed
from slimoe.offload.text.generation import Finished, GenerationRequest, PromptProgress, SamplingParams, TokenStep
from slimoe.server.options.engine_options import DEMO

N_ANSWER = 32


def asked(model: Path, kept: Path | None, n_tokens: int, kv_type: str) -> dict[str, Any]:
    """Opens an engine, asks it for an answer, and tells what that took."""
    settings = {"n_ctx": n_tokens + 256, "kv_type": kv_type, "device": "none", "prompt_cache": kept}
    with closing(Engine.open(changed(EngineConfig(model), settings))) as engine:
        prompt = tuple(random_tokens(n_tokens, engine.spec.n_vocab))
        begin = time.perf_counter()
        engine.submit(GenerationRequest(prompt, N_ANSWER, SamplingParams(temperature=0), ignore_eos=True))
        first, tokens, n_cached, steps = None, list[int](), 0, list[float]()
        while not engine.is_idle:
            at = time.perf_counter()
            for _, event in engine.step():
                if isinstance(event, PromptProgress):
                    n_cached = event.n_cached
                if isinstance(event, TokenStep):
                    first = first or time.perf_counter() - begin
                    tokens.append(event.token)
                assert not isinstance(event, Finished) or event.timings.cached_n == n_cached
            steps.append(time.perf_counter() - at)
        idle = time.perf_counter()
        while engine.tidy():
            pass
        return {
            "first_token_seconds": first,
            "token_ms": 1000 * statistics.median(steps[-N_ANSWER + 1 :]),
            "mean_token_ms": 1000 * statistics.fmean(steps[-N_ANSWER + 1 :]),
            "idle_writing_seconds": time.perf_counter() - idle,
            "cached": n_cached,
            "tokens": tokens,
            "counters": {name: n for name, n in engine.counters().items() if "prompt_cache" in name},
        }


def in_a_process(model: Path, kept: Path | None, n_tokens: int, kv_type: str) -> dict[str, Any]:
    """The same in a process of its own."""
    words = [sys.executable, "-m", "bench.api.kept_prompts", "--model", str(model), "--tokens", str(n_tokens)]
    words += ["--kv-type", kv_type, "--one", str(kept or "")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def drop_from_page_cache(folder: Path) -> None:
    """Has the system forget what it holds of the files in memory, so that they are read from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="A GGUF file (default: the demo).")
@click.option("--shape", type=click.Choice(sorted(MODELS)), help="A random model of this shape instead.")
@click.option("--type", "kind", default="Q4_K", show_default=True, help="Type of the random model's weights.")
@click.option("--tokens", "n_tokens", default=1700, show_default=True, type=click.IntRange(min=300))
@click.option("--kv-type", default="f16", show_default=True)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--smoke", is_flag=True, help="One short round, to see that it runs.")
@click.option("--one", help="One engine's times with this folder, empty for none, as JSON.")
def main(
    model: Path | None,
    shape: str | None,
    kind: str,
    n_tokens: int,
    kv_type: str,
    rounds: int,
    smoke: bool,
    one: str | None,
) -> None:
    """Compares the first token after a restart with and without prompts on disk."""
    path = model or DEMO
    if one is not None:
        print(json.dumps(asked(path, Path(one) if one else None, n_tokens, kv_type)))
        return
    if smoke:
        n_tokens, rounds = 600, 1
    with ExitStack() as stack:
        if shape is not None:
            path = stack.enter_context(random_model_file(shape, kind))
        runs = []
        for _ in range(rounds):
            kept = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            run = {"first": in_a_process(path, kept, n_tokens, kv_type)}
            drop_from_page_cache(kept)
            run["restarted"] = in_a_process(path, kept, n_tokens, kv_type)
            run["recomputed"] = in_a_process(path, None, n_tokens, kv_type)
            assert run["first"]["cached"] == run["recomputed"]["cached"] == 0
            runs.append(run)
    report = summary(runs)
    print(
        f"{report['read_tokens']} of {n_tokens} tokens read: first token after {report['restarted_seconds']:.2f} s in "
        f"place of {report['recomputed_seconds']:.2f} s"
    )
    print(json.dumps({"machine": machine.describe(), "model": path.name, "tokens": n_tokens, **report}))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds."""

    def median(name: str, figure: str) -> float:
        return float(statistics.median(run[name][figure] for run in runs))

    restarted, recomputed = (median(name, "first_token_seconds") for name in ("restarted", "recomputed"))
    return {
        "first_token_vs_recompute": recomputed / restarted,
        "restarted_seconds": restarted,
        "recomputed_seconds": recomputed,
        "first_seconds": median("first", "first_token_seconds"),
        "equal_tokens": min(_equal(run["restarted"]["tokens"], run["recomputed"]["tokens"]) for run in runs),
        "read_tokens": runs[0]["restarted"]["cached"],
        "read_bytes": runs[0]["restarted"]["counters"]["bytes_prompt_cache_read"],
        "idle_writing_seconds": median("first", "idle_writing_seconds"),
        "mean_token_ms": {name: median(name, "mean_token_ms") for name in ("first", "recomputed")},
        "token_ms": {name: median(name, "token_ms") for name in ("first", "recomputed")},
    }


def _equal(ours: list[int], theirs: list[int]) -> int:
    """How many tokens two answers have in common, from the first on."""
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=True))))


if __name__ == "__main__":
    main()
