"""Slots for experts on a device: stacks of equal matrices, filled over the link.

A stack is what `mul_mat_id` takes, so an expert is chosen by the number of its slot, and a device's graphs never
change. Devices take stacks up to a size only: where the slots of a class are more, layers have theirs in several banks.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.host_slots import Addresses, matrix_bytes
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import Backend
from slimoe.offload.model.experts import SlotClass

_ALIGNMENT = 256


def device_slot_bytes(slot_class: SlotClass) -> int:
    """Device memory of one expert."""
    return sum(matrix_bytes(kind, ne) for kind, ne in slot_class)


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """`n_slots` slots of one class on a device, those for experts that pass through included, for those of `layers`."""

    slot_class: SlotClass
    layers: tuple[int, ...]
    n_slots: int


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
    """`n_slots` slots of one class, as three `stacks` [ne0, ne1, n_slots] of gate, up and down.

    The last `n_passing` slots are no expert's own: experts pass through them for one batch.
    """

    def __init__(self, backend: Backend, slot_class: SlotClass, n_slots: int, n_passing: int) -> None:
        assert 0 < n_passing < n_slots
        self.backend, self.slot_class = backend, slot_class
        self.n_slots, self.n_passing = n_slots, n_passing
        self._free = list(range(n_slots - n_passing - 1, -1, -1))
        self._passing = itertools.cycle(range(n_slots - n_passing, n_slots))
        self._ctx = ggml.ggml_init(ggml.InitParams(4 * ggml.ggml_tensor_overhead(), None, True))
        self._buffers: list[int] = []
        self.stacks: tuple[int, ...] = ()
        try:
            for kind, ne in slot_class:
                stack = int(ggml.ggml_new_tensor_3d(self._ctx, kind, ne[0], ne[1], n_slots))
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
        """A slot for something that passes through; `write` fills it, after what was begun with the one before."""
        return next(self._passing)

    def write(self, slot: int, addresses: Addresses) -> None:
        """Fills a slot from host memory."""
        for stack, (kind, ne), address in zip(self.stacks, self.slot_class, addresses, strict=True):
            n_bytes = matrix_bytes(kind, ne)
            self.backend.set_async(stack, ggml.array_at(address, np.uint8, n_bytes), slot * n_bytes)
        self.backend.synchronize()

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
