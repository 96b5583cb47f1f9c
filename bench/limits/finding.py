"""What an attack found: promises that did not hold, and how to see each again."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """A promise that did not hold: `kind` groups those of one cause, `case` repeats it, `detail` is what was seen."""

    kind: str
    case: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """An attack's figures, and what it found."""

    figures: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The figures with the number of findings, by kind."""
        return {**self.figures, "n_findings": len(self.findings), "findings": counted(self.findings)}


def counted(findings: Iterable[Finding]) -> dict[str, int]:
    """The number of findings of each kind, the most frequent kind first."""
    return {kind: len(group) for kind, group in _grouped(findings)}


def tell(name: str, outcome: Outcome) -> None:
    """Writes an attack's figures and findings for a person, on standard error."""
    print(f"{name}: {json.dumps(outcome.figures)}", file=sys.stderr)
    for kind, group in _grouped(outcome.findings):
        print(f"  {len(group)} x {kind}", file=sys.stderr)
        for finding in group[:_SHOWN]:
            print(f"      case {finding.case}: {finding.detail[:500]}", file=sys.stderr)


def _grouped(findings: Iterable[Finding]) -> list[tuple[str, list[Finding]]]:
    groups: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.kind].append(finding)
    return sorted(groups.items(), key=lambda item: -len(item[1]))
