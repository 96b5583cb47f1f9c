"""`slimoe bench`: how fast this machine reads prompts and writes answers with a model, in llama-bench's table."""

import contextlib
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
import msgspec

from slimoe.offload.engine import Engine
from slimoe.offload.errors import UsageError
from slimoe.offload.gguf.header import shard_paths
from slimoe.offload.plan.prediction import known_as
from slimoe.offload.resources.memory import human
from slimoe.offload.text.generation import TierUse
from slimoe.server.jobs.local_engine import open_engine
from slimoe.server.options.engine_options import OptionsCommand, engine_config, engine_flags
from slimoe.server.options.serving_memory import running_bytes
from slimoe.server.terminal.interrupts import ending_at_interrupt


class Counts(click.ParamType[tuple[int, ...]]):
    """Numbers with commas between, as llama-bench takes them."""

    name = "N[,N]"

    def __init__(self, least: int, length: int | None = None) -> None:
        self._least, self._length = least, length

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Gives the numbers; fails for what is none, too small, or not as many as there must be."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        numbers = tuple(int(part) for part in parts if part.strip().isdecimal())
        if len(numbers) != len(parts) or min(numbers) < self._least or len(numbers) != (self._length or len(numbers)):
            many = "one or more numbers" if self._length is None else f"{self._length} numbers"
            self.fail(f"{value!r} are not {many} from {self._least} on, with commas between.", param, ctx)
        return numbers


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """The command's own flags."""

    n_prompt: tuple[int, ...]
    n_gen: tuple[int, ...]
    both: tuple[tuple[int, ...], ...]
    depth: tuple[int, ...]
    n_rounds: int
    as_json: bool


@dataclass(frozen=True, slots=True)
class Test:
    """What is measured: `n_prompt` tokens read, then `n_gen` written, after `depth` tokens."""

    n_prompt: int
    n_gen: int
    depth: int

    @property
    def name(self) -> str:
        """As llama-bench writes it."""
        parts = [f"pp{self.n_prompt}"] * bool(self.n_prompt) + [f"tg{self.n_gen}"] * bool(self.n_gen)
        return "+".join(parts) + (f" @ d{self.depth}" if self.depth else "")


@dataclass(frozen=True, slots=True)
class Measured:
    """A test's tokens per second: of the first pass, cold, and of the rounds after it, warm.

    `hit_share` is the part of the selected experts that were found in memory in the warm rounds.
    """

    test: Test
    cold: float
    warm: tuple[float, ...]
    hit_share: float | None

    @property
    def median(self) -> float:
        """Of the warm rounds."""
        return statistics.median(self.warm)

    @property
    def spread(self) -> float:
        """The warm rounds' standard deviation, 0 for a single one."""
        return statistics.stdev(self.warm) if len(self.warm) > 1 else 0.0

    def as_json(self) -> dict[str, Any]:
        """The figures by name."""
        return {
            "test": self.test.name,
            **msgspec.to_builtins(self.test),
            "cold_per_second": self.cold,
            "median_per_second": self.median,
            "stddev_per_second": self.spread,
            "rounds_per_second": list(self.warm),
            "hit_share": self.hit_share,
        }


