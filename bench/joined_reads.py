"""What it brings to read experts that are neighbours in the file at once: requests and milliseconds per token.

A model's routers are watched over random texts, and the last text goes token by token through a cache that holds a
given part of the experts. What each layer misses is read from the file, around the page cache: every matrix by itself,
as the engine reads; neighbours at once; neighbours at once if the order by co-selection, learnt from the other texts,
were the file's; and as if all that is missing were neighbours, beyond which no order can go. The four take turns. As
many requests as are in flight go to as many threads, in parts of 2 MiB at most. The last line of stdout is one JSON
document.

    python -m bench.joined_reads --shape qwen3moe
"""

import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import local
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.limits import machine
from bench.limits.flags import run_flags, threads_flag
from bench.models.shapes import MODELS
from bench.routing_stats import opened, read_texts
from bench.traces.expert_order import PARTS, learnt_orders, missing
from bench.traces.routing import Routing, observe
from slimoe.offload.cache.router_trace import ANSWER, Trace, TraceHeader, TraceLayer, TraceRun, TraceStep
from slimoe.offload.errors import SlimoeError
from slimoe.offload.gguf.header import GGUFFile, TensorInfo, read_gguf
from slimoe.offload.resources.processors import default_threads

IN_FLIGHT = (2, 4, 8)
PAGE, MOST_BYTES = 4096, 2 << 20
Request = tuple[int, int]
"""Offset in the file and bytes, both multiples of a page."""


@dataclass(slots=True)
class Taken:
    """What one way of reading took: requests, bytes and seconds."""

    n_requests: int = 0
    n_bytes: int = 0
    seconds: float = 0.0


