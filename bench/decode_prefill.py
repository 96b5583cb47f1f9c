"""Decode and prefill next to llama.cpp: the same file, the same threads, in turn, in one process.

Every round measures each candidate once, in alternating order. llama.cpp runs with its extra buffer types on and
off, and the better of the two on each figure is what ours is compared with. The table goes to stderr; the last
line of stdout is one JSON document. A ratio above 1 means that ours is faster. The tokens are random, so the
experts are chosen evenly: natural text is never harder. With --ik, which names a Python that has ik-llama-cpp-python,
that fork runs on the same file as well, in a process of its own, with and without weights rearranged at load. With
--ratio the same file is then run under memory limits, as `bench.offload` does it.

    python -m bench.decode_prefill --shape qwen3moe --depths 0,4096 --ratio 1.4 --ratio 2
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from bench import offload
from bench.baselines.ik_llama_cpp import IK_BASELINES, IkConfig, IkLlamaCpp
from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.stepping import Candidate, Timing, go_to_depth, kl_divergence, measure, random_tokens, time_decode
from bench.limits import limited_runs, machine
from bench.limits.flags import ik_flag, ik_python, run_flags, threads_flag, type_flag
from bench.models.random_model import random_model_file
from bench.models.shapes import MODELS
from bench.quality import offload_report
from slimoe.offload.cache.host_slots import slot_bytes
from slimoe.offload.cache.slots import plan_tiers, slot_classes
from slimoe.offload.engine import Engine
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.plan.engine_config import ContextConfig, EngineConfig, changed
from slimoe.offload.plan.engine_plan import plan_engine
from slimoe.offload.resources.memory import available_bytes
from slimoe.offload.resources.processors import default_threads

OURS = "slimoe"
BASELINES = {"llama.cpp": True, "llama.cpp --no-repack": False}
REFERENCE = "llama.cpp --no-repack"
COPIES_TOGETHER = 4.5  # the mapped file, two rearranged copies, ours and theirs, one of plain weights, and some air
IK_COPIES = 1.1  # its rearranged weights; the others are the mapped file
CHECKED_STEPS = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: `n_prefill` and `n_decode` tokens at each of `depths`, `n_rounds` times.

    `ik` is the Python that has ik_llama.cpp, None to leave that out.
    """

    model: Path
    n_threads: int
    n_rounds: int
    n_prefill: int
    n_decode: int
    depths: tuple[int, ...]
    ik: Path | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The candidates, ours first."""
        return (OURS, *BASELINES, *(IK_BASELINES if self.ik else ()))

    @property
    def n_ctx(self) -> int:
        """Tokens that the contexts hold, in the steps of 256 that llama.cpp takes."""
        return -(-(max(self.depths) + max(self.n_prefill, self.n_decode, CHECKED_STEPS)) // 256) * 256

    @property
    def fits_together(self) -> bool:
        """Whether memory holds all candidates at once; otherwise they are measured one after the other."""
        n_copies = COPIES_TOGETHER + (IK_COPIES if self.ik else 0)
        return n_copies * read_gguf(self.model).n_bytes < available_bytes()


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured: a timing per candidate, depth and round, and each candidate's checked logits.

    `python_shares` has, by depth and round, the share of a decode step that our engine spends outside ggml's graphs;
    `in_slots` is `measure_in_slots`' answer.
    """

    timings: dict[tuple[str, int], list[Timing]]
    logits: dict[str, list[np.ndarray]]
    python_shares: dict[int, list[float]]
    engine: dict[str, Any]
    in_slots: dict[str, float] | None = None

    def seconds(self, name: str, depth: int, phase: str) -> float:
        """The median of the rounds' seconds; `phase` is `prefill` (the whole of it) or `decode` (one step)."""
        return float(statistics.median(getattr(timing, phase) for timing in self.timings[name, depth]))

    def ratio(self, depth: int, phase: str, baselines: Iterable[str] = BASELINES) -> float:
        """How many times faster ours is than the better of the baselines, llama.cpp's two by default."""
        return min(self.seconds(name, depth, phase) for name in baselines) / self.seconds(OURS, depth, phase)

    def kl(self, name: str) -> float:
        """The largest KL divergence of the checked steps from plain llama.cpp, in nats."""
        return max(map(kl_divergence, self.logits[name], self.logits[REFERENCE]))


