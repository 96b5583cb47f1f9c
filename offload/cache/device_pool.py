"""Slots for experts on a device: stacks of equal matrices, filled over the link, and who lies in which slot.

A stack is what `mul_mat_id` takes, so an expert is chosen by the number of its slot, and a device's graphs never
change.
"""

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from slimoe.offload.cache.host_slots import Addresses, matrix_bytes
from slimoe.offload.cache.residency import Key
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import Backend
from slimoe.offload.model.experts import SlotClass

_ALIGNMENT = 256


def device_slot_bytes(slot_class: SlotClass) -> int:
    """Device memory of one expert."""
    return sum(matrix_bytes(kind, ne) for kind, ne in slot_class)


class SlotPool:
    """`n_slots` slots of one class, as three `stacks` [ne0, ne1, n_slots] of gate, up and down.

    The last `n_passing` slots are no expert's own: experts pass through them for one batch.
    """

    def __init__(self, backend: Backend, slot_class: SlotClass, n_slots: int, n_passing: int) -> None:
        assert 0 < n_passing < n_slots
        self.backend, self.slot_class = backend, slot_class
        self.n_slots, self.n_passing = n_slots, n_passing
        self._slot_of: dict[Key, int] = {}
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

    def __iter__(self) -> Iterator[Key]:
        return iter(self._slot_of)

    def slot(self, key: Key) -> int | None:
        """The number of the slot that an expert has, None if it has none."""
        return self._slot_of.get(key)

    @property
    def n_bytes(self) -> int:
        """Device memory of all slots."""
        return self.n_slots * device_slot_bytes(self.slot_class)

    @property
    def n_free(self) -> int:
        """Slots that hold no expert."""
        return len(self._free)

    def put(self, key: Key, addresses: Addresses, victim: Key | None = None) -> int:
        """Copies an expert from host memory into a free slot, or into its victim's; returns the bytes copied."""
        if victim is not None:
            self.drop(victim)
        slot = self._free.pop()
        self.write(slot, addresses)
        self._slot_of[key] = slot
        return device_slot_bytes(self.slot_class)

    def drop(self, key: Key) -> None:
        """Gives an expert's slot back."""
        self._free.append(self._slot_of.pop(key))

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


Pools = Mapping[SlotClass, SlotPool]
"""A device's pools."""
