"""Experts that the CPU computes: from the host expert cache, or read into it; predicted ones are prefetched."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.device_pool import DeviceSlots
from slimoe.offload.cache.host_pool import LEAST_AHEAD, HostPool, n_read_ahead
from slimoe.offload.cache.host_slots import Addresses, HostSlot, alone
from slimoe.offload.cache.prefetch import ExpertPredictor
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.routed_tokens import RoutedTokens, group_by_expert, pairs_of
from slimoe.offload.experts.host_graph import BankWork, ExpertGraphs
from slimoe.offload.experts.layer_banks import LayerBanks, RouterTables
from slimoe.offload.ggml.cpu_backend import EngineAbortedError
from slimoe.offload.model.experts import ExpertCopy, ExpertLayer, SlotClass

_WORTH_READING, _SURE = 0.5, 0.8
"""Probabilities from which an expert is prefetched when nothing better is to be read, and before others."""
_MOST_WAITING = 2
"""So many waiting reads keep guesses for layers after the next from the disk: wrong ones would delay everything."""
_NO_KEYS: set[Key] = set()
_NO_EXPERTS = np.empty(0, np.int64)

_Read = tuple[RoutedTokens, HostSlot]
"""Tokens of an expert, and the slot that it is read into."""

Cancelled = Callable[[], bool] | None
EarlyLogits = tuple[tuple[int, ...], NDArray[np.float32]]
"""Later layers, and [n_later, n_row] what their routers say to the input of a layer before them, for a single token."""
NO_LOGITS: EarlyLogits = ((), np.zeros((0, 0), np.float32))


class HostExperts:
    """The host's part of every cut layer.

    Nothing is read here for experts that are `on_devices`, which is None without devices. `prefetch_copy` says which
    copy to read of an expert that will perhaps be selected, the best one by default.
    """

    def __init__(
        self,
        layers: Sequence[ExpertLayer | None],
        banks: Sequence[LayerBanks | None],
        cut: Sequence[int],
        graphs: ExpertGraphs,
        host_pool: HostPool,
        on_devices: DeviceSlots | None = None,
        prefetch_copy: Callable[[Key], ExpertCopy] | None = None,
    ) -> None:
        self._prefetch_copy = prefetch_copy
        self._layers, self.banks, self._graphs, self._host_pool = layers, banks, graphs, host_pool
        self._on_devices = on_devices
        self._next = dict(pairwise(cut))
        self._predicted: dict[int, list[int]] = {}
        self._begun: dict[int, dict[Key, ExpertCopy]] = {}
        self._predictor = ExpertPredictor()
        self._routers = RouterTables(layers, banks, tuple(host_pool.classes))
        self._told: list[tuple[Key, bool]] = []

    @property
    def compute_bytes(self) -> int:
        """Size of the graphs' buffer."""
        return self._graphs.compute_bytes

    @property
    def predicted(self) -> list[Key]:
        """What was to be prefetched at the last layer of a single token, the first to be read first."""
        return [key for key, _ in sorted(self._told, key=lambda one: not one[1])]

    def begin(self) -> None:
        """A step begins: what the last one predicted is void."""
        for begun in self._begun.values():
            self._abandon(begun)
        self._begun.clear()
        self._predicted.clear()
        self._predictor.begin()

    def run(
        self,
        index: int,
        selected: NDArray[np.int64],
        copies: NDArray[np.int64] | None,
        early_logits: EarlyLogits,
        is_cancelled: Cancelled,
        elsewhere: NDArray[np.int64] = _NO_EXPERTS,
    ) -> None:
        """Fills the columns of the `selected` experts of layer `index`, [n_rows, n_used], that are not negative.

        `copies` [n_rows, n_used] says which copy of each, the best one by default. `elsewhere` are the other experts
        that a single token selected: they say which predictions were right. What is in memory comes first, all experts
        of one class in one graph. Raises EngineAbortedError and ReadFailedError.
        """
        columns = (selected >= 0).ravel().nonzero()[0]
        experts = selected.take(columns)
        n_arrived = 0
        if is_single := len(selected) == 1:
            self.settle(index, np.append(experts, elsewhere) if elsewhere.size else experts)
            n_arrived = self._take_begun(index, experts, is_best=copies is None)
        works, is_here = self._find(index, experts, columns, copies, *selected.shape)
        missing: list[RoutedTokens] = []
        n_here = int(np.count_nonzero(is_here))
        if n_here == len(experts):
            self._host_pool.pin(_NO_KEYS)
        else:
            layer = self._layers[index]
            assert layer is not None
            left = selected.copy()
            left.put(columns[is_here], -1)
            missing = group_by_expert(index, layer, left, copies)
        self._host_pool.counters.pending += n_arrived
        self._host_pool.counters.hits += n_here - n_arrived
        if is_single:
            self._run_single(index, experts, works, missing, early_logits, is_cancelled)
        else:
            self._run_batch(index, experts[is_here], works, missing, len(selected), is_cancelled)

    def _find(
        self,
        index: int,
        experts: NDArray[np.int64],
        columns: NDArray[np.int64],
        copies: NDArray[np.int64] | None,
        n_rows: int,
        n_used: int,
    ) -> tuple[list[BankWork], NDArray[np.bool_]]:
        """The work that can be done at once, and which of the experts it is, bool [n]."""
        banks = self.banks[index]
        assert banks is not None
        is_here = np.zeros(len(experts), np.bool_)
        works = []
        if is_mixed := len(banks.classes) > 1:
            numbers = banks.numbers[0 if copies is None else copies.ravel()[columns], experts]
        for number, (slot_class, phases) in enumerate(zip(banks.classes, banks.phases, strict=True)):
            if phases is None:
                continue
            slots, own, places = self._host_pool.ready(slot_class)[index].take(experts), experts, columns
            found = slots >= 0
            if is_mixed:
                found &= numbers == number
            is_here |= found
            if not found.all():
                slots, own, places = slots[found], experts[found], columns[found]
            if len(slots):
                bank = self._host_pool.bank(slot_class, phases)
                is_token = n_rows == 1 and not banks.may_repeat and len(slots) == n_used
                works.append(BankWork(index, slot_class, bank, slots, own, places, is_token))
        return works, is_here

    def _abandon(self, begun: Mapping[Key, ExpertCopy]) -> None:
        for key, copy in begun.items():
            self._host_pool.abandon(key, copy)

    def _run_read(self, read: Sequence[_Read], n_rows: int, is_cancelled: Cancelled) -> None:
        """Computes experts of a layer that are waited for first, those whose slots are in one bank together."""
        by_class: dict[SlotClass, list[_Read]] = {}
        for one, slot in read:
            self._host_pool.addresses(slot)
            by_class.setdefault(one.copy.slot_class, []).append((one, slot))
        index = read[0][0].key[0]
        banks = self.banks[index]
        assert banks is not None
        for slot_class, same in by_class.items():
            phases = banks.phases[banks.classes.index(slot_class)]
            if phases is None and n_rows == 1:
                experts = [(one.key[1], slot.addresses) for one, slot in same]
                self._graphs.run_apart(index, slot_class, experts, [int(one.columns[0]) for one, _ in same])
            elif phases is None:
                for one, slot in same:
                    work = BankWork(index, slot_class, alone(slot.addresses), *pairs_of([one], [0]))
                    self._graphs.run(work, n_rows, is_cancelled)
            else:
                bank, slots = self._host_pool.bank(slot_class, phases), [slot.index for _, slot in same]
                work = BankWork(index, slot_class, bank, *pairs_of([one for one, _ in same], slots))
                if n_rows == 1:
                    self._graphs.run(work, 1, is_cancelled)
                else:
                    self._run_works([work], n_rows, is_cancelled)

    def has_begun(self, index: int) -> bool:
        """Whether experts of a layer were prefetched in this step."""
        return bool(self._begun.get(index))

    def settle(self, index: int, selected: NDArray[np.integer[Any]]) -> None:
        """A single token has selected these experts of a layer: what was predicted is no longer expected."""
        if self._predicted.pop(index, None) is not None:
            self._predictor.settle(index, selected)

    # --- one token ------------------------------------------------------------------------------------------

    def _run_single(
        self,
        index: int,
        experts: NDArray[np.int64],
        works: Sequence[BankWork],
        missing: Sequence[RoutedTokens],
        early_logits: EarlyLogits,
        is_cancelled: Cancelled,
    ) -> None:
        """Computes what is here while the others are read, then those as they come."""
        if missing:
            self._host_pool.pin({(index, expert) for expert in experts.tolist()}, self._all_predicted())
        waiting = [(one, self._host_pool.demand(one.key, one.copy, counts=len(one.columns))) for one in missing]
        self._prefetch_predicted(index, experts, early_logits)
        for work in works:
            self._graphs.run(work, 1, is_cancelled)
        while waiting:
            arrived = [one for one in waiting if one[1].is_ready] or waiting[:1]
            waiting = [one for one in waiting if one not in arrived]
            self._run_read(arrived, 1, is_cancelled)

    def _take_begun(self, index: int, experts: NDArray[np.int64], *, is_best: bool) -> int:
        """Gives up what was prefetched for a layer and is not selected; how many of the others have arrived.

        These count with what was here before, where the best copy of each is wanted and all slots are in banks.
        """
        begun, banks = self._begun.pop(index, None), self.banks[index]
        if not begun:
            return 0
        assert banks is not None
        needed = {(index, expert) for expert in experts.tolist()}
        self._abandon({key: copy for key, copy in begun.items() if key not in needed})
        if not is_best or None in banks.phases:
            return 0
        return sum(self._host_pool.arrive(key, copy) for key, copy in begun.items() if key in needed)

    def _all_predicted(self) -> set[Key]:
        return {(layer, expert) for layer, experts in self._predicted.items() for expert in experts}

    def _prefetch_predicted(self, index: int, experts: NDArray[np.int64], early_logits: EarlyLogits) -> None:
        """Has experts read that the next layer will probably select, and later ones while the disk has time for it."""
        self._told, (layers, logits) = [], early_logits
        if not layers:
            return
        later, rows = self._routers.later(layers)
        guesses = self._predictor.guess(later, logits)
        probabilities, is_absent = guesses.probabilities, self._is_absent(rows, guesses.experts)
        if self._on_devices is not None:
            probabilities = np.where(self._on_devices.numbers[rows, guesses.experts] < 0, probabilities, 0)
        wanted: list[tuple[Key, bool]] = []
        candidates = zip(guesses.experts.tolist(), probabilities.tolist(), is_absent.tolist(), strict=True)
        for layer, n_used, (ones, chances, absences) in zip(layers, later.n_used, candidates, strict=True):
            likely: list[int] = []
            for expert, chance, absent in zip(ones, chances, absences, strict=True):
                if chance >= _WORTH_READING and len(likely) < n_used:
                    likely.append(expert)
                    self._told.append(((layer, expert), chance >= _SURE))
                    if absent:
                        wanted.append(self._told[-1])
            self._predicted[layer] = likely
            if self._begun.get(layer):
                self._keep_begun(layer, set(likely))
        if not wanted:
            return
        self._host_pool.pin({(index, expert) for expert in experts.tolist()}, self._all_predicted())
        for key, sure in sorted(wanted, key=lambda one: not one[1]):
            if key[0] != layers[0] and self._host_pool.n_waiting >= _MOST_WAITING:
                self._told.remove((key, sure))
                continue
            copy = self._copy_to_read(key)
            self._begun.setdefault(key[0], {})[key] = copy
            self._host_pool.prefetch(key, copy, is_sure=sure)

    def _is_absent(self, layers: NDArray[np.int64], experts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which experts of these layers would have to be asked for: all those whose best copies are not ready."""
        if self._prefetch_copy is not None:
            return np.ones(experts.shape, np.bool_)
        return self._routers.is_absent(self._host_pool, layers, experts)

    def _keep_begun(self, index: int, likely: set[int]) -> None:
        """Gives up what was prefetched for a layer and is no longer likely, or in another copy."""
        begun = self._begun[index]
        kept = {key for key, copy in begun.items() if key[1] in likely and self._copy_to_read(key) is copy}
        self._abandon({key: copy for key, copy in begun.items() if key not in kept})
        self._begun[index] = {key: begun[key] for key in kept}

    def _copy_to_read(self, key: Key) -> ExpertCopy:
        return self._copy(key) if self._prefetch_copy is None else self._prefetch_copy(key)

    # --- a batch --------------------------------------------------------------------------------------------

    def _run_batch(
        self,
        index: int,
        here: NDArray[np.int64],
        works: Sequence[BankWork],
        missing: Sequence[RoutedTokens],
        n_rows: int,
        is_cancelled: Cancelled,
    ) -> None:
        """Visits each expert once: those that are `here` while others are read."""
        # Asked once: an expert that arrives between two questions would be on neither list.
        is_held = [self._host_pool.holds(one.key, one.copy) for one in missing]
        queue = [
            one for held in (True, False) for one, is_there in zip(missing, is_held, strict=True) if is_there is held
        ]
        coming = self._missing_of_next_layer(index, n_rows)
        first = {(index, expert) for expert in here.tolist()} if queue or coming else set()
        n_first = len(first)
        n_here, slots = n_first + sum(is_held), list[HostSlot]()
        n_ahead = n_read_ahead(max((one.copy.n_bytes for one in queue), default=1))
        # While those are computed together that have arrived, the disk still has others to read.
        n_together, n_done = max(1, n_ahead // 2), 0
        for at in range(-1 if works else 0, len(queue)):
            if is_cancelled is not None and is_cancelled():
                raise EngineAbortedError
            # Places in the whole queue, at whose beginning those are that are computed together.
            place = 0 if at < 0 else n_first + at
            n_begun, n_most = max(place + 1, n_here) - n_first, place + self._host_pool.n_free_to_pin - n_first
            n_wanted = min(n_begun + n_ahead, n_most)
            # Of the next layer's only a few: a batch seldom needs all of them.
            after = coming[: max(0, min(n_begun + LEAST_AHEAD, n_most) - len(queue))]
            pinned = {one.key for one in queue[max(0, at) : max(0, n_wanted)]} | {key for key, _ in after}
            if queue or coming:
                self._host_pool.pin(pinned | first if at < 0 else pinned)
            while len(slots) < min(n_wanted, len(queue)):
                one = queue[len(slots)]
                slots.append(self._host_pool.demand(one.key, one.copy, counts=len(one.columns)))
            for key, copy in after:
                self._host_pool.prefetch(key, copy)
            if at < 0:
                self._run_works(works, n_rows, is_cancelled)
            elif at == n_done:
                arrived = takewhile(lambda slot: slot.is_ready, slots[at + 1 : at + n_together])
                n_done += 1 + sum(1 for _ in arrived)
                self._run_read([*zip(queue[at:n_done], slots[at:n_done], strict=True)], n_rows, is_cancelled)

    def _run_works(self, works: Sequence[BankWork], n_rows: int, is_cancelled: Cancelled) -> None:
        """Computes what is in memory, whole experts at a time, as many as one graph has memory for."""
        for work in works:
            order = np.argsort(work.slots, kind="stable")
            slots = work.slots[order]
            ordered = replace(work, slots=slots, experts=work.experts[order], columns=work.columns[order])
            begins = np.flatnonzero(np.diff(slots, prepend=-1)).tolist()
            n_most, begin = self._graphs.most_pairs(work.bank), 0
            for at, end in pairwise([*begins, len(slots)]):
                if end - begin > n_most and at > begin:
                    self._graphs.run(ordered.part(begin, at), n_rows, is_cancelled)
                    begin = at
            self._graphs.run(ordered.part(begin, len(slots)), n_rows, is_cancelled)

    def _missing_of_next_layer(self, index: int, n_rows: int) -> list[tuple[Key, ExpertCopy]]:
        """Experts of the next cut layer that are not here: a batch that can select them all is taken to need them."""
        later = self._next.get(index)
        layer = None if later is None else self._layers[later]
        if later is None or layer is None or n_rows * layer.n_expert_used < len(layer.experts):
            return []
        experts = np.arange(len(layer.experts))
        is_absent = self._is_absent(np.array(later), experts)
        if self._on_devices is not None:
            is_absent &= self._on_devices.numbers[later, experts] < 0
        wanted = [((later, expert), self._copy_to_read((later, expert))) for expert in experts[is_absent].tolist()]
        return [(key, copy) for key, copy in wanted if not self._host_pool.holds(key, copy)]

    def invest(self, keys: Iterable[Key], margin: float) -> None:
        """Begins to read the first of these experts' best copies that is worth its place, behind all other reads."""
        any(self._host_pool.invest(key, self._copy(key), margin) for key in keys)

    # --- for devices ----------------------------------------------------------------------------------------

    @property
    def n_free_to_pin(self) -> int:
        """How many experts can be held at once."""
        return self._host_pool.n_free_to_pin

    def has(self, key: Key) -> bool:
        """Whether an expert is in memory here, complete."""
        return self._host_pool.holds(key, self._copy(key))

    def addresses(self, key: Key) -> Addresses:
        """Where gate, up and down of an expert begin that is here."""
        return self._host_pool.addresses(self._host_pool.demand(key, self._copy(key), counts=0))

    def hold(self, keys: Iterable[Key], why: str) -> None:
        """Keeps experts here that something reads, until the next call for the same reason."""
        self._host_pool.hold(keys, why)

    def replace(self, gone: Key, come: Key) -> None:
        """An expert went to a device, and another has come back from there: it is read when nothing else is."""
        self._host_pool.pin(set())
        self._host_pool.prefetch(come, self._copy(come))

    def run_one(self, key: Key, n_tokens: int) -> None:
        """Computes an expert that is here for `n_tokens` tokens, whatever they hold, to measure how long it takes."""
        slots, columns = np.zeros(n_tokens, np.int64), np.arange(n_tokens)
        bank, experts = alone(self.addresses(key)), np.full(n_tokens, key[1])
        self._graphs.run(BankWork(key[0], self._copy(key).slot_class, bank, slots, experts, columns), n_tokens)

    def _copy(self, key: Key) -> ExpertCopy:
        layer = self._layers[key[0]]
        assert layer is not None
        return layer.experts[key[1]][0]

    def close(self) -> None:
        """Frees the graphs."""
        self._graphs.close()