def open_in_slots(plan: Plan) -> Engine | None:
    """Our engine with a slot of the host expert cache for each expert, as where memory is short; None without experts.

    Between a layer's router and its experts the engine then looks for them, which costs Python.
    """
    config = EngineConfig(plan.model, n_threads=plan.n_threads, context=ContextConfig(n_ctx=plan.n_ctx))
    config = changed(config, {"device": "none"})
    engine_plan = plan_engine(config)
    n_slots = slot_classes(engine_plan.cut_layers)
    if not n_slots:
        return None
    budget = sum(n * slot_bytes(slot_class) for slot_class, n in n_slots.items())
    tiers = plan_tiers(engine_plan.cut_layers, budget, program=0, weights=0, kv=0, compute=0, what=str(config.model))
    engine_plan = replace(engine_plan, tiers=replace(tiers, is_final=True), shortfall=None)
    return Engine(config, engine_plan, lambda done, total: None)


def measure_in_slots(plan: Plan, in_memory: float) -> dict[str, float] | None:
    """A decode step with all experts in slots: its milliseconds, Python's share, and how it compares with `in_memory`.

    None for a model without experts. The figures are medians of the rounds, from an empty KV cache on; `in_memory` are
    the seconds of a step that finds the experts as the file has them.
    """
    engine = open_in_slots(plan)
    if engine is None:
        return None
    with closing(engine):
        decode = random_tokens(plan.n_decode, read_vocabulary_size(plan.model), seed=3)
        seconds, shares = list[float](), list[float]()
        for _ in range(1 + plan.n_rounds):
            engine.truncate(0)
            computed, taken = engine.compute_seconds, time_decode(engine, decode)
            seconds.append(statistics.median(taken))
            shares.append(1.0 - (engine.compute_seconds - computed) / sum(taken))
    step = statistics.median(seconds[1:])
    return {
        "decode_ms": 1e3 * step,
        "decode_vs_memory": in_memory / step,
        "python_share": statistics.median(shares[1:]),
    }


def candidates(plan: Plan) -> dict[str, Callable[[], Candidate]]:
    """How each candidate is opened, ours first."""
    config = EngineConfig(plan.model, n_threads=plan.n_threads, context=ContextConfig(n_ctx=plan.n_ctx))
    baselines = {
        name: lambda extra=extra: LlamaCpp(LlamaCppConfig(plan.model, plan.n_ctx, plan.n_threads, extra))
        for name, extra in BASELINES.items()
    }
    return {OURS: lambda: Engine.open(config), **baselines, **ik_candidates(plan)}


def ik_candidates(plan: Plan) -> dict[str, Callable[[], IkLlamaCpp]]:
    """How ik_llama.cpp is opened, with weights as they are and rearranged; none without its Python."""
    if plan.ik is None:
        return {}
    configs = {
        name: IkConfig(plan.ik, plan.model, plan.n_ctx, plan.n_threads, repack) for name, repack in IK_BASELINES.items()
    }
    return {name: partial(IkLlamaCpp, config) for name, config in configs.items()}


def run(plan: Plan, say: Callable[[str], None]) -> Report:
    """Measures all candidates together if memory allows it, one after the other if not."""
    report = Report({}, {}, {}, {})
    makers = candidates(plan)
    for names in [list(makers)] if plan.fits_together else [[name] for name in makers]:
        with ExitStack() as stack:
            opened = {}
            for name in names:
                say(f"loading {name}")
                opened[name] = stack.enter_context(closing(makers[name]()))
            _measure_together(plan, opened, report, say)
    say("our engine with experts in slots")
    return replace(report, in_slots=measure_in_slots(plan, report.seconds(OURS, min(plan.depths), "decode")))


