"""The report as Markdown, whose tables can be read in a terminal too, with plots in the sections that have any."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from slimoe.converter.report.block_facts import BlockFacts
from slimoe.converter.report.quality import DomainQuality
from slimoe.converter.report.report import Report

_MANY_UNSEEN = 40
FLATTERED = 0.05
"""The part of the evaluation text that calibration may have seen before the figures are said to flatter."""


def markdown(report: Report, plots: Mapping[str, str]) -> str:
    """Writes the report; `plots` are paths of pictures by the title of their section, such as `Types`."""
    sections = (
        ("Quality by domain", _domains),
        ("Damage by layer", _damage),
        ("Words by frequency", _words),
        ("Writing", _writing),
        ("Calibration", _calibration),
        ("Bytes", _bytes),
        ("Types", _types),
        ("Recipe", _recipe),
        ("Provenance", _provenance),
    )
    lines = [f"# {report.file.name}", "", *_summary(report)]
    for title, section in sections:
        lines += ["", f"## {title}", "", *section(report)]
        lines += ["", f"![{title}]({plots[title]})"] if title in plots else []
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Writes a Markdown table with padded cells; all columns but the first are aligned to the right."""
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    rule = ["-" * width if not n else "-" * (width - 1) + ":" for n, width in enumerate(widths)]
    lines = []
    for row in (rows[0], rule, *rows[1:]):
        first, *others = zip(row, widths, strict=True)
        lines.append(f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])} |")
    return lines


def percent(part: float | None) -> str:
    """A part of 1 as text, such as `12.3 %`; empty for None."""
    return "" if part is None else f"{100 * part:.1f} %"


def divergence(one: DomainQuality) -> str:
    """The mean KL divergence as text, with its error if that is known."""
    error = one.divergence.error
    return f"{one.divergence.mean:.4f}" + ("" if error is None else f" ± {error:.4f}")


# --- the sections ------------------------------------------------------------------------------------------


def _summary(report: Report) -> Iterator[str]:
    file, total = report.file, report.quality.total
    flips = [one for one in report.quality.flips if one is not None]
    nats, lacks = report.expected_kl, " and ".join(report.expected_lacks)
    expected = "not predicted"
    if nats is not None and (nats or not lacks):
        expected = f"{nats:.4f}" + (f", and what {lacks} cost" if lacks else "")
    quantiles = total.divergence
    yield from table(
        [
            ("Figure", "Value"),
            ("Made of", report.provenance.source_name),
            ("Size", f"{file.n_bytes:,} bytes"),
            ("Of the source in 16 bits", percent(file.share)),
            ("Bits for each weight of the source", f"{file.bits_per_weight:.2f}"),
            ("Format", f"{file.format}, loads in {' and '.join(file.loads_in)}"),
            ("KL divergence, nats per token", divergence(total)),
            (
                "median; 99 %; 99.9 %",
                f"{quantiles.median:.4f}; {quantiles.percentile_99:.4f}; {quantiles.percentile_999:.4f}",
            ),
            ("KL expected by the plan", expected),
            ("KL of plain types at as many bytes", plain_kl(report)),
            ("Perplexity, source", f"{total.reference_perplexity:.3f}"),
            ("Perplexity, this file", f"{total.perplexity:.3f} ({100 * total.perplexity_rise:+z.1f} %)"),
            ("Same likeliest token", percent(total.same_top)),
            ("Selected experts that changed", percent(sum(flips) / len(flips)) if flips else "not counted"),
        ]
    )
    if report.low_quality is not None:
        low = report.low_quality
        yield ""
        yield (
            f"With every expert's second copy: KL {divergence(low)} nats, perplexity {low.perplexity:.3f} "
            f"({100 * low.perplexity_rise:+z.1f} %)."
        )
    for text in (task_text(report), healing_text(report), yardstick_text(report), unread_text(report)):
        if text:
            yield ""
            yield text
    yield ""
    yield from _texts(report)


def task_text(report: Report) -> str:
    """What the file is for, if it was made for a task, and what of the source it lacks; empty otherwise."""
    texts = " and ".join(f"{name} ({n_token:,} tokens)" for name, n_token in report.provenance.tasks.items())
    lost = "what that does not use is lost, and other uses suffer more than its figures may say"
    return f"Made for one task: experts were merged by what they do on {texts}; {lost}." if texts else ""


def plain_kl(report: Report) -> str:
    """The KL divergence of plain types at the file's bytes, for a cell of a table."""
    found = report.yardstick
    if found is None or found.kl is None:
        return "not known"
    return f"{found.kl:.4f}, {'measured' if found.is_measured else 'expected'}"


