"""Experts in a device's slots: computed there while the CPU does the others, and exchanged when that pays."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slimoe.offload.cache.device_pool import Pools, SlotPool
from slimoe.offload.cache.host_slots import Addresses
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.routed_tokens import RoutedTokens
from slimoe.offload.cache.swap import SlotExchange
from slimoe.offload.experts.device_graph import SlotGraphs, SlotWork
from slimoe.offload.model.experts import ExpertCopy, SlotClass

_ROUNDS = 3
_MANY = 64


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


def measure_times(run: Callable[[int], None], n_batch: int) -> ExpertTimes:
    """Times `run`, which computes an expert for a number of tokens, at most `n_batch`: the fastest of several runs."""
    n_many = min(_MANY, n_batch)
    return ExpertTimes(_fastest(run, 1), _fastest(run, n_many), n_many)


def _fastest(run: Callable[[int], None], n_tokens: int) -> float:
    taken = []
    for _ in range(_ROUNDS + 1):  # the first builds the graph
        begin = time.perf_counter()
        run(n_tokens)
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


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


class DeviceExperts:
    """One device's slots. `copies` are those that its layers could have here.

    Counters since it was opened: `hits` selected experts computed here (once per token), `bytes_uploaded`, `n_swaps`,
    and `n_streamed` experts that passed through for a batch; `n_arrived` counts by layer those that got a slot. `times`
    and `swaps` are None until measured: nothing is streamed or exchanged.
    """

    def __init__(self, pools: Pools, graphs: SlotGraphs, copies: Mapping[Key, ExpertCopy]) -> None:
        self.pools, self._graphs, self.copies = pools, graphs, copies
        self.times: LinkTimes | None = None
        self.swaps: SlotExchange | None = None
        self.hits = self.bytes_uploaded = self.n_swaps = self.n_streamed = 0
        self.n_arrived: Counter[int] = Counter()

    @property
    def compute_bytes(self) -> int:
        """Size of the graphs' buffer."""
        return self._graphs.compute_bytes

    @property
    def n_bytes(self) -> int:
        """Memory of all slots."""
        return sum(pool.n_bytes for pool in self.pools.values())

    def __iter__(self) -> Iterator[Key]:
        for pool in self.pools.values():
            yield from pool

    def __contains__(self, key: Key) -> bool:
        return self.holds(key)

    def holds(self, key: Key) -> bool:
        """Whether an expert is in a slot here."""
        return self.kind_of(key) is not None and self._pool(key).slot(key) is not None

    def begin(self, routed: Sequence[RoutedTokens], n_rows: int) -> None:
        """Begins to fill the columns of experts that are here, all those of one class in one graph."""
        groups: dict[SlotClass, list[RoutedTokens]] = {}
        for one in routed:
            groups.setdefault(one.copy.slot_class, []).append(one)
        works = []
        for slot_class, group in groups.items():
            slots = []
            for one in group:
                slot = self._pool(one.key).slot(one.key)
                assert slot is not None, f"{one.key} is not on the device"
                slots.append(np.full(len(one.columns), slot, np.int32))
            tokens = np.concatenate([one.tokens for one in group])
            columns = np.concatenate([one.columns for one in group])
            experts = np.repeat([one.key[1] for one in group], [len(one.columns) for one in group]).astype(np.int32)
            works.append(SlotWork(slot_class, tokens, np.concatenate(slots), columns, group[0].key[0], experts))
        self._graphs.begin(works, n_rows)
        self.hits += sum(len(one.columns) for one in routed)

    def _pool(self, key: Key) -> SlotPool:
        return self.pools[self.copies[key].slot_class]

    # --- what lies where ------------------------------------------------------------------------------------

    def has_room(self, key: Key) -> bool:
        """Whether an expert finds a slot without another's leaving."""
        return self.kind_of(key) is not None and self._pool(key).n_free > 0

    def takes(self, copy: ExpertCopy) -> bool:
        """Whether there are slots for experts like this."""
        return copy.slot_class in self.pools

    def kind_of(self, key: Key) -> SlotClass | None:
        """The class of slots that an expert fits, None if there are none of it here."""
        copy = self.copies.get(key)
        return copy.slot_class if copy is not None and copy.slot_class in self.pools else None

    def put(self, key: Key, addresses: Addresses, victim: Key | None = None) -> None:
        """Copies an expert from host memory into a free slot, or into its victim's."""
        self.bytes_uploaded += self._pool(key).put(key, addresses, victim)
        self.n_swaps += victim is not None
        self.n_arrived[key[0]] += 1

    def stream(
        self,
        work: Sequence[tuple[RoutedTokens, Addresses]],
        n_rows: int,
        is_given_up: Callable[[], bool] = lambda: False,
    ) -> None:
        """Copies experts to slots kept for passing through, one after the other, and begins to compute their tokens.

        Does no more of them as soon as it `is_given_up`.
        """
        for one, addresses in work:
            if is_given_up():
                return
            pool = self.pools[one.copy.slot_class]
            slot = pool.next_passing()
            pool.write(slot, addresses)
            self.bytes_uploaded += one.copy.n_bytes
            self.n_streamed += 1
            slots = np.full(len(one.columns), slot, np.int32)
            layer, expert = one.key
            experts = np.full(len(one.columns), expert, np.int32)
            work_of_one = SlotWork(one.copy.slot_class, one.tokens, slots, one.columns, layer, experts)
            self._graphs.begin([work_of_one], n_rows)

    # --- measuring ------------------------------------------------------------------------------------------

    def seconds_per_copy(self, addresses: Addresses, slot_class: SlotClass) -> float:
        """Time to copy an expert of a class over; it is in all slots for passing through afterwards."""
        pool = self.pools[slot_class]
        taken = []
        for _ in range(max(2, pool.n_passing)):  # the first may find the memory untouched
            begin = time.perf_counter()
            pool.write(pool.next_passing(), addresses)
            taken.append(time.perf_counter() - begin)
        return min(taken)

    def run_passing(self, slot_class: SlotClass, n_tokens: int, synchronize: Callable[[], None]) -> None:
        """Computes an expert that `seconds_per_copy` left, but for biases, for `n_tokens` tokens, and waits for it."""
        slots = np.full(n_tokens, self.pools[slot_class].next_passing(), np.int32)
        tokens = np.arange(n_tokens, dtype=np.int32)
        work = SlotWork(slot_class, tokens, slots, tokens.astype(np.int64), -1, np.zeros_like(tokens))
        self._graphs.begin([work], n_tokens)
        synchronize()

    def close(self) -> None:
        """Frees graphs and slots."""
        self._graphs.close()
        for pool in self.pools.values():
            pool.close()
