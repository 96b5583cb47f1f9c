"""Experts in host memory: slots that are filled from disk, and which expert is in which.

Which one leaves is `residency`'s and `policy`'s decision; here bytes move. The engine's thread alone calls this; the
reader's threads only fill slots.
"""

import ctypes
import mmap
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from slimoe.offload.cache.disk_reader import PAGE, DiskReader, Read, padded
from slimoe.offload.cache.residency import Key, SlotCache, Valued
from slimoe.offload.model.experts import ExpertCopy, SlotClass
from slimoe.offload.resources.memory import advise_huge_pages, out_of_memory

_WORTH_FINISHING = 0.3
"""A read that is not needed goes on if no more than this part of it is left."""
_NORESERVE = 0x4000 if sys.platform == "linux" else 0
"""Memory is promised for what is touched only: a pool can grow without having to move."""
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
Addresses = tuple[int, int, int]
"""Where gate, up and down begin."""


@dataclass(slots=True)
class HostPoolCounters:
    """What the host expert cache has done since it was opened.

    Selected experts, each once per token: `hits` found in memory, `pending` whose read had begun before they were
    selected, `misses` the others. `n_prefetched` and `n_cancelled` reads begun ahead of time and dropped again,
    `stall_seconds` spent waiting for the disk.
    """

    hits: int = 0
    pending: int = 0
    misses: int = 0
    n_prefetched: int = 0
    n_cancelled: int = 0
    stall_seconds: float = 0.0


@dataclass(slots=True, eq=False)
class HostSlot:
    """A slot of memory and its expert: the read that fills it, where its matrices begin, whether it was prefetched."""

    address: int
    key: Key = (-1, -1)
    read: Read | None = None
    addresses: Addresses = (0, 0, 0)
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


def slot_bytes(slot_class: SlotClass) -> int:
    """Memory of one slot, for matrices that may begin anywhere in a page of the file."""
    return sum(padded(matrix_bytes(kind, ne)) for kind, ne in slot_class)


