"""Experts in a device's slots: computed there while the CPU does the others, and exchanged when that pays."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.device_pool import Bank, DeviceSlots, Pools, SlotPool
from slimoe.offload.cache.host_slots import Addresses
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.routed_tokens import RoutedTokens, pairs_of
from slimoe.offload.cache.swap import SlotExchange
from slimoe.offload.experts.device_graph import SlotGraphs, SlotWork
from slimoe.offload.experts.layer_uploads import LayerUploads, Upload
from slimoe.offload.machine.upload_costs import ExchangeChoice
from slimoe.offload.machine.watchdog import Watchdog
from slimoe.offload.model.experts import ExpertCopy


@dataclass(frozen=True, slots=True)
class ExpertTimes:
    """Seconds that an expert takes for one token and for `n_many`; between and beyond them a straight line."""

    one: float
    many: float
    n_many: int

    def seconds(self, n_tokens: int) -> float:
        """Seconds that an expert takes for `n_tokens` tokens."""
        if self.n_many == 1:
            return self.one * n_tokens
        return max(0.0, self.one + (self.many - self.one) * (n_tokens - 1) / (self.n_many - 1))

    def at(self, one: float) -> "ExpertTimes":
        """The times of a side that takes so long for one token now, and for many as much longer or shorter."""
        return self if not self.one else ExpertTimes(one, self.many * one / self.one, self.n_many)


@dataclass(frozen=True, slots=True)
class LinkTimes:
    """What streaming is decided by: experts on the host, on the device, and seconds to copy one there."""

    host: ExpertTimes
    device: ExpertTimes
    copy_seconds: float


def choose_streams(n_host: list[int], n_device: list[int], times: LinkTimes) -> list[int]:
    """Which of the host's experts a batch should copy to the device, so that both sides end soonest.

    `n_host` and `n_device` are the tokens of each expert on either side; the result are indices into `n_host`. The
    experts with most tokens are the first to be copied, since a copy costs the same for all.
    """
    on_host = sum(times.host.seconds(n) for n in n_host)
    on_device = sum(times.device.seconds(n) for n in n_device)
    chosen = []
    for index in sorted(range(len(n_host)), key=lambda index: -n_host[index]):
        less = on_host - times.host.seconds(n_host[index])
        more = on_device + times.copy_seconds + times.device.seconds(n_host[index])
        if max(less, more) >= max(on_host, on_device):
            break
        on_host, on_device = less, more
        chosen.append(index)
    return chosen


class Watch(Protocol):
    """Asks while the engine runs whether the choice of what is exchanged still holds."""

    watchdog: Watchdog

    def step(self, seconds: float, *, is_token: bool) -> None:
        """A step took so many seconds, from its beginning until its logits were there."""


class DeviceExperts:
    """One device's slots. `copies` are those that its layers could have here, `slots` tells where those are that do.

    Counters since it was opened: `hits` selected experts computed here (once per token), `bytes_uploaded`, `n_swaps`,
    and `n_streamed` experts that were copied here for one layer of a step. `times`, `swaps` and `choice` are None until
    measured: nothing is streamed or exchanged. `uploads` is None where single tokens copy nothing within a layer,
    `watch` where nobody asks whether the choice still holds.
    """

    def __init__(self, pools: Pools, graphs: SlotGraphs, copies: Mapping[Key, ExpertCopy], slots: DeviceSlots) -> None:
        self.pools, self._graphs, self.copies, self._slots = pools, graphs, copies, slots
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
        pool = self._pool(key)
        if victim is not None:
            pool.give_back(self.slot(victim))
            self._slots.numbers[victim] = -1
            self.n_swaps += 1
        slot = pool.take()
        pool.write(slot, addresses)
        self._slots.numbers[key] = slot
        self._slots.n_arrived[key[0]] += 1
        self.bytes_uploaded += self.copies[key].n_bytes

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

    def stream(
        self,
        work: Sequence[tuple[RoutedTokens, Addresses]],
        n_rows: int,
        is_given_up: Callable[[], bool] = lambda: False,
    ) -> None:
        """Copies experts to their reserved slots, or to those kept for passing through, and begins to compute them.

        Does no more of them as soon as it `is_given_up`.
        """
        for bank, same in groupby(work, lambda one: self._banks[one[0].key]):
            pool, left = self.pools[bank], sorted(same, key=lambda one: one[0].key not in self._reserved)
            n_reserved = sum(one.key in self._reserved for one, _ in left)
            while left:
                n_together, n_reserved = n_reserved + pool.n_passing, 0
                together, left = left[:n_together], left[n_together:]
                slots = []
                for one, addresses in together:
                    if is_given_up():
                        return
                    slot = self._reserved.get(one.key)
                    slots.append(pool.next_passing() if slot is None else slot)
                    pool.write(slots[-1], addresses)
                    self._written.add(one.key)
                    self.bytes_uploaded += one.copy.n_bytes
                    self.n_streamed += 1
                pairs = pairs_of([one for one, _ in together], slots)
                self._graphs.begin([SlotWork(together[0][0].key[0], bank, *pairs)], n_rows)

    # --- measuring ------------------------------------------------------------------------------------------

    def copy_passing(self, addresses: Addresses, bank: Bank) -> None:
        """Copies an expert of a bank over, to a slot for passing through: several times, and it is in all of them."""
        pool = self.pools[bank]
        pool.write(pool.next_passing(), addresses)

    def run_passing(self, bank: Bank, n_tokens: int) -> None:
        """Begins to compute an expert that `copy_passing` left, but for biases, for `n_tokens` tokens."""
        slots, columns = np.full(n_tokens, self.pools[bank].next_passing()), np.arange(n_tokens)
        self._graphs.begin([SlotWork(-1, bank, slots, np.zeros_like(slots), columns)], n_tokens)

    def close(self) -> None:
        """Frees graphs and slots."""
        self._graphs.close()
        for pool in self.pools.values():
            pool.close()
