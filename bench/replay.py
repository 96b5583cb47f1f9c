"""A recorded trace through every cache policy, next to two that know the future: the best fixed set, and Belady's.

Tier `host`, the host expert cache, loads every miss from disk first; tier `device` multiplies misses where they lie,
and moves experts in when that pays (LRU and LFU move in every miss). Seconds are charged from the given rates as if
nothing overlapped; filling the tier at the start is free. The last line of stdout is one JSON document.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench.models.random_trace import write_random_trace
from bench.traces.cache_replay import CacheReplay, Tally, Tier, experts_by_size, pool_sizes, pools_within
from bench.traces.candidate import Belady, Candidate, Online, OracleStatic
from bench.traces.demand import Demand, demands
from slimoe.offload.cache.policy import POLICIES, PolicyContext, Values, make_policy
from slimoe.offload.cache.router_trace import Trace, TraceHeader, read_trace
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.plan.budget import parse_size

GB = 1e9
RATES = {"host": (1.2, 20.0, 20.0), "device": (12.0, 300.0, 20.0)}
"""Default GB per second of moving, of multiplying hits, and of multiplying misses."""
OLD_TIERS = {"arena": "host"}
"""Old spellings that are still understood for one version."""
SMOKE_SLOTS = 9
PHASES = ("answer", "prompt")


@dataclass(frozen=True, slots=True)
class Plan:
    """A trace to replay through a tier with slots by expert bytes; `priors` is what policies know beforehand."""

    trace: Trace
    slots: dict[int, int]
    tier: Tier
    priors: Values | None


ORACLES: dict[str, Callable[[TraceHeader, Sequence[Demand]], Candidate]] = {
    "oracle-static": OracleStatic,
    "belady": Belady,
}
CANDIDATES = (*POLICIES, *ORACLES)


def replay(plan: Plan, names: Sequence[str]) -> dict[str, dict[str, Tally]]:
    """Tallies by candidate and phase; names are some of CANDIDATES."""
    steps, header = demands(plan.trace), plan.trace.header
    context = PolicyContext(header.n_layer, header.n_expert, header.n_expert_used, plan.priors)
    results = {}
    for name in names:
        candidate = ORACLES[name](header, steps) if name in ORACLES else Online(make_policy(name, context))
        cache = CacheReplay(header, plan.slots, candidate, plan.tier)
        results[name] = cache.run(steps)
        cache.check()
    return results


def figures(tally: Tally, tier: Tier) -> dict[str, float]:
    """Counts of a tally, and what its tokens cost in milliseconds each."""
    move, compute = (1e3 * seconds / max(1, tally.n_tokens) for seconds in tier.seconds(tally))
    return {
        "tokens": tally.n_tokens,
        "hits": tally.hits,
        "misses": tally.misses,
        "pending": tally.pending,
        "ahead": tally.pending,  # the field's old name, for one version
        "hit_share": tally.hit_share,
        "moved_bytes": tally.moved_bytes,
        "moved_bytes_per_token": tally.moved_bytes / max(1, tally.n_tokens),
        "move_ms_per_token": move,
        "compute_ms_per_token": compute,
        "ms_per_token": move + compute,
    }


def table(plan: Plan, results: dict[str, dict[str, dict[str, float]]]) -> Table:
    """The figures for a person."""
    n_experts = experts_by_size(plan.trace.header).total()
    drawn = Table(title=f"{sum(plan.slots.values())} slots for {n_experts} experts")
    for column in ("policy", "phase", "tokens", "hits %", "MB/token", "moving ms", "computing ms", "sum ms/token"):
        drawn.add_column(column, justify="left" if column in ("policy", "phase") else "right")
    for name, phases in results.items():
        for phase, row in phases.items():
            moved = row["moved_bytes_per_token"] / 1e6
            charges = (row["move_ms_per_token"], row["compute_ms_per_token"], row["ms_per_token"])
            cells = (f"{100 * row['hit_share']:.1f}", f"{moved:.1f}", *(f"{charge:.2f}" for charge in charges))
            drawn.add_row(name, phase, f"{row['tokens']:.0f}", *cells)
    return drawn


def make_plan(trace: Trace, size: int | str, tier: Tier, priors: Path | None) -> Plan:
    """The plan for a tier of `size`, a number of slots or a text such as 8GiB or 50%.

    Raises UsageError and TraceFileError.
    """
    experts = experts_by_size(trace.header)
    if not experts:
        raise UsageError("The trace is of a model without experts. Record a mixture of experts.")
    if isinstance(size, int):
        pools = pool_sizes(trace.header, size)
    else:
        total = sum(n_bytes * n for n_bytes, n in experts.items())
        n_bytes = parse_size(size, total, "--bytes")
        pools = pools_within(trace.header, total if n_bytes is None else n_bytes)
    known = None if priors is None else read_trace(priors, trace.header.model).rates()
    return Plan(trace, pools, tier, known)


def smoke_trace() -> Trace:
    """A small random trace with two sizes of experts."""
    header = TraceHeader("none", 2, tuple((3 << 20 if layer % 2 else 2 << 20,) * 6 for layer in range(4)))
    with tempfile.TemporaryDirectory(prefix="slimoe-replay-") as directory:
        path = Path(directory) / "trace"
        write_random_trace(path, header, n_prompt=20, n_answer=40, n_turns=2, seed=1)
        return read_trace(path)


@click.command(context_settings={"token_normalize_func": lambda name: OLD_TIERS.get(name, name)})
@click.argument("trace", required=False, type=click.Path(path_type=Path))
@click.option("--slots", type=click.IntRange(0), help="Experts that fit into the tier.")
@click.option("--bytes", "size", help="The tier's size instead, such as 8GiB, or in percent of all experts.")
@click.option("--tier", "tier_name", type=click.Choice(list(RATES)), default="host", show_default=True)
@click.option("--policy", "names", type=click.Choice(["all", *CANDIDATES]), multiple=True, default=["all"])
@click.option("--priors", type=click.Path(path_type=Path), help="A trace of other text, known at the start.")
@click.option("--move-gbs", type=click.FloatRange(0, min_open=True), help="GB/s of moving experts in.")
@click.option("--hit-gbs", type=click.FloatRange(0, min_open=True), help="GB/s of multiplying with hits.")
@click.option("--miss-gbs", type=click.FloatRange(0, min_open=True), help="GB/s of multiplying with misses.")
@click.option("--smoke", is_flag=True, help="Seconds only, on a random trace.")
def main(
    trace: Path | None,
    slots: int | None,
    size: str | None,
    tier_name: str,
    names: tuple[str, ...],
    priors: Path | None,
    move_gbs: float | None,
    hit_gbs: float | None,
    miss_gbs: float | None,
    smoke: bool,
) -> None:
    """Replay TRACE through cache policies."""
    given = (move_gbs, hit_gbs, miss_gbs)
    move, hit, miss = (GB * (rate or default) for rate, default in zip(given, RATES[tier_name], strict=True))
    tier = Tier(move, hit, miss, computes_misses=tier_name == "device")
    chosen, wanted = list(CANDIDATES) if "all" in names else list(names), slots if size is None else size
    try:
        if smoke:
            plan = make_plan(smoke_trace(), SMOKE_SLOTS, tier, None)
        elif trace is None:
            raise UsageError("Name a trace, or use --smoke.")
        elif wanted is None or None not in (slots, size):
            raise UsageError("Name either --slots or --bytes.")
        else:
            plan = make_plan(read_trace(trace), wanted, tier, priors)
        tallies = replay(plan, chosen)
    except SlimoeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    results = {name: {phase: figures(by[phase], tier) for phase in PHASES} for name, by in tallies.items()}
    Console(stderr=True, width=None if sys.stderr.isatty() else 100).print(table(plan, results))
    print(json.dumps(as_json(plan, tier_name, results)))


def as_json(plan: Plan, tier_name: str, results: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """What was replayed, and all figures."""
    return {
        "policies": results,
        "tier": tier_name,
        "slots": sum(plan.slots.values()),
        "slots_by_expert_bytes": plan.slots,
        "experts": experts_by_size(plan.trace.header).total(),
        "move_bytes_per_second": plan.tier.move_rate,
        "hit_bytes_per_second": plan.tier.hit_rate,
        "miss_bytes_per_second": plan.tier.miss_rate,
        "steps": len(plan.trace.steps),
    }


if __name__ == "__main__":
    main()
