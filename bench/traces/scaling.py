"""What the engine's bookkeeping takes for each selected expert, from 64 to 100,000 experts, without a model.

Simulated routers select experts for decoded tokens, and what the engine does beside computing is done for them: the
policy is told, half of the experts have slots and what is missing takes the least valuable one, later layers' experts
are predicted, a device takes in what pays, uses are counted and the trace is written. Other programs may take the
processor, so a figure is the median over tokens, and the least of several rounds. The last line of stdout is one JSON
document.
"""

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.traces.simulated_routers import ROUTERS, Routed, hidden_states
from slimoe.offload.cache.expert_uses import ExpertUses
from slimoe.offload.cache.policy import PolicyContext, make_policy
from slimoe.offload.cache.prefetch import ExpertPredictor, Later
from slimoe.offload.cache.residency import Key, SlotCache, most_valuable
from slimoe.offload.cache.router_trace import ANSWER, TraceHeader, TraceRun, TraceWriter
from slimoe.offload.cache.swap import SlotExchange, SwapRule

SHAPES = ((4, 16), (16, 64), (40, 256), (64, 1600))
"""Layers, and experts of each, from 64 to 102,400 in all."""
N_TOKENS, N_WARM, N_ROUNDS = 120, 20, 3
PARTS = ("policy", "cache", "prediction", "device", "counting", "trace")
RULE = SwapRule(gain_seconds=1e-3, cost_seconds=1e-3)


class Clock:
    """Seconds by part, for each token."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}
        self._now: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds what the block takes to a part of the token."""
        begin = time.perf_counter()
        yield
        self._now[name] += time.perf_counter() - begin

    def end_token(self) -> None:
        """A token is over."""
        for part, seconds in self.seconds.items():
            seconds.append(self._now[part])
        self._now.clear()


