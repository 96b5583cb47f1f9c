"""Measures the quality of a written file: its bytes are read back and evaluated, not the plan that it was made by."""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from slimoe.converter.forward.texts import CalibrationText
from slimoe.converter.forward.windows import Windows, cut_windows
from slimoe.converter.layout.offsets import lay_out
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.report.alignment import likely_layer_map, planned_layer_map
from slimoe.converter.report.block_facts import block_facts, reported_layer_map
from slimoe.converter.report.cloze import Cloze, cloze, content_tokens
from slimoe.converter.report.estimate import (
    BLOCKS,
    FILE,
    PLAIN,
    SECOND,
    SOURCE,
    WRITING,
    ReportWork,
    estimate_seconds,
)
from slimoe.converter.report.eval_text import EvalText
from slimoe.converter.report.evaluation import TRACED_TOKENS, Reference
from slimoe.converter.report.generation_check import Continue, check_generation, greedy
from slimoe.converter.report.layer_swap import divergence_by_block
from slimoe.converter.report.quality import Comparison, DomainQuality, summarise
from slimoe.converter.report.report import Coverage, EvaluatedOn, FileFacts, Healing, Provenance, Report, Writing
from slimoe.converter.report.yardstick import PlainPlan, Yardstick, make_yardstick, plain_neighbours, planned_source
from slimoe.converter.source.gguf_source import gguf_source
from slimoe.converter.source.inventory import take_inventory
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.tasks import tasks_of
from slimoe.converter.stats.forward_pass import Progress, coverage
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.write.estimate import writing_seconds
from slimoe.offload.ggml.library import chosen
from slimoe.offload.gguf import keys
from slimoe.offload.gguf.header import Value, read_gguf
from slimoe.offload.model.native_format import read_layout

LOADERS = {"stock": ("llama.cpp", "slimoe"), "native": ("slimoe",)}
"""The programs that load files of a format."""
_LIBRARIES = ("slimoe", "numpy", "torch", "gguf")
_HELD_BYTES = 1 << 30
"""Most bytes in float32 of a small model, which continues texts in memory if no engine is given for it, and is
quantised to plain types to be compared with.
"""
_PROMPTS, _PROMPT_TOKENS = 6, 16
_BLOCK_LENGTH = 128


@dataclass(frozen=True, slots=True)
class ReportSettings:
    """How to evaluate: `device` is a torch device, and `n_threads` quantise plain models to compare with.

    The changes of each block alone are evaluated on `n_block_tokens` tokens, and texts are continued by `n_written`
    tokens, neither if it is 0. Residual streams of more than `max_state_bytes` lie on disk.
    """

    device: str = "cpu"
    n_block_tokens: int = 1024
    n_written: int = 64
    max_state_bytes: int = 1 << 31
    n_threads: int = 1


@dataclass(frozen=True, slots=True)
class Engines:
    """What continues texts with the file (`model`) and with its source; None for in memory, if the model is small."""

    model: Continue | None = None
    source: Continue | None = None


