"""A model larger than its memory, next to llama.cpp: both in turn, each alone in a process under the same hard limit.

The limit is the file's size over the ratio (2: the file is twice as large as the memory). It counts the page cache,
which is emptied of the file before every run. Both read the same tokens, so that they need the same experts: random
ones (--routing uniform, the adversarial case), or ones whose experts last and can be predicted about as a trained
model's (natural). llama.cpp maps the file; its rearranged weights, which it keeps in memory of its own besides, are
tried where the file fits. With --ik, which names a Python that has ik-llama-cpp-python, that fork runs as well. The
bound is what the machine allows: the longer of computing a token with everything in memory and of reading what the
cache missed as fast as the disk gives it. Before each run of ours its plan is asked how long a token will take. The
table goes to stderr, the last line of stdout is one JSON document. A ratio of times above 1 means that
ours is faster. Linux only, see `bench.limits.cgroup`.

    python -m bench.offload --model qwen3moe --ratio 1.4 --ratio 2
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import click
from rich.console import Console

from bench.limits import machine
from bench.limits.cgroup import NoControlGroupError, memory_group
from bench.limits.engine_changes import parse_changes
from bench.limits.flags import ik_flag, ik_python, run_flags, threads_flag
from bench.limits.limited_runs import Limit, Plan, measure
from bench.models.random_checkpoint import write_random_checkpoint
from bench.models.random_model import random_model_file
from bench.models.shapes import MODELS, SHAPES
from bench.models.topics import STYLES, TOKENS
from bench.quality.offload_report import as_json, table
from slimoe.converter.convert import ConvertOptions, convert
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.plan.budget import parse_size
from slimoe.offload.resources.memory import available_bytes
from slimoe.offload.resources.processors import default_threads

RATIOS = ("0.9", "1.4", "2")
N_PROMPT, N_WARM = 64, 16
OLD_FLAGS = {"pair": "copies"}
"""Old spellings that are still understood for one version."""
_SMOKE_LIMIT = Limit("smoke", 1 << 30, fits=True)
_WITHOUT_LIMIT = 1.5
"""So many times the file's size must be free for runs without a limit: the file, and a rearranged copy of most."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """How much is run: rounds, and tokens of the prompt, to warm up with, and to measure."""

    n_rounds: int
    n_prompt: int
    n_warm: int
    n_measured: int


def make_plan(model: Path, own_model: Path, limits: tuple[Limit, ...], routing: str, lengths: Lengths) -> Plan:
    """The runs of both files with one thread; raises ModelFileError."""
    n_tokens = lengths.n_prompt + lengths.n_warm + lengths.n_measured
    tokens = TOKENS[routing](n_tokens, read_gguf(model).tensors["token_embd.weight"].ne[1])
    return Plan(
        model,
        own_model,
        limits,
        n_threads=1,
        n_rounds=lengths.n_rounds,
        prompt=tuple(tokens[: lengths.n_prompt]),
        tokens=tuple(tokens[lengths.n_prompt :]),
        n_warm=lengths.n_warm,
        piece_bytes=expert_matrix_bytes(own_model),
    )


def limits_for(model: Path, ratios: tuple[str, ...]) -> tuple[Limit, ...]:
    """No limit, where the machine holds the file, and the file's size over each ratio, or that size in bytes.

    Raises UsageError and ModelFileError.
    """
    size = read_gguf(model).n_bytes
    limits = [Limit("unlimited", None, fits=True)] if _WITHOUT_LIMIT * size < available_bytes() else []
    for ratio in ratios:
        try:
            value = float(ratio)
        except ValueError:
            n_bytes = parse_size(ratio, size, "--ratio") or size
        else:
            if value <= 0:
                raise UsageError(f"--ratio is the file's size over the memory's and must be above 0, got {ratio}.")
            n_bytes = int(size / value)
        limits.append(Limit(ratio, n_bytes, fits=n_bytes > size))
    return tuple(limits)


