"""How a layer's selected experts are found in the slots of the host expert cache, all of them at once."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.disk_reader import PAGE
from slimoe.offload.cache.host_slots import Addresses
from slimoe.offload.model.experts import ExpertCopy, ExpertLayer, SlotClass


@dataclass(frozen=True, slots=True, eq=False)
class LayerBanks:
    """The slot classes of a layer's copies of experts.

    `numbers` I64 [n_copies, n_expert] says which of the `classes` a copy of an expert is of, -1 where it has no slots.
    `phases` say for each class where in a page of the file gate, up and down begin, None where that differs from expert
    to expert: their slots then are no stack of matrices. `target` I64 are the layer's stored experts by row of its
    router. If `may_repeat`, several rows mean one expert, which a token can then select more than once.
    """

    classes: tuple[SlotClass, ...]
    numbers: NDArray[np.int64]
    phases: tuple[Addresses | None, ...]
    target: NDArray[np.int64]
    may_repeat: bool

    @classmethod
    def of(cls, layer: ExpertLayer, with_slots: Collection[SlotClass]) -> "LayerBanks":
        """The banks of a layer; `with_slots` are the classes that have slots."""
        every = dict.fromkeys(copy.slot_class for copies in layer.experts for copy in copies)
        classes = tuple(slot_class for slot_class in every if slot_class in with_slots)
        numbers = np.full((max(map(len, layer.experts), default=1), len(layer.experts)), -1, np.int64)
        found: list[set[Addresses]] = [set() for _ in classes]
        for expert, copies in enumerate(layer.experts):
            for index, copy in enumerate(copies):
                if copy.slot_class in with_slots:
                    numbers[index, expert] = classes.index(copy.slot_class)
                    found[numbers[index, expert]].add(_phases(copy))
        stored = [expert for expert in layer.target if expert >= 0]
        phases = tuple(next(iter(one)) if len(one) == 1 else None for one in found)
        return cls(classes, numbers, phases, np.array(layer.target, np.int64), len(set(stored)) < len(stored))


def _phases(copy: ExpertCopy) -> Addresses:
    gate, up, down = (matrix.spans[0].offset % PAGE for matrix in (copy.gate, copy.up, copy.down))
    return gate, up, down
