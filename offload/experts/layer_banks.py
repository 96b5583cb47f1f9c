"""How selected and predicted experts are found in the slots of the host expert cache, all of them at once."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.disk_reader import PAGE
from slimoe.offload.cache.host_pool import HostPool
from slimoe.offload.cache.host_slots import Addresses
from slimoe.offload.cache.prefetch import Later
from slimoe.offload.model.experts import ExpertCopy, ExpertLayer, SlotClass


@dataclass(frozen=True, slots=True, eq=False)
class LayerBanks:
    """The slot classes of a layer's copies of experts.

    `numbers` I64 [n_copies, n_expert] says which of the `classes` a copy of an expert is of, -1 where it has no slots.
    `phases` say for each class where in a page of the file its matrices begin, None where that differs from expert
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


class RouterTables:
    """What the rows of all cut layers' routers mean, in arrays that are looked up for several layers at once."""

    def __init__(
        self,
        layers: Sequence[ExpertLayer | None],
        banks: Sequence[LayerBanks | None],
        classes: Sequence[SlotClass],
    ) -> None:
        self._layers, self._classes = layers, classes
        n_row = max((len(layer.target) for layer in layers if layer is not None), default=0)
        n_expert = max((one.numbers.shape[1] for one in banks if one is not None), default=0)
        self._targets = np.full((len(layers), n_row), -1, np.int64)
        self._class_numbers = np.full((len(layers), n_expert), -1, np.int64)
        for index, one in enumerate(banks):
            if one is not None:
                self._targets[index, : len(one.target)] = one.target
                numbers = np.array([*map(classes.index, one.classes), -1])
                self._class_numbers[index, : one.numbers.shape[1]] = numbers[one.numbers[0]]
        self._later: dict[tuple[int, ...], tuple[Later, NDArray[np.int64]]] = {}

    def later(self, indices: tuple[int, ...]) -> tuple[Later, NDArray[np.int64]]:
        """What is to be known of these cut layers to predict their experts, and their indices, I64 [n, 1]."""
        known = self._later.get(indices)
        if known is None:
            layers = [layer for index in indices if (layer := self._layers[index]) is not None]
            n_rows, n_used = [len(layer.target) for layer in layers], [layer.n_expert_used for layer in layers]
            rows = np.array(indices, np.int64)
            known = Later(indices, self._targets[rows], n_rows, n_used), rows[:, None]
            self._later[indices] = known
        return known

    def is_absent(
        self, host_pool: HostPool, layers: NDArray[np.int64], experts: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Which experts of these layers would have to be asked for: all those whose best copies are not ready."""
        if len(self._classes) == 1:
            return host_pool.ready(self._classes[0])[layers, experts] < 0
        is_absent = np.ones(experts.shape, np.bool_)
        numbers = self._class_numbers[layers, experts]
        for number, slot_class in enumerate(self._classes):
            is_absent &= (host_pool.ready(slot_class)[layers, experts] < 0) | (numbers != number)
        return is_absent


def _phases(copy: ExpertCopy) -> Addresses:
    return tuple(matrix.spans[0].offset % PAGE for matrix in copy.matrices)
