"""What healing works on: two models, texts to train and to measure on, and for how long."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from slimoe.converter.forward.stream import Sequences
from slimoe.converter.forward.tensor_source import TensorSource
from slimoe.converter.source.model_source import ModelSource
from slimoe.offload.errors import UsageError

Tokens = tuple[tuple[int, ...], ...]
"""The token ids of sequences."""
Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much is done."""

_HELD_EVERY = 8
_MOST_TOKENS = 32768
N_BATCH = 2
"""Sequences of a step."""


@dataclass(frozen=True, slots=True)
class HealTexts:
    """Sequences: to `train` on, and those `held` out and of `other` texts, on both of which the file may not be worse.

    `other` may be empty.
    """

    train: Tokens
    held: Tokens
    other: Tokens = ()

    @property
    def sequences(self) -> Sequences:
        """All of them, those to train on first."""
        return Sequences(self.train + self.held + self.other)

    @property
    def n_train(self) -> int:
        """Tokens to train on."""
        return sum(map(len, self.train))

    @property
    def n_longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences.tokens))


def heal_texts(calibration: Tokens, other: Tokens = ()) -> HealTexts:
    """Holds out an eighth of a calibration's sequences, and takes at most so many that training sees them often.

    Raises UsageError for fewer than two sequences.
    """
    step = max(1, sum(map(len, calibration)) // _MOST_TOKENS)
    some = [one for one in calibration[::step] if len(one) > 1]
    if len(some) < 2:
        raise UsageError(
            "Healing holds text out, and the calibration has one sequence only. Calibrate on more --tokens."
        )
    every = min(_HELD_EVERY, len(some))
    is_held = np.arange(len(some)) % every == every - 1
    train, held = (tuple(one for one, here in zip(some, mask, strict=True) if here) for mask in (~is_held, is_held))
    return HealTexts(train, held, other)


@dataclass(frozen=True, slots=True)
class HealSettings:
    """How to train: for how many seconds by the `clock`, on which torch device, and in how much memory (None: all)."""

    seconds: float
    device: str = "cpu"
    memory: int | None = None
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True, slots=True)
class Lesson:
    """A model that is trained to say what its source says. `blocks` are the source's blocks that its layers are of."""

    source: ModelSource
    model: TensorSource
    blocks: tuple[int, ...]
    texts: HealTexts
    settings: HealSettings
