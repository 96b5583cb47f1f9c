"""What the runs under memory limits say: time per token, ratio to llama.cpp, and share of what the machine allows."""

import statistics
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from rich.table import Table

from bench.baselines.ik_llama_cpp import IK_BASELINES
from bench.limits.isolated_plan import Expected
from bench.limits.isolated_run import BASELINES, OURS, Outcome
from bench.limits.limited_runs import Limit, Plan, Run, Runs

_VISITS = ("hits", "pending", "misses")
"""Counters of where a selected expert was found: each counts once for a step and layer."""


def as_json(plan: Plan, runs: Runs) -> dict[str, Any]:
    """All figures as one document: the ratios by limit at its top, the rest below."""
    by_limit = {limit.name: limit_figures(plan, limit, runs) for limit in plan.limits}
    return {
        "decode_vs_llamacpp": {name: figures["decode_vs_llamacpp"] for name, figures in by_limit.items()},
        "share_of_bound": {name: figures.get("share_of_bound") for name, figures in by_limit.items()},
        "expected_vs_measured": {name: figures["expected_vs_measured"] for name, figures in by_limit.items()},
        "limits": by_limit,
        "file_bytes": plan.model.stat().st_size,
        "own_file_bytes": plan.own_model.stat().st_size,
        "threads": plan.n_threads,
        "rounds": plan.n_rounds,
        "n_prompt": len(plan.prompt),
        "n_measured": len(plan.tokens) - plan.n_warm,
        "engine": dict(plan.engine),
    }


def limit_figures(plan: Plan, limit: Limit, runs: Runs) -> dict[str, Any]:
    """The figures under one limit."""
    candidates = {name: candidate_figures(runs.candidates[limit.name, name]) for name in plan.candidates(limit)}
    baselines = [candidates[name]["ms_per_token"] for name in limit.candidates if name in BASELINES]
    best = min((ms for ms in baselines if ms is not None), default=None)
    own = candidates[OURS]["ms_per_token"]
    ik = [candidates[name]["ms_per_token"] for name in candidates.keys() & IK_BASELINES.keys()]
    best_ik = min((ms for ms in ik if ms is not None), default=None)
    figures = {
        "limit_bytes": limit.n_bytes,
        "decode_vs_llamacpp": best / own if best and own else None,
        "decode_vs_ik": best_ik / own if best_ik and own else None,
        **expected_figures(runs.expected.get(limit.name, ()), own),
        "candidates": candidates,
        "contenders": candidates,  # the field's old name, for one version
        "same_choices": same_choices(limit, runs),
        "same_logits": same_logits(plan, limit, runs),
    }
    outcomes = outcomes_of(runs.candidates[limit.name, OURS])
    if limit.n_bytes is None or not outcomes:
        return figures
    return figures | cache_figures(outcomes) | bound_figures(plan, limit, runs, outcomes)


def candidate_figures(runs: Sequence[Run]) -> dict[str, Any]:
    """Medians over the rounds of one candidate, the extremes of its time per token, and every failure."""
    outcomes = outcomes_of(runs)
    times = [ms_per_token(outcome) for outcome in outcomes]
    disk = [outcome.disk_bytes / len(outcome.step_seconds) for outcome in outcomes if outcome.disk_bytes is not None]
    usages = [run.usage for run in runs if run.usage is not None]
    return {
        "ms_per_token": _median(times),
        "ms_per_token_of_rounds": times,
        "prompt_seconds": _median([outcome.prompt_seconds for outcome in outcomes]),
        "load_seconds": _median([outcome.load_seconds for outcome in outcomes]),
        "disk_bytes_per_token": _median(disk),
        "peak_resident_bytes": max((outcome.peak_resident for outcome in outcomes), default=None),
        "peak_group_bytes": max((usage.peak_bytes for usage in usages), default=None),
        "limit_hits": max((usage.n_limit_hits for usage in usages), default=None),
        "oom_kills": sum(usage.n_oom_kills for usage in usages),
        "failures": [run.failure for run in runs if run.failure is not None],
    }


def expected_figures(expected: Sequence[Expected], own: float | None) -> dict[str, Any]:
    """What our plan expected, and its ratio to what came: above 1 the plan was too pessimistic."""
    decode = _median([one.decode_ms for one in expected])
    return {
        "expected_ms": decode,
        "expected_disk_share": _median([one.disk_share for one in expected]),
        "expected_vs_measured": decode / own if decode and own else None,
    }


def cache_figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The engine's own counters per token, and the share of selected experts that were in memory by then."""
    per_token = {}
    for name in outcomes[0].counters:
        of_all = [outcome.counters[name] / len(outcome.step_seconds) for outcome in outcomes]
        per_token[name] = statistics.median(of_all)
    n_visits = sum(per_token.get(name, 0.0) for name in _VISITS)
    return {"counters_per_token": per_token, "hit_share": per_token["hits"] / n_visits if n_visits else None}


