"""What benches of quality start from: a checkpoint, its statistics, and its own predictions of texts."""

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimoe.converter.budget.compress import plan_compression, target_bytes
from slimoe.converter.forward.texts import TextFile
from slimoe.converter.forward.windows import cut_windows
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.recipe.recipe import Recipe
from slimoe.converter.report.cloze import Cloze, cloze, content_tokens
from slimoe.converter.report.evaluation import Reference
from slimoe.converter.report.quality import Quality, summarise
from slimoe.converter.source.model_source import ModelSource, active_weights
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.imatrix_file import imatrix_of
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.statistics_file import load_statistics
from slimoe.converter.write.writer import chosen_quantiser, write_planned
from slimoe.offload.gguf import keys
from slimoe.server.chat.text_encoder import TokenizerEncoder

WINDOW = 512
"""Tokens of a window of text, of which the second half is predicted."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Lab:
    """A checkpoint, what is known of it, and its own answers to the texts."""

    checkpoint: Path
    source: ModelSource
    statistics: Statistics
    reference: Reference
    directory: Path
    n_threads: int
    feedback: bool = True

    @classmethod
    def open(
        cls,
        checkpoint: Path,
        stats: Path,
        texts: tuple[str, ...],
        n_windows: int,
        directory: Path,
        n_threads: int,
        *,
        feedback: bool = True,
    ) -> "Lab":
        """Reads the texts [NAME=]FILE and has the checkpoint predict them; raises SlimoeError as reading does."""
        source = open_source(checkpoint)
        statistics = load_statistics(stats, source)
        reference = Reference(source, cut_windows(read_windows(source, texts, n_windows)))
        return cls(checkpoint, source, statistics, reference, directory, n_threads, feedback)

    @property
    def bf16_bytes(self) -> int:
        """The bytes of all weights in 16 bits."""
        return 2 * sum(math.prod(shape) for shape in self.source.shapes.values())

    def importance(self) -> dict[str, np.ndarray]:
        """An importance matrix for llama.cpp: mean squares of what each tensor reads, float32 [matrices, n_per_row]."""
        return {
            name: np.stack([entry.means(index) for index in range(len(entry.counts))]).astype(np.float32)
            for name, entry in imatrix_of(self.statistics).entries.items()
        }

    def write(self, recipe: Recipe, path: Path) -> CompressPlan:
        """Writes what a recipe makes of the checkpoint, over what is there; raises as `plan_compression` does."""
        plan = plan_compression(self.source, self.statistics, recipe, n_threads=self.n_threads)
        quantiser = chosen_quantiser(self.source, plan, self.statistics, self.n_threads)
        write_planned(
            self.source, plan, path, self.statistics, quantiser=quantiser, n_threads=self.n_threads, force=True
        )
        return plan

    def figures(self, path: Path) -> Row:
        """The size of a file and how it compares with the checkpoint.

        `cloze` are shares of the texts' content words: those that are the likeliest token for the checkpoint and for
        the file, and None without a vocabulary. `active` are the weights that a token is multiplied with or looks up.
        """
        model = open_source(path)
        compared = self.reference.compare(model)
        quality: Quality = summarise(compared)
        words: Mapping[str, Cloze] = {}
        if keys.TOKENS in self.source.metadata:
            words = cloze(compared, content_tokens(self.source.metadata), self.statistics.token_count)
        n_words = sum(one.n_words for one in words.values())
        firsts = [(one.reference_first * one.n_words, one.model_first * one.n_words) for one in words.values()]
        return {
            "n_bytes": path.stat().st_size,
            "kl": quality.total.divergence.mean,
            "kl_error": quality.total.divergence.error,
            "same_top": quality.total.same_top,
            "perplexity_rise": {name: one.perplexity_rise for name, one in quality.domains.items()},
            "perplexity": {name: one.perplexity for name, one in quality.domains.items()},
            "cloze": [sum(column) / n_words for column in zip(*firsts, strict=True)] if n_words else None,
            "active": active_weights(model),
        }

    def evaluated(self, path: Path) -> Row:
        """The figures of a file, which is deleted."""
        row = self.figures(path)
        path.unlink()
        return row

    def ours(self, recipe: Recipe) -> Row:
        """The figures of the file that our recipe makes; its bytes never exceed the recipe's budget."""
        path = self.directory / "ours.gguf"
        plan = self.write(recipe, path)
        budget = target_bytes(self.source, recipe)
        assert budget is None or path.stat().st_size <= budget
        return {"expected_kl": plan.expected_kl} | self.evaluated(path)


def read_windows(source: ModelSource, texts: tuple[str, ...], n_windows: int) -> dict[str, list[int]]:
    """The first windows of each text, as token ids; raises as reading and the tokenizer do."""
    with closing(TokenizerEncoder(source.path, source.metadata)) as encoder:
        files = [TextFile.parse(text) for text in texts]
        return {
            file.domain: encoder.text(file.path.read_text("utf-8"), at_start=True)[: n_windows * WINDOW]
            for file in files
        }
