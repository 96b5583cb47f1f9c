"""`slimoe calibrate`: what a checkpoint's layers and experts do, measured on texts."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from slimoe.offload.errors import SlimoeError
from slimoe.server.chat.text_encoder import TokenizerEncoder
from slimoe.server.options.destination import reserve
from slimoe.server.options.engine_options import OptionsCommand
from slimoe.server.options.hub_cache import ModelPath
from slimoe.server.options.installed import check_installed
from slimoe.server.telling import tell
from slimoe.server.terminal.progress_bars import duration, status, step_bar

if TYPE_CHECKING:
    from slimoe.converter.stats.calibrate import CalibrateOptions, CalibratePlan

_MANY_TOKENS = 32768
_WORK = {
    "read": "reading weights",
    "pass": "forward through the layers",
    "types": "quantisation errors of experts",
    "widths": "narrower experts",
    "layers": "forward through the layers",
    "sensitivity": "backward pass",
    "prices": "quantisation costs of every matrix",
}
"""What a person calls each kind of work; the kinds are keys of an estimate and of progress."""


@click.command("calibrate", cls=OptionsCommand)
@click.argument("source", metavar="SRC", type=ModelPath(prefers_checkpoint=True))
@click.option(
    "-o", "--output", metavar="STATS", required=True, type=click.Path(path_type=Path), help="Statistics file to write."
)
@click.option(
    "--text", "texts", metavar="[NAME=]FILE", multiple=True, help="Text to read: plain, or .jsonl of chats. Repeatable."
)
@click.option("--tokens", type=click.IntRange(min=1), default=131072, show_default=True, help="Most tokens to read.")
@click.option("--length", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens in each sequence.")
@click.option("--device", default="auto", show_default=True, help="torch device: auto, cpu, cuda ...")
@click.option("--types", metavar="LIST", help="ggml types to measure errors of, such as Q2_K,Q4_K; none measures none.")
@click.option(
    "--no-widths", is_flag=True, help="Leave out what narrower experts would lose: sizes then leave experts as wide."
)
@click.option("--no-sensitivity", is_flag=True, help="Leave out the backward pass, and the costs that build on it.")
@click.option(
    "--imatrix", metavar="FILE", type=click.Path(path_type=Path), help="Write llama.cpp's importance matrix too."
)
@click.option("-f", "--force", is_flag=True, help="Overwrite STATS and the importance matrix.")
@click.option("--json", "as_json", is_flag=True, help="Print a report as one JSON object.")
def command(values: Mapping[str, Any]) -> None:
    """Measure on texts what the layers and experts of SRC do, and keep it in STATS.

    SRC is a checkpoint directory or a GGUF file. One layer is in memory at a time. Texts of your own use are best;
    without any, a small mixture is taken. When interrupted, the same command goes on where it was.
    """
    check_installed("Calibration", "torch", "safetensors", source=values["source"])
    from slimoe.converter.stats import calibrate as calibration

    output: Path = values["output"]
    options = calibration.CalibrateOptions(
        values["source"],
        output,
        values["texts"],
        values["tokens"],
        values["length"],
        calibration.settings(values["device"], values["types"], not values["no_sensitivity"], not values["no_widths"]),
        values["force"],
        values["imatrix"],
    )
    calibration.check_targets(options)
    with ExitStack() as files:
        destination = files.enter_context(reserve(output, resumes=True))
        if options.imatrix is not None:
            files.enter_context(reserve(options.imatrix))
        with status("reading, and trying what it will take (the quantiser's tables need up to a minute)"):
            planned = calibration.plan(options, TokenizerEncoder)
        _announce(planned, options)
        try:
            steps = {_WORK[kind]: seconds for kind, seconds in planned.estimate.steps.items()}
            with step_bar(steps) as on_step:
                report = calibration.carry_out(
                    planned, destination, lambda kind, done, total: on_step(_WORK[kind], done, total)
                )
        except (KeyboardInterrupt, SlimoeError):
            if not destination.is_empty:
                tell(f"What is done lies in {destination.folder}; the same command goes on there.")
            raise
    tell(
        f"{report.path}: {report.n_bytes:,} bytes in {duration(report.seconds)}; "
        f"{report.n_seen} of {report.n_experts} experts were routed to"
    )
    if report.n_seen < report.n_experts:
        tell("Nothing is known of the others; more or more varied text may reach them.")
    if values["no_sensitivity"]:
        tell("Sizes (--target-size, --target-bpw) need the backward pass that --no-sensitivity left out.")
    if values["as_json"]:
        fields = asdict(report) | {"path": str(report.path), "estimated_seconds": planned.estimate.total_seconds}
        click.echo(msgspec.json.encode(fields))


def _announce(planned: "CalibratePlan", options: "CalibrateOptions") -> None:
    text, expected = planned.text, planned.estimate
    parts = ", ".join(f"{_WORK[kind]} {duration(seconds)}" for kind, seconds in expected.seconds.items())
    place = "on disk" if expected.state_bytes > planned.settings.max_state_bytes else "in memory"
    tell(
        f"{options.source}: {text.n_tokens:,} tokens in {len(text.tokens)} sequences on {planned.settings.device}, "
        f"about {duration(expected.total_seconds)} ({parts}), {expected.state_bytes:,} bytes of hidden states {place}"
    )
    if not options.texts:
        tell("The texts are the mixture that comes along. Texts of your own use (--text) are better.")
    elif text.n_tokens < min(_MANY_TOKENS, options.n_tokens):
        tell(f"That is little text: {_MANY_TOKENS:,} tokens or more show what rare experts do.")
