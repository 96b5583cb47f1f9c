"""The rows of the seed's table as they are measured, kept in a file so that none is measured twice."""

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from bench.quality.lab import Lab, Row
from bench.quality.seed_trials import MIXES, Trial, quick_plan
from slimoe.converter.forward.texts import CalibrationText
from slimoe.converter.layout.offsets import lay_out
from slimoe.converter.write.estimate import seconds_per_weight, writing_seconds
from slimoe.converter.write.feedback_time import FeedbackTime, measured_speeds
from slimoe.offload.errors import DoesNotFitError, UsageError
from slimoe.offload.files.whole_file import BusyError
from slimoe.offload.plan.engine_config import ContextConfig, DeviceConfig, EngineConfig
from slimoe.offload.plan.engine_plan import plan_engine

N_CTX = 512
"""The context that memory and speed are of."""
ABOUT = "about"


@dataclass(slots=True)
class Rows:
    """The rows by the id of their trial, in a file of JSON lines whose first says what they are about.

    A line adds to those before it of the same id, so that a row that is measured again has its latest figures.
    """

    path: Path
    by_id: dict[str, Row] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, about: Row) -> "Rows":
        """Reads the rows of the same checkpoint and texts, or begins with none; raises UsageError for others' rows.

        A line that was cut off is left out.
        """
        rows = cls(path)
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        if not lines:
            rows._append({ABOUT: about})
            return rows
        if json.loads(lines[0]).get(ABOUT) != about:
            raise UsageError(f"{path} has rows of another checkpoint or other texts. Name another --out.")
        for line in lines[1:]:
            if line.endswith("\n"):
                row = json.loads(line)
                rows.by_id[row["id"]] = rows.by_id.get(row["id"], {}) | row
        if not lines[-1].endswith("\n"):
            path.write_text("".join(lines[:-1]), "utf-8")
        return rows

    def add(self, row: Row) -> None:
        """Keeps a row, or more figures of one."""
        self.by_id[row["id"]] = self.by_id.get(row["id"], {}) | row
        self._append(row)

    def lacking(self, trials: Sequence[Trial], key: str) -> list[Trial]:
        """The trials whose rows lack a figure and are not refused."""
        known = {name for name, row in self.by_id.items() if key in row or "refused" in row}
        return [trial for trial in trials if trial.id not in known]

    def _append(self, row: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def about(lab: Lab) -> Row:
    """What rows are about: digests of the checkpoint and the texts, and the numbers of tokens."""
    windows = lab.reference.windows
    texts = CalibrationText(windows.sequences.tokens, windows.domains)
    n_tokens = {"n_calibrated": lab.statistics.n_tokens, "n_scored": windows.n_scored}
    return {"source": lab.source.source_hash, "texts": texts.hash} | n_tokens


def measured(lab: Lab, trial: Trial, path: Path) -> Row:
    """The row of a trial, whose file is at `path` afterwards; a row with the reason where the recipe is refused."""
    row: Row = {"id": trial.id, "method": trial.method, "name": trial.name}
    begin = time.monotonic()
    try:
        trial.make(lab, path)
    except DoesNotFitError as error:
        return row | {"refused": str(error), "required": error.required_bytes}
    except BusyError:
        # Another run has the file, which says nothing of the recipe.
        raise
    except UsageError as error:
        return row | {"refused": str(error)}
    seconds = time.monotonic() - begin
    return row | lab.figures(path) | {"memory": memory_bytes(path), "making_seconds": seconds}


def memory_bytes(path: Path) -> int:
    """What our engine has in memory of a model that decodes: weights, KV cache and a token's intermediate results.

    The program itself does not count.
    """
    config = EngineConfig(path, context=ContextConfig(n_ctx=N_CTX, n_batch=1), devices=DeviceConfig("none"))
    planned = plan_engine(config)
    tiers, forms = planned.tiers, planned.weight_forms
    return tiers.fixed - tiers.program + tiers.host_pool if tiers else forms.required - forms.program


@dataclass(frozen=True, slots=True)
class Cost:
    """What measuring takes: files, their bytes on disk, and seconds."""

    n_files: int
    n_bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.n_files} files of {self.n_bytes / 1e6:,.0f} MB in all, about {self.seconds / 60:.0f} min"


def cost(lab: Lab, trials: Sequence[Trial], evaluating: float) -> Cost:
    """What trials will take if an evaluation takes so many seconds; fitting what joins experts comes on top."""
    per_weight = functools.cache(seconds_per_weight)
    speeds = functools.cache(lambda: measured_speeds(lab.n_threads))
    n_bytes, seconds = 0.0, evaluating * len(trials)
    for trial in trials:
        if trial.recipe is None:
            kind = MIXES.get(trial.mix, Type.F16)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            n_bytes += lab.bf16_bytes / 2 / block * block_bytes
            seconds += 0.0 if kind == Type.F16 else lab.bf16_bytes / 2 * per_weight(kind) / lab.n_threads
            continue
        # Choosing types takes long: files for a size count as all of the type that takes longest.
        has_size = trial.recipe.target_size is not None
        types = replace(trial.recipe.types, expert="IQ3_XXS", candidates=()) if has_size else trial.recipe.types
        try:
            plan = quick_plan(lab, replace(trial.recipe, target_size=None, types=types))
        except (DoesNotFitError, UsageError):
            continue
        layout = lay_out(lab.source, plan, lab.statistics)
        n_bytes += trial.recipe.target_size or layout.n_bytes
        seconds += writing_seconds(lab.source, layout, lab.n_threads, per_weight)
        if plan.feedback:
            seconds += FeedbackTime.of(lab.source, plan, layout, speeds()).chosen(plan).seconds
    return Cost(len(trials), round(n_bytes), seconds)