def requests(tensors: Sequence[TensorInfo], places: Sequence[int], *, joined: bool) -> list[Request]:
    """The requests for the matrices at these places of each tensor; neighbours share one where they are `joined`."""
    made = []
    for tensor in tensors:
        size = tensor.n_bytes // tensor.ne[2]
        runs: list[list[int]] = []
        for place in sorted(places):
            if joined and runs and runs[-1][1] == place:
                runs[-1][1] += 1
            else:
                runs.append([place, place + 1])
        for first, end in runs:
            begin = (tensor.offset + first * size) // PAGE * PAGE
            stop = -(-(tensor.offset + end * size) // PAGE) * PAGE
            made += [(at, min(MOST_BYTES, stop - at)) for at in range(begin, stop, MOST_BYTES)]
    return made


def ways(n_expert: int, by_co_selection: Sequence[int]) -> dict[str, Callable[[Sequence[TensorInfo], list[int]], Any]]:
    """By name, the requests for the experts that a layer misses."""
    place = np.argsort(by_co_selection).tolist()

    def neighbours(tensors: Sequence[TensorInfo], missed: list[int]) -> list[Request]:
        first = min(missed[0], n_expert - len(missed))
        return requests(tensors, range(first, first + len(missed)), joined=True)

    return {
        "apart": partial(requests, joined=False),
        "joined": partial(requests, joined=True),
        "joined, co-selection": lambda tensors, missed: requests(tensors, [place[e] for e in missed], joined=True),
        "all neighbours": neighbours,
    }


def trace_of(routing: Routing, n_bytes: int) -> Trace:
    """A text as a trace in which each token is an answer's."""
    n_layer, n_tokens, n_used = routing.selected.shape
    weights = routing.expert_weights.astype(np.float16)
    layers = [TraceLayer(n, routing.selected[n].astype(np.int32), weights[n]) for n in range(n_layer)]
    header = TraceHeader("observed", n_used, ((n_bytes,) * routing.n_expert,) * n_layer)
    return Trace(header, (TraceStep((TraceRun(ANSWER, 0, 0, n_tokens),), tuple(layers)),))


class Disk:
    """Reads requests of a file, `n_in_flight` at once."""

    def __init__(self, path: Path, n_in_flight: int) -> None:
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        self._threads, self._own = ThreadPoolExecutor(n_in_flight), local()

    def _read(self, request: Request) -> int:
        if not hasattr(self._own, "memory"):
            self._own.memory = memoryview(mmap.mmap(-1, MOST_BYTES))
        offset, n_bytes = request
        return os.preadv(self._file, [self._own.memory[:n_bytes]], offset)

    def read(self, wanted: Sequence[Request]) -> int:
        """Returns the bytes that were read, once all are."""
        return sum(self._threads.map(self._read, wanted))

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown()
        os.close(self._file)


def measure(gguf: GGUFFile, learnt: Trace, tried: Trace, part: float, n_in_flight: int) -> dict[str, Taken]:
    """What each way takes for all that is missing; the file has experts in every layer and is in one piece."""
    orders, n_expert = learnt_orders(learnt)["co-selection"], tried.header.n_expert
    by_layer = [ways(n_expert, order) for order in orders]
    tensors = [
        [gguf.tensors[f"blk.{layer}.ffn_{name}_exps.weight"] for name in ("gate", "up", "down")]
        for layer in range(tried.header.n_layer)
    ]
    taken = {name: Taken() for name in by_layer[0]}
    with ExitStack() as stack:
        disk = Disk(gguf.path, n_in_flight)
        stack.callback(disk.close)
        for number, (layer, missed) in enumerate(missing(tried, part)):
            names = list(taken)
            for name in names[number % len(names) :] + names[: number % len(names)] if missed else ():
                wanted = by_layer[layer][name](tensors[layer], missed)
                begin = time.perf_counter()
                taken[name].n_bytes += disk.read(wanted)
                taken[name].seconds += time.perf_counter() - begin
                taken[name].n_requests += len(wanted)
    return taken


def row(part: float, n_in_flight: int, n_tokens: int, taken: dict[str, Taken]) -> dict[str, Any]:
    """The figures of one part and number of requests in flight."""
    ways_taken = {
        name: {
            "requests_per_token": one.n_requests / n_tokens,
            "bytes_per_request": one.n_bytes / max(1, one.n_requests),
            "ms_per_token": 1e3 * one.seconds / n_tokens,
            "ratio": one.seconds / max(1e-9, taken["apart"].seconds),
        }
        for name, one in taken.items()
    }
    return {"part": part, "in_flight": n_in_flight, "tokens": n_tokens, "ways": ways_taken}


def table(rows: list[dict[str, Any]]) -> Table:
    """The figures for a person."""
    drawn = Table(title="reads of experts that are missing")
    for column in ("in memory %", "in flight", "way", "requests/token", "kB/request", "ms/token", "of apart"):
        drawn.add_column(column, justify="left" if column == "way" else "right")
    for one in rows:
        for name, way in one["ways"].items():
            figures = f"{way['requests_per_token']:.2f}", f"{way['bytes_per_request'] / 1e3:.0f}"
            times = f"{way['ms_per_token']:.2f}", f"{way['ratio']:.3f}"
            drawn.add_row(f"{100 * one['part']:.0f}", str(one["in_flight"]), name, *figures, *times)
    return drawn


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="A GGUF file, in one piece, instead of --shape.")
@click.option("--shape", type=click.Choice(MODELS), default="qwen3moe", show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=512, show_default=True, help="Tokens of each of four texts.")
@click.option("--part", "parts", type=click.FloatRange(0, 1), multiple=True, default=PARTS, help="Experts in memory.")
@threads_flag
@run_flags
def main(
    model: Path | None,
    shape: str,
    tokens: int,
    parts: tuple[float, ...],
    threads: int | None,
    smoke: bool,
    allow_busy: bool,
) -> None:
    """Measure what joined reads bring."""
    try:
        with opened(model, None, "smoke" if smoke else shape, "natural") as path:
            load = machine.require_quiet(allow_busy=allow_busy, is_smoke=smoke)
            gguf = read_gguf(path)
            ids = read_texts(path, (), "natural", 32 if smoke else tokens)
            expert_bytes = sum(
                tensor.n_bytes // tensor.ne[2]
                for name, tensor in gguf.tensors.items()
                if name.startswith("blk.0.ffn_") and name.endswith("_exps.weight")
            )
            *learnt, tried = (trace_of(one, expert_bytes) for one in observe(path, ids, threads or default_threads()))
            known = Trace(tried.header, tuple(step for trace in learnt for step in trace.steps))
            n_tokens, rows = len(ids[-1]), []
            for part in parts[:1] if smoke else parts:
                for n_in_flight in IN_FLIGHT[:1] if smoke else IN_FLIGHT:
                    taken = measure(gguf, known, tried, part, n_in_flight)
                    rows.append(row(part, n_in_flight, n_tokens, taken))
    except SlimoeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    Console(stderr=True, width=None if sys.stderr.isatty() else 100).print(table(rows))
    print(json.dumps({"rows": rows, "other_cores_before": load, "machine": machine.describe()}))


if __name__ == "__main__":
    main()