def block_windows(windows: Windows, n_tokens: int) -> Windows | None:
    """Cuts about `n_tokens` tokens of each domain's windows into shorter ones, to evaluate each block's changes alone.

    None if `n_tokens` is 0.
    """
    if not n_tokens:
        return None
    texts: dict[str, list[int]] = {}
    for domain, tokens in zip(windows.domains, windows.sequences.tokens, strict=True):
        texts.setdefault(domain, []).extend(tokens)
    return cut_windows(texts, _BLOCK_LENGTH, max(1, n_tokens // (_BLOCK_LENGTH * len(texts))))


def report_work(
    source: ModelSource, windows: Windows, plain: Sequence[PlainPlan], n_copy: int, settings: ReportSettings
) -> ReportWork:
    """The work that a report takes for a file of `n_copy` copies, which may be compared with the models `plain`."""
    measured = plain if is_small(source) else ()
    seconds = [writing_seconds(source, lay_out(source, one.plan), settings.n_threads) for one in measured]
    n_written = settings.n_written if is_small(source) else 0
    cut = block_windows(windows, settings.n_block_tokens)
    return ReportWork(windows, cut, n_copy, len(measured), sum(seconds), _PROMPTS, n_written, n_models=1)


def is_small(source: ModelSource) -> bool:
    """Whether a model is small enough to be held in memory in float32."""
    return 4 * _n_weights(source) <= _HELD_BYTES


class ReportMaker:
    """Makes the report on the file `target`, which was made of `source`, by evaluating it on `texts`.

    Without `plan`, an earlier report `known` says which blocks of the source the file has. Without both, they
    correspond one to one, and nothing is reported by block for a file of fewer blocks.
    """

    def __init__(
        self,
        source: ModelSource,
        target: Path,
        texts: EvalText,
        *,
        statistics: Statistics | None = None,
        plan: CompressPlan | None = None,
        settings: ReportSettings = ReportSettings(),
        engines: Engines = Engines(),
        expected_lacks: Sequence[str] = (),
        known: Report | None = None,
    ) -> None:
        """Opens the file; raises ModelFileError. `expected_lacks` is what the plan's expected KL does not count."""
        self.known = known
        self.expected_lacks = known.expected_lacks if known is not None and plan is None else tuple(expected_lacks)
        self.source, self.target, self.texts = source, target, texts
        self.statistics, self.plan, self.settings, self.engines = statistics, plan, settings, engines
        self.model = gguf_source(target)
        told = None if known is None else reported_layer_map(known.blocks)
        self.layer_map = planned_layer_map(plan) if plan else told or likely_layer_map(self.model, source)
        self.plain = plain_neighbours(source, statistics, target.stat().st_size)
        gguf = read_gguf(target)
        self.metadata = gguf.metadata
        is_native = self.model.spec.is_native
        self.n_copy = read_layout(gguf, self.model.spec).n_copy if is_native else 1
        self.format = "native" if is_native else "stock"

    @property
    def seconds(self) -> dict[str, float]:
        """The estimated seconds by kind of work, from a short trial."""
        work = report_work(self.source, self.texts.windows, self.plain, self.n_copy, self.settings)
        return estimate_seconds(self.source, work, self.settings.device)

    def make(self, on_progress: Progress = lambda _what, _done, _total: None, directory: Path | None = None) -> Report:
        """Evaluates the file; large residual streams lie in `directory`, if one is given.

        Raises ModelFileError, UsageError for a file of another model, and BadLogitsError for NaN or infinity.
        """
        begin, spec, n_rows = time.monotonic(), self.source.spec, self.texts.windows.sequences.n_rows
        n_kept = 6 * n_rows + spec.n_layer * max(min(TRACED_TOKENS, n_rows), self.settings.n_block_tokens)
        if 4 * n_kept * spec.n_embd <= self.settings.max_state_bytes:
            directory = None
        compared, low, yardstick = self._compare(directory, on_progress)
        block_kl = self._block_kl(directory, on_progress)
        writing, source_writing = None, None
        if self.settings.n_written:
            on_progress(WRITING, 0, 2)
            writing = self._writing(self.engines.model, self.model)
            on_progress(WRITING, 1, 2)
            source_writing = self._writing(self.engines.source, self.source)
            on_progress(WRITING, 2, 2)
        known, n_bytes, n_weights = self.known, self.target.stat().st_size, _n_weights(self.source)
        return Report(
            file=FileFacts(
                name=self.target.name,
                format=self.format,
                loads_in=LOADERS[self.format],
                n_bytes=n_bytes,
                source_bytes=2 * n_weights,
                bits_per_weight=8 * n_bytes / n_weights,
                parts=take_inventory(self.target).counts,
            ),
            provenance=self._provenance(),
            evaluated_on=_evaluated_on(self.texts),
            quality=summarise(compared),
            low_quality=low,
            expected_kl=self.plan.expected_kl if self.plan else known.expected_kl if known else None,
            expected_lacks=self.expected_lacks,
            blocks=block_facts(self.target, self.source, self.layer_map),
            block_kl=block_kl,
            cloze=self._cloze(compared),
            writing=writing,
            source_writing=source_writing,
            coverage=expert_coverage(self.statistics) if self.statistics else known.coverage if known else None,
            yardstick=yardstick,
            seconds=time.monotonic() - begin,
            healing=healing_of(self.metadata),
        )

    # --- measuring -----------------------------------------------------------------------------------------

    def _compare(
        self, directory: Path | None, on_progress: Progress
    ) -> tuple[Comparison, DomainQuality | None, Yardstick | None]:
        device = self.settings.device
        reference = Reference(
            self.source,
            self.texts.windows,
            device=device,
            directory=directory,
            on_progress=_named(on_progress, SOURCE),
        )
        try:
            compared = reference.compare(self.model, self.layer_map, _named(on_progress, FILE))
            low = None
            if self.n_copy > 1:
                second = gguf_source(self.target, self.n_copy - 1)
                low = summarise(reference.compare(second, self.layer_map, _named(on_progress, SECOND))).total
            return compared, low, self._yardstick(reference, on_progress)
        finally:
            reference.close()

    def _yardstick(self, reference: Reference, on_progress: Progress) -> Yardstick | None:
        n_layer, done = self.source.spec.n_layer, 0
        n_steps = n_layer * len(self.plain)

        def measure(one: PlainPlan) -> float:
            nonlocal done
            model = planned_source(self.source, self.statistics, one.plan, self.settings.n_threads)
            compared = reference.compare(model, None, lambda layer, _all: on_progress(PLAIN, done + layer, n_steps))
            done += n_layer
            return summarise(compared).total.divergence.mean

        n_bytes = self.target.stat().st_size
        return make_yardstick(self.plain, n_bytes, measure if is_small(self.source) else None)

    def _block_kl(self, directory: Path | None, on_progress: Progress) -> tuple[float, ...] | None:
        windows = block_windows(self.texts.windows, self.settings.n_block_tokens)
        if windows is None or self.layer_map is None:
            return None
        return divergence_by_block(
            self.model,
            self.source,
            windows,
            layer_map=self.layer_map,
            device=self.settings.device,
            directory=directory,
            on_progress=_named(on_progress, BLOCKS),
        )

    def _writing(self, continue_: Continue | None, model: ModelSource) -> Writing | None:
        ends = end_tokens(self.model.metadata)
        if continue_ is None:
            if not is_small(model):
                return None
            continue_ = greedy(model, ends)
        tokens = self.texts.windows.sequences.tokens
        rows = np.unique(np.linspace(0, len(tokens) - 1, _PROMPTS).round().astype(int))
        # A prompt leaves room for its continuation in short contexts.
        prompts = [tokens[row][: min(_PROMPT_TOKENS, max(1, len(tokens[row]) // 2))] for row in rows.tolist()]
        n_tokens = min(self.settings.n_written, max(1, model.spec.n_ctx_train - _PROMPT_TOKENS))
        found = check_generation(continue_, prompts, n_tokens, ends)
        return Writing(len(prompts), found.n_looped, found.n_ended, found.distinct, n_tokens)

    def _cloze(self, compared: Comparison) -> dict[str, Cloze]:
        if keys.TOKENS not in self.source.metadata:
            return {}
        if self.statistics is not None:
            counts = self.statistics.token_count
        else:
            tokens = [token for one in self.texts.windows.sequences.tokens for token in one]
            counts = np.bincount(tokens, minlength=self.source.spec.n_vocab)
        return cloze(compared, content_tokens(self.source.metadata), counts)

    def _provenance(self) -> Provenance:
        known, statistics = self.metadata, self.statistics
        domains: Counter[str] = Counter()
        if statistics is not None:
            for domain, tokens in zip(statistics.domains, statistics.tokens, strict=True):
                domains[domain] += len(tokens)
        if statistics is None and self.known is not None:
            domains.update(self.known.provenance.calibration_domains)
        return Provenance(
            source_name=str(self.source.metadata.get("general.name", self.source.path.name)),
            source_hash=self.source.source_hash,
            licence=str(self.source.metadata.get("general.license", "")),
            recipe=str(known.get(keys.RECIPE, "")),
            calibration_hash=str(known.get(keys.CALIBRATION_HASH, "")),
            calibration_tokens=int(str(known.get(keys.CALIBRATION_TOKENS, 0))),
            calibration_domains=dict(domains),
            versions={name: version(name) for name in _LIBRARIES} | {chosen().package.name: chosen().version},
            tasks={name: task.tokens for name, task in tasks_of(known).items()},
        )


def _evaluated_on(texts: EvalText) -> EvaluatedOn:
    windows, tokens = texts.windows, texts.windows.sequences.tokens
    return EvaluatedOn(
        hash=CalibrationText(tokens, windows.domains).hash,
        n_tokens=windows.sequences.n_rows,
        n_scored=windows.n_scored,
        length=max(map(len, tokens)),
        is_own=texts.is_own,
        seen=texts.seen,
    )


def healing_of(metadata: Mapping[str, Value]) -> Healing | None:
    """What a file's header says of its healing; None if it was not healed, or says it in a way that is not known."""
    try:
        told = json.loads(str(metadata[keys.HEALED]))
        before, after = (float(one) for one in told["kl"])
        return Healing(before, after, float(told["seconds"]), bool(told["kept"]))
    except (KeyError, TypeError, ValueError):
        return None


def expert_coverage(statistics: Statistics) -> Coverage:
    """The experts that a calibration's tokens selected."""
    n_seen, n_experts = coverage(statistics.layers)
    unseen = [
        (index, expert)
        for index, layer in enumerate(statistics.layers)
        if layer.outputs is not None
        for expert in np.flatnonzero(layer.outputs.n_pick == 0).tolist()
    ]
    selections = tuple(
        None if layer.router is None else tuple(layer.router.rank_count.sum(1).tolist()) for layer in statistics.layers
    )
    return Coverage(n_seen, n_experts, tuple(unseen), selections)


def end_tokens(metadata: Mapping[str, Value]) -> set[int]:
    """The tokens that end a text."""
    found = (metadata.get(keys.token_id_key(role)) for role in ("eos", "eot", "eom"))
    return {token for token in found if isinstance(token, int)}


def file_hash(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _n_weights(source: ModelSource) -> int:
    return sum(math.prod(shape) for shape in source.shapes.values())


def _named(on_progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(what, done, total)
