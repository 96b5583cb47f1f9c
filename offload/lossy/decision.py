"""What a lossy mode decides for the selected experts of a layer: the copy to use, or what stands in its place."""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.slots import LowSlots
from slimoe.offload.lossy.loss import LossTable
from slimoe.offload.model.experts import ExpertLayer

SKIPPED = int(np.iinfo(np.int64).min)
"""In place of a stored expert: nothing is computed or added for this selected expert."""


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The experts that the router of layer `index` selected for each token, those of the best scores first.

    `stored` I64 [n_rows, n_used] are stored experts, or -1 - n for constant expert n; `weights` F32 their weights.
    """

    index: int
    layer: ExpertLayer
    table: LossTable
    stored: NDArray[np.int64]
    weights: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What becomes of a choice, all [n_rows, n_used].

    `copies` I64 numbers each expert's copies from the best on; `stored` is the choice's, with constant experts and
    `SKIPPED` where experts are left out; `weights` are new ones, None for no change.
    """

    copies: NDArray[np.int64]
    stored: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None


class Memory(Protocol):
    """What a mode may ask about memory and disk."""

    def holds(self, key: Key, copy_index: int) -> bool:
        """Whether a copy of an expert is in host or device memory, complete."""

    def read_seconds(self, n_bytes: int) -> float:
        """The seconds that reading so many bytes takes."""


class Chooser(Protocol):
    """A lossy mode: decides what is computed for the experts that the router selected."""

    @property
    def low_slots(self) -> LowSlots:
        """Which memory the mode wants for low-bit copies."""

    @property
    def invests(self) -> bool:
        """Whether missing best copies are to be read while the disk has nothing else to do."""

    @property
    def is_steady(self) -> bool:
        """Whether the mode decides by expert weights alone, and so must see those of all layers."""

    def choose(self, choice: Choice, memory: Memory) -> Decision:
        """Decides for the selected experts of a layer."""

    def prefetch_copy(self, key: Key, table: LossTable, memory: Memory) -> int:
        """The copy that is worth reading for an expert that will perhaps be selected soon."""


def unchanged(choice: Choice) -> Decision:
    """Returns the exact decision: the best copy of every selected expert."""
    return Decision(np.zeros_like(choice.stored), choice.stored)


def without(choice: Choice, given_up: NDArray[np.bool_], copies: NDArray[np.int64], constants: bool) -> Decision:
    """Leaves some selected experts out: with `constants` their constant experts stand in, the others are skipped.

    The weights of the experts that stay grow by what was skipped, since the sum of a token's expert weights matters
    more than its parts; a constant expert keeps the weight of the expert that it stands for.
    """
    if not given_up.any():
        return Decision(copies, choice.stored)
    fallback = choice.table.fallback[choice.table.rows(choice.stored)] if constants else np.int64(-1)
    stored = np.where(given_up, np.where(fallback >= 0, -1 - fallback, SKIPPED), choice.stored)
    decision = Decision(np.where(stored < 0, 0, copies), stored)
    skipped = stored == SKIPPED
    if not skipped.any():
        return decision
    kept = np.where(skipped, np.float32(0), choice.weights)
    whole, left = (values.sum(axis=1, keepdims=True, dtype=np.float64) for values in (choice.weights, kept))
    has_lost = skipped.any(axis=1, keepdims=True) & (left > 0)
    # Rows that lost nothing keep their weights to the last bit.
    grown = np.where(has_lost, kept * (whole / np.where(has_lost, left, 1.0)), kept)
    return replace(decision, weights=grown.astype(np.float32))
