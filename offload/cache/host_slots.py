"""Equal slots for experts in one stretch of host memory, which the CPU multiplies with as stacks of matrices."""

import ctypes
import mmap
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from slimoe.offload.cache.disk_reader import PAGE, Read, padded
from slimoe.offload.cache.residency import Key, SlotCache, Valued
from slimoe.offload.model.experts import SlotClass
from slimoe.offload.resources.memory import advise_huge_pages, out_of_memory

_NORESERVE = 0x4000 if sys.platform == "linux" else 0
"""Memory is promised for what is touched only: a pool can grow without having to move."""
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
Addresses = tuple[int, ...]
"""Where the matrices of an expert begin."""


@dataclass(slots=True, eq=False)
class HostSlot:
    """A slot of memory and its expert: the read that fills it, where its matrices begin, whether it was prefetched.

    `index` is its number among the slots of its class.
    """

    slot_class: SlotClass
    index: int
    address: int
    key: Key = (-1, -1)
    read: Read | None = None
    addresses: Addresses = ()
    is_prefetched: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether no read to it is under way."""
        return self.read is None or self.read.is_done

    @property
    def is_complete(self) -> bool:
        """Whether its bytes are all there."""
        return self.read is None or self.read.is_complete

    @property
    def has_failed(self) -> bool:
        """Whether its bytes will never be all there."""
        return self.is_ready and not self.is_complete


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """`n_slots` equal slots: where the matrices of the first one begin, and the bytes from a slot to the next."""

    addresses: Addresses
    stride: int
    n_slots: int


def alone(addresses: Addresses) -> Bank:
    """A bank of one expert, whose matrices may begin anywhere."""
    return Bank(addresses, 0, 1)


def slot_bytes(slot_class: SlotClass) -> int:
    """Memory of one slot, for matrices that may begin anywhere in a page of the file."""
    return sum(padded(matrix_bytes(kind, ne)) for kind, ne in slot_class)


def matrix_bytes(kind: GGMLQuantizationType, ne: tuple[int, ...]) -> int:
    """Bytes of a matrix of a type and shape."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return int(np.prod(ne)) // int(block) * int(block_bytes)


class SlotMemory:
    """Slots of one class, in one stretch of memory, of which more is set aside than is used, for `n_most` slots.

    `ready` I32 [n_layer, n_expert] has the number of each expert's slot, -1 of those that are not here or still have to
    be asked for.
    """

    def __init__(self, slot_class: SlotClass, n_slots: int, n_most: int, policy: Valued) -> None:
        self.slot_class, self.n_most = slot_class, max(n_slots, n_most)
        self.cache = SlotCache(n_slots, policy)
        self.ready: NDArray[np.int32] = np.full(policy.shape, -1, np.int32)
        self._size = slot_bytes(slot_class)
        try:
            # Shared memory, mmap's default, would not get huge pages.
            self._memory = mmap.mmap(-1, max(PAGE, self.n_most * self._size), flags=_FLAGS)
        except OSError:
            self.n_most = n_slots
            try:
                self._memory = mmap.mmap(-1, max(PAGE, self.n_bytes), flags=_FLAGS)
            except OSError:
                raise out_of_memory(self.n_bytes) from None
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self._base = int(self._bytes.ctypes.data)
        advise_huge_pages(self._base, self.n_bytes)
        self._banks: dict[Addresses, Bank] = {}
        self.slots = self._new_slots(range(n_slots))

    def _new_slots(self, numbers: Iterable[int]) -> list[HostSlot]:
        return [HostSlot(self.slot_class, index, self._base + index * self._size) for index in numbers]

    @property
    def n_bytes(self) -> int:
        """Memory of the slots."""
        return self.cache.n_slots * self._size

    def resize(self, n_slots: int) -> None:
        """Has so many slots from now on, at most `n_most`; nothing may be on its way to any."""
        before = self.n_bytes
        for source, target in self.cache.resize(n_slots):
            old, new = self.slots[source], self.slots[target]
            ctypes.memmove(new.address, old.address, self._size)
            addresses = tuple(address - old.address + new.address for address in old.addresses)
            new.key, new.addresses, new.is_prefetched = old.key, addresses, old.is_prefetched
        self.slots = [*self.slots[:n_slots], *self._new_slots(range(len(self.slots), n_slots))]
        self._banks.clear()
        self.ready.fill(-1)
        for index, slot in enumerate(self.slots):
            if self.slot(slot.key) is slot:
                self.ready[slot.key] = index
        if self.n_bytes < before:
            self._memory.madvise(mmap.MADV_DONTNEED, self.n_bytes, before - self.n_bytes)
        else:
            advise_huge_pages(self._base + before, self.n_bytes - before)

    def slot(self, key: Key) -> HostSlot | None:
        """The slot of an expert, None if it has none."""
        index = self.cache.lookup(key)
        return None if index is None else self.slots[index]

    def take(self, key: Key, pinned: Collection[Key]) -> HostSlot | None:
        """The slot that an expert gets, a free one or that of the least valuable one that is not pinned, if any."""
        taken = self.cache.try_acquire(key, pinned)
        if taken is None:
            return None
        index, evicted = taken
        if evicted is not None:
            self.ready[evicted] = -1
        slot = self.slots[index]
        slot.key = key
        return slot

    def free(self, key: Key) -> None:
        """Takes an expert out."""
        self.ready[key] = -1
        self.cache.free(key)

    def bank(self, phases: Addresses) -> Bank:
        """All slots as stacks, for experts whose matrices begin at these places in a page of the file."""
        known = self._banks.get(phases)
        if known is None:
            begins, address = [], self._base
            for phase, (kind, ne) in zip(phases, self.slot_class, strict=True):
                begins.append(address + phase)
                address += padded(matrix_bytes(kind, ne))
            known = self._banks[phases] = Bank(tuple(begins), self._size, self.cache.n_slots)
        return known

    def close(self) -> None:
        """Frees the memory."""
        del self._bytes
        self._memory.close()