class Bookkeeping:
    """All that the engine keeps of `n_layer` layers of `n_expert` experts, of which half have slots in host memory."""

    def __init__(self, policy: str, n_layer: int, n_expert: int, n_used: int, trace: Path) -> None:
        keys = [(layer, expert) for layer in range(n_layer) for expert in range(n_expert)]
        self.policy = make_policy(policy, PolicyContext(n_layer, n_expert, n_used))
        self.cache = SlotCache(len(keys) // 2, self.policy)
        for key in most_valuable(self.policy.values, keys, self.cache.n_slots):
            self.cache.acquire(key)
        self.on_device = set(keys[:: max(2, len(keys) // (len(keys) // 8))])
        self.exchange = SlotExchange(self.policy, RULE, lambda key: "one")
        self.predictor, self.uses = ExpertPredictor(), ExpertUses([n_expert] * n_layer)
        self.trace = TraceWriter(trace, TraceHeader("simulated", n_used, ((1,) * n_expert,) * n_layer))
        self.n_layer, self.n_expert = n_layer, n_expert
        self.n_hits = self.n_selected = 0

    def step(self, routed: list[Routed], clock: Clock) -> None:
        """Decodes one token, whose layers select what is `routed`."""
        missed: list[Key] = []
        self.predictor.begin()
        with clock.part("trace"):
            self.trace.step([TraceRun(ANSWER, 0, 0, 1)])
        for layer, one in enumerate(routed):
            keys = [(layer, expert) for expert in one.experts.tolist()]
            with clock.part("policy"):
                self.policy.decode(layer, one.experts)
            with clock.part("counting"):
                self.uses.add(layer, one.experts[None].astype(np.int32))
            with clock.part("trace"):
                self.trace.layer(layer, one.experts[None], np.full((1, len(one.experts)), 0.1))
            self._serve(keys, clock)
            missed += [key for key in keys if key not in self.on_device]
            with clock.part("prediction"):
                self.predictor.settle(layer, one.experts)
                if layer + 1 < self.n_layer:
                    later = routed[layer + 1]
                    n_row = len(later.logits)
                    known = Later([layer + 1], later.candidates[None], [n_row], [min(len(later.experts), n_row)])
                    self.predictor.guess(known, later.logits[None])
        with clock.part("device"):
            swaps = self.exchange.choose(self.on_device, missed, lambda key: True)
        for victim, newcomer in swaps:
            self.on_device.remove(victim)
            self.on_device.add(newcomer)
        with clock.part("policy"):
            self.policy.end_token()
        clock.end_token()

    def _serve(self, keys: list[Key], clock: Clock) -> None:
        pinned = set(keys)
        with clock.part("cache"):
            for key in keys:
                if key in self.cache:
                    self.n_hits += 1
                else:
                    self.cache.try_acquire(key, pinned)
        self.n_selected += len(keys)


def least(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Each part's least time in rounds of the same work."""
    parts = {part: min(one["microseconds"][part] for one in rounds) for part in PARTS}
    return {**rounds[0], "microseconds": parts, "sum": sum(parts.values())}


def measure(router: str, policy: str, n_layer: int, n_expert: int, n_tokens: int) -> dict[str, Any]:
    """Microseconds of each part for each selected expert, with `n_layer` layers of `n_expert` experts."""
    rng = np.random.default_rng(n_layer)
    routers = [ROUTERS[router](n_expert, rng) for _ in range(n_layer)]
    clock = Clock()
    n_used = len(routers[0].route(next(hidden_states(1, rng))).experts)
    with tempfile.TemporaryDirectory(prefix="slimoe-scaling-") as directory:
        books = Bookkeeping(policy, n_layer, n_expert, n_used, Path(directory) / "trace")
        for hidden in hidden_states(n_tokens, rng):
            books.step([one.route(hidden) for one in routers], clock)
        books.cache.check()
        books.trace.close()
    n_selected = books.n_selected / n_tokens
    taken = {part: 1e6 * float(np.median(each[N_WARM:])) / n_selected for part, each in clock.seconds.items()}
    sizes = {"router": router, "n_layer": n_layer, "n_expert": n_layer * n_expert}
    return {**sizes, "hit_share": books.n_hits / books.n_selected, "microseconds": taken}


def table(rows: list[dict[str, Any]]) -> Table:
    """The figures for a person."""
    drawn = Table(title="microseconds for each selected expert")
    for column in ("router", "layers", "experts", "hits %", *PARTS, "sum"):
        drawn.add_column(column, justify="left" if column == "router" else "right")
    for row in rows:
        parts = [f"{row['microseconds'][part]:.2f}" for part in PARTS]
        hits = f"{100 * row['hit_share']:.0f}"
        drawn.add_row(row["router"], str(row["n_layer"]), f"{row['n_expert']:,}", hits, *parts, f"{row['sum']:.2f}")
    return drawn


@click.command()
@click.option("--router", "names", type=click.Choice(list(ROUTERS)), multiple=True, default=list(ROUTERS))
@click.option("--policy", default="lfu-decay", show_default=True)
@click.option("--million", is_flag=True, help="One layer of a million experts too, by product keys.")
@click.option("--smoke", is_flag=True, help="Seconds only: few tokens, up to a thousand experts.")
def main(names: tuple[str, ...], policy: str, million: bool, smoke: bool) -> None:
    """Measure the engine's bookkeeping with simulated routers."""
    shapes, n_tokens = (SHAPES[:2], N_WARM + 5) if smoke else (SHAPES, N_TOKENS)
    jobs: list[tuple[str, int, int]] = [(name, *shape) for name in names for shape in shapes]
    jobs += [("product-keys", 1, 1000**2)] if million else []
    rows = [
        least([measure(name, policy, n_layer, n_expert, n_tokens) for _ in range(1 if smoke else N_ROUNDS)])
        for name, n_layer, n_expert in jobs
    ]
    Console(stderr=True, width=None if sys.stderr.isatty() else 120).print(table(rows))
    print(json.dumps({"policy": policy, "rows": rows}))


if __name__ == "__main__":
    main()
