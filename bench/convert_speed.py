"""Conversion next to `llama_model_quantize`: the same tensors to the same types, with the same threads, in turn.

Ours reads a random bfloat16 checkpoint, llama.cpp's a bfloat16 GGUF of the same tensors; both write the same blocks,
which is checked. Ours syncs the file to disk, llama.cpp does not. Peak memory is measured in a child process.
`convert_vs_llamacpp` above 1 means that ours is the faster. The last line of stdout is one JSON document.

    python -m bench.convert_speed --shape design8 --layers 1 --type Q4_K
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from bench.baselines.llama_cpp import llama_quantize
from bench.limits import machine
from bench.limits.flags import run_flags, threads_flag
from bench.models.random_checkpoint import write_random_checkpoint
from bench.models.shapes import SHAPES
from slimoe.converter.convert import ConvertOptions, convert
from slimoe.converter.quant.mixes import find_recipe
from slimoe.offload.errors import SlimoeError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.resources.processors import default_threads

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q4_0", "IQ4_NL", "IQ4_XS")
ALLOWANCE = 1 << 30
# Not the parent's view of the child's usage: that counts the parent's own memory, which a fork shares.
_MEASURED_CHILD = """
import sys
from pathlib import Path
from slimoe.converter.convert import ConvertOptions, convert
source, target, kind, n_threads = sys.argv[1:]
convert(ConvertOptions(Path(source), Path(target), kind, int(n_threads), force=True))
status = Path("/proc/self/status").read_text()
print(int(status.partition("VmHWM:")[2].split()[0]) * 1024)
"""


class ChildFailedError(SlimoeError):
    """The conversion in a process of its own failed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is converted, to which type, and how often; all files lie in `directory`."""

    directory: Path
    kind: str
    n_threads: int
    n_rounds: int

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that our conversion reads."""
        return self.directory / "checkpoint"

    @property
    def bf16(self) -> Path:
        """The same weights as a GGUF file in BF16, which llama.cpp reads."""
        return self.directory / "bf16.gguf"


def convert_once(plan: Plan, target: Path) -> float:
    """Seconds that our conversion takes, planning included."""
    begin = time.perf_counter()
    convert(ConvertOptions(plan.checkpoint, target, plan.kind, plan.n_threads, force=True))
    return time.perf_counter() - begin


def quantize_once(plan: Plan, target: Path) -> float:
    """Seconds that llama.cpp takes for the same types; raises QuantizerError."""
    recipe = find_recipe(plan.kind)
    output_type = recipe.type_of("output.weight", 1, moe=True, tied=False)
    begin = time.perf_counter()
    llama_quantize(plan.bf16, target, int(recipe.file_type), plan.n_threads, pure=True, output_type=output_type)
    return time.perf_counter() - begin


def peak_bytes(plan: Plan, target: Path) -> int:
    """Peak resident memory of the conversion in a process of its own; raises ChildFailedError when that fails."""
    arguments = [str(plan.checkpoint), str(target), plan.kind, str(plan.n_threads)]
    command = [sys.executable, "-c", _MEASURED_CHILD, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChildFailedError(f"The conversion failed in a process of its own: {done.stderr}")
    return int(done.stdout)


def same_blocks(ours: Path, theirs: Path) -> bool:
    """Whether both files hold the same tensors, byte for byte."""
    first, second = read_gguf(ours), read_gguf(theirs)
    if first.tensors.keys() != second.tensors.keys():
        return False
    with ours.open("rb") as left, theirs.open("rb") as right:
        for name, tensor in first.tensors.items():
            other = second.tensors[name]
            left.seek(tensor.offset)
            right.seek(other.offset)
            if tensor.type != other.type or left.read(tensor.n_bytes) != right.read(other.n_bytes):
                return False
    return True


def measure(plan: Plan) -> dict[str, Any]:
    """The figures of all rounds, ours and llama.cpp's in turn; one of each goes before and does not count."""
    ours, theirs = plan.directory / "ours.gguf", plan.directory / "theirs.gguf"
    rounds = [(convert_once(plan, ours), quantize_once(plan, theirs)) for _ in range(plan.n_rounds + 1)][1:]
    largest = max(tensor.n_elements for tensor in read_gguf(ours).tensors.values())
    return {
        "convert_vs_llamacpp": statistics.median(their / our for our, their in rounds),
        "seconds": statistics.median(our for our, _ in rounds),
        "llamacpp_seconds": statistics.median(their for _, their in rounds),
        "same_blocks": same_blocks(ours, theirs),
        "peak_rss_bytes": peak_bytes(plan, ours),
        "peak_rss_bound_bytes": 4 * largest + ALLOWANCE,
        "weights": sum(tensor.n_elements for tensor in read_gguf(ours).tensors.values()),
        "type": plan.kind,
        "threads": plan.n_threads,
        "rounds": plan.n_rounds,
    }


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="design8", show_default=True)
@click.option("--layers", type=click.IntRange(1), default=1, show_default=True)
@click.option("--type", "kind", type=click.Choice(TYPES), default="Q4_K", show_default=True)
@threads_flag
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@run_flags
def main(shape: str, layers: int, kind: str, threads: int | None, rounds: int, smoke: bool, allow_busy: bool) -> None:
    """Compare the conversion's speed with llama.cpp's quantiser, and its memory with the bound."""
    name = "smoke" if smoke else shape
    try:
        load_before = machine.require_quiet(allow_busy=allow_busy, is_smoke=smoke)
        with tempfile.TemporaryDirectory(prefix="slimoe-bench-") as directory:
            plan = Plan(Path(directory), kind, threads or default_threads(), 1 if smoke else rounds)
            write_random_checkpoint(plan.checkpoint, replace(SHAPES[name], n_layer=layers))
            convert(ConvertOptions(plan.checkpoint, plan.bf16, "BF16", plan.n_threads))
            figures = measure(plan)
    except SlimoeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    about = {"shape": name, "layers": layers, "other_cores_before": load_before, "machine": machine.describe()}
    print(json.dumps(figures | about))


if __name__ == "__main__":
    main()
