"""`slimoe convert` with a size, a recipe or a method: the slimmed file, after what it will be has been told."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from converter.slim_writer import SlimReport, slim
from converter.writer import check_target
from server.progress_bars import byte_bar
from server.slim_options import SlimOptions
from server.slim_report import announced, work_fields, work_lines
from server.slim_work import SlimWork, plan_work


def convert_slim(values: Mapping[str, Any], options: SlimOptions, n_threads: int) -> None:
    """Plans, tells and, unless it is a dry run, writes; raises as planning and writing do."""
    target: Path = values["target"]
    check_target(target, 0, force=values["force"])
    work = plan_work(values["source"], options, n_threads)
    click.echo("\n".join([*work_lines(work), "", announced(work, target)]), err=True)
    check_target(target, work.layout.n_bytes, force=values["force"])
    report = None if values["dry_run"] else _write(work, target, n_threads, force=values["force"])
    if report is not None:
        click.echo(f"{target}: {report.n_bytes:,} bytes in {report.seconds:.1f} s", err=True)
    if values["as_json"]:
        click.echo(msgspec.json.encode(work_fields(work) | _written(target, report)))


def _write(work: SlimWork, target: Path, n_threads: int, *, force: bool) -> SlimReport:
    with byte_bar(work.layout.n_bytes) as on_progress:
        return slim(
            work.source,
            work.plan,
            target,
            work.statistics,
            n_threads=n_threads,
            force=force,
            on_progress=on_progress,
        )


def _written(target: Path, report: SlimReport | None) -> dict[str, Any]:
    if report is None:
        return {"path": str(target), "seconds": 0.0}
    return {
        "path": str(target),
        "seconds": round(report.seconds, 3),
        "n_tensors": report.n_tensors,
        "n_copied_bytes": report.n_copied,
    }
