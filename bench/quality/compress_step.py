"""One step of compressing alone in its process, so that its time and its peak of memory are its own.

The step is an argument, its job comes as JSON on stdin, what it took goes as JSON to stdout; `run_step` does all that.
Steps import what they use themselves: what others need would count into their memory.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimoe.offload.errors import SlimoeError
from slimoe.offload.resources.memory import peak_resident_bytes

if TYPE_CHECKING:
    from slimoe.converter.source.model_source import ModelSource


class StepFailedError(SlimoeError):
    """A step ended without the figures that it was started for."""


@dataclass(frozen=True, slots=True)
class CalibrationJob:
    """Calibrates on texts of token ids, the first `n_sensitivity` tokens backwards too, and prices `types`.

    The pass tries no types on experts; `tried` are tried on the first expert alone, to know how long that takes.
    """

    source: str
    target: str
    texts: list[list[int]]
    types: list[str]
    tried: list[str]
    n_sensitivity: int
    n_sketch: int
    n_threads: int


@dataclass(frozen=True, slots=True)
class ConversionJob:
    """Converts a checkpoint to the type `kind`."""

    source: str
    target: str
    kind: str
    n_threads: int


@dataclass(frozen=True, slots=True)
class CompressionJob:
    """Compresses a checkpoint by a recipe, which is the text of its TOML file."""

    source: str
    target: str
    recipe: str
    statistics: str
    n_threads: int


Job = CalibrationJob | ConversionJob | CompressionJob


@dataclass(frozen=True, slots=True)
class Taken:
    """Seconds by part of the work, the peak of resident memory, and the result's bytes, by type too for a model.

    Starting Python and loading its libraries counts into memory only.
    """

    parts: dict[str, float]
    peak_resident: int
    n_bytes: int
    bytes_by_type: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """The seconds of all parts."""
        return sum(self.parts.values())


class Laps:
    """Times parts of work that follow each other."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._what, self._begin = "", time.perf_counter()

    def now(self, what: str, _done: int = 0, _all: int = 0) -> None:
        """Begins the part of the work that is named, and ends the one before if that had another name."""
        if what != self._what:
            end = time.perf_counter()
            if self._what:
                self.parts[self._what] = self.parts.get(self._what, 0.0) + end - self._begin
            self._what, self._begin = what, end


def calibration(job: CalibrationJob, laps: Laps) -> dict[str, int]:
    """Calibrates and saves the statistics; raises as `calibrate` does."""
    import torch

    from slimoe.converter.forward.texts import CalibrationText
    from slimoe.converter.source.open_source import open_source
    from slimoe.converter.stats.forward_pass import CalibrationSettings, calibrate
    from slimoe.converter.stats.observer import Samples
    from slimoe.converter.stats.statistics_file import save_statistics
    from slimoe.converter.stats.type_costs import measure_type_costs, packed_costs

    target, texts = Path(job.target), tuple(map(tuple, job.texts))
    torch.set_num_threads(job.n_threads)
    laps.now("open")
    source = open_source(Path(job.source))
    samples = Samples(types=(), n_gram=job.n_sketch)
    settings = CalibrationSettings(samples, n_sensitivity=job.n_sensitivity, n_threads=job.n_threads)
    text = CalibrationText(texts, ("random",) * len(texts))
    statistics = calibrate(source, text, settings, target.with_suffix(".partial"), laps.now)
    if job.types:
        laps.now("prices")
        costs = measure_type_costs(source, statistics, types=job.types, n_threads=job.n_threads)
        statistics = replace(statistics, matrix_costs=packed_costs(costs))
    if job.tried:
        laps.now("types")
        try_types(source, job)
    laps.now("save")
    save_statistics(statistics, target)
    return {}


def try_types(source: "ModelSource", job: CalibrationJob) -> None:
    """Does for one expert what a calibration does for each, on as many inputs."""
    import torch

    from slimoe.converter.forward.block import read_expert
    from slimoe.converter.stats.observer import Samples
    from slimoe.converter.stats.type_errors import TypeErrorTable

    samples, spec = Samples(), source.spec
    table = TypeErrorTable(source, 0, tuple(job.tried), samples.n_rows, job.n_threads)
    expert = read_expert(source, 0, 0)
    x, weights = torch.randn(samples.n_tokens, spec.n_embd), torch.full((samples.n_tokens,), 0.5)
    importance = np.ones(spec.n_embd, np.float32), np.ones(expert.down.weight.shape[1], np.float32)
    table.measure(0, expert, x, weights, importance)


def conversion(job: ConversionJob, laps: Laps) -> dict[str, int]:
    """Converts; returns bytes by type. Raises as `convert` does."""
    from slimoe.converter.convert import ConvertOptions, convert

    laps.now("write")
    return convert(ConvertOptions(Path(job.source), Path(job.target), job.kind, job.n_threads)).bytes_by_type


def compressing(job: CompressionJob, laps: Laps) -> dict[str, int]:
    """Plans and writes; returns bytes by type. Raises as `plan_compression` and `write_planned` do."""
    from slimoe.converter.budget.compress import plan_compression
    from slimoe.converter.recipe.fields import SourceSizes
    from slimoe.converter.recipe.toml_file import parse_recipe
    from slimoe.converter.source.open_source import open_source
    from slimoe.converter.stats.statistics_file import load_statistics
    from slimoe.converter.write.writer import chosen_quantiser, write_planned

    laps.now("plan")
    source = open_source(Path(job.source))
    statistics = load_statistics(Path(job.statistics), source)
    recipe = parse_recipe(job.recipe, SourceSizes(source.spec.n_layer, source.spec.n_expert, source.spec.n_ff))
    plan = plan_compression(source, statistics, recipe, n_threads=job.n_threads)
    laps.now("write")
    quantiser = chosen_quantiser(source, plan, statistics, job.n_threads)
    done = write_planned(source, plan, Path(job.target), statistics, quantiser=quantiser, n_threads=job.n_threads)
    return done.bytes_by_type


STEPS: dict[str, tuple[type[Any], Callable[[Any, Laps], dict[str, int]]]] = {
    "calibrate": (CalibrationJob, calibration),
    "convert": (ConversionJob, conversion),
    "compress": (CompressionJob, compressing),
}


def run_step(job: Job) -> Taken:
    """Carries out a job in a process of its own; raises StepFailedError."""
    command = [sys.executable, "-m", "bench.quality.compress_step", _name(job)]
    done = subprocess.run(command, input=json.dumps(asdict(job)), capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise StepFailedError(f"The step {_name(job)} of {Path(job.target).name} failed: {why}")
    return Taken(**json.loads(done.stdout.splitlines()[-1]))


def run_here(job: Job) -> Taken:
    """Carries out a job in this process, whose peak of memory is then everything's; raises as the step does."""
    laps = Laps()
    bytes_by_type = STEPS[_name(job)][1](job, laps)
    laps.now("")
    return Taken(laps.parts, peak_resident_bytes(), Path(job.target).stat().st_size, bytes_by_type)


def _name(job: Job) -> str:
    return next(name for name, (kind, _) in STEPS.items() if isinstance(job, kind))


def main() -> None:
    """Carries out the job on stdin; exits as the `slimoe` command does."""
    job: Job = STEPS[sys.argv[1]][0](**json.load(sys.stdin))
    try:
        taken = run_here(job)
    except SlimoeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(asdict(taken)))


if __name__ == "__main__":
    main()