def expert_matrix_bytes(model: Path) -> int:
    """The size of the largest matrix of an expert, or of any matrix where there are no experts."""
    tensors = read_gguf(model).tensors.values()
    sizes = [tensor.n_bytes // tensor.ne[2] for tensor in tensors if len(tensor.ne) > 2 and tensor.ne[2] > 1]
    return max(sizes or [tensor.n_bytes for tensor in tensors])


@contextmanager
def opened(model: str, copies: str | None, routing: str) -> Iterator[tuple[Path, Path]]:
    """llama.cpp's file and ours: files of these names, or random ones of that shape, deleted at the end.

    Raises UsageError, and ModelFileError and UnsupportedModelError as the conversion does.
    """
    if copies is not None and "," in copies:
        if model not in SHAPES:
            raise UsageError(f"--copies {copies} is made of random weights: --model must be one of {' '.join(SHAPES)}.")
        with tempfile.TemporaryDirectory(prefix="slimoe-copies-") as directory:
            yield write_copies(Path(directory), model, copies, routing)
    elif model in MODELS:
        with random_model_file(model, routing=routing) as path:
            yield path, Path(copies or path)
    else:
        yield Path(model), Path(copies or model)


def write_copies(directory: Path, shape: str, copies: str, routing: str) -> tuple[Path, Path]:
    """Writes the same random weights twice: a stock file of the better type, and a file with two copies of experts."""
    checkpoint, stock, native = (
        directory / "checkpoint",
        directory / f"{shape}.gguf",
        directory / f"{shape}-copies.gguf",
    )
    write_random_checkpoint(checkpoint, SHAPES[shape], routing=routing)
    convert(ConvertOptions(checkpoint, stock, copies.partition(",")[0]))
    convert(ConvertOptions(checkpoint, native, pair=copies))
    shutil.rmtree(checkpoint)
    return stock, native


def smoke_limits() -> tuple[Limit, ...]:
    """A limit that holds everything, or none where no limit can be set."""
    try:
        with memory_group(1 << 30):
            return (_SMOKE_LIMIT,)
    except NoControlGroupError as error:
        print(error, file=sys.stderr)
        return (Limit("unlimited", None, fits=True),)


@click.command(context_settings={"token_normalize_func": lambda name: OLD_FLAGS.get(name, name)})
@click.option("--model", default="design8", show_default=True, help="A file, or a shape for random weights.")
@click.option("--copies", help="Two copies of each expert for our engine: types such as Q4_K,Q2_K, or a native file.")
@click.option("--routing", type=click.Choice(list(STYLES)), default="natural", show_default=True)
@click.option("--ratio", "ratios", multiple=True, default=RATIOS, show_default=True, help="Or memory such as 12GiB.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=32, show_default=True, help="Measured tokens of a run.")
@threads_flag
@click.option("--engine", multiple=True, metavar="FIELD=VALUE", help="Changes our engine's configuration.")
@ik_flag
@run_flags
def main(
    model: str,
    copies: str | None,
    routing: str,
    ratios: tuple[str, ...],
    rounds: int,
    tokens: int,
    threads: int | None,
    engine: tuple[str, ...],
    smoke: bool,
    allow_busy: bool,
) -> None:
    """Measure decoding of a model that is larger than its memory against llama.cpp."""
    console = Console(stderr=True)
    lengths = Lengths(1, 8, 1, 4) if smoke else Lengths(rounds, N_PROMPT, min(N_WARM, tokens), tokens)
    try:
        changes = parse_changes(engine)
        with ExitStack() as stack:
            path, own = stack.enter_context(opened("smoke" if smoke else model, copies, routing))
            limits = smoke_limits() if smoke else limits_for(path, ratios)
            plan = make_plan(path, own, limits, routing, lengths)
            plan = replace(plan, n_threads=threads or default_threads(), engine=changes, ik=ik_python())
            load_before = machine.require_quiet(allow_busy=allow_busy, is_smoke=smoke)
            load = machine.OtherLoad()
            runs = measure(plan, console.print)
            document = as_json(plan, runs)
            console.print(table(plan, document))
            loads = {"other_cores_before": load_before, "other_cores_during": load.cores()}
    except SlimoeError as error:
        console.print(str(error), markup=False)
        sys.exit(error.exit_code)
    about = {"model": path.name, "copies": copies, "pair": copies, "routing": routing, "machine": machine.describe()}
    print(json.dumps(document | loads | about))


if __name__ == "__main__":
    main()
