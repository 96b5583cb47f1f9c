"""The model card of a compressed file: Markdown with YAML front matter, as model hubs read it."""

import json
from collections.abc import Iterator
from typing import Any

from slimoe.converter.report.markdown import (
    FLATTERED,
    divergence,
    percent,
    plain_kl,
    table,
    task_text,
    unread_text,
    yardstick_text,
)
from slimoe.converter.report.report import Report

_ONLY_HERE = "The file is in slimoe's own format, which llama.cpp does not load."


def model_card(report: Report, report_name: str) -> str:
    """Writes the model card of a report's file; `report_name` is the name of the Markdown report beside it."""
    origin, name = report.provenance, report.file.name
    lines = ["---", *_front_matter(report), "---", "", f"# {name.removesuffix('.gguf')}", ""]
    lines.append(f"{origin.source_name}, made smaller by slimoe: {_what(report)}.")
    if tasks := task_text(report):
        lines += ["", tasks]
    licence = f"{origin.source_name}, whose files do not say which it is. Look it up before you pass this file on."
    if origin.licence:
        licence = f"{origin.source_name}: {origin.licence}."
    lines += ["", "## Licence", "", f"That of {licence}"]
    lines += ["", "## What it lost", "", *_figures(report)]
    in_llama = "llama.cpp" in report.file.loads_in
    lines += ["", "## Run it", "", "```sh", f"slimoe run {name}"]
    lines.append(f"slimoe serve {name}        # an OpenAI-compatible endpoint on 127.0.0.1:8080")
    lines += [f"llama-cli -m {name}", "```"] if in_llama else ["```", "", _ONLY_HERE]
    lines += ["", "## How it was made", "", "```toml", origin.recipe.strip(), "```", ""]
    lines.append(f"Source: {origin.source_name}, digest `{origin.source_hash}`.")
    if origin.calibration_tokens:
        lines.append(f"Calibrated on {origin.calibration_tokens:,} tokens, digest `{origin.calibration_hash}`.")
    lines.append(f"File: {report.file.n_bytes:,} bytes, sha256 `{report.file.sha256}`.")
    lines.append(f"Made with slimoe {origin.versions['slimoe']}. All figures: [{report_name}]({report_name}).")
    return "\n".join(lines) + "\n"


def _front_matter(report: Report) -> Iterator[str]:
    """The lines of the YAML front matter, whose values are written as JSON, which is valid YAML."""
    origin = report.provenance
    values: dict[str, Any] = {
        "base_model": origin.source_name,
        "base_model_relation": "quantized",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": [
            "gguf",
            "mixture-of-experts",
            "slimoe",
            *(["llama.cpp"] if "llama.cpp" in report.file.loads_in else []),
        ],
    }
    if origin.licence:
        values = {"license": origin.licence} | values
    for key, value in values.items():
        yield f"{key}: {json.dumps(value, ensure_ascii=False)}"


def _what(report: Report) -> str:
    rows = [row for facts in report.blocks for row in facts.rows]
    n_kept = len({(facts.block, row.stored) for facts in report.blocks for row in facts.rows if row.stored is not None})
    n_blocks = sum(facts.layer is not None for facts in report.blocks)
    parts = [f"{report.file.bits_per_weight:.2f} bits for each weight of the original"]
    parts += [f"{n_blocks} of {len(report.blocks)} layers"] if n_blocks < len(report.blocks) else []
    parts += [f"{n_kept} of {len(rows)} experts"] if n_kept < len(rows) else []
    return f"{', '.join(parts)}, {percent(report.file.share)} of its size in 16 bits"


def _figures(report: Report) -> Iterator[str]:
    total = report.quality.total
    rows = [("Figure", "Value"), ("KL divergence from the original, nats per token", divergence(total))]
    rows.append(("The same for one token in 1,000, at least", f"{total.divergence.percentile_999:.4f}"))
    rows.append(("The whole model in plain types of as many bytes", plain_kl(report)))
    rows.append(("Same likeliest token", percent(total.same_top)))
    read = [(name, one) for name, one in report.quality.domains.items() if name not in report.quality.unread]
    for name, one in read or report.quality.domains.items():
        value = f"{one.reference_perplexity:.3f} to {one.perplexity:.3f} ({100 * one.perplexity_rise:+z.1f} %)"
        rows.append((f"Perplexity, {name}", value))
    for name, words in report.cloze.items():
        if words.kept is not None:
            rows.append((f"Known {name} words that it still knows", percent(words.kept)))
    if report.writing is not None:
        rows.append(("Texts with a loop", f"{report.writing.n_looped} of {report.writing.n_texts}"))
    yield from table(rows)
    yield ""
    texts = report.evaluated_on
    own = " of slimoe's own mixture" if texts.is_own else ""
    yield f"Measured on {texts.n_scored:,} tokens{own}. Other uses may suffer more or less."
    yield from (text for text in (yardstick_text(report), unread_text(report)) if text)
    if texts.seen is not None and texts.seen >= FLATTERED:
        yield f"{percent(texts.seen)} of them were calibrated on, so the figures flatter."