@click.command("bench", cls=OptionsCommand)
@engine_flags
@click.option(
    "-p", "--n-prompt", type=Counts(0), default="512", show_default=True, help="Prompt tokens to read; 0 reads none."
)
@click.option("-n", "--n-gen", type=Counts(0), default="128", show_default=True, help="Tokens to write; 0 writes none.")
@click.option("-pg", "--both", type=Counts(1, 2), multiple=True, help="Read, then write: P,N. Repeatable.")
@click.option(
    "-d", "--depth", type=Counts(0), default="0", show_default=True, help="Tokens already in the context of each test."
)
@click.option(
    "-r",
    "--rounds",
    "n_rounds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Warm rounds to take medians over.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(values: Mapping[str, Any]) -> None:
    """Measure how fast MODEL reads a prompt and writes an answer here.

    The table is llama-bench's: pp512 is a prompt of 512 tokens, tg128 an answer of 128, d4096 the tokens before. Its
    last columns are tokens per second, cold and warm: the first pass of each test, and the median and the standard
    deviation of the rounds after it. The file's pages are dropped beforehand where the system lets them go. The tokens
    are random, as in llama-bench, and sampling is not counted. Other work on the machine spoils the figures. Without
    MODEL the built-in demo is used.
    """
    options = msgspec.convert(dict(values), BenchOptions)
    config = engine_config(values, running_bytes())
    if config.model.is_file():
        drop_pages(shard_paths(config.model))
    with ending_at_interrupt():
        engine = open_engine(config)
        try:
            found = [_measure(engine, test, options.n_rounds) for test in _tests(engine, options)]
            report = _report(engine, options, found)
        finally:
            engine.close()
    click.echo(msgspec.json.encode(report) if options.as_json else "\n".join(_table(report)))


def drop_pages(paths: Sequence[os.PathLike[str]]) -> None:
    """Lets the system forget what it keeps of files in memory, where it can be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _tests(engine: Engine, options: BenchOptions) -> list[Test]:
    pairs = [(n, 0) for n in options.n_prompt] + [(0, n) for n in options.n_gen] + [(p, n) for p, n in options.both]
    tests = [Test(*pair, depth) for depth in options.depth for pair in pairs if any(pair)]
    if not tests:
        raise UsageError("Nothing is to be read or written. Give -p or -n.")
    longest = max(test.depth + test.n_prompt + test.n_gen for test in tests)
    if longest > engine.n_ctx:
        raise UsageError(f"This takes {longest} tokens of context, but there are {engine.n_ctx}. Raise --ctx.")
    return tests


def _measure(engine: Engine, test: Test, n_rounds: int) -> Measured:
    draw = random.Random(1)
    tokens = [draw.randrange(engine.spec.n_vocab) for _ in range(test.depth + test.n_prompt + test.n_gen)]
    engine.truncate(0)
    if test.depth:
        engine.prefill(tokens[: test.depth])
    prompt, answer = tokens[test.depth : test.depth + test.n_prompt], tokens[test.depth + test.n_prompt :]
    seconds, before = [], engine.counters()
    for n in range(n_rounds + 1):
        engine.truncate(test.depth)
        begin = time.perf_counter()
        if prompt:
            engine.prefill(prompt)
        for token in answer:
            engine.decode(token)
        seconds.append(time.perf_counter() - begin)
        if n == 0:
            before = engine.counters()
    use = TierUse({name: total - before.get(name, 0.0) for name, total in engine.counters().items()})
    cold, *warm = ((test.n_prompt + test.n_gen) / one for one in seconds)
    return Measured(test, cold, tuple(warm), use.hit_share)


def _report(engine: Engine, options: BenchOptions, found: Sequence[Measured]) -> dict[str, Any]:
    """All figures; those that stand at the top are of the first test of each kind."""
    plan = engine.plan

    def first(is_kind: Callable[[Test], bool]) -> float | None:
        return next((one.median for one in found if is_kind(one.test)), None)

    decode = first(lambda test: not test.n_prompt)
    return {
        "model": str(engine.gguf.path),
        "name": engine.gguf.metadata.get("general.name") or engine.gguf.path.stem,
        "n_bytes": engine.gguf.n_bytes,
        "n_params": sum(tensor.n_elements for tensor in engine.gguf.tensors.values()),
        "backends": ["CPU", *(known_as(device.device) for device in plan.devices)],
        "n_threads": plan.n_threads,
        "weights": plan.weight_forms.mode,
        "n_prompt": options.n_prompt[0],
        "n_gen": options.n_gen[0],
        "depth": options.depth[0],
        "n_rounds": options.n_rounds,
        "prefill_per_second": first(lambda test: not test.n_gen),
        "decode_per_second": decode,
        "decode_ms": None if decode is None else 1000 / decode,
        "tests": [one.as_json() for one in found],
        "memory": engine.memory(),
    }


def _table(report: Mapping[str, Any]) -> list[str]:
    """The figures as Markdown, as llama-bench prints them."""
    head = ["model", "size", "params", "backend", "threads", "test", "t/s cold", "t/s"]
    left = [
        str(report["name"]),
        human(report["n_bytes"]),
        f"{report['n_params'] / 1e9:.2f} B" if report["n_params"] >= 1e9 else f"{report['n_params'] / 1e6:.2f} M",
        ", ".join(report["backends"]),
        str(report["n_threads"]),
    ]
    rows = [head]
    for test in report["tests"]:
        warm = f"{test['median_per_second']:.2f} ± {test['stddev_per_second']:.2f}"
        rows.append([*left, test["test"], f"{test['cold_per_second']:.2f}", warm])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(w) if n in (0, 3) else cell.rjust(w)
            for n, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    marks = ["-" * w if n in (0, 3) else "-" * (w - 1) + ":" for n, w in enumerate(widths)]
    return [line(rows[0]), line(marks), *map(line, rows[1:])]
