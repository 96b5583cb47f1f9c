"""What an earlier report of a file knows that the file does not say: what converting left out, expected and learnt."""

from collections.abc import Sequence
from pathlib import Path

from converter.block_facts import BlockFacts
from converter.descent import Descent
from converter.document import BadDocumentError, decode_json
from converter.report import Report
from offload.regular_file import read_regular


def known_report(path: Path, source_hash: str, sha256: str) -> Report | None:
    """The report in a file of JSON, None if it cannot be read or is of another source or of other bytes."""
    try:
        report = decode_json(read_regular(path), Report)
    except (OSError, BadDocumentError):
        return None
    is_same = report.provenance.source_hash == source_hash and report.file.sha256 == sha256
    return report if is_same else None


def reported_descent(blocks: Sequence[BlockFacts]) -> Descent | None:
    """Which blocks and rows of their source a report's file has; None where it does not say."""
    kept = sorted((facts for facts in blocks if facts.layer is not None), key=lambda facts: facts.layer or 0)
    numbers = tuple(facts.block for facts in kept)
    if list(numbers) != sorted(set(numbers)):
        return None
    rows = (tuple(n for n, row in enumerate(facts.rows) if row.stored is not None or row.is_novice) for facts in kept)
    return Descent(numbers, tuple(rows))
