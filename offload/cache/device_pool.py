"""Slots for experts on a device: stacks of equal matrices, filled over the link.

A stack is what `mul_mat_id` takes, so an expert is chosen by the number of its slot, and a device's graphs never
change. Devices take stacks up to a size only: where the slots of a class are more, layers have theirs in several banks.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.host_slots import Addresses, matrix_bytes
from slimoe.offload.cache.uploads import Uploads
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import Backend
from slimoe.offload.model.experts import SlotClass

_ALIGNMENT = 256
_MOST_AT_ONCE, _AT_ONCE_BYTES, _PARTS = 8, 16 << 20, 8
"""Experts that pass through a device are computed so many at once, or fewer that have so many bytes or are such a part
of a layer's."""


def device_slot_bytes(slot_class: SlotClass) -> int:
    """Device memory of one expert."""
    return sum(matrix_bytes(kind, ne) for kind, ne in slot_class)


def n_passing(slot_class: SlotClass, n_of_layer: int) -> int:
    """Slots for experts of a class that are copied for one step, of which a layer has `n_of_layer` at most.

    Half of them are computed in one graph. Large or few experts have two, so that one is copied while the other is
    computed, and small ones more: graphs cost as well.
    """
    n_at_once = min(_AT_ONCE_BYTES // device_slot_bytes(slot_class), n_of_layer // _PARTS)
    return 2 * max(1, min(_MOST_AT_ONCE, n_at_once))


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """`n_slots` slots of one class on a device, those for experts of `layers`; experts pass through the last ones."""

    slot_class: SlotClass
    layers: tuple[int, ...]
    n_slots: int
    n_passing: int


@dataclass(frozen=True, slots=True, eq=False)
class DeviceSlots:
    """Where experts are on devices: `numbers` I32 [n_layer, n_expert] of their slots, -1 of those on none.

    A layer is on one device, and an expert has slots of one class there. `n_arrived` [n_layer] counts those that got a
    slot.
    """

    numbers: NDArray[np.int32]
    n_arrived: list[int]

    @classmethod
    def empty(cls, n_layer: int, n_expert: int) -> "DeviceSlots":
        """No expert is on a device."""
        return cls(np.full((n_layer, n_expert), -1, np.int32), [0] * n_layer)


class SlotPool:
    """`n_slots` slots of one class, as three `stacks` [ne0, ne1, n_slots] of gate, up and down, filled by `uploads`.

    The last ones are no expert's own: experts pass through them for one batch, in two `halves`, of which one is filled
    while the experts of the other are computed. `read` are marks of the last graphs that have used each half.
    """

    def __init__(self, backend: Backend, uploads: Uploads, bank: Bank) -> None:
        self.backend, self.uploads, self.slot_class = backend, uploads, bank.slot_class
        self.n_slots, self.n_passing = bank.n_slots, bank.n_passing
        assert 0 < self.n_passing < self.n_slots
        n_own = self.n_slots - self.n_passing
        self._free = list(range(n_own - 1, -1, -1))
        self._passing = itertools.cycle(range(n_own, self.n_slots))
        middle = n_own + self.n_passing // 2
        self.halves = range(n_own, middle), range(middle, self.n_slots)
        self.read = [0, 0]
        self._turns = itertools.cycle(self.halves)
        self._ctx = ggml.ggml_init(ggml.InitParams(4 * ggml.ggml_tensor_overhead(), None, True))
        self._buffers: list[int] = []
        self.stacks: tuple[int, ...] = ()
        try:
            for kind, ne in self.slot_class:
                stack = int(ggml.ggml_new_tensor_3d(self._ctx, kind, ne[0], ne[1], self.n_slots))
                # Some kernels read a little past the last row.
                n_bytes = ggml_backend.ggml_backend_buft_get_alloc_size(backend.buft, stack) + _ALIGNMENT
                self._buffers.append(backend.allocate(n_bytes))
                base = ggml_backend.ggml_backend_buffer_get_base(self._buffers[-1])
                ggml_backend.ggml_backend_tensor_alloc(self._buffers[-1], stack, -(-base // _ALIGNMENT) * _ALIGNMENT)
                self.stacks += (stack,)
        except DoesNotFitError:
            self.close()
            raise

    @property
    def n_bytes(self) -> int:
        """Device memory of all slots."""
        return self.n_slots * device_slot_bytes(self.slot_class)

    @property
    def n_free(self) -> int:
        """Slots that hold no expert."""
        return len(self._free)

    def take(self) -> int:
        """A free slot, which is none any more."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """Lets a slot be free again."""
        self._free.append(slot)

    def next_passing(self) -> int:
        """Each of the slots that experts pass through in turn."""
        return next(self._passing)

    def next_half(self) -> range:
        """The half of the slots for passing through whose turn it is."""
        return next(self._turns)

    def write(self, slot: int, addresses: Addresses) -> None:
        """Begins to fill a slot from host memory, which may change afterwards; graphs wait for `uploads` before."""
        for part in self._parts(slot, addresses):
            self.uploads.copy(*part)

    def write_behind(self, slot: int, addresses: Addresses) -> None:
        """Fills a slot from host memory behind everything that is demanded."""
        for part in self._parts(slot, addresses):
            self.uploads.copy_behind(*part)

    def _parts(self, slot: int, addresses: Addresses) -> Iterator[tuple[int, int, int, int]]:
        """Stack, address, bytes and offset of each matrix."""
        for stack, (kind, ne), address in zip(self.stacks, self.slot_class, addresses, strict=True):
            n_bytes = matrix_bytes(kind, ne)
            yield stack, address, n_bytes, slot * n_bytes

    def close(self) -> None:
        """Frees the device's memory."""
        for buffer in self._buffers:
            ggml_backend.ggml_backend_buffer_free(buffer)
        self._buffers.clear()
        if self._ctx:
            ggml.ggml_free(self._ctx)
            self._ctx = 0


Pools = Mapping[Bank, SlotPool]
"""A device's pools."""
