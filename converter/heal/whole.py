"""Healing a model as a whole: all small tensors at once are trained by the KL divergence of the source's logits."""

import numpy as np
import torch
from torch import Tensor

from slimoe.converter.forward.head import Head, read_head
from slimoe.converter.forward.tensor_source import TensorSource
from slimoe.converter.forward.whole_block import pass_block
from slimoe.converter.heal.lesson import N_BATCH, Lesson, Progress, Tokens
from slimoe.converter.heal.saved import Saved, SavedState, restore_trained, trained_arrays
from slimoe.converter.heal.trained import SLOWER, Adam
from slimoe.converter.report.evaluation import divergences
from slimoe.converter.source.model_source import MatrixKey
from slimoe.converter.stats.statistics_file import Arrays

WHOLE = "healing the whole model"
RATE = 0.01
_LOOKS = 8
"""How often the model is measured on held-out sequences and saved."""
_BEST, _MEANS, _SQUARES = "best.", "mean.", "square."


def model_states(model: TensorSource, tokens: Tokens) -> Tensor:
    """The hidden states [n_rows, n_embd] behind the last layer, through which gradients flow; raises ModelFileError."""
    ids = torch.tensor([token for one in tokens for token in one], device=model.device)
    h = model.spec.multipliers.embedding * model.tensor(MatrixKey("token_embd.weight"))[ids]
    for layer in range(model.spec.n_layer):
        h = pass_block(model, layer, h, [len(one) for one in tokens])
    return h


class WholeTraining:
    """Trains all tensors of a model, which is in memory as a whole, and takes up what an interrupted run has saved.

    `wanted` [n_rows, n_embd] are the source's hidden states behind the last layer, of all sequences.
    """

    def __init__(self, lesson: Lesson, head: Head, wanted: Tensor, state: SavedState) -> None:
        self._lesson, self._head, self._wanted, self._state = lesson, head, wanted, state
        self._spans = list(lesson.texts.sequences.spans())
        self._tensors = lesson.model.trained
        self._adam = Adam(list(self._tensors.values()), RATE)

    def run(self, seconds: float, arrays: Arrays, on_progress: Progress) -> None:
        """Trains for so many seconds in all, and leaves the tensors that are best on held-out sequences.

        `arrays` are saved with the state. Raises ModelFileError.
        """
        settings, texts = self._lesson.settings, self._lesson.texts
        spent, best, kept = self._begin()
        draw, last, begin = np.random.default_rng(self._adam.n_step), spent, settings.clock() - spent
        order: list[int] = []
        while spent < seconds:
            if len(order) < N_BATCH:
                order += draw.permutation(len(texts.train)).tolist()
            batch, order = order[:N_BATCH], order[N_BATCH:]
            self._adam.step(self._divergence(batch), 1 - spent / seconds)
            spent = settings.clock() - begin
            on_progress(WHOLE, round(min(spent, seconds)), round(seconds))
            if spent - last > seconds / _LOOKS or spent >= seconds:
                found, last = self.held(), spent
                if found < best:
                    best, kept = found, trained_arrays(self._tensors)
                else:
                    # Steps are too long for a file that is so near to its source.
                    restore_trained(self._tensors, kept)
                    self._adam.slow_down(SLOWER)
                self._save(spent, best, kept, arrays)
                # Neither measuring nor saving is training.
                begin = settings.clock() - spent
        restore_trained(self._tensors, kept)

    def held(self) -> float:
        """The mean divergence on held-out sequences, in nats per token."""
        n_train, model = len(self._lesson.texts.train), self._lesson.model
        head, total, n_rows = read_head(model, model.device), 0.0, 0
        with torch.no_grad():
            for index, tokens in enumerate(self._lesson.texts.held, n_train):
                found = model_states(model, (tokens,))
                total += float(divergences(self._head, self._rows([index]), head, found).sum(dtype=np.float64))
                n_rows += len(tokens)
        return total / n_rows

    def _divergence(self, batch: list[int]) -> Tensor:
        """The mean divergence of some sequences to train on, in nats per token."""
        tokens = tuple(self._lesson.texts.train[index] for index in batch)
        found = read_head(self._lesson.model, self._lesson.model.device)(
            model_states(self._lesson.model, tokens)
        ).log_softmax(-1)
        with torch.no_grad():
            wanted = self._head(self._rows(batch)).log_softmax(-1)
        return (wanted.exp() * (wanted - found)).sum(-1).mean()

    def _rows(self, sequences: list[int]) -> Tensor:
        rows = torch.cat([self._wanted[slice(*self._spans[index])] for index in sequences])
        return rows.to(self._lesson.model.device)

    def _begin(self) -> tuple[float, float, Arrays]:
        """Seconds that were spent before, the best divergence, and the tensors that have it."""
        found = self._state.load("whole")
        if found is None or "n_step" not in found.numbers:
            return 0.0, self.held(), trained_arrays(self._tensors)
        restore_trained(self._tensors, found.arrays)
        self._adam.n_step = int(found.numbers["n_step"])
        for prefix, moments in ((_MEANS, self._adam.means), (_SQUARES, self._adam.squares)):
            restore_trained(dict(zip(self._tensors, moments, strict=True)), found.arrays, prefix)
        best = {name.removeprefix(_BEST): one for name, one in found.arrays.items() if name.startswith(_BEST)}
        return found.numbers["spent"], found.numbers["best"], best

    def _save(self, spent: float, best: float, kept: Arrays, others: Arrays) -> None:
        moments = ((_MEANS, self._adam.means), (_SQUARES, self._adam.squares))
        arrays = {**others, **trained_arrays(self._tensors)}
        arrays |= {f"{_BEST}{name}": array for name, array in kept.items()}
        for prefix, tensors in moments:
            arrays |= trained_arrays(dict(zip(self._tensors, tensors, strict=True)), prefix)
        self._state.save("whole", Saved(arrays, {"spent": spent, "best": best, "n_step": self._adam.n_step}))
