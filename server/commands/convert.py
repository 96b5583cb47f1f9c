"""`slimoe convert`: a Hugging Face checkpoint or a GGUF file to a GGUF file."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import msgspec

from slimoe.converter.convert import Conversion, ConvertOptions, ConvertReport, carry_out, plan
from slimoe.converter.quant.mixes import FOR_IMPORTANCE, RECIPES
from slimoe.converter.stats.given_importance import Fitted
from slimoe.offload.plan.context_notes import window_note
from slimoe.offload.resources.processors import usable_processors
from slimoe.server.options.compress_options import (
    OLD_SPELLINGS,
    compress_flags,
    compress_options,
    hf_bits_flag,
    with_copies,
    with_type,
)
from slimoe.server.options.destination import reserve, unwritten
from slimoe.server.options.engine_options import OptionsCommand
from slimoe.server.options.eval_options import eval_flags
from slimoe.server.options.hub_cache import ModelPath
from slimoe.server.options.idle_flags import refuse_idle
from slimoe.server.options.installed import CONVERTERS, check_installed
from slimoe.server.telling import tell
from slimoe.server.terminal.progress_bars import byte_bar


@click.command("convert", cls=OptionsCommand, context_settings=OLD_SPELLINGS)
@click.argument("source", metavar="SRC", type=ModelPath(prefers_checkpoint=True))
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "-t",
    "--type",
    "type_name",
    help="Type of the weights, one of those below (default: Q4_K_M, or MXFP4_MOE of experts in MXFP4).",
)
@click.option(
    "--two-copies", metavar="HIGH,LOW", help="Store every expert twice, in these two types, such as Q4_K,Q2_K."
)
@click.option(
    "--imatrix",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Fit weights to an importance matrix: llama.cpp's, or what slimoe calibrate measured.",
)
@click.option(
    "--mtp", "keeps_mtp", is_flag=True, help="Keep the block that predicts a further token, for slimoe's --draft mtp."
)
@compress_flags
@click.option(
    "--hf", is_flag=True, help="Write what is left of the checkpoint SRC as a checkpoint, to the directory DST."
)
@hf_bits_flag
@click.option(
    "--report/--no-report",
    default=True,
    help="Evaluate a compressed file against SRC, in a report beside it (default: yes).",
)
@eval_flags
@click.option("--threads", type=click.IntRange(min=1), help="Threads to convert with (default: one for each core).")
@click.option("-f", "--force", is_flag=True, help="Overwrite DST.")
@click.option("--dry-run", is_flag=True, help="Say exactly what would be written, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print a report as one JSON object.")
def command(values: Mapping[str, Any]) -> None:
    """Convert the Hugging Face checkpoint directory or GGUF file SRC to the GGUF file DST.

    A directory holds config.json, safetensors in BF16, F16 or F32 or quantised by bitsandbytes, and a tokenizer;
    docs/converting.md lists the models that are read. Of a GGUF file, tensors that have the right type already are
    copied byte for byte. The result loads in llama.cpp too, unless it has --two-copies, which serve any memory between
    the sizes of both. DST appears under its name only when it is whole.

    With --target-size, a recipe or any other flag from --stats to --heal the model is compressed, by what slimoe
    calibrate has measured of it. What will be written is told first. The file is in slimoe's own format unless --stock
    is given. Then it is evaluated against SRC on texts, in a report and a model card beside DST.

    With --hf what is left of a checkpoint is written as one of the same class, for vLLM, SGLang or transformers.
    """
    compression, type_name, copies = compress_options(values), values["type_name"], values["two_copies"]
    if values["keeps_mtp"] and (values["hf"] or values["hf_bits"] or copies or compression.is_asked):
        raise click.UsageError("--mtp is for a whole model in types by name: only --type and --imatrix go with it.")
    if values["hf"] or values["hf_bits"]:
        check_installed("Compressing", *CONVERTERS, source=values["source"])
        from slimoe.server.jobs.hf_checkpoint import convert_to_checkpoint

        convert_to_checkpoint(values, compression)
        return
    if copies and type_name:
        raise click.UsageError("--two-copies names the types of everything. Leave --type out.")
    if not compression.is_asked:
        refuse_idle(
            ["eval_texts", "eval_tokens", "report"],
            "is for a model that is compressed. Leave it out; slimoe report evaluates any file.",
        )
        _convert(values)
    elif values["imatrix"]:
        raise click.UsageError("--imatrix is for types by name. Compressing takes importance from --stats.")
    else:
        if not values["report"]:
            refuse_idle(["eval_texts", "eval_tokens"], "is for the report. Leave it or --no-report out.")
        needed = (*CONVERTERS, "matplotlib") if values["report"] else CONVERTERS
        check_installed("Compressing", *needed, source=values["source"])
        from slimoe.server.jobs.compress import convert_compressed

        compression = (
            with_type(compression, type_name)
            if type_name
            else with_copies(compression, copies)
            if copies
            else compression
        )
        convert_compressed(values, compression, values["threads"] or usable_processors())


command.epilog = f"Types: {' '.join(RECIPES)}. With --imatrix only: {' '.join(FOR_IMPORTANCE)}."


def _convert(values: Mapping[str, Any]) -> None:
    """Converts everything to types by name."""
    target = values["target"]
    options = ConvertOptions(
        values["source"],
        target,
        values["type_name"],
        values["threads"] or usable_processors(),
        values["force"],
        values["two_copies"],
        values["imatrix"],
        values["keeps_mtp"],
    )
    if values["dry_run"]:
        planned = plan(options)
        _announce(planned, options)
        _report(planned.report(target), values["as_json"])
        return
    with unwritten(target), reserve(target) as destination:
        planned = plan(options)
        _announce(planned, options)
        with byte_bar(planned.layout.n_bytes) as on_progress:
            report = carry_out(planned, options, on_progress, destination)
    tell(f"{target}: {report.n_bytes:,} bytes in {report.seconds:.1f} s")
    _report(report, values["as_json"])


def _announce(planned: Conversion, options: ConvertOptions) -> None:
    layout = planned.layout
    parts = ", ".join(f"{name} {n_bytes:,}" for name, n_bytes in layout.bytes_by_type.items())
    copied = f", {planned.n_copied_bytes:,} of them copied" if planned.n_copied_bytes else ""
    size = f"{layout.n_bytes:,} bytes will be written{copied}"
    tell(f"{options.target}: {size}, {planned.plan.recipe} ({parts})")
    if note := window_note(layout.spec):
        tell(note)
    for note in planned.notes:
        tell(note)
    if planned.fitted:
        tell(f"{options.imatrix}: {_reach(planned.fitted)}")


def _reach(fitted: Fitted) -> str:
    known = f"{fitted.n_fitted:,} of {fitted.n_matrices:,} quantised matrices are fitted to it"
    if not fitted.n_experts:
        return known
    unmet = f"{fitted.n_unmet} of {fitted.n_experts} experts were never met"
    return f"{known}, {unmet}" + (" and count like the others of their layer" if fitted.n_unmet else "")


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
        "unfit_types": report.unfit_types,
        "fitted": None if report.fitted is None else asdict(report.fitted),
    }
    click.echo(msgspec.json.encode(fields))
