"""Experts in host memory: slots that are filled from disk, and which expert is in which.

Which one leaves is `residency`'s and `policy`'s decision; here bytes move. The engine's thread alone calls this; the
reader's threads only fill slots.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.disk_reader import PAGE, DiskReader, padded
from slimoe.offload.cache.host_slots import Addresses, Bank, HostSlot, SlotMemory
from slimoe.offload.cache.residency import Key, Valued
from slimoe.offload.model.experts import ExpertCopy, SlotClass

_WORTH_FINISHING = 0.3
"""A read that is not needed goes on if no more than this part of it is left."""
LEAST_AHEAD = 2
"""Experts that a batch has the disk read, however large, while it computes others."""
_AHEAD_BYTES = 32 << 20


def n_read_ahead(n_bytes: int) -> int:
    """How many of its experts, each of `n_bytes`, a batch has the disk read meanwhile: more if they are small.

    All that are in memory are computed in one go, in which a disk reads some tens of megabytes.
    """
    return max(LEAST_AHEAD, _AHEAD_BYTES // n_bytes)


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
        self._pools = {kind: SlotMemory(kind, n, n_most[kind], policy) for kind, n in n_slots.items()}
        self._note_slots()
        self._needed: set[Key] = set()
        self._pinned: set[Key] = set()
        self._held: frozenset[Key] = frozenset()
        self._held_for: dict[str, frozenset[Key]] = {}
        self._invested: HostSlot | None = None
        self.counters = HostPoolCounters()
        self.n_resized = 0
        """How often it got another number of slots."""

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

    @property
    def classes(self) -> Collection[SlotClass]:
        """The classes that have slots."""
        return self._pools.keys()

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
                        pool.free(slot.key)
                slot.read = None
        self._needed, self._pinned, self._held, self._invested = set(), set(), frozenset(), None
        self._held_for.clear()
        for kind, n in n_slots.items():
            self._pools[kind].resize(n)
        self._note_slots()
        self.n_resized += 1

    def _note_slots(self) -> None:
        n_slots, n_copies = {kind: pool.cache.n_slots for kind, pool in self._pools.items()}, self._n_copies
        # Where all have room nobody is driven out.
        self._tight = [n for kind, n in n_slots.items() if n_copies is None or n < n_copies[kind]]
        self._n_slots = sum(n_slots.values())

    def check(self) -> None:
        """Asserts that slots and experts match one to one."""
        for pool in self._pools.values():
            pool.cache.check()
            for layer, expert in np.argwhere(pool.ready >= 0).tolist():
                slot = pool.slot((layer, expert))
                assert slot is not None
                assert (slot.read, slot.index) == (None, pool.ready[layer, expert])

    def holds(self, key: Key, copy: ExpertCopy) -> bool:
        """Whether a copy is here, complete."""
        pool = self._pools.get(copy.slot_class)
        slot = pool.slot(key) if pool else None
        return slot is not None and slot.is_complete

    def place(self, key: Key, copy: ExpertCopy) -> Addresses | None:
        """Where the matrices of a copy begin, None if it is not here or still has to be asked for."""
        slot = self._pools[copy.slot_class].slot(key)
        return None if slot is None or slot.read is not None else slot.addresses

    def fill(self, wanted: Iterable[tuple[Key, ExpertCopy]], on_progress: Callable[[int], None]) -> None:
        """Reads copies into free slots, as many as there are, before the first step."""
        begun: list[tuple[HostSlot, ExpertCopy]] = []
        for key, copy in wanted:
            pool = self._pools[copy.slot_class]
            if len(pool.cache) < pool.cache.n_slots:
                begun.append((self._demand(pool, key, copy), copy))
        for slot, copy in begun:
            self._complete(slot)
            on_progress(copy.n_bytes)

    def forget(self) -> None:
        """Empties all slots; nothing may be on its way."""
        for pool in self._pools.values():
            for key in list(pool.cache):
                pool.free(key)

    def ready(self, slot_class: SlotClass) -> NDArray[np.int32]:
        """The slots of experts of a class that can be multiplied with at once, [n_layer, n_expert]; -1 of others."""
        return self._pools[slot_class].ready

    def bank(self, slot_class: SlotClass, phases: Addresses) -> Bank:
        """The slots of a class as stacks, for experts whose matrices begin at these places in a page of the file."""
        return self._pools[slot_class].bank(phases)

    def pin(self, keys: set[Key], likely: Collection[Key] = ()) -> None:
        """Keeps these, and only these and those that are held, from leaving until the next call.

        The `likely` ones stay as well, as long as what is demanded finds room beside them.
        """
        self._needed = keys | self._held
        self._pinned = self._needed.union(likely)

    def hold(self, keys: Iterable[Key], why: str) -> None:
        """Keeps these from leaving whatever is pinned, until the next call for the same reason."""
        self._held_for[why] = frozenset(keys)
        self._held = frozenset[Key]().union(*self._held_for.values())
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
            pool.free(key)
            slot = None
        if slot is None:
            self.counters.misses += counts
            return self._demand(pool, key, copy)
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
        if key in pool.cache:
            return
        slot = pool.take(key, self._pinned)
        if slot is not None:
            self._begin(slot, copy, demanded=False, is_sure=is_sure)
            slot.is_prefetched = True
            self.counters.n_prefetched += 1

    def invest(self, key: Key, copy: ExpertCopy, margin: float) -> bool:
        """Begins to read a copy that nobody waits for, if it is worth `margin` times what leaves for it.

        One at a time, and behind all other reads.
        """
        pool = self._pools[copy.slot_class]
        is_busy = self._invested is not None and not self._invested.is_ready
        if is_busy or key in pool.cache:
            return False
        victim = pool.cache.victim(self._pinned)
        if victim is not None and pool.cache.value(key) <= margin * pool.cache.value(victim):
            return False
        self._invested = pool.take(key, self._pinned)
        if self._invested is None:
            return False
        self._begin(self._invested, copy, demanded=False, is_sure=False)
        return True

    def arrive(self, key: Key, copy: ExpertCopy) -> bool:
        """Whether a copy that was prefetched, and is needed now, is here whole: it then is like any other."""
        pool = self._pools[copy.slot_class]
        slot = pool.slot(key)
        if slot is None or not slot.is_prefetched or not slot.is_complete:
            return False
        self._complete(slot)
        slot.is_prefetched = False
        return True

    @property
    def n_waiting(self) -> int:
        """Experts that the disk is still to read."""
        return self._reader.n_waiting

    def abandon(self, key: Key, copy: ExpertCopy) -> None:
        """Drops the read of a copy that was prefetched and is not needed, unless most of it is read already."""
        pool = self._pools[copy.slot_class]
        slot = pool.slot(key)
        if slot is None or not slot.is_prefetched:
            return
        slot.is_prefetched = False
        if slot.read is not None and slot.read.fraction_left > _WORTH_FINISHING:
            self._reader.drop(slot.read)
            pool.free(key)
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
                self._pools[slot.slot_class].free(slot.key)
            elif slot.is_ready:
                self._pools[slot.slot_class].ready[slot.key] = slot.index
            if slot.is_ready:
                slot.read = None

    def _demand(self, pool: SlotMemory, key: Key, copy: ExpertCopy) -> HostSlot:
        slot = pool.take(key, self._pinned) or pool.take(key, self._needed)
        assert slot is not None, f"no slot for {key}: everything is needed"
        self._begin(slot, copy, demanded=True)
        return slot

    def _begin(self, slot: HostSlot, copy: ExpertCopy, *, demanded: bool, is_sure: bool = True) -> None:
        if slot.read is not None:
            if not slot.read.is_done and not slot.read.is_cancelled:
                self.counters.n_cancelled += 1
            self._reader.cancel(slot.read)
        parts, begins, address = [], [], slot.address
        for matrix in copy.matrices:
            (span,) = matrix.spans
            parts.append((span, address))
            begins.append(address + span.offset % PAGE)
            address += padded(span.n_bytes)
        slot.addresses = tuple(begins)
        slot.read = self._reader.submit(parts, demanded=demanded, is_sure=is_sure)
        slot.is_prefetched = False

    def close(self) -> None:
        """Ends what is under way to the slots, then frees them."""
        for slot in self.slots:
            if slot.read is not None:
                self._reader.cancel(slot.read)
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