def _measure_together(plan: Plan, opened: Mapping[str, Candidate], report: Report, say: Callable[[str], None]) -> None:
    """Adds all rounds of the candidates that are open at the same time to the report."""
    n_vocab = read_vocabulary_size(plan.model)
    tokens = random_tokens(max(plan.depths), n_vocab)
    prefill, decode = random_tokens(plan.n_prefill, n_vocab, seed=2), random_tokens(plan.n_decode, n_vocab, seed=3)
    for name, candidate in opened.items():
        report.logits[name] = check_logits(candidate, prefill[: CHECKED_STEPS * 2])
    for depth in sorted(plan.depths, reverse=True):  # a deep cache serves the shallower depths as well
        for candidate in opened.values():
            go_to_depth(candidate, tokens, depth)
            time_round(candidate, prefill, decode[:1], tokens[:depth])
        for round_no in range(plan.n_rounds):
            say(f"depth {depth}, round {round_no + 1} of {plan.n_rounds}")
            for name in sorted(opened, reverse=bool(round_no % 2)):
                report.timings.setdefault((name, depth), []).append(
                    time_round(opened[name], prefill, decode, tokens[:depth])
                )
            if isinstance(engine := opened.get(OURS), Engine):
                report.python_shares.setdefault(depth, []).append(python_share(engine, decode, tokens[:depth]))
                report.engine.update(engine.memory(), weights=engine.plan.weight_forms.mode)


def time_round(candidate: Candidate, prefill: list[int], decode: list[int], cached: list[int]) -> Timing:
    """One round behind what is cached; what runs in a process of its own is timed there."""
    if isinstance(candidate, IkLlamaCpp):
        return candidate.measure(prefill, decode)
    return measure(candidate, prefill, decode, cached)


def check_logits(candidate: Candidate, tokens: list[int]) -> list[np.ndarray]:
    """Logits after a short prompt and after each of CHECKED_STEPS steps; the KV cache is empty before and after."""
    candidate.truncate(0)
    logits = [candidate.prefill(tokens[:-CHECKED_STEPS]).copy()]
    logits += [candidate.decode(token).copy() for token in tokens[-CHECKED_STEPS:]]
    candidate.truncate(0)
    return logits


def python_share(engine: Engine, tokens: list[int], cached: list[int]) -> float:
    """The share of decode steps behind what is cached, from 0 to 1, that is spent outside ggml's graphs."""
    computed, begin = engine.compute_seconds, time.perf_counter()
    for token in tokens:
        engine.decode(token)
    seconds, computed = time.perf_counter() - begin, engine.compute_seconds - computed
    go_to_depth(engine, cached, len(cached))
    return 1.0 - computed / seconds


def read_vocabulary_size(model: Path) -> int:
    """The size of a model's vocabulary, which its token embedding has rows for."""
    return read_gguf(model).tensors["token_embd.weight"].ne[1]


def as_json(plan: Plan, report: Report) -> dict[str, Any]:
    """The figures as one document; the ratios at its top are the worst of all depths."""
    depths = {
        str(depth): {
            "decode_ms": {name: 1e3 * report.seconds(name, depth, "decode") for name in plan.names},
            "prefill_tokens_per_s": {
                name: plan.n_prefill / report.seconds(name, depth, "prefill") for name in plan.names
            },
            "decode_vs_llamacpp": report.ratio(depth, "decode"),
            "prefill_vs_llamacpp": report.ratio(depth, "prefill"),
            "decode_vs_ik": report.ratio(depth, "decode", IK_BASELINES) if plan.ik else None,
            "prefill_vs_ik": report.ratio(depth, "prefill", IK_BASELINES) if plan.ik else None,
            "python_share": statistics.median(report.python_shares[depth]),
        }
        for depth in plan.depths
    }
    return {
        "decode_vs_llamacpp": min(report.ratio(depth, "decode") for depth in plan.depths),
        "prefill_vs_llamacpp": min(report.ratio(depth, "prefill") for depth in plan.depths),
        "python_share": max(statistics.median(shares) for shares in report.python_shares.values()),
        "kl_vs_llamacpp": report.kl(OURS),
        "kl_between_llamacpp_settings": max(map(report.kl, BASELINES)),
        "kl_of_ik": max(map(report.kl, IK_BASELINES)) if plan.ik else None,
        "depths": depths,
        "engine": report.engine,
        "in_slots": report.in_slots,
        "threads": plan.n_threads,
        "rounds": plan.n_rounds,
        "n_prefill": plan.n_prefill,
        "n_decode": plan.n_decode,
    }


