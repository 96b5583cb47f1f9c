"""What compressing gains in speed and memory, and what it takes: layers of true shape, in our engine.

A random checkpoint in bfloat16 is calibrated on random tokens and converted to F16, to plain Q4_K, and by recipes: the
paper's best, which leaves out the experts of a quarter of the layers and stores the rest in 4 bits (arXiv 2406.02500;
without importance, as the plain file), and ours, of so many bits per weight, in our own format and in llama.cpp's.
Every step runs alone in a process, timed, with its peak of memory. Then all files decode the same tokens in turn, each
alone in a process, in an order that turns from round to round. Ratios above 1 mean that the compressed file is faster.
The paper measured 6.05 times the speed with 77.1 % less memory, of which its plain 4 bits alone gave 5.08 times. What
whole models would take is computed by the formulas of `compress_projection`. Quality is nothing that random weights
have: see `bench.compress_quality`. The table goes to stderr, the last line of stdout is one JSON document.

    python -m bench.compress_speed --layers 4
"""

import json
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from bench.limits import machine
from bench.limits.flags import run_flags
from bench.models.shapes import SHAPES
from bench.quality.compress_runs import COMPRESSED, Plan, check_room, measure
from bench.quality.compress_speed_report import as_json, table
from slimoe.converter.stats.type_costs import CANDIDATES
from slimoe.offload.errors import SlimoeError
from slimoe.offload.resources.processors import default_threads

_DEFAULT_TYPES = "IQ1_M,IQ2_XXS,Q2_K,Q3_K,Q4_K,Q6_K"
OLD_FLAGS = {"slim": "files"}
"""Old spellings that are still understood for one version."""


def parse_types(_context: click.Context, _option: click.Parameter, text: str) -> tuple[str, ...]:
    """Reads names of types with commas between them; raises BadParameter."""
    names = tuple(name.strip().upper() for name in text.split(","))
    wrong = [name for name in names if name not in CANDIDATES]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} is no type to choose from. There are {', '.join(CANDIDATES)}.")
    return names


def smallest(plan: Plan) -> Plan:
    """The plan cut down to seconds: the smallest shape, one compressed file, and types that are quick to make."""
    compressed, types = ("native",) if "native" in plan.compressed else plan.compressed[:1], ("Q3_K", "Q6_K")
    plan = replace(plan, shape=SHAPES["smoke"], compressed=compressed, types=types, priced=types, bits=4.0)
    return replace(plan, n_tokens=64, n_decode=4, n_rounds=1, n_threads=1, alone=False)


@click.command(context_settings={"token_normalize_func": lambda name: OLD_FLAGS.get(name, name)})
@click.option("--layers", type=click.IntRange(1), default=4, show_default=True, help="Of Mixtral 8x7B's shape.")
@click.option("--files", type=click.Choice(COMPRESSED), multiple=True, default=COMPRESSED, help="Which to make [all].")
@click.option("--bpw", type=click.FloatRange(1), default=2.5, show_default=True, help="Bits per weight of our files.")
@click.option("--types", callback=parse_types, default=_DEFAULT_TYPES, show_default=True, help="To choose from.")
@click.option("--feedback", is_flag=True, help="Make up for errors of rounding in ours, and refit routers: slower.")
@click.option("--tokens", type=click.IntRange(16), default=2048, show_default=True, help="To calibrate on.")
@click.option("--decode", type=click.IntRange(1), default=32, show_default=True, help="Tokens of a round.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@run_flags
def main(
    layers: int,
    files: tuple[str, ...],
    bpw: float,
    types: tuple[str, ...],
    feedback: bool,
    tokens: int,
    decode: int,
    rounds: int,
    smoke: bool,
    allow_busy: bool,
) -> None:
    """Measure what compressing gains in speed and memory, and what it takes."""
    # Many gigabytes lie in the temporary directory: whoever ends this, they go.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    console = Console(stderr=True, width=120)
    shape = replace(SHAPES["mixtral"], n_layer=layers)
    try:
        load_before = machine.require_quiet(allow_busy=allow_busy, is_smoke=smoke)
        load = machine.OtherLoad()
        with tempfile.TemporaryDirectory(prefix="slimoe-bench-") as name:
            plan = Plan(
                Path(name),
                shape,
                files,
                bpw,
                types,
                CANDIDATES,
                feedback,
                tokens,
                decode,
                rounds,
                n_threads=default_threads(),
            )
            if smoke:
                plan = smallest(plan)
            check_room(plan)
            report = measure(plan, lambda line: console.print(line, markup=False))
            document = as_json(plan, report)
        console.print(table(document))
    except SlimoeError as error:
        console.print(str(error), markup=False)
        sys.exit(error.exit_code)
    loads = {"other_cores_before": load_before, "other_cores_during": load.cores()}
    print(json.dumps(document | loads | {"machine": machine.describe()}))


if __name__ == "__main__":
    main()
