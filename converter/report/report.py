"""The report on a slimmed file: values only. `report_making` measures them, others write them for people."""

from collections.abc import Mapping
from dataclasses import dataclass

from slimoe.converter.report.block_facts import BlockFacts
from slimoe.converter.report.cloze import Cloze
from slimoe.converter.report.quality import DomainQuality, Quality
from slimoe.converter.report.yardstick import Yardstick
from slimoe.converter.source.inventory import KindCount


@dataclass(frozen=True, slots=True)
class FileFacts:
    """The file: its bytes, `source_bytes` those of the source's weights in 16 bits, bits for each of those."""

    name: str
    format: str
    loads_in: tuple[str, ...]
    n_bytes: int
    source_bytes: int
    bits_per_weight: float
    parts: tuple[KindCount, ...]
    sha256: str = ""

    @property
    def share(self) -> float:
        """Of the source in 16 bits."""
        return self.n_bytes / self.source_bytes


@dataclass(frozen=True, slots=True)
class Provenance:
    """What it was made of and with: `source_*` tell the model apart, `calibration_*` are 0 and empty without one."""

    source_name: str
    source_hash: str
    licence: str
    recipe: str
    calibration_hash: str
    calibration_tokens: int
    calibration_domains: Mapping[str, int]
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Coverage:
    """Experts that calibration text was routed to: picks of each [layer][row], None for layers without any; `unseen`
    are (layer, stored expert).
    """

    n_seen: int
    n_experts: int
    unseen: tuple[tuple[int, int], ...]
    picks: tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True, slots=True)
class Writing:
    """Texts that were continued by the likeliest tokens: how many, with a loop, ended, mean share of different tokens,
    and tokens of each at most.
    """

    n_texts: int
    n_looped: int
    n_ended: int
    distinct: float
    n_tokens: int


@dataclass(frozen=True, slots=True)
class EvaluatedOn:
    """The texts of the figures: tokens run and scored, tokens of a window, and as in `EvalText`."""

    hash: str
    n_tokens: int
    n_scored: int
    length: int
    is_own: bool
    seen: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything. `quality` is that of the best copies, `low_quality` that of the second ones. KL is in nats per token.

    `expected_lacks` is what was done that the expected KL says nothing of, `yardstick` what plain types would lose.
    By block of the source, None where there is nothing to say: `block_kl`, what a block's changes alone cost.
    """

    file: FileFacts
    provenance: Provenance
    judged: EvaluatedOn
    quality: Quality
    low_quality: DomainQuality | None
    expected_kl: float | None
    expected_lacks: tuple[str, ...]
    blocks: tuple[BlockFacts, ...]
    block_kl: tuple[float, ...] | None
    probes: Mapping[str, Cloze]
    writing: Writing | None
    source_writing: Writing | None
    coverage: Coverage | None
    yardstick: Yardstick | None
    seconds: float
