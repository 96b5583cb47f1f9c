"""Experts that the CPU computes: from the host expert cache, or read into it; predicted ones are prefetched."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress, pairwise

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.host_pool import Addresses, HostPool, HostSlot
from slimoe.offload.cache.prefetch import ExpertPredictor, Guess
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.routed_tokens import RoutedTokens
from slimoe.offload.experts.host_graph import ExpertGraphs, ExpertWork
from slimoe.offload.ggml.cpu_backend import EngineAbortedError
from slimoe.offload.model.experts import ExpertCopy, ExpertLayer

_IN_FLIGHT = 2
"""Experts of a batch that are read while another is computed."""
_WORTH_READING, _SURE = 0.5, 0.8
"""Probabilities from which an expert is prefetched when nothing better is to be read, and before others."""

Cancelled = Callable[[], bool] | None


class HostExperts:
    """The host's part of every cut layer.

    `is_elsewhere` says of an expert that a device has it, so that nothing is read for it here; `prefetch_copy` which
    copy to read of one that will perhaps be selected, the best one by default.
    """

    def __init__(
        self,
        layers: Sequence[ExpertLayer | None],
        cut: Sequence[int],
        graphs: ExpertGraphs,
        host_pool: HostPool,
        is_elsewhere: Callable[[Key], bool],
        prefetch_copy: Callable[[Key], ExpertCopy] | None = None,
    ) -> None:
        self._prefetch_copy = prefetch_copy or self._copy
        self._layers, self._graphs, self._host_pool = layers, graphs, host_pool
        self._is_elsewhere = is_elsewhere
        self._next = dict(pairwise(cut))
        self._predicted: dict[int, dict[Key, ExpertCopy]] = {}
        self._predictor = ExpertPredictor()
        self.predicted: list[Key] = []
        """What was to be prefetched at the last layer of a single token, the first to be read first."""

    @property
    def compute_bytes(self) -> int:
        """Size of the graphs' buffer."""
        return self._graphs.compute_bytes

    def begin(self) -> None:
        """A step begins: what the last one predicted is void."""
        for predicted in self._predicted.values():
            self._abandon(predicted)
        self._predicted.clear()
        self._predictor.begin()

    # --- one token ------------------------------------------------------------------------------------------

    def run_single(
        self,
        index: int,
        routed: Sequence[RoutedTokens],
        early_logits: Mapping[int, NDArray[np.float32]],
        is_cancelled: Cancelled,
        elsewhere: Iterable[Key] = (),
    ) -> None:
        """Fills the columns of one token's selected experts in layer `index`.

        `early_logits` are by later layer what its router says to this layer's input. `elsewhere` are the other experts
        that the token selected: they say which predictions were right. Raises EngineAbortedError and ReadFailedError.
        """
        layer, needed = self._layers[index], {one.key for one in routed}
        assert layer is not None
        self._predictor.settle(index, layer, {expert for _, expert in (*needed, *elsewhere)})
        predicted = self._predicted.pop(index, {})
        self._abandon({key: copy for key, copy in predicted.items() if key not in needed})
        self._host_pool.pin(needed, self._all_predicted())
        slots = [self._host_pool.demand(one.key, one.copy) for one in routed]
        self._prefetch_predicted(early_logits, needed)
        ready = [slot.is_ready for slot in slots]
        works = [self._work(one, slot) for one, slot, is_ready in zip(routed, slots, ready, strict=True) if is_ready]
        if works:
            self._graphs.run(works, 1, is_cancelled)
        for one, slot, is_ready in zip(routed, slots, ready, strict=True):
            if not is_ready:
                self._graphs.run([self._work(one, slot)], 1, is_cancelled)

    def _all_predicted(self) -> set[Key]:
        return {key for keys in self._predicted.values() for key in keys}

    def _abandon(self, predicted: Mapping[Key, ExpertCopy]) -> None:
        for key, copy in predicted.items():
            self._host_pool.abandon(key, copy)

    def _prefetch_predicted(self, early_logits: Mapping[int, NDArray[np.float32]], needed: set[Key]) -> None:
        """Has experts read that later layers will probably select: the sure ones first, then the nearest layers'."""
        wanted: list[Guess] = []
        for distance, (later, logits) in enumerate(early_logits.items(), start=1):
            layer = self._layers[later]
            assert layer is not None
            guesses = [
                guess
                for guess in self._predictor.guess(later, distance, layer, logits)
                if guess.probability >= _WORTH_READING and not self._is_elsewhere(guess.key)
            ]
            predicted = {guess.key: self._prefetch_copy(guess.key) for guess in guesses[: layer.n_expert_used]}
            gone = self._predicted.get(later, {})
            self._abandon({key: copy for key, copy in gone.items() if predicted.get(key) is not copy})
            self._predicted[later] = predicted
            wanted += guesses[: layer.n_expert_used]
        self._host_pool.pin(needed, self._all_predicted())
        wanted.sort(key=lambda guess: guess.probability < _SURE)
        self.predicted = [guess.key for guess in wanted]
        for guess in wanted:
            copy = self._predicted[guess.key[0]][guess.key]
            self._host_pool.prefetch(guess.key, copy, is_sure=guess.probability >= _SURE)

    def _work(self, one: RoutedTokens, slot: HostSlot) -> ExpertWork:
        return ExpertWork(one.copy.slot_class, self._host_pool.addresses(slot), one.tokens, one.columns)

    # --- a batch --------------------------------------------------------------------------------------------

    def run_batch(self, index: int, routed: Sequence[RoutedTokens], n_rows: int, is_cancelled: Cancelled) -> None:
        """Fills the columns of a batch's selected experts, each visited once: those here while others are read."""
        # Asked once: an expert that arrives between two questions would be on neither list.
        is_here = [self._host_pool.holds(one.key, one.copy) for one in routed]
        here = list(compress(routed, is_here))
        queue = here + [one for one, held in zip(routed, is_here, strict=True) if not held]
        coming = self._missing_of_next_layer(index)
        slots: list[HostSlot] = []
        for at, current in enumerate(queue):
            if is_cancelled is not None and is_cancelled():
                raise EngineAbortedError
            n_wanted = min(max(at + 1, len(here)) + _IN_FLIGHT, at + self._host_pool.n_free_to_pin)
            after = coming[: max(0, n_wanted - len(queue))]
            self._host_pool.pin({one.key for one in queue[at:n_wanted]} | {key for key, _ in after})
            while len(slots) < min(n_wanted, len(queue)):
                one = queue[len(slots)]
                slots.append(self._host_pool.demand(one.key, one.copy, counts=len(one.columns)))
            for key, copy in after:
                self._host_pool.prefetch(key, copy)
            self._graphs.run([self._work(current, slots[at])], n_rows, is_cancelled)

    def _missing_of_next_layer(self, index: int) -> list[tuple[Key, ExpertCopy]]:
        """Experts of the next cut layer that are not here: a batch is taken to need them all."""
        later = self._next.get(index)
        layer = None if later is None else self._layers[later]
        if later is None or layer is None:
            return []
        keys = [(later, expert) for expert in range(len(layer.experts))]
        wanted = [(key, self._prefetch_copy(key)) for key in keys if not self._is_elsewhere(key)]
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

    @contextmanager
    def held(self, keys: Iterable[Key]) -> Iterator[None]:
        """Keeps experts here for as long as something reads them."""
        self._host_pool.hold(list(keys))
        try:
            yield
        finally:
            self._host_pool.hold(())

    def replace(self, gone: Key, come: Key) -> None:
        """An expert went to a device, and another has come back from there: it is read when nothing else is."""
        self._host_pool.pin(set())
        self._host_pool.prefetch(come, self._copy(come))

    def run_one(self, key: Key, n_tokens: int) -> None:
        """Computes an expert that is here for `n_tokens` tokens, whatever they hold, to measure how long it takes."""
        tokens = np.arange(n_tokens, dtype=np.int32)
        copy = self._copy(key)
        work = ExpertWork(copy.slot_class, self.addresses(key), tokens, tokens.astype(np.int64))
        self._graphs.run([work], n_tokens)

    def _copy(self, key: Key) -> ExpertCopy:
        layer = self._layers[key[0]]
        assert layer is not None
        return layer.experts[key[1]][0]

    def close(self) -> None:
        """Frees the graphs."""
        self._graphs.close()
