"""Makes compressed files of a random checkpoint and decodes them in turn, every step alone in a process."""

import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.baselines.stepping import random_tokens
from bench.limits import isolated_run
from bench.limits.isolated_run import OURS, Outcome
from bench.limits.limited_runs import BenchChildError, run_candidate
from bench.models.random_checkpoint import write_random_checkpoint
from bench.models.shapes import Shape
from bench.quality.compress_projection import Calibrated, Density, Weights
from bench.quality.compress_step import CalibrationJob, CompressionJob, ConversionJob, Job, Taken, run_here, run_step
from slimoe.converter.forward.texts import DEFAULT_LENGTH
from slimoe.converter.recipe.recipe import FitRecipe, Recipe, StorageRecipe
from slimoe.converter.recipe.toml_file import recipe_text
from slimoe.converter.stats.type_errors import DEFAULT_TYPES
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.resources.memory import available_bytes, human, require

F16, Q4_K = "F16", "Q4_K"
COMPRESSED = ("layer-drop", "native", "stock")
_PROMPT, _WARM = 16, 4
_SHORT, _LONG = "short", "long"
_SHORTER = 8
"""So many times shorter is the calibration that tells what does not depend on tokens."""
_SPARE_MEMORY = 2 << 30
_CHECKPOINTS_ON_DISK = 3
"""The checkpoint, its F16 and all smaller files take no more than this many times its bytes."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is made and measured; all files lie in `directory`. `types` are chosen from, `priced` are priced.

    Each step is `alone` in a process, or all are in this one, where peaks of memory mean nothing.
    """

    directory: Path
    shape: Shape
    compressed: tuple[str, ...]
    bits: float
    types: tuple[str, ...]
    priced: tuple[str, ...]
    feedback: bool
    n_tokens: int
    n_decode: int
    n_rounds: int
    n_threads: int
    alone: bool = True

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that all files are made of."""
        return self.directory / "checkpoint"

    @property
    def statistics(self) -> Path:
        """The statistics of the longer calibration."""
        return self.directory / f"{_LONG}.stats"

    def file(self, name: str) -> Path:
        """The path of the file of that name."""
        return self.directory / f"{name}.gguf"

    def recipe(self, name: str) -> Recipe:
        """The recipe of one of COMPRESSED."""
        if name == "layer-drop":
            kept = StorageRecipe(expert=Q4_K)
            n_drop = max(1, round(self.shape.n_layer / 4))
            return Recipe(drop_ffn=n_drop, types=kept, fit=FitRecipe(importance=False), hints=False)
        fit = FitRecipe(feedback=self.feedback, refit=self.feedback)
        recipe = Recipe(target_bpw=self.bits, types=StorageRecipe(candidates=self.types), fit=fit)
        return replace(recipe, format="stock") if name == "stock" else recipe


@dataclass(slots=True)
class Report:
    """Everything measured: calibrations, and by file how it was made, what it is, and each round of decoding."""

    calibrations: list[Calibrated] = field(default_factory=list)
    made: dict[str, Taken] = field(default_factory=dict)
    densities: dict[str, Density] = field(default_factory=dict)
    rounds: dict[str, list[Outcome]] = field(default_factory=dict)

    def step_seconds(self, name: str) -> float:
        """Seconds of a decoded token: the median of the rounds' medians."""
        return statistics.median(statistics.median(run.step_seconds) for run in self.rounds[name])

    def peak(self, name: str) -> int:
        """The most memory that a decoding process had in any round."""
        return max(run.peak_resident for run in self.rounds[name])


def check_room(plan: Plan) -> None:
    """Raises DoesNotFitError unless disk and memory hold what is to be made and decoded."""
    bf16 = 2 * Weights.of(plan.shape).total
    free, needed = shutil.disk_usage(plan.directory).free, _CHECKPOINTS_ON_DISK * bf16
    if needed > free:
        message = f"The files take up to {human(needed)}, but {plan.directory.parent} has room for {human(free)}."
        hint = "Measure fewer --layers, or set TMPDIR to a larger disk."
        raise DoesNotFitError(f"{message} {hint}", required_bytes=needed, available_bytes=free)
    require(bf16 + _SPARE_MEMORY, available_bytes(), "Decoding the F16 file")


def measure(plan: Plan, say: Say) -> Report:
    """Calibrates, converts and decodes; raises StepFailedError and BenchChildError."""
    report = Report()
    say(f"writing a checkpoint of {plan.shape.n_layer} layers")
    write_random_checkpoint(plan.checkpoint, plan.shape)
    for name, n_tokens in ((_SHORT, max(2, plan.n_tokens // _SHORTER)), (_LONG, plan.n_tokens)):
        say(f"calibrating on {n_tokens} tokens")
        report.calibrations.append(calibrated(plan, name, n_tokens))
        say(_parts(report.calibrations[-1].taken))
    for name in (F16, Q4_K, *plan.compressed):
        say(f"making {name}")
        report.made[name] = made(plan, name)
        say(_parts(report.made[name]))
        report.densities[name] = Density.of(plan.file(name), plan.shape)
    shutil.rmtree(plan.checkpoint)
    decode(plan, report, say)
    return report


def _parts(taken: Taken) -> str:
    return "  " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in taken.parts.items())


def calibrated(plan: Plan, name: str, n_tokens: int) -> Calibrated:
    """A calibration on random tokens, half of them backwards as well, an eighth through all experts.

    Only the longer one finds what types cost.
    """
    tokens = random_tokens(n_tokens, plan.shape.n_vocab)
    texts = [tokens[begin : begin + DEFAULT_LENGTH] for begin in range(0, n_tokens, DEFAULT_LENGTH)]
    n_sensitivity, n_sketch = sum(map(len, texts[: -(-len(texts) // 2)])), max(1, n_tokens // 8)
    priced = plan.priced if name == _LONG else ()
    job = CalibrationJob(
        str(plan.checkpoint),
        str(plan.directory / f"{name}.stats"),
        texts,
        list(priced),
        [kind for kind in DEFAULT_TYPES if kind in priced],
        n_sensitivity,
        n_sketch,
        plan.n_threads,
    )
    return Calibrated(plan.shape, n_tokens, n_sensitivity, n_sketch, _run(plan, job))


def made(plan: Plan, name: str) -> Taken:
    """Makes the file of that name; raises as its step does."""
    source, target = str(plan.checkpoint), str(plan.file(name))
    if name not in COMPRESSED:
        return _run(plan, ConversionJob(source, target, name, plan.n_threads))
    return _run(
        plan, CompressionJob(source, target, recipe_text(plan.recipe(name)), str(plan.statistics), plan.n_threads)
    )


def _run(plan: Plan, job: Job) -> Taken:
    return run_step(job) if plan.alone else run_here(job)


def decode(plan: Plan, report: Report, say: Say) -> None:
    """Decodes with all files in all rounds; the order turns from round to round. Raises BenchChildError."""
    tokens = random_tokens(_PROMPT + _WARM + plan.n_decode, plan.shape.n_vocab)
    prompt, steps = tuple(tokens[:_PROMPT]), tuple(tokens[_PROMPT:])
    names = list(report.made)
    for number in range(plan.n_rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            say(f"decoding, round {number + 1} of {plan.n_rounds}: {name}")
            run = run_candidate(
                isolated_run.Job(OURS, str(plan.file(name)), plan.n_threads, prompt, steps, _WARM), None
            )
            if run.outcome is None:
                raise BenchChildError(f"{name} could not be decoded: {run.failure}.")
            report.rounds.setdefault(name, []).append(run.outcome)