def yardstick_text(report: Report) -> str:
    """A sentence on the whole model in plain types at the file's bytes; empty if it can be in none."""
    found, kl = report.yardstick, report.quality.total.divergence.mean
    if found is None:
        return ""
    models = " and ".join(
        f"{one.type} of {one.n_bytes:,} bytes" + ("" if one.kl is None else f" (KL {one.kl:.4f})")
        for one in found.models
    )
    if found.kl is None and found.models[0].n_bytes > report.file.n_bytes:
        return f"No plain type of the whole model is so small: the smallest is {models}."
    if found.kl is None:
        why = "" if report.coverage is not None else " --stats predicts their KL divergence."
        return f"The nearest plain types of the whole model are {models}.{why}"
    how = "measured alike" if found.is_measured else "as the statistics predict"
    less = f": this file has {kl / found.kl:.2g} times that" if found.kl > 0 and kl > 0 else ""
    return f"Plain types of the whole model at as many bytes, {how}: KL {found.kl:.4f}, from {models}{less}."


def healing_text(report: Report) -> str:
    """A sentence on the file's healing; empty if there was none."""
    found = report.healing
    if found is None:
        return ""
    on = f"KL {found.kl_before:.4f} before and {found.kl_after:.4f} after, on held-out calibration text"
    if not found.is_kept:
        return f"Healing of {found.seconds:.0f} s was undone, as it did not help ({on})."
    return f"Healed for {found.seconds:.0f} s, which trained norms, routers and other small tensors: {on}."


def unread_text(report: Report) -> str:
    """A sentence on the domains that the source cannot read; empty if there are none."""
    names = report.quality.unread
    if not names:
        return ""
    told = ", ".join(f"{name} (perplexity {report.quality.domains[name].reference_perplexity:,.0f})" for name in names)
    rule = "it predicts their tokens no better than by how often they occur"
    if len(names) == len(report.quality.domains):
        return f"The source cannot read any of the texts ({rule}): {told}. The figures say little."
    return f"Left out of the mean, since the source cannot read them ({rule}): {told}."


def _texts(report: Report) -> Iterator[str]:
    texts = report.evaluated_on
    yield (
        f"Measured on the bytes of the file, in float32, on {texts.n_scored:,} tokens with at least half a window of "
        f"{texts.length} before them."
    )
    if texts.is_own:
        yield "The texts are what calibration leaves out of slimoe's small mixture: --eval-text evaluates on your own."
    if texts.seen is None:
        yield "It is not known which texts the file was calibrated on."
    elif texts.seen >= FLATTERED:
        yield (
            f"**{percent(texts.seen)} of the text was calibrated on, so the figures flatter.** Evaluate on other texts."
        )
    else:
        yield f"{percent(texts.seen)} of the text was calibrated on."


def _domains(report: Report) -> Iterator[str]:
    head = ("Domain", "Tokens", "KL", "Median", "99 %", "99.9 %", "Ppl source", "Ppl file", "Rise", "Same top")
    rows = [head]
    for name, one in report.quality.domains.items():
        rows.append(
            (
                name + (" (unread)" if name in report.quality.unread else ""),
                f"{one.n_tokens:,}",
                divergence(one),
                f"{one.divergence.median:.4f}",
                f"{one.divergence.percentile_99:.4f}",
                f"{one.divergence.percentile_999:.4f}",
                f"{one.reference_perplexity:.3f}",
                f"{one.perplexity:.3f}",
                f"{100 * one.perplexity_rise:+z.1f} %",
                percent(one.same_top),
            )
        )
    yield from table(rows)


def _damage(report: Report) -> Iterator[str]:
    """By block of the source."""
    flips, errors = report.quality.flips, report.quality.stream_error
    rows = [("Block", "KL alone", "Changed experts", "Error of the stream")]
    for block in range(len(flips)):
        alone = "" if report.block_kl is None else f"{report.block_kl[block]:.5f}"
        error = errors[block]
        rows.append((str(block), alone, percent(flips[block]), "" if error is None else f"{error:.4f}"))
    yield "KL alone: nats per token with this block's changes only; the token table and the output are not among them."
    yield "Changed experts: the part of the source's selected experts that the file does not select too."
    yield "Error of the stream: the relative difference of the residual stream behind the block, with all blocks before"
    yield "it changed as well."
    yield ""
    yield from table(rows)


