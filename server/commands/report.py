"""`slimoe report`: what a file has lost against the model that it was made of."""

from pathlib import Path
from typing import Any

import click
import msgspec

from slimoe.server.options.destination import reserve
from slimoe.server.options.engine_options import OptionsCommand
from slimoe.server.options.eval_options import eval_flags, eval_options
from slimoe.server.options.hub_cache import ModelPath
from slimoe.server.options.installed import CONVERTERS, check_installed


@click.command("report", cls=OptionsCommand)
@click.argument("source", metavar="SRC", type=ModelPath(prefers_checkpoint=True))
@click.argument("model", metavar="FILE", type=ModelPath())
@click.option(
    "--stats", metavar="STATS", type=click.Path(path_type=Path), help="Statistics that slimoe calibrate wrote for SRC."
)
@eval_flags
@click.option("--device", default="auto", show_default=True, help="torch device: auto, cpu, cuda ...")
@click.option("--threads", type=click.IntRange(min=1), help="Threads for the texts that FILE writes.")
@click.option("--record", is_flag=True, help="Write the figures into FILE too, if its header has room for them.")
@click.option("-f", "--force", is_flag=True, help="Replace an existing report; what converting knew is kept.")
@click.option("--json", "as_json", is_flag=True, help="Print a report as one JSON object.")
def command(values: dict[str, Any]) -> None:
    """Evaluate the GGUF file FILE against SRC, the checkpoint directory or GGUF file that it was made of.

    Both read the same texts, layer by layer. Beside FILE are written FILE.report.md with pictures, FILE.report.json and
    FILE.card.md, a model card for hubs. Files of slimoe convert have a report already, which knows what was left out:
    it is replaced with --force only, by one that knows it as well. Without such a report a file must have as many
    layers as SRC for figures by layer.
    """
    check_installed("A report", *CONVERTERS, "matplotlib", source=values["source"])
    from slimoe.converter.report.make import check_reports
    from slimoe.converter.source.gguf_source import gguf_source
    from slimoe.converter.source.open_source import open_source
    from slimoe.converter.stats.statistics_file import load_statistics
    from slimoe.server.jobs.evaluate import Evaluator, report_summary

    gguf_source(values["model"])
    hint = "--force replaces the report by one on other texts, which keeps what converting knew of the file."
    check_reports(values["model"], hint, force=values["force"])
    source = open_source(values["source"])
    statistics = None if values["stats"] is None else load_statistics(values["stats"], source)
    with reserve(values["model"]) as destination:
        evaluator = Evaluator(source, statistics, eval_options(values, values["device"]))
        report = evaluator.report(destination, None, record=values["record"])
    if values["as_json"]:
        click.echo(msgspec.json.encode(report_summary(report, values["model"])))
