"""Decoding under memory limits with all of a token's experts computed, and with main experts alone.

Both files have the same random weights, the second one vectors in place of the experts that are selected and not
computed (compressed experts). Each runs alone in a process within the same hard limit, the first file's size over a
ratio, the two in turn. The last line of stdout is one JSON document. Linux only, see `bench.limits.cgroup`.

    python -m bench.quality.main_experts --shape qwen3moe --ratio 1.4 --ratio 2
"""

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench.limits import machine
from bench.limits.flags import run_flags, threads_flag
from bench.limits.isolated_run import OURS, Job, Outcome
from bench.limits.limited_runs import BenchChildError, run_candidate
from bench.models.fine_models import FINE_MODELS
from bench.models.random_copies import write_random_native
from bench.models.shapes import SHAPES, model_named
from bench.models.topics import STYLES, TOKENS
from slimoe.offload.errors import SlimoeError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.resources.processors import default_threads

NAMES = ("all", "main")
N_PROMPT, N_WARM = 64, 16


@dataclass(frozen=True, slots=True)
class Plan:
    """Two files, the tokens that both read, of which the first `n_warm` behind the prompt do not count, and limits.

    `limits` are bytes of memory by name, None for no limit.
    """

    files: dict[str, Path]
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    n_warm: int
    limits: dict[str, int | None]
    n_threads: int
    n_rounds: int


def measure(plan: Plan, console: Console) -> list[dict[str, Any]]:
    """A row for each limit; raises NoControlGroupError, and BenchChildError for a run that fails."""
    rows = []
    for limit, n_bytes in plan.limits.items():
        found: dict[str, list[Outcome]] = {name: [] for name in plan.files}
        for round_no in range(plan.n_rounds):
            for name in NAMES[:: -1 if round_no % 2 else 1]:
                ram = None if n_bytes is None else f"{n_bytes}B"
                job = Job(OURS, str(plan.files[name]), plan.n_threads, plan.prompt, plan.tokens, plan.n_warm, ram)
                run = run_candidate(job, n_bytes)
                if run.outcome is None:
                    raise BenchChildError(f"memory {limit}, {name} experts: {run.failure}. Give more memory.")
                found[name].append(run.outcome)
        by_name = {name: figures(runs) for name, runs in found.items()}
        ratio = by_name["all"]["ms_per_token"] / by_name["main"]["ms_per_token"]
        rows.append({"memory": limit, "bytes": n_bytes, "ratio": ratio, **by_name})
        times, read = ([by_name[name][field] for name in NAMES] for field in ("ms_per_token", "read_bytes"))
        console.print(
            f"memory {limit}: {times[0]:.1f} ms per token with all experts, {times[1]:.1f} with main experts, ratio "
            f"{ratio:.2f}; MB read {read[0] / 1e6:.1f} and {read[1] / 1e6:.1f}",
            markup=False,
        )
    return rows


def figures(runs: list[Outcome]) -> dict[str, Any]:
    """Medians over the rounds, per token that counts."""
    times = [1e3 * statistics.mean(run.step_seconds) for run in runs]
    read, visits = (
        statistics.median(sum(run.counters.get(name, 0.0) for name in names) / len(run.step_seconds) for run in runs)
        for names in (("bytes_read",), ("hits", "pending", "misses"))
    )
    hits = statistics.median(run.counters.get("hits", 0.0) / len(run.step_seconds) for run in runs)
    return {
        "ms_per_token": statistics.median(times),
        "ms_of_rounds": times,
        "prompt_seconds": statistics.median(run.prompt_seconds for run in runs),
        "read_bytes": read,
        "hit_share": hits / visits if visits else None,
        "peak_resident_bytes": max(run.peak_resident for run in runs),
    }


def write_files(directory: Path, shape: str, n_main: int | None, n_layer: int | None, routing: str) -> dict[str, Path]:
    """Writes both files; half of a token's experts are main ones without `n_main`. Raises UsageError."""
    spec = model_named(shape, n_layer)
    files = {name: directory / f"{name}.gguf" for name in NAMES}
    n_main = n_main or spec.n_expert_used // 2
    write_random_native(files["main"], spec, ("Q4_K",), n_main=n_main, routing=routing)
    write_random_native(files["all"], spec, ("Q4_K",), routing=routing)
    return files


@click.command()
@click.option("--shape", type=click.Choice([*FINE_MODELS, *SHAPES]), default="qwen3moe", show_default=True)
@click.option("--layers", type=click.IntRange(1), help="[default: the shape's]")
@click.option("--main", "n_main", type=click.IntRange(1), help="Experts to compute.  [default: half]")
@click.option("--routing", type=click.Choice(list(STYLES)), default="natural", show_default=True)
@click.option("--ratio", "ratios", type=click.FloatRange(0, min_open=True), multiple=True, default=(1.4, 2.0))
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=32, show_default=True, help="Measured tokens of a run.")
@threads_flag
@run_flags
def main(
    shape: str,
    layers: int | None,
    n_main: int | None,
    routing: str,
    ratios: tuple[float, ...],
    rounds: int,
    tokens: int,
    threads: int | None,
    smoke: bool,
    allow_busy: bool,
) -> None:
    """Measure what computing main experts alone brings where memory is short."""
    console = Console(stderr=True, width=120)
    if smoke:
        shape, rounds, tokens, ratios = "smoke", 1, 2, ()
    try:
        with tempfile.TemporaryDirectory(prefix="slimoe-main-") as name:
            files = write_files(Path(name), shape, n_main, layers, routing)
            size, n_vocab = files["all"].stat().st_size, read_gguf(files["all"]).tensors["token_embd.weight"].ne[1]
            drawn = tuple(TOKENS[routing](N_PROMPT + N_WARM + tokens, n_vocab))
            limits: dict[str, int | None] = {"unlimited": None}
            limits |= {f"{ratio:g}": int(size / ratio) for ratio in ratios}
            plan = Plan(files, drawn[:N_PROMPT], drawn[N_PROMPT:], N_WARM, limits, threads or default_threads(), rounds)
            load_before = machine.require_quiet(allow_busy=allow_busy, is_smoke=smoke)
            rows = measure(plan, console)
    except SlimoeError as error:
        console.print(str(error), markup=False)
        sys.exit(error.exit_code)
    about = {"shape": shape, "routing": routing, "file_bytes": size, "rounds": rounds, "threads": plan.n_threads}
    print(json.dumps({"rows": rows, **about, "other_cores_before": load_before, "machine": machine.describe()}))


if __name__ == "__main__":
    main()