def matrix_bytes(kind: GGMLQuantizationType, ne: tuple[int, ...]) -> int:
    """Bytes of a matrix of a type and shape."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return int(np.prod(ne)) // int(block) * int(block_bytes)


class _Pool:
    """Slots of one class, in one stretch of memory, of which more is set aside than is used, for `n_most` slots."""

    def __init__(self, slot_class: SlotClass, n_slots: int, n_most: int, policy: Valued) -> None:
        self.slot_class, self.n_most = slot_class, max(n_slots, n_most)
        self.cache = SlotCache(n_slots, policy)
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
        self.slots = [HostSlot(self._base + index * self._size) for index in range(n_slots)]

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
            gate, up, down = (address - old.address + new.address for address in old.addresses)
            new.key, new.addresses, new.is_prefetched = old.key, (gate, up, down), old.is_prefetched
        more = range(len(self.slots), n_slots)
        self.slots = [*self.slots[:n_slots], *(HostSlot(self._base + index * self._size) for index in more)]
        if self.n_bytes < before:
            self._memory.madvise(mmap.MADV_DONTNEED, self.n_bytes, before - self.n_bytes)
        else:
            advise_huge_pages(self._base + before, self.n_bytes - before)

    def slot(self, key: Key) -> HostSlot | None:
        """The slot of an expert, None if it has none."""
        index = self.cache.lookup(key)
        return None if index is None else self.slots[index]

    def can_take(self, pinned: set[Key]) -> bool:
        """Whether another expert finds a slot."""
        return len(self.cache) < self.cache.n_slots or self.cache.victim(pinned) is not None

    def close(self) -> None:
        del self._bytes
        self._memory.close()


class HostPool:
    """Pools by slot class, the reader that fills them, and the copies they hold; `n_copies` there are of each class."""

    def __init__(
        self,
        reader: DiskReader,
        policy: Valued,
        n_slots: Mapping[SlotClass, int],
        n_copies: Mapping[SlotClass, int] | None = None,
    ) -> None:
        self._reader = reader
        self._n_copies = n_copies
        n_most = n_slots if n_copies is None else n_copies
        self._pools = {kind: _Pool(kind, n, n_most[kind], policy) for kind, n in n_slots.items()}
        self._note_slots()
        self._needed: set[Key] = set()
        self._pinned: set[Key] = set()
        self._held: frozenset[Key] = frozenset()
        self._invested: HostSlot | None = None
        self.counters = HostPoolCounters()

    @property
    def n_bytes(self) -> int:
        """Memory of all slots."""
        return sum(pool.n_bytes for pool in self._pools.values())

    @property
    def keys(self) -> list[Key]:
        """The experts that have a slot, whose reads may still be under way."""
        return [key for pool in self._pools.values() for key in pool.cache]

    def places(self) -> list[tuple[Key, SlotClass, bool]]:
        """The copies that have a slot, by expert and class, and whether each is there whole; for any thread."""
        found = []
        for kind, pool in list(self._pools.items()):
            for key in list(pool.cache):
                slot = pool.slot(key)
                if slot is not None:
                    found.append((key, kind, slot.is_complete))
        return found

    @property
    def n_free_to_pin(self) -> int:
        """How many experts can be pinned at once, whatever their class, beside those that are held."""
        return min(self._tight, default=self._n_slots) - len(self._held)

    @property
    def has_all(self) -> bool:
        """Whether there is a slot for every copy that may want one."""
        return not self._tight

    @property
    def slots(self) -> list[HostSlot]:
        """All slots, class by class, those that nobody has included."""
        return [slot for pool in self._pools.values() for slot in pool.slots]

    def can_resize(self, n_slots: Mapping[SlotClass, int]) -> bool:
        """Whether there is memory set aside for so many slots."""
        return n_slots.keys() == self._pools.keys() and all(
            n <= self._pools[kind].n_most for kind, n in n_slots.items()
        )

    def resize(self, n_slots: Mapping[SlotClass, int]) -> None:
        """Has so many slots from now on, between two steps; new ones are filled as experts are asked for."""
        for pool in self._pools.values():
            for slot in pool.slots:
                if slot.read is not None and not slot.is_complete:
                    self._reader.cancel(slot.read)
                    if pool.slot(slot.key) is slot:
                        pool.cache.free(slot.key)
                slot.read = None
        self._needed, self._pinned, self._held, self._invested = set(), set(), frozenset(), None
        for kind, n in n_slots.items():
            self._pools[kind].resize(n)
        self._note_slots()

    def _note_slots(self) -> None:
        n_slots, n_copies = {kind: pool.cache.n_slots for kind, pool in self._pools.items()}, self._n_copies
        # Where all have room nobody is driven out.
        self._tight = [n for kind, n in n_slots.items() if n_copies is None or n < n_copies[kind]]
        self._n_slots = sum(n_slots.values())

    def check(self) -> None:
        """Asserts that slots and experts match one to one."""
        for pool in self._pools.values():
            pool.cache.check()

    def holds(self, key: Key, copy: ExpertCopy) -> bool:
        """Whether a copy is here, complete."""
        pool = self._pools.get(copy.slot_class)
        slot = pool.slot(key) if pool else None
        return slot is not None and slot.is_complete

    def fill(self, wanted: Iterable[tuple[Key, ExpertCopy]], on_progress: Callable[[int], None]) -> None:
        """Reads copies into free slots, as many as there are, before the first step."""
        begun: list[tuple[HostSlot, ExpertCopy]] = []
        for key, copy in wanted:
            pool = self._pools[copy.slot_class]
            if len(pool.cache) < pool.cache.n_slots:
                begun.append((self._begin(pool, key, copy, demanded=True), copy))
        for slot, copy in begun:
            self._complete(slot)
            on_progress(copy.n_bytes)

    def forget(self) -> None:
        """Empties all slots; nothing may be on its way."""
        for pool in self._pools.values():
            for key in list(pool.cache):
                pool.cache.free(key)

    def pin(self, keys: set[Key], likely: Collection[Key] = ()) -> None:
        """Keeps these, and only these and those that are held, from leaving until the next call.

        The `likely` ones stay as well, as long as what is demanded finds room beside them.
        """
        self._needed = keys | self._held
        self._pinned = self._needed.union(likely)

    def hold(self, keys: Collection[Key]) -> None:
        """Keeps these from leaving whatever is pinned, until the next call."""
        self._held = frozenset(keys)
        self._needed |= self._held
        self._pinned |= self._held

    def demand(self, key: Key, copy: ExpertCopy, *, counts: int = 1) -> HostSlot:
        """Makes sure that a copy is here or read before anything else; it must be pinned.

        `counts` tokens that selected it are added to the counters.
        """
        pool = self._pools[copy.slot_class]
        slot = pool.slot(key)
        if slot is not None and slot.has_failed:
            # Prefetched, or read for somebody who did not wait: who needs it now shall know from a read of their own.
            pool.cache.free(key)
            slot = None
        if slot is None:
            self.counters.misses += counts
            return self._begin(pool, key, copy, demanded=True)
        if slot.read is not None:
            self._reader.demand(slot.read)
        if slot.is_prefetched:
            self.counters.pending += counts
        else:
            self.counters.hits += counts
        slot.is_prefetched = False
        return slot

    def prefetch(self, key: Key, copy: ExpertCopy, *, is_sure: bool = True) -> None:
        """Begins to read a copy if it is not here; only pinned keys survive until they are needed."""
        pool = self._pools[copy.slot_class]
        if key not in pool.cache and pool.can_take(self._pinned):
            self._begin(pool, key, copy, demanded=False, is_sure=is_sure).is_prefetched = True
            self.counters.n_prefetched += 1

    def invest(self, key: Key, copy: ExpertCopy, margin: float) -> bool:
        """Begins to read a copy that nobody waits for, if it is worth `margin` times what leaves for it.

        One at a time, and behind all other reads.
        """
        pool = self._pools[copy.slot_class]
        is_busy = self._invested is not None and not self._invested.is_ready
        if is_busy or key in pool.cache or not pool.can_take(self._pinned):
            return False
        victim = pool.cache.victim(self._pinned)
        if victim is not None and pool.cache.value(key) <= margin * pool.cache.value(victim):
            return False
        self._invested = self._begin(pool, key, copy, demanded=False, is_sure=False)
        return True

    def abandon(self, key: Key, copy: ExpertCopy) -> None:
        """Drops the read of a copy that was prefetched and is not needed, unless most of it is read already."""
        pool = self._pools[copy.slot_class]
        slot = pool.slot(key)
        if slot is None or not slot.is_prefetched:
            return
        slot.is_prefetched = False
        if slot.read is not None and slot.read.fraction_left > _WORTH_FINISHING:
            self._reader.drop(slot.read)
            pool.cache.free(key)
            self.counters.n_cancelled += 1

    def addresses(self, slot: HostSlot) -> Addresses:
        """Where the matrices begin; waits for them. Raises ReadFailedError, and the slot is free again."""
        if not slot.is_ready:
            begin = time.perf_counter()
            self._complete(slot)
            self.counters.stall_seconds += time.perf_counter() - begin
        else:
            self._complete(slot)
        return slot.addresses

    def _complete(self, slot: HostSlot) -> None:
        if slot.read is None:
            return
        try:
            self._reader.wait(slot.read)
        finally:
            # Whatever ends the waiting, a slot that is not filled must not pass for one that is.
            if slot.has_failed:
                pool = next(pool for pool in self._pools.values() if slot in pool.slots)
                pool.cache.free(slot.key)
            if slot.is_ready:
                slot.read = None

    def _begin(self, pool: _Pool, key: Key, copy: ExpertCopy, *, demanded: bool, is_sure: bool = True) -> HostSlot:
        is_tight = demanded and not pool.can_take(self._pinned)
        index, _ = pool.cache.acquire(key, self._needed if is_tight else self._pinned)
        slot = pool.slots[index]
        slot.key = key
        if slot.read is not None:
            if not slot.read.is_done and not slot.read.is_cancelled:
                self.counters.n_cancelled += 1
            self._reader.cancel(slot.read)
        parts, begins, address = [], [], slot.address
        for matrix in (copy.gate, copy.up, copy.down):
            (span,) = matrix.spans
            parts.append((span, address))
            begins.append(address + span.offset % PAGE)
            address += padded(span.n_bytes)
        slot.addresses = (begins[0], begins[1], begins[2])
        slot.read = self._reader.submit(parts, demanded=demanded, is_sure=is_sure)
        slot.is_prefetched = False
        return slot

    def close(self) -> None:
        """Ends what is under way to the slots, then frees them."""
        for slot in self.slots:
            if slot.read is not None:
                self._reader.cancel(slot.read)
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
