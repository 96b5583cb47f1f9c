"""`slimoe convert`: a Hugging Face checkpoint or a GGUF file to a GGUF file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from converter import convert as conversion
from converter.convert import ConvertOptions, ConvertPlan, ConvertReport
from converter.type_recipe import RECIPES


@click.command("convert")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option("-t", "--type", "type_name", default="Q4_K_M", show_default=True, help="One of the types below.")
@click.option("--pair", metavar="HIGH,LOW", help="Store every expert twice, in these two types, such as Q4_K,Q2_K.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads to use; one a core if not given.")
@click.option("-f", "--force", is_flag=True, help="Overwrite DST.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, exactly, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Report in one JSON object on standard output.")
@click.pass_context
def command(
    ctx: click.Context,
    source: Path,
    target: Path,
    type_name: str,
    pair: str | None,
    threads: int | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Convert the Hugging Face checkpoint directory or GGUF file SRC to the GGUF file DST.

    A directory holds config.json, safetensors in BF16, F16 or F32 or quantised by bitsandbytes, and a tokenizer of a
    Mixtral, Mistral or Llama model. Of a GGUF file, tensors that have the right type already are copied byte for byte.
    The result loads in llama.cpp too, unless it has the two copies of --pair, which serve any memory between the sizes
    of both. DST appears under its name only when it is whole.
    """
    if pair and ctx.get_parameter_source("type_name") is not click.core.ParameterSource.DEFAULT:
        raise click.UsageError("--pair names the types of everything. Leave --type out.")
    options = ConvertOptions(source, target, type_name, threads or 0, force, pair)
    planned = conversion.plan(options)
    _announce(planned, target)
    if dry_run:
        _report(
            ConvertReport(
                target,
                planned.recipe,
                planned.n_bytes,
                0.0,
                len(planned.tensors),
                planned.bytes_by_type,
                planned.n_copied_bytes,
            ),
            as_json,
        )
        return
    with _progress_bar(planned.n_bytes) as on_progress:
        report = conversion.carry_out(planned, options, on_progress)
    click.echo(f"{target}: {report.n_bytes:,} bytes in {report.seconds:.1f} s", err=True)
    _report(report, as_json)


command.epilog = "Types: " + " ".join(RECIPES) + "."


def _announce(planned: ConvertPlan, target: Path) -> None:
    parts = ", ".join(f"{name} {n_bytes:,}" for name, n_bytes in planned.bytes_by_type.items())
    copied = f", {planned.n_copied_bytes:,} of them copied" if planned.n_copied_bytes else ""
    click.echo(f"{target}: {planned.n_bytes:,} bytes will be written{copied}, {planned.recipe} ({parts})", err=True)


def _report(report: ConvertReport, as_json: bool) -> None:
    if not as_json:
        return
    fields = {
        "path": str(report.path),
        "recipe": report.recipe,
        "n_bytes": report.n_bytes,
        "n_tensors": report.n_tensors,
        "seconds": round(report.seconds, 3),
        "bytes_by_type": report.bytes_by_type,
        "n_copied_bytes": report.n_copied_bytes,
    }
    click.echo(msgspec.json.encode(fields))


@contextmanager
def _progress_bar(n_bytes: int) -> Iterator[conversion.Progress]:
    """A bar on standard error with bytes, speed and time left; nothing when that is no terminal."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=n_bytes)
        yield lambda done, _total: progress.update(task, completed=done)
