"""Several answers at once: tokens per second of all together, next to llama.cpp's sequences in one batch.

Each candidate runs alone in a process, in turn, for each number of streams; with --ratio not as memory allows, but
under a limit of the file's size over the ratio. Prompts are natural texts that differ (`bench.models.topics`), answers
greedy. llama.cpp decodes as llama-server does for its slots, without HTTP; where everything fits it also has its
rearranged weights. The last line of stdout is one JSON document. A ratio above 1 means that ours is faster.

    python -m bench.quality.streams --model qwen3moe --streams 1,2,4,8,16 --ratio 1.4
"""

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench.limits import machine
from bench.limits.cgroup import drop_cached, memory_group
from bench.limits.flags import run_flags, threads_flag
from bench.limits.isolated_run import BASELINES, OURS
from bench.limits.limited_runs import REARRANGED
from bench.limits.stream_run import StreamJob, StreamOutcome
from bench.models.random_model import random_model_file
from bench.models.shapes import MODELS
from bench.models.topics import TOKENS
from slimoe.offload.errors import SlimoeError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.resources.processors import default_threads


class StreamRunError(SlimoeError):
    """A process of the bench ended without figures."""


def prompts(model: Path, n_streams: int, n_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Natural texts that differ, as tokens of a model."""
    n_vocab = read_gguf(model).tensors["token_embd.weight"].ne[1]
    return tuple(tuple(TOKENS["natural"](n_tokens, n_vocab, seed)) for seed in range(1, 1 + n_streams))


def run(job: StreamJob, limit: int | None) -> StreamOutcome:
    """Runs a job in a process of its own; raises StreamRunError and NoControlGroupError."""
    command = [sys.executable, "-m", "bench.limits.stream_run"]
    with ExitStack() as stack:
        if limit is not None:
            drop_cached(Path(job.model))
            command = stack.enter_context(memory_group(limit)).entering(command)
        done = subprocess.run(command, input=json.dumps(asdict(job)), capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise StreamRunError(f"{job.candidate} with {job.n_streams} streams ended: {why}")
    return StreamOutcome(**json.loads(done.stdout.splitlines()[-1]))


def measure(jobs: dict[int, StreamJob], limit: int | None, console: Console) -> dict[str, dict[str, float]]:
    """Tokens per second by the number of streams and the candidate, of the same job for each of them."""
    found: dict[str, dict[str, float]] = {}
    for n_streams, job in jobs.items():
        for name in (OURS, *(name for name in BASELINES if limit is None or name not in REARRANGED)):
            console.print(f"{n_streams} streams: {name}")
            ram = f"{limit}B" if limit is not None and name == OURS else None
            one = StreamJob(**asdict(job) | {"candidate": name, "ram": ram})
            found.setdefault(str(n_streams), {})[name] = run(one, limit).tokens_per_second
    return found


def ratio(row: dict[str, float]) -> float:
    """How many times as many tokens ours gives as the better llama.cpp."""
    return row[OURS] / max(speed for name, speed in row.items() if name != OURS)


def table(found: dict[str, dict[str, float]], title: str) -> Table:
    """The figures for a person."""
    names = list(next(iter(found.values())))
    drawn = Table("streams", *names, "ratio", title=title)
    for n_streams, row in found.items():
        drawn.add_row(n_streams, *(f"{row[name]:.1f}" for name in names), f"{ratio(row):.2f}")
    return drawn


def _numbers(_: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    numbers = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in numbers):
        raise click.BadParameter(f"{text!r} is no list of numbers from 1 up, such as {option.default}.")
    return tuple(map(int, numbers))


@click.command()
@click.option("--model", default="design8", show_default=True, help="A file, or a shape for random weights.")
@click.option("--streams", callback=_numbers, default="1,2,4,8,16", show_default=True, help="Answers at once.")
@click.option("--tokens", type=click.IntRange(4), default=32, show_default=True, help="Tokens of each answer.")
@click.option(
    "--ratio",
    "ratios",
    multiple=True,
    type=click.FloatRange(1.0),
    help="The file's size over a limit of memory.",
)
@threads_flag
@run_flags
def main(
    model: str,
    streams: tuple[int, ...],
    tokens: int,
    ratios: tuple[float, ...],
    threads: int | None,
    smoke: bool,
    allow_busy: bool,
) -> None:
    """Measure answers at once against llama.cpp."""
    console = Console(stderr=True)
    documents: dict[str, Any] = {}
    try:
        with ExitStack() as stack:
            path = Path(model)
            if smoke or model in MODELS:
                shape = "smoke" if smoke else model
                path = stack.enter_context(random_model_file(shape, routing="natural"))
            machine.require_quiet(allow_busy=allow_busy, is_smoke=smoke)
            jobs = {
                n: StreamJob(OURS, str(path), threads or default_threads(), prompts(path, n, 32), tokens, n_warm=2)
                for n in ((1, 2) if smoke else streams)
            }
            limits: dict[str, int | None] = {f"{one:g}": int(path.stat().st_size / one) for one in ratios}
            limits = limits or {"unlimited": None}
            for name, limit in limits.items():
                documents[name] = measure(jobs, limit, console)
                console.print(table(documents[name], f"{path.name}, memory {name}, tokens per second of all streams"))
    except SlimoeError as error:
        console.print(str(error), markup=False)
        sys.exit(error.exit_code)
    ratios_of = {name: {n: ratio(row) for n, row in found.items()} for name, found in documents.items()}
    print(json.dumps({"tokens_per_second": documents, "vs_llamacpp": ratios_of, "machine": machine.describe()}))


if __name__ == "__main__":
    main()
