"""`slimoe convert` with a size, a recipe or a method, and `slimoe plan` of the same: what the file will be, and it."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import msgspec

from slimoe.converter.gguf.writer import check_target
from slimoe.converter.layout.metadata import left_out
from slimoe.converter.report.make import check_reports
from slimoe.converter.source.open_source import model_files
from slimoe.converter.source.tokenizer.space_prefix import notes
from slimoe.converter.stats.type_costs import statistics_costs
from slimoe.converter.write.estimate import writing_seconds
from slimoe.converter.write.feedback_time import FeedbackTime, measured_speeds, saved_share, with_chosen
from slimoe.converter.write.writer import WriteReport, chosen_quantiser, write_layout
from slimoe.offload.errors import UsageError
from slimoe.offload.files.whole_file import Destination
from slimoe.offload.plan.context_notes import window_note
from slimoe.offload.resources.processors import usable_processors
from slimoe.server.jobs.compress_plan import CompressWork, is_healed, neuron_seconds, plan_work, with_neurons
from slimoe.server.jobs.compress_report import announced, work_fields, work_lines
from slimoe.server.jobs.evaluate import Evaluator, report_summary
from slimoe.server.jobs.heal import Healing, heal_fields, unfinished
from slimoe.server.options.compress_options import CompressOptions, with_type
from slimoe.server.options.destination import reserve, unwritten
from slimoe.server.options.eval_options import eval_options
from slimoe.server.telling import tell
from slimoe.server.terminal.progress_bars import byte_bar, duration, status

LONG_SECONDS = 1800
"""Seconds of writing from which on a quicker way is worth a line."""


def convert_compressed(values: Mapping[str, Any], options: CompressOptions, n_threads: int) -> None:
    """Plans, tells and, unless it is a dry run, writes; raises as planning and writing do."""
    written, quality = None, dict[str, Any]()
    if values["dry_run"]:
        work = _plan(values, options, n_threads)
    else:
        heals = is_healed(options)
        with reserve(values["target"], resumes=heals) as destination:
            with unfinished(destination) if heals else unwritten(values["target"]):
                work = _plan(values, options, n_threads)
                # Texts are read first: what is wrong with them is told before hours of work.
                evaluator = Evaluator(work.source, work.statistics, eval_options(values)) if values["report"] else None
                healing = None
                if heals:
                    healing = Healing.planned(work, () if evaluator is None else evaluator.tokens)
                    healing.announce()
                if evaluator is not None:
                    n_copy = 1 + any(expert.low_types for layer in work.plan.layers for expert in layer.experts)
                    seconds = evaluator.seconds(work.layout.n_bytes, n_copy)
                    tell(f"Its evaluation will then take about {duration(seconds)}; --no-report leaves it out.")
                if healing is None or not healing.is_written(destination):
                    work = with_neurons(work)
                    written = _write(values, work, healing.path(destination) if healing else destination, n_threads)
                if healing is not None:
                    quality["healing"] = heal_fields(healing.run(destination))
            if evaluator is not None:
                target, lacks = destination.target, list(work.plan.uncounted)
                try:
                    report = evaluator.report(destination, work.plan, lacks=lacks, record=True)
                except KeyboardInterrupt:
                    tell(f"{target} is whole, but has no report. slimoe report makes one.")
                    raise
                quality["quality"] = report_summary(report, target)
    if values["as_json"]:
        done: dict[str, Any] = {"path": str(values["target"]), "seconds": 0.0}
        if written is not None:
            done["seconds"] = round(written.seconds, 3)
            done |= {"n_tensors": written.n_tensors, "n_copied_bytes": written.n_copied}
        click.echo(msgspec.json.encode(work_fields(work) | done | quality))


def _write(values: Mapping[str, Any], work: CompressWork, target: Destination | Path, n_threads: int) -> WriteReport:
    """Writes the planned file, and tells that it is there."""
    with byte_bar(work.layout.n_bytes) as on_progress:
        written = write_layout(
            work.source,
            work.layout,
            target,
            chosen_quantiser(work.source, work.plan, work.statistics, n_threads),
            n_threads=n_threads,
            # What lies in the run's folder is of another plan.
            force=values["force"] or isinstance(target, Path),
            on_progress=on_progress,
        )
    tell(f"{values['target']}: {written.n_bytes:,} bytes in {written.seconds:.1f} s")
    return written


def _plan(values: Mapping[str, Any], options: CompressOptions, n_threads: int) -> CompressWork:
    """What will be made, told, and that it can be."""
    target: Path = values["target"]
    check_target(target, 0, force=values["force"])
    if (
        options.stats is not None
        and os.path.exists(target)
        and os.path.exists(options.stats)
        and target.samefile(options.stats)
    ):
        raise UsageError(f"{target} holds the statistics that are read. Choose another name.")
    if values["report"]:
        check_reports(target, "Choose another name, or overwrite it with --force.", force=values["force"])
    eval_options(values)
    work = plan_work(values["source"], options, n_threads)
    with status("trying how long it will take"):
        joining = neuron_seconds(work)
        plain = joining + writing_seconds(work.source, work.layout, n_threads)
        work, taken, about_feedback = _with_feedback(work, n_threads)
    note = window_note(work.source.spec)
    for line in [*work_lines(work), "", *([note] if note else []), announced(work, target, plain + taken)]:
        tell(line)
    if joining:
        tell(f"Choosing the neurons of merged experts takes about {duration(joining)} of that.")
    for note in (*left_out(work.source), *(notes(work.source.metadata) if work.plan.format == "stock" else ())):
        tell(note)
    if about_feedback and (plain + taken > LONG_SECONDS or work.plan.fitted is not None):
        tell(f"{about_feedback}; with --no-feedback it would be about {duration(plain)}.")
    check_target(target, work.layout.n_bytes, force=values["force"], sources=model_files(work.source))
    return work


def _with_feedback(work: CompressWork, n_threads: int) -> tuple[CompressWork, float, str]:
    """The work with those matrices chosen that feedback's time is best spent on.

    With the seconds that feedback takes, and refitted routers, and what is to be told. Raises UsageError for a time
    that reaches nothing.
    """
    plan = work.plan
    if not plan.feedback and not plan.refit:
        return work, 0.0, ""
    needed = FeedbackTime.of(work.source, plan, work.layout, measured_speeds(n_threads))
    if isinstance(plan.feedback, bool):
        line = (
            f"Feedback takes {duration(needed.seconds)} of that, and less as --feedback TIME" if plan.feedback else ""
        )
        return work, needed.seconds, line
    assert work.statistics is not None
    kinds = sorted({matrix.type.name for group, _ in needed.groups for matrix in group})
    costs = statistics_costs(work.source, work.statistics, kinds, n_threads, lambda _what, _done, _total: None)
    chosen = with_chosen(plan, needed, costs)
    taken = needed.chosen(chosen)
    n_all = sum(len(group) for group, _ in needed.groups)
    line = (
        f"Feedback takes {duration(taken.seconds)} of that, for {len(chosen.fitted or ())} of {n_all} matrices, with "
        f"{saved_share(chosen, needed, costs):.0%} of what types are expected to lose. All would take "
        f"{duration(needed.seconds)}"
    )
    return replace(work, plan=chosen), taken.seconds, line


def tell_plan(values: Mapping[str, Any], options: CompressOptions) -> None:
    """Tells what `convert_compressed` would write; raises as planning does."""
    model, n_threads = values["model"], values["n_threads"]
    if values["type_name"]:
        options = with_type(options, values["type_name"])
    work = plan_work(model, options, n_threads or usable_processors())
    click.echo(msgspec.json.encode(work_fields(work)) if values["as_json"] else "\n".join(work_lines(work)))
