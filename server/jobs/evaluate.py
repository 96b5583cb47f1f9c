"""Evaluates a file against the model that it was made of, and tells beforehand how long that takes."""

from collections.abc import Collection, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from slimoe.converter.forward.texts import TextFile
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.report.estimate import estimate_seconds
from slimoe.converter.report.eval_text import read_eval_text
from slimoe.converter.report.generation_check import Continue
from slimoe.converter.report.make import known_report, report_paths, write_report
from slimoe.converter.report.markdown import unread_text, yardstick_text
from slimoe.converter.report.measure import Engines, ReportMaker, ReportSettings, end_tokens, file_hash, report_work
from slimoe.converter.report.report import Report
from slimoe.converter.report.yardstick import plain_neighbours
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.calibrate import choose_device
from slimoe.converter.stats.statistics import Statistics
from slimoe.offload.engine import Engine
from slimoe.offload.files.whole_file import Destination
from slimoe.offload.plan.engine_config import ContextConfig, EngineConfig
from slimoe.offload.resources.processors import usable_processors
from slimoe.server.chat.text_encoder import TokenizerEncoder
from slimoe.server.options.eval_options import EvalOptions
from slimoe.server.telling import tell
from slimoe.server.terminal.progress_bars import duration, step_bar

_N_CTX = 256


class Evaluator:
    """Texts, read and counted before anything is made, and the model that a file will be held against."""

    def __init__(self, source: ModelSource, statistics: Statistics | None, options: EvalOptions) -> None:
        """Raises UsageError for texts or a device that cannot be used, ModelFileError for a model without tokenizer."""
        self.source, self.statistics, self.device = source, statistics, choose_device(options.device)
        self.n_threads = options.n_threads
        self.settings = ReportSettings(self.device, n_threads=options.n_threads or usable_processors())
        files = tuple(map(TextFile.parse, options.texts))
        with closing(TokenizerEncoder(source.path, source.metadata)) as encoder:
            self.text = read_eval_text(files, encoder, source.spec.n_ctx_train, statistics, options.n_tokens)

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        """The sequences of token ids that files are evaluated on."""
        return self.text.windows.sequences.tokens

    def seconds(self, n_bytes: int, n_copy: int) -> float:
        """Estimates how long evaluating a file of `n_bytes` with `n_copy` copies of each expert takes.

        It tries the work for a moment; raises ModelFileError.
        """
        plain = plain_neighbours(self.source, self.statistics, n_bytes)
        work = report_work(self.source, self.text.windows, plain, n_copy, self.settings)
        return sum(estimate_seconds(self.source, work, self.device).values())

    def report(
        self, destination: Destination, plan: CompressPlan | None, *, lacks: Sequence[str] = (), record: bool = False
    ) -> Report:
        """Evaluates the file and writes the report beside it; raises as `write_report` does.

        `lacks` is what the plan's expected KL does not count; with `record` the file keeps the figures too.
        """
        target, source = destination.target, self.source
        ends, n_ctx_train = end_tokens(source.metadata), source.spec.n_ctx_train
        # The file is run as it is served, and so is its source if that is a file.
        models = [target, *([source.path] if source.path.is_file() else [])]
        maker = ReportMaker(
            self.source,
            target,
            self.text,
            statistics=self.statistics,
            plan=plan,
            settings=self.settings,
            engines=Engines(*(engine_writer(model, n_ctx_train, ends, self.n_threads) for model in models)),
            expected_lacks=lacks,
            known=known_report(report_paths(target)["json"], self.source.source_hash, file_hash(target)),
        )
        n_tokens, seconds = self.text.windows.sequences.n_rows, maker.seconds
        tell(f"evaluating it on {n_tokens:,} tokens: about {duration(sum(seconds.values()))}")
        with step_bar(seconds) as on_progress:
            report = write_report(maker, record=record, on_progress=on_progress, destination=destination)
        for line in _told(report, target):
            tell(line)
        return report


def report_summary(report: Report, target: Path) -> dict[str, Any]:
    """What programs are told of a report; all of it lies in the file at `json`."""
    total = report.quality.total
    return {
        "kl": total.divergence.mean,
        "kl_99": total.divergence.percentile_99,
        "kl_999": total.divergence.percentile_999,
        "plain_kl": None if report.yardstick is None else report.yardstick.kl,
        "unread": list(report.quality.unread),
        "same_top": total.same_top,
        "perplexity": total.perplexity,
        "source_perplexity": total.reference_perplexity,
        **{name: str(path) for name, path in report_paths(target).items()},
    }


def engine_writer(model: Path, n_ctx_train: int, ends: Collection[int], n_threads: int | None = None) -> Continue:
    """Continues texts by the likeliest tokens, in an engine that is open only meanwhile; raises as opening it does."""

    def continue_(prompts: Sequence[Sequence[int]], n_tokens: int) -> list[tuple[int, ...]]:
        context = ContextConfig(n_ctx=min(_N_CTX, n_ctx_train))
        with closing(Engine.open(EngineConfig(model, n_threads=n_threads, context=context))) as engine:
            return [_greedy(engine, prompt, n_tokens, ends) for prompt in prompts]

    return continue_


def _greedy(engine: Engine, prompt: Sequence[int], n_tokens: int, ends: Collection[int]) -> tuple[int, ...]:
    engine.truncate(0)
    logits, tokens = engine.prefill(prompt), list[int]()
    while True:
        tokens.append(int(logits.argmax()))
        if len(tokens) == n_tokens or tokens[-1] in ends:
            return tuple(tokens)
        logits = engine.decode(tokens[-1])


def _told(report: Report, target: Path) -> list[str]:
    total = report.quality.total
    error = "" if total.divergence.error is None else f" ± {total.divergence.error:.4f}"
    first = (
        f"{report_paths(target)['markdown']}: KL {total.divergence.mean:.4f}{error} nats per token, "
        f"{total.divergence.percentile_999:.3g} or more for one in 1,000; {100 * total.same_top:.1f} % the same "
        f"likeliest token, perplexity {100 * total.perplexity_rise:+z.1f} %"
    )
    return [first, *(text for text in (yardstick_text(report), unread_text(report)) if text)]
