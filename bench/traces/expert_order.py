"""What the order of experts in a file brings where neighbours are read at once: reads per token, and bytes per read.

The traces' tokens, prompts included, are taken one by one, as if each were decoded, through a cache that keeps a given
part of the experts. Of those that a layer misses, neighbours in the file are one read for each of the three matrices.
Orders are learnt from one trace and tried on another. The last line of stdout is one JSON document.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from slimoe.converter.methods.expert_order import co_selection_order
from slimoe.offload.cache.policy import PolicyContext, make_policy
from slimoe.offload.cache.residency import SlotCache, most_valuable
from slimoe.offload.cache.router_trace import Trace, read_trace

PARTS = (0.25, 0.5, 0.75)
N_MATRICES = 3
Orders = dict[str, list[list[int]]]
"""By name, for each layer its experts in the order of the file."""


def tokens(trace: Trace) -> Iterator[list[tuple[int, list[int]]]]:
    """The layers and selected experts of each token for which all layers were computed."""
    for step in trace.steps:
        n_rows = min((len(part.selected) for part in step.layers), default=0)
        for row in range(-n_rows, 0):
            yield [(part.layer, [e for e in part.selected[row].tolist() if e >= 0]) for part in step.layers]


def pair_counts(trace: Trace) -> NDArray[np.int64]:
    """How many tokens select two experts of a layer together, [n_layer, n_expert, n_expert]."""
    header = trace.header
    counts = np.zeros((header.n_layer, header.n_expert, header.n_expert), np.int64)
    for token in tokens(trace):
        for layer, experts in token:
            counts[layer][np.ix_(experts, experts)] += 1
    return counts


def learnt_orders(trace: Trace) -> Orders:
    """The orders that are compared."""
    sizes = [len(layer) for layer in trace.header.expert_bytes]
    counts = [pairs[:n, :n] for pairs, n in zip(pair_counts(trace), sizes, strict=True)]
    return {
        "router": [list(range(n)) for n in sizes],
        "use": [np.argsort(-np.diag(pairs), kind="stable").tolist() for pairs in counts],
        "co-selection": [co_selection_order(pairs) for pairs in counts],
    }


def n_runs(places: NDArray[np.int64]) -> int:
    """Runs of neighbouring places."""
    return int(np.count_nonzero(np.diff(np.sort(places)) != 1)) + 1 if len(places) else 0


def missing(trace: Trace, part: float) -> Iterator[tuple[int, list[int]]]:
    """What each layer misses of what a token selects, token by token, in a cache that holds a `part` of the experts."""
    header = trace.header
    keys = [(layer, expert) for layer, sizes in enumerate(header.expert_bytes) for expert in range(len(sizes))]
    policy = make_policy("lfu-decay", PolicyContext(header.n_layer, header.n_expert, header.n_expert_used))
    cache = SlotCache(max(header.n_expert_used, int(part * len(keys))), policy)
    for key in most_valuable(policy.values, keys, cache.n_slots):
        cache.acquire(key)
    for token in tokens(trace):
        for layer, experts in token:
            policy.decode(layer, experts)
            selected = {(layer, expert) for expert in experts}
            missed = [expert for expert in experts if (layer, expert) not in cache]
            for expert in missed:
                cache.acquire((layer, expert), selected)
            yield layer, missed
        policy.end_token()


def try_orders(trace: Trace, orders: Orders, part: float) -> dict[str, Any]:
    """Reads and bytes of a trace whose cache holds a `part` of the experts."""
    places = {name: [np.argsort(own) for own in order] for name, order in orders.items()}
    reads, n_bytes, n_missed, n_tokens = Counter[str](), 0, 0, sum(1 for _ in tokens(trace))
    for layer, missed in missing(trace, part):
        n_missed += len(missed)
        n_bytes += sum(trace.header.expert_bytes[layer][expert] for expert in missed)
        for name, own in places.items():
            reads[name] += N_MATRICES * n_runs(own[layer][missed])
    by_order = {
        name: {
            "reads_per_token": reads[name] / n_tokens,
            "bytes_per_read": n_bytes / max(1, reads[name]),
            "ratio": reads[name] / max(1, reads["router"]),
        }
        for name in orders
    }
    return {"part": part, "tokens": n_tokens, "missed_per_token": n_missed / n_tokens, "orders": by_order}


def table(rows: list[dict[str, Any]]) -> Table:
    """The figures for a person."""
    drawn = Table(title="reads of experts that are missing")
    for column in ("in memory %", "order", "misses/token", "reads/token", "kB/read", "of the router's order"):
        drawn.add_column(column, justify="left" if column == "order" else "right")
    for row in rows:
        for name, one in row["orders"].items():
            cells = f"{one['reads_per_token']:.2f}", f"{one['bytes_per_read'] / 1e3:.1f}", f"{one['ratio']:.3f}"
            drawn.add_row(f"{100 * row['part']:.0f}", name, f"{row['missed_per_token']:.2f}", *cells)
    return drawn


@click.command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option("--learn", required=True, type=click.Path(path_type=Path), help="A trace of other text of the model.")
@click.option("--part", "parts", type=click.FloatRange(0, 1), multiple=True, default=PARTS, help="Experts in memory.")
def main(trace: Path, learn: Path, parts: tuple[float, ...]) -> None:
    """Try orders of experts on TRACE."""
    tried = read_trace(trace)
    orders = learnt_orders(read_trace(learn, tried.header.model))
    rows = [try_orders(tried, orders, part) for part in parts]
    Console(stderr=True, width=None if sys.stderr.isatty() else 100).print(table(rows))
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