def bound_figures(plan: Plan, limit: Limit, runs: Runs, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The least time per token that the machine allows, given what the cache missed, and how near ours comes.

    Computing takes no less than in the graphs of these runs or in whole steps without a limit, and reading no less than
    at the speed of the disk alone or at that of these runs while they read, whichever was faster.
    """
    missed = _median_per_token(outcomes, missed_bytes)
    alone = statistics.median(one.bytes_per_second for one in runs.disk[limit.name])
    speed = max(alone, _median(list(filter(None, map(read_speed, outcomes)))) or alone)
    free = next((limit for limit in plan.limits if limit.n_bytes is None), None)
    resident = [ms_per_token(one) for one in outcomes_of(runs.candidates[free.name, OURS])] if free else []
    graphs = 1e3 * _median_per_token(outcomes, lambda one: one.graph_seconds)
    compute, disk = min(graphs, _median(resident) or graphs), 1e3 * missed / speed
    bound = max(compute, disk)
    return {
        "missed_bytes_per_token": missed,
        "disk_bytes_per_second": alone,
        "read_bytes_per_second": speed,
        "disk_ms": disk,
        "compute_ms_without_limit": _median(resident),
        "compute_ms_in_graphs": graphs,
        "bound_ms": bound,
        "bound_by": "disk" if disk > compute else "compute",
        "share_of_bound": bound / statistics.median(map(ms_per_token, outcomes)),
    }


def missed_bytes(outcome: Outcome) -> float:
    """Bytes that had to come from the disk: what the engine read and used, nothing when all was resident."""
    counters = outcome.counters
    return counters.get("bytes_read", 0.0) - counters.get("bytes_wasted", 0.0)


def read_speed(outcome: Outcome) -> float | None:
    """Bytes per second while the engine had reads under way, None without any."""
    seconds = outcome.counters.get("read_seconds")
    return outcome.counters["bytes_read"] / seconds if seconds else None


def same_choices(limit: Limit, runs: Runs) -> float | None:
    """The share of steps in which ours and a llama.cpp find the same token likeliest: the lowest of all runs."""
    ours = outcomes_of(runs.candidates[limit.name, OURS])
    baselines = [outcomes_of(runs.candidates[limit.name, name]) for name in limit.candidates if name in BASELINES]
    shares = [
        statistics.mean(our == their for our, their in zip(own.choices, other.choices, strict=True))
        for own in ours
        for other in chain.from_iterable(baselines)
    ]
    return min(shares, default=None)


def same_logits(plan: Plan, limit: Limit, runs: Runs) -> bool | None:
    """Whether ours under the limit is ours without one, to the last bit; None where that was not measured."""
    free = [one for one in plan.limits if one.n_bytes is None]
    expected = {one.checksum for other in free for one in outcomes_of(runs.candidates[other.name, OURS])}
    seen = {one.checksum for one in outcomes_of(runs.candidates[limit.name, OURS])}
    return len(expected | seen) == 1 if expected and seen else None


def outcomes_of(runs: Sequence[Run]) -> list[Outcome]:
    """The outcomes of the runs that came to an end."""
    return [run.outcome for run in runs if run.outcome is not None]


def ms_per_token(outcome: Outcome) -> float:
    """Milliseconds per token: the mean over the steps, since a user waits for all of them."""
    return 1e3 * statistics.mean(outcome.step_seconds)


def _median_per_token(outcomes: Sequence[Outcome], value: Callable[[Outcome], float]) -> float:
    return statistics.median(value(outcome) / len(outcome.step_seconds) for outcome in outcomes)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def table(plan: Plan, document: dict[str, Any]) -> Table:
    """The figures for a person."""
    title = f"{plan.model.name}, {plan.n_threads} threads, medians of {plan.n_rounds} rounds"
    drawn = Table("memory", "candidate", "ms/token", "prompt s", "disk MB/token", "peak MB", title=title)
    for name, figures in document["limits"].items():
        for candidate, row in figures["candidates"].items():
            cells = (
                _cell(row["ms_per_token"], 1, "; ".join(sorted(set(row["failures"])))),
                _cell(row["prompt_seconds"], 1),
                _cell(row["disk_bytes_per_token"], 1e-6),
                _cell(row["peak_group_bytes"] or row["peak_resident_bytes"], 1e-6),
            )
            drawn.add_row(name, candidate, *cells)
        drawn.add_row("", "expected by our plan", _cell(figures["expected_ms"], 1))
        ratio, share = figures["decode_vs_llamacpp"], figures.get("share_of_bound")
        drawn.add_row("", "ratio, share of the bound", _cell(ratio, 1), _cell(share, 1), end_section=True)
    return drawn


def _cell(value: float | None, factor: float, missing: str = "") -> str:
    return missing if value is None else f"{value * factor:.2f}"