def _words(report: Report) -> Iterator[str]:
    if not report.cloze:
        yield "There are no content words in the texts."
        return
    where = "these texts have" if report.coverage is None else "calibration met"
    yield f"Content words as cloze tests, by how often {where} them; rare ones are the first that models forget."
    yield ""
    rows = [("Words", "Asked", "At most", "Source first", "File first", "Known", "Kept", "Loss, nats")]
    for name, one in report.cloze.items():
        loss = "" if one.log_probability_loss is None else f"{one.log_probability_loss:.3f}"
        first = percent(one.reference_first), percent(one.model_first)
        rows.append((name, str(one.n_words), str(one.most_common), *first, str(one.n_known), percent(one.kept), loss))
    yield from table(rows)


def _writing(report: Report) -> Iterator[str]:
    if report.writing is None:
        yield "No texts were written."
        return
    rows = [("Model", "Texts", "With a loop", "Ended", "Different tokens")]
    for name, one in (("source", report.source_writing), ("this file", report.writing)):
        if one is not None:
            rows.append((name, str(one.n_texts), str(one.n_looped), str(one.n_ended), percent(one.distinct)))
    yield f"Beginnings of the texts continued by the likeliest tokens, at most {report.writing.n_tokens} each."
    if report.source_writing is None:
        yield "The source was too large to write beside it."
    yield ""
    yield from table(rows)


def _calibration(report: Report) -> Iterator[str]:
    seen, origin = report.coverage, report.provenance
    if seen is None:
        yield "No statistics were given."
        return
    parts = ", ".join(f"{name} {n:,}" for name, n in origin.calibration_domains.items())
    yield f"{origin.calibration_tokens:,} tokens ({parts}). {seen.n_seen} of {seen.n_experts} experts were routed to."
    if seen.unseen:
        names = ", ".join(f"{layer}.{expert}" for layer, expert in seen.unseen[:_MANY_UNSEEN])
        more = len(seen.unseen) - _MANY_UNSEEN
        yield f"No token was routed to these (layer.expert): {names}" + (f" and {more} more." if more > 0 else ".")


def _bytes(report: Report) -> Iterator[str]:
    rows = [("Kind", "Type", "Weights", "Bytes", "Bits each")]
    for part in report.file.parts:
        rows.append((part.kind, part.type, f"{part.n_weights:,}", f"{part.n_bytes:,}", f"{part.bits_per_weight:.2f}"))
    rest = report.file.n_bytes - sum(part.n_bytes for part in report.file.parts)
    yield from table([*rows, ("header, padding", "", "", f"{rest:,}", "")])


def _types(report: Report) -> Iterator[str]:
    has_dense = any(facts.dense for facts in report.blocks)
    dense = ("Dense, shared experts",) if has_dense else ()
    head = ("Block", "Attention", *dense, "Experts: gate/up/down", "Dropped", "Constants", "Bytes")
    yield from table([head, *(_block_row(facts, has_dense=has_dense) for facts in report.blocks)])


def _block_row(facts: BlockFacts, *, has_dense: bool) -> tuple[str, ...]:
    if facts.layer is None:
        return str(facts.block), "dropped", *(("dropped",) if has_dense else ()), "dropped", "", "", "0"
    stored = {row.stored: row for row in facts.rows if row.stored is not None}
    # The types of each expert's copies, once where gate, up and down have the same.
    names: Counter[str] = Counter()
    for row in stored.values():
        copies = [copy for copy in (row.types, row.low_types) if copy]
        names[" + ".join(copy[0] if len(set(copy)) == 1 else "/".join(copy) for copy in copies)] += 1
    types = ", ".join(f"{n} x {name}" for name, n in names.most_common()) or "none"
    dropped = sum(row.stored is None and not row.is_constant for row in facts.rows)
    constants = sum(row.is_constant for row in facts.rows)
    n_bytes = f"{sum(facts.n_bytes.values()):,}"
    attention, dense = (" ".join(dict.fromkeys(kinds.values())) or "none" for kinds in (facts.attention, facts.dense))
    shown = (dense,) if has_dense else ()
    return str(facts.block), attention, *shown, types, str(dropped), str(constants), n_bytes


def _recipe(report: Report) -> Iterator[str]:
    yield "```toml"
    yield report.provenance.recipe.strip()
    yield "```"


def _provenance(report: Report) -> Iterator[str]:
    origin = report.provenance
    rows = [
        ("What", "Value"),
        ("sha256 of this file", report.file.sha256),
        ("source", origin.source_name),
        ("digest of the source", origin.source_hash),
        ("digest of the calibration's texts", origin.calibration_hash or "none"),
        ("digest of the evaluation texts", report.evaluated_on.hash),
        ("evaluated in", f"{report.seconds:.0f} s"),
        *((name, value) for name, value in origin.versions.items()),
    ]
    yield from table(rows)
