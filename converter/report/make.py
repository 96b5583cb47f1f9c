"""Makes reports: the entry point, which evaluates a written file, and writes the report beside it and its quality into
it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from slimoe.converter.document import BadDocumentError, decode_json
from slimoe.converter.gguf.late_keys import add_late_keys
from slimoe.converter.report.markdown import markdown
from slimoe.converter.report.measure import ReportMaker, file_hash
from slimoe.converter.report.model_card import model_card
from slimoe.converter.report.report import Report
from slimoe.converter.stats.forward_pass import Progress
from slimoe.offload.errors import UsageError
from slimoe.offload.files.regular_file import read_regular
from slimoe.offload.files.whole_file import Destination, real_path, reserved, write_error, write_whole
from slimoe.offload.gguf import keys
from slimoe.offload.gguf.header import Value, read_gguf
from slimoe.offload.model.spec import NATIVE

_ROOM = 640
"""Most characters of the JSON about quality, for which the header's room suffices beside the losses of two copies."""


def write_report(
    maker: ReportMaker,
    *,
    record: bool = True,
    on_progress: Progress = lambda _what, _done, _total: None,
    destination: Destination | None = None,
) -> Report:
    """Evaluates, and writes TARGET.report.json, TARGET.report.md with pictures in TARGET.report, and TARGET.card.md.

    With `record` the quality is also written into the file's header, if it has room for it. No other run may write the
    file meanwhile: `destination` is the target if it is reserved already. Raises as `ReportMaker.make` does, and
    UsageError or DoesNotFitError if a file cannot be written.
    """
    with reserved(destination or maker.target) as own:
        report = maker.make(on_progress, own.folder)
        if record and keys.RESERVED in read_gguf(maker.target).metadata:
            add_late_keys(maker.target, quality_keys(report))
        on_progress("writing the report", 0, 1)
        report = replace(report, file=replace(report.file, sha256=file_hash(maker.target)))
        save_report(report, maker.target, own.folder)
        on_progress("writing the report", 1, 1)
        return report


def report_paths(target: Path) -> dict[str, Path]:
    """The paths of a file's report: json, markdown, plots (a directory) and card."""
    ends = {"json": ".report.json", "markdown": ".report.md", "plots": ".report", "card": ".card.md"}
    return {what: target.with_name(target.name + end) for what, end in ends.items()}


def known_report(path: Path, source_hash: str, sha256: str) -> Report | None:
    """Reads the report in a JSON file; None if it cannot be read, or is of another source or another file."""
    try:
        fields = decode_json(read_regular(path), dict[str, Any])
        for place, name, old in _renamed(fields):
            if name not in place:
                place[name] = place[old]
        report = decode_json(msgspec.json.encode(fields), Report)
    except (OSError, BadDocumentError, AttributeError, KeyError, TypeError):
        return None
    is_same = report.provenance.source_hash == source_hash and report.file.sha256 == sha256
    return report if is_same else None


def check_reports(target: Path, hint: str, *, force: bool) -> None:
    """Raises UsageError if a report of the file cannot be written, or would replace one without `force`."""
    for path in report_paths(target).values():
        if os.path.isdir(path) and not force and any(path.iterdir()):
            raise UsageError(f"{path} holds pictures. {hint}")
        if not os.path.isdir(path) and real_path(path).exists() and not force:
            raise UsageError(f"{path} exists. {hint}")


def save_report(report: Report, target: Path, folder: Path | None = None) -> None:
    """Writes a report's files beside its `target`, each whole or not at all, and in `folder` until it is whole.

    Raises UsageError or DoesNotFitError if a file cannot be written.
    """
    from slimoe.converter.report.plots import draw_plots

    paths = report_paths(target)
    try:
        paths["plots"].mkdir(exist_ok=True)
    except OSError as error:
        raise write_error(paths["plots"], error) from None
    names = {}
    for title, (name, picture) in draw_plots(report).items():
        write_whole(paths["plots"] / name, picture, folder)
        names[title] = quote(f"{paths['plots'].name}/{name}")
    write_whole(paths["json"], msgspec.json.format(msgspec.json.encode(report_fields(report)), indent=2), folder)
    write_whole(paths["markdown"], markdown(report, names).encode(), folder)
    write_whole(paths["card"], model_card(report, paths["markdown"].name).encode(), folder)


def report_fields(report: Report) -> dict[str, Any]:
    """The fields of the report's JSON, which for one version also has the old names of renamed fields."""
    fields: dict[str, Any] = msgspec.to_builtins(report)
    fields["file"]["share"] = report.file.share
    for place, name, old in _renamed(fields):
        place[old] = place[name]
    return {"version": 2, **fields}


def _renamed(fields: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yields the objects of a report's JSON that have a renamed field, the field's name, and its old name."""
    yield fields, "evaluated_on", "judged"
    yield fields, "cloze", "probes"
    yield from ((one, "log_probability_loss", "lost_nats") for one in fields["cloze"].values())
    yield from ((row, "is_constant", "is_novice") for block in fields["blocks"] for row in block["rows"])
    if fields["coverage"] is not None:
        yield fields["coverage"], "selections", "picks"


def quality_keys(report: Report) -> Mapping[str, Value]:
    """The header's keys about the file's quality: the KL divergence of its copies, and a line of JSON with more."""
    total = report.quality.total
    told: dict[str, Any] = {
        "kl": total.divergence.mean,
        "kl_error": total.divergence.error,
        "kl_median": total.divergence.median,
        "kl_99": total.divergence.percentile_99,
        "kl_999": total.divergence.percentile_999,
        "same_top": total.same_top,
        "perplexity": [total.reference_perplexity, total.perplexity],
        "n_tokens": total.n_tokens,
        "texts": report.evaluated_on.hash,
    }
    by_domain = {name: [one.reference_perplexity, one.perplexity] for name, one in report.quality.domains.items()}
    values: dict[str, Value] = {keys.QUALITY: _short({**told, "domains": by_domain})}
    if len(str(values[keys.QUALITY]).encode()) > _ROOM:
        values[keys.QUALITY] = _short(told)
    if report.file.format == "native":
        copies = [total] if report.low_quality is None else [total, report.low_quality]
        # Of models that differ in nothing, rounding can make a divergence a little less than zero.
        values[f"{NATIVE}.measured_kl"] = [max(0.0, one.divergence.mean) for one in copies]
    return values


def _short(values: object) -> str:
    return json.dumps(_rounded(values), separators=(",", ":"))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value
