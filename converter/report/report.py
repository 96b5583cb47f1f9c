"""The report on a compressed file, as values: `measure` makes them, and `markdown` and `model_card` write them out."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from slimoe.converter.report.block_facts import BlockFacts
from slimoe.converter.report.cloze import Cloze
from slimoe.converter.report.quality import DomainQuality, Quality
from slimoe.converter.report.yardstick import Yardstick
from slimoe.converter.source.inventory import KindCount


@dataclass(frozen=True, slots=True)
class FileFacts:
    """The file and its size: `source_bytes` are those of the source's weights in 16 bits.

    `bits_per_weight` are the file's bits for each weight of the source, and `parts` its tensors by kind and type.
    """

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
        """The file's bytes over those of the source's weights in 16 bits."""
        return self.n_bytes / self.source_bytes


@dataclass(frozen=True, slots=True)
class Provenance:
    """The model that the file was made of, and how; the `calibration_*` are 0 or empty if there was none.

    `tasks` are the tokens of the texts for whose task experts were merged, by their names.
    """

    source_name: str
    source_hash: str
    licence: str
    recipe: str
    calibration_hash: str
    calibration_tokens: int
    calibration_domains: Mapping[str, int]
    versions: Mapping[str, str]
    tasks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Coverage:
    """The experts that the calibration's tokens selected: `n_seen` of `n_experts`.

    `unseen` are the others, as (layer, stored expert). `selections` is how often each row of each layer's router was
    selected, None for layers without experts.
    """

    n_seen: int
    n_experts: int
    unseen: tuple[tuple[int, int], ...]
    selections: tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True, slots=True)
class Writing:
    """The texts that a model continued by the likeliest tokens, by at most `n_tokens` tokens each.

    `n_looped` of them have a loop, and `n_ended` the model ended by itself; `distinct` is the mean, over texts, of the
    number of different tokens over that of all tokens.
    """

    n_texts: int
    n_looped: int
    n_ended: int
    distinct: float
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Healing:
    """What training small tensors of the file for so many `seconds` reached, by KL on held-out calibration text.

    If it did not help and was undone, `is_kept` is false, and `kl_after` is what it would have been.
    """

    kl_before: float
    kl_after: float
    seconds: float
    is_kept: bool


@dataclass(frozen=True, slots=True)
class EvaluatedOn:
    """The texts of the evaluation: their tokens, the scored ones among them, and the tokens of the longest window.

    `is_own` and `seen` are those of `EvalText`.
    """

    hash: str
    n_tokens: int
    n_scored: int
    length: int
    is_own: bool
    seen: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """A report. `quality` is that of the best copies of experts, `low_quality` that of the second ones.

    KL divergences are in nats per token: `expected_kl` is the plan's, which does not count what `expected_lacks` names,
    `yardstick` that of the whole model in plain types, and `block_kl` that of the changes of each block of the source
    alone. What is not known is None.
    """

    file: FileFacts
    provenance: Provenance
    evaluated_on: EvaluatedOn
    quality: Quality
    low_quality: DomainQuality | None
    expected_kl: float | None
    expected_lacks: tuple[str, ...]
    blocks: tuple[BlockFacts, ...]
    block_kl: tuple[float, ...] | None
    cloze: Mapping[str, Cloze]
    writing: Writing | None
    source_writing: Writing | None
    coverage: Coverage | None
    yardstick: Yardstick | None
    seconds: float
    healing: Healing | None = None
