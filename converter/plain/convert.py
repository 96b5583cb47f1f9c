"""Converts a Hugging Face checkpoint directory or a GGUF file into a GGUF file: the room's front door."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from slimoe.converter.gguf.writer import Progress, check_target, write_pieces
from slimoe.converter.plain.plan import ConvertPlan, plan_conversion, plan_pair
from slimoe.converter.plain.plan_pieces import plan_pieces
from slimoe.converter.stats.given_importance import Fitted
from slimoe.offload.files.whole_file import Destination
from slimoe.offload.resources.processors import usable_processors

DEFAULT_TYPE = "Q4_K_M"
"""Where nobody names one."""


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What to convert: the checkpoint directory or GGUF file, the file to write, the recipe's name.

    0 threads means one a core.
    `pair`, if any, is in place of `type`: the recipes "HIGH,LOW" of a native file's two copies of every expert.
    `imatrix` is the file of an importance matrix, or of statistics, to fit weights to.
    """

    source: Path
    target: Path
    type: str = DEFAULT_TYPE
    n_threads: int = 0
    force: bool = False
    pair: str | None = None
    imatrix: Path | None = None


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What was written: path, bytes, seconds it took, number of tensors, tensor bytes by type.

    `n_copied_bytes` of these were taken over from a GGUF file as they were. `fitted` says how far the importance matrix
    reached, if one was given. `unfit_types` counts tensors that have another type than was asked for.
    """

    path: Path
    recipe: str
    n_bytes: int
    seconds: float
    n_tensors: int
    bytes_by_type: dict[str, int]
    n_copied_bytes: int = 0
    fitted: Fitted | None = None
    unfit_types: dict[str, int] = field(default_factory=dict)


def plan(options: ConvertOptions) -> ConvertPlan:
    """Everything that will be written, exactly, and that it can be; reads only headers and writes nothing.

    Raises UsageError, ModelFileError, UnsupportedModelError, StatisticsError or DoesNotFitError.
    """
    if options.pair is None:
        planned = plan_conversion(options.source, options.type, options.imatrix)
    else:
        planned = plan_pair(options.source, options.pair, options.imatrix)
    check_target(options.target, planned.n_bytes, force=options.force, sources=planned.source_files)
    return planned


def carry_out(
    planned: ConvertPlan, options: ConvertOptions, on_progress: Progress, destination: Destination | None = None
) -> ConvertReport:
    """Writes what was planned, to the target or where it is reserved already; raises as `write_pieces` does."""
    begin = time.monotonic()
    n_threads = options.n_threads or usable_processors()
    write_pieces(
        planned.header,
        plan_pieces(planned, n_threads),
        destination or options.target,
        n_bytes=planned.n_bytes,
        n_threads=n_threads,
        force=options.force,
        on_progress=on_progress,
    )
    return ConvertReport(
        path=options.target,
        recipe=planned.recipe,
        n_bytes=planned.n_bytes,
        seconds=time.monotonic() - begin,
        n_tensors=len(planned.tensors),
        bytes_by_type=planned.bytes_by_type,
        n_copied_bytes=planned.n_copied_bytes,
        fitted=planned.fitted,
        unfit_types=planned.unfit_types,
    )


def convert(options: ConvertOptions, on_progress: Progress = lambda _done, _total: None) -> ConvertReport:
    """Plans and writes in one go."""
    return carry_out(plan(options), options, on_progress)
