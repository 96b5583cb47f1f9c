"""Experts in a device's slots: computed there while the CPU does the others, and exchanged when that pays."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.device_pool import Bank, DeviceSlots, Pools, SlotPool
from slimoe.offload.cache.host_slots import Addresses
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.routed_tokens import RoutedTokens, pairs_of
from slimoe.offload.cache.swap import SlotExchange
from slimoe.offload.cache.uploads import Uploads
from slimoe.offload.experts.device_graph import SlotGraphs, SlotWork
from slimoe.offload.experts.layer_uploads import LayerUploads, Upload
from slimoe.offload.machine.expert_times import LinkTimes
from slimoe.offload.machine.upload_costs import ExchangeChoice
from slimoe.offload.machine.watchdog import Watchdog
from slimoe.offload.model.experts import ExpertCopy

Streamed = tuple[RoutedTokens, Addresses]
"""Tokens of an expert that is to be copied for one step, and where it lies."""


class Watch(Protocol):
    """Asks while the engine runs whether the choice of what is exchanged still holds."""

    watchdog: Watchdog

    def step(self, seconds: float, *, is_token: bool) -> None:
        """A step took so many seconds, from its beginning until its logits were there."""


class DeviceExperts:
    """One device's slots, filled over its `link`. `copies` are those that its layers could have here, `slots` tells
    where those are that do.

    Counters since it was opened: `hits` selected experts computed here (once per token), `bytes_uploaded`, `n_swaps`,
    and `n_streamed` experts that were copied here for one layer of a step. `times`, `swaps` and `choice` are None until
    measured: nothing is streamed or exchanged. `uploads` is None where single tokens copy nothing within a layer,
    `watch` where nobody asks whether the choice still holds.
    """

    def __init__(
        self,
        pools: Pools,
        graphs: SlotGraphs,
        copies: Mapping[Key, ExpertCopy],
        slots: DeviceSlots,
        link: Uploads,
    ) -> None:
        self.pools, self._graphs, self.copies, self._slots, self.link = pools, graphs, copies, slots, link
        self._layers = sorted({layer for layer, _ in copies})
        banks = {(layer, bank.slot_class): (number, bank) for number, bank in enumerate(pools) for layer in bank.layers}
        self._banks = {
            key: banks[key[0], copy.slot_class][1] for key, copy in copies.items() if (key[0], copy.slot_class) in banks
        }
        self._numbers = np.full(slots.numbers.shape, -1, np.int32)
        for key, bank in self._banks.items():
            self._numbers[key] = banks[key[0], bank.slot_class][0]
        self._numbered = {
            layer: [
                numbered
                for (at, _), numbered in banks.items()
                if at == layer and (self._numbers[layer] == numbered[0]).any()
            ]
            for layer in self._layers
        }
        self.times: LinkTimes | None = None
        self.swaps: SlotExchange | None = None
        self.uploads: LayerUploads | None = None
        self.choice: ExchangeChoice | None = None
        self.watch: Watch | None = None
        self._reserved: dict[Key, int] = {}
        self._written: set[Key] = set()
        self._coming: dict[Key, Future[None]] = {}
        self._ahead: dict[Key, int] = {}
        self.hits = self.bytes_uploaded = self.n_swaps = self.n_streamed = 0

    @property
    def compute_bytes(self) -> int:
        """Size of the graphs' buffer."""
        return self._graphs.compute_bytes

    @property
    def n_bytes(self) -> int:
        """Memory of all slots."""
        return sum(pool.n_bytes for pool in self.pools.values())

    def __iter__(self) -> Iterator[Key]:
        for layer in self._layers:
            for expert in np.flatnonzero(self._slots.numbers[layer] >= 0).tolist():
                yield layer, expert

    def __contains__(self, key: Key) -> bool:
        return bool(self._slots.numbers[key] >= 0)

    def slot(self, key: Key) -> int:
        """The number of the slot of an expert that is here."""
        return int(self._slots.numbers[key])

    def find(self, layer: int, experts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of a layer's experts are in a slot here, bool [n]."""
        is_here: NDArray[np.bool_] = self._slots.numbers[layer, experts] >= 0
        return is_here

    def begin(
        self, layer: int, experts: NDArray[np.int64], columns: NDArray[np.int64], n_rows: int, *, is_token: bool
    ) -> None:
        """Begins to fill the columns of experts that are here, [n] each, all those of one class in one graph.

        `is_token` says that they are a single token's, each another one.
        """
        if self._coming:
            self.arrive([(layer, expert) for expert in experts.tolist()])
        slots, numbers, works = self._slots.numbers[layer, experts], self._numbers[layer, experts], []
        for number, bank in self._numbered[layer]:
            own = slice(None) if len(self._numbered[layer]) == 1 else np.flatnonzero(numbers == number)
            if len(slots[own]):
                works.append(SlotWork(layer, bank, slots[own], experts[own], columns[own], is_token))
        self._graphs.begin(works, n_rows)
        self.hits += len(columns)

    def write(self, columns: NDArray[np.int64], rows: NDArray[np.float32]) -> None:
        """Fills the columns of experts that were computed elsewhere."""
        self._graphs.write(columns, rows)

    def _pool(self, key: Key) -> SlotPool:
        return self.pools[self._banks[key]]

    # --- what lies where ------------------------------------------------------------------------------------

    def has_room(self, key: Key) -> bool:
        """Whether an expert finds a slot without another's leaving."""
        return key in self._banks and self._pool(key).n_free > 0

    def bank_of(self, key: Key) -> Bank | None:
        """The bank whose slots an expert fits, None if there is none of it here."""
        return self._banks.get(key)

    def put(self, key: Key, addresses: Addresses, victim: Key | None = None) -> None:
        """Copies an expert from host memory into a free slot, or into its victim's."""
        self.arrive()  # the victim itself may be on its way
        pool = self._pool(key)
        slot = self._give_slot(pool, key, victim)
        pool.write(slot, addresses)
        self.link.settle()
        self._slots.numbers[key] = slot

    def swap(self, key: Key, addresses: Addresses, victim: Key, executor: Executor) -> None:
        """Lets an expert be in its victim's place, where a thread of `executor` copies it behind what is demanded.

        What is at the addresses must stay until it did `arrive`, which it must before the step after the next.
        """
        pool = self._pool(key)
        slot = self._give_slot(pool, key, victim)
        self._slots.numbers[key] = slot
        self._coming[key] = executor.submit(pool.write_behind, slot, addresses)

    def _give_slot(self, pool: SlotPool, key: Key, victim: Key | None) -> int:
        if victim is not None:
            pool.give_back(self.slot(victim))
            self._slots.numbers[victim] = -1
            self.n_swaps += 1
        self._slots.n_arrived[key[0]] += 1
        self.bytes_uploaded += self.copies[key].n_bytes
        return pool.take()

    def arrive(self, keys: Collection[Key] | None = None) -> None:
        """Waits for those of the `keys` that `swap` has sent, by default for all. Raises what was raised on the way."""
        coming = {key: one for key, one in self._coming.items() if keys is None or key in keys}
        wait(coming.values())
        failed = [error for key in coming if (error := self._coming.pop(key).exception()) is not None]
        for key in coming if failed else ():
            if key in self and coming[key].exception() is not None:  # none was swapped in for it already
                self._pool(key).give_back(self.slot(key))
                self._slots.numbers[key] = -1
        if failed:
            raise failed[0]

    @property
    def kinds(self) -> NDArray[np.int32]:
        """Numbers of the banks whose slots experts fit, [n_layer, n_expert], -1 of those that have none here."""
        return self._numbers

    def begin_token(self) -> None:
        """A step of a single token begins."""
        if self.uploads is not None:
            self.uploads.begin_token(self._slots.numbers >= 0)

    def reserve(self, layer: int, uploads: Sequence[Upload]) -> None:
        """Lets experts that `stream` is to copy have their victims' slots; the victims are gone at once."""
        for upload in uploads:
            if upload.victim is not None:
                self._reserved[layer, upload.expert] = self.slot(upload.victim)
                self._slots.numbers[upload.victim] = -1

    def settle(self) -> list[Key]:
        """Lets experts with reserved slots be here, and returns them; what was given up leaves its slot free."""
        arrived = [key for key in self._reserved if key in self._written]
        for key, slot in self._reserved.items():
            if key in self._written:
                self._slots.numbers[key] = slot
                self._slots.n_arrived[key[0]] += 1
                self.n_swaps += 1
            else:
                self._pool(key).give_back(slot)
        self._reserved.clear()
        self._written.clear()
        return arrived

    def stream(self, work: Sequence[Streamed], n_rows: int, is_given_up: Callable[[], bool] = lambda: False) -> None:
        """Copies experts to their reserved slots, or to those kept for passing through, and begins to compute them.

        Those that `stream_ahead` has copied are the first. Does no more as soon as it `is_given_up`.
        """
        by_bank: dict[Bank, list[Streamed]] = {}
        for one in work:
            by_bank.setdefault(self._banks[one[0].key], []).append(one)
        with self.link.demanded():
            try:
                for bank, own in by_bank.items():
                    for together, slots in self._groups(self.pools[bank], own, n_rows):
                        if is_given_up() or not self._stream_group(bank, together, slots, n_rows, is_given_up):
                            return
            finally:
                self._ahead.clear()

    def _groups(
        self, pool: SlotPool, work: Sequence[Streamed], n_rows: int
    ) -> Iterator[tuple[Sequence[Streamed], list[int]]]:
        """What is computed in one graph, and its slots: half of those for passing through, while the others are filled.

        Of a single token, whose experts take little time on a device, as much as possible goes together.
        """
        left = [one for one in work if one[0].key not in self._reserved]
        if n_rows == 1:
            n_most, reserved = pool.n_passing, [one for one in work if one[0].key in self._reserved]
            while reserved or left:
                slots = [self._reserved[one.key] for one, _ in reserved] + [*pool.halves[0], *pool.halves[1]]
                yield [*reserved, *left[:n_most]], slots
                reserved, left = [], left[n_most:]
            return
        there = {one[0].key: self._ahead[one[0].key] for one in left if one[0].key in self._ahead}
        for half in pool.halves:
            if together := [one for one in left if there.get(one[0].key) in half]:
                yield together, [there[one.key] for one, _ in together]
        left = [one for one in left if one[0].key not in there]
        n_most = len(pool.halves[0])
        for begin in range(0, len(left), n_most):
            yield left[begin : begin + n_most], [*pool.next_half()]

    def _stream_group(
        self, bank: Bank, together: Sequence[Streamed], slots: list[int], n_rows: int, is_given_up: Callable[[], bool]
    ) -> bool:
        """Fills slots as soon as the graphs before that use them are done, and begins a graph; whether it did."""
        pool, slots = self.pools[bank], slots[: len(together)]
        halves = [number for number, half in enumerate(pool.halves) if any(slot in half for slot in slots)]
        for half in halves:
            self.link.wait(pool.read[half])
        for (one, addresses), slot in zip(together, slots, strict=True):
            if is_given_up():
                return False
            if one.key not in self._ahead:
                pool.write(slot, addresses)
                self._note_streamed(one.copy)
            self._written.add(one.key)
        pairs = pairs_of([one for one, _ in together], slots)
        self._graphs.begin([SlotWork(together[0][0].key[0], bank, *pairs)], n_rows, self.link.mark())
        mark = self._graphs.mark()
        for half in halves:
            pool.read[half] = mark
        return True

    def stream_ahead(self, wanted: Sequence[tuple[Key, Addresses]], is_given_up: Callable[[], bool]) -> None:
        """Copies experts that the next layer will probably stream, while this one and what is between are computed."""
        self._ahead.clear()
        left: dict[Bank, list[tuple[Key, Addresses]]] = {}
        for key, addresses in wanted:
            left.setdefault(self._banks[key], []).append((key, addresses))
        for bank, own in left.items():
            pool = self.pools[bank]
            n_half = len(pool.halves[0])
            for begin in range(0, min(len(own), pool.n_passing), n_half):
                slots = pool.next_half()
                self.link.wait(pool.read[pool.halves.index(slots)])
                for (key, addresses), slot in zip(own[begin:], slots, strict=False):
                    if is_given_up():
                        return
                    pool.write(slot, addresses)
                    self._note_streamed(self.copies[key])
                    self._ahead[key] = slot

    def _note_streamed(self, copy: ExpertCopy) -> None:
        self.bytes_uploaded += copy.n_bytes
        self.n_streamed += 1

    # --- measuring ------------------------------------------------------------------------------------------

    def copy_passing(self, addresses: Addresses, bank: Bank) -> None:
        """Copies an expert of a bank over, to a slot for passing through: several times, and it is in all of them."""
        pool = self.pools[bank]
        self._ahead.clear()
        pool.write(pool.next_passing(), addresses)
        self.link.settle()

    def run_passing(self, bank: Bank, n_tokens: int) -> None:
        """Begins to compute an expert that `copy_passing` left, but for biases, for `n_tokens` tokens."""
        slots, columns = np.full(n_tokens, self.pools[bank].next_passing()), np.arange(n_tokens)
        self._graphs.begin([SlotWork(-1, bank, slots, np.zeros_like(slots), columns)], n_tokens)

    def close(self) -> None:
        """Frees graphs and slots, after what is on its way to them."""
        if self._coming:
            wait(self._coming.values())
            self._coming.clear()
        self._graphs.close()
        for pool in self.pools.values():
            pool.close()
