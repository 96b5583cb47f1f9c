"""`slimoe bench`: how fast this machine reads prompts and writes answers with a model."""

import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click
import msgspec

from slimoe.offload.engine import Engine
from slimoe.offload.errors import UsageError
from slimoe.server.jobs.local_engine import open_engine
from slimoe.server.options.engine_options import OptionsCommand, engine_config, engine_flags
from slimoe.server.options.serving_memory import running_bytes


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """The command's own flags."""

    n_prompt: int
    n_gen: int
    depth: int
    n_rounds: int
    as_json: bool


@dataclass(frozen=True, slots=True)
class Speeds:
    """Medians over the rounds, in tokens per second, and the milliseconds of one decoded token."""

    prefill_per_second: float
    decode_per_second: float
    decode_ms: float


@click.command("bench", cls=OptionsCommand)
@engine_flags
@click.option(
    "-p",
    "--n-prompt",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Prompt tokens to read in each round.",
)
@click.option(
    "-n", "--n-gen", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens to write in each round."
)
@click.option(
    "-d", "--depth", type=click.IntRange(min=0), default=0, show_default=True, help="Tokens already in the context."
)
@click.option(
    "-r",
    "--rounds",
    "n_rounds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Rounds to take the medians over.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(values: Mapping[str, Any]) -> None:
    """Measure how fast MODEL reads a prompt and writes an answer here, as medians over several rounds.

    The tokens are random, as in llama-bench, and sampling is not counted. Other work on the machine spoils the
    figures. Without MODEL the built-in demo is used.
    """
    options = msgspec.convert(dict(values), BenchOptions)
    engine = open_engine(engine_config(values, running_bytes()))
    try:
        speeds = _measure(engine, options)
        report = {
            "model": str(engine.gguf.path),
            "n_threads": engine.plan.n_threads,
            "weights": engine.plan.weight_forms.mode,
            **{name: getattr(options, name) for name in ("n_prompt", "n_gen", "depth", "n_rounds")},
            **msgspec.to_builtins(speeds),
            "memory": engine.memory(),
        }
    finally:
        engine.close()
    if options.as_json:
        click.echo(msgspec.json.encode(report))
        return
    click.echo(
        f"read  {options.n_prompt:>5} tokens at depth {options.depth}: {speeds.prefill_per_second:9.2f} tokens/s"
    )
    click.echo(f"write {options.n_gen:>5} tokens at depth {options.depth}: {speeds.decode_per_second:9.2f} tokens/s")


def _measure(engine: Engine, options: BenchOptions) -> Speeds:
    longest = options.depth + max(options.n_prompt, options.n_gen)
    if longest > engine.n_ctx:
        raise UsageError(f"This takes {longest} tokens of context, but there are {engine.n_ctx}. Raise --ctx.")
    draw = random.Random(1)
    tokens = [draw.randrange(engine.spec.n_vocab) for _ in range(longest)]
    if options.depth:
        engine.prefill(tokens[: options.depth])
    new = tokens[options.depth :]
    prefills, decodes = [], []
    for _ in range(options.n_rounds + 1):
        engine.truncate(options.depth)
        begin = time.perf_counter()
        engine.prefill(new[: options.n_prompt])
        prefills.append(time.perf_counter() - begin)
        engine.truncate(options.depth)
        begin = time.perf_counter()
        for token in new[: options.n_gen]:
            engine.decode(token)
        decodes.append(time.perf_counter() - begin)
    # The first round warms up: it builds graphs and touches memory.
    prefill, decode = statistics.median(prefills[1:]), statistics.median(decodes[1:])
    return Speeds(options.n_prompt / prefill, options.n_gen / decode, 1000 * decode / options.n_gen)