def larger_than_memory(plan: Plan, limits: tuple[limited_runs.Limit, ...], console: Console) -> dict[str, Any]:
    """What `bench.offload` finds of the file under these limits, with tokens of natural routing."""
    lengths = offload.Lengths(plan.n_rounds, offload.N_PROMPT, offload.N_WARM, plan.n_decode)
    limited = replace(offload.make_plan(plan.model, plan.model, limits, "natural", lengths), n_threads=plan.n_threads)
    document = offload_report.as_json(limited, limited_runs.measure(limited, console.print))
    console.print(offload_report.table(limited, document))
    return document


def table(plan: Plan, report: Report) -> Table:
    """The figures for a person."""
    result = Table(title=f"{plan.model.name}, {plan.n_threads} threads, medians of {plan.n_rounds} rounds")
    for column in ("depth", "candidate", f"decode ms ({plan.n_decode})", f"prefill tokens/s ({plan.n_prefill})"):
        result.add_column(column, justify="left" if column == "candidate" else "right")
    for depth in plan.depths:
        for name in plan.names:
            decode, prefill = (report.seconds(name, depth, phase) for phase in ("decode", "prefill"))
            result.add_row(str(depth), name, f"{1e3 * decode:.2f}", f"{plan.n_prefill / prefill:.1f}")
        ratios = (f"{report.ratio(depth, phase):.3f}" for phase in ("decode", "prefill"))
        result.add_row(str(depth), "ratio to the better llama.cpp", *ratios, end_section=plan.ik is None)
        if plan.ik is not None:
            ratios = (f"{report.ratio(depth, phase, IK_BASELINES):.3f}" for phase in ("decode", "prefill"))
            result.add_row(str(depth), "ratio to the better ik_llama.cpp", *ratios, end_section=True)
    return result


def _comma_ints(_: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers, such as {option.default}.") from None
    if min(values) < 0:
        raise click.BadParameter("only counts from 0 up are possible.")
    return values


@click.command()
@click.option("--shape", type=click.Choice(MODELS), default="design8", show_default=True)
@type_flag
@click.option("--model", type=click.Path(path_type=Path), help="Measure this file instead of a random one.")
@threads_flag
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--tokens", callback=_comma_ints, default="512,64", show_default=True, help="To prefill, to decode.")
@click.option("--depths", callback=_comma_ints, default="0,1024", show_default=True, help="Tokens already cached.")
@ik_flag
@click.option("--ratio", "ratios", multiple=True, help="The file's size over a memory limit, or one such as 12GiB.")
@run_flags
def main(
    shape: str,
    kind: str | None,
    model: Path | None,
    threads: int | None,
    rounds: int,
    tokens: tuple[int, ...],
    depths: tuple[int, ...],
    ratios: tuple[str, ...],
    smoke: bool,
    allow_busy: bool,
) -> None:
    """Measure decode and prefill against llama.cpp on the same file."""
    console = Console(stderr=True)
    try:
        if len(tokens) != 2 or min(tokens) < 2:
            raise UsageError("--tokens takes two numbers from 2 up: how many to prefill and how many to decode.")
        with ExitStack() as stack:
            routing = "natural" if ratios else "uniform"
            path = model or stack.enter_context(random_model_file("smoke" if smoke else shape, kind, routing=routing))
            plan = Plan(path, threads or default_threads(), rounds, *tokens, depths, ik_python())
            if smoke:
                plan = replace(plan, n_rounds=1, n_prefill=32, n_decode=4, depths=(0, 16))
            load_before = machine.require_quiet(allow_busy=allow_busy, is_smoke=smoke)
            load = machine.OtherLoad()
            report = run(plan, console.print)
            console.print(table(plan, report))
            limits = offload.smoke_limits() if smoke else offload.limits_for(path, ratios)
            larger = larger_than_memory(plan, limits, console) if ratios else None
            loads = {"other_cores_before": load_before, "other_cores_during": load.cores()}
    except SlimoeError as error:
        console.print(str(error), markup=False)
        sys.exit(error.exit_code)
    about = {"model": path.name, "type": kind, "machine": machine.describe()}
    print(json.dumps(as_json(plan, report) | loads | about | {"larger_than_memory": larger}))


if __name__ == "__main__":
    main()
