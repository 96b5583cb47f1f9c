"""Between two segments: takes the router's choice, finds the experts, multiplies, and has the next ones read ahead."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress, pairwise

import numpy as np
from numpy.typing import NDArray

from offload.arena import Arena, Loaded
from offload.backend import EngineAbortedError
from offload.batch import Batch
from offload.exchange import Exchange
from offload.expert_graph import ExpertGraphs, ExpertWork
from offload.expert_source import ExpertCopy, ExpertLayer
from offload.novice import Novices, write_novices
from offload.policy import Policy
from offload.residency import Key
from offload.segment import Segment

_IN_FLIGHT = 2
"""Experts of a batch that are read while another is multiplied."""


@dataclass(frozen=True, slots=True, eq=False)
class _Picks:
    """An expert's picks in this step: rows of the batch and columns of the outputs."""

    key: Key
    copy: ExpertCopy
    tokens: NDArray[np.int32]
    columns: NDArray[np.int64]


class ExpertStage:
    """The experts of all cut layers, out of one arena."""

    def __init__(
        self,
        layers: Sequence[ExpertLayer | None],
        cut: Sequence[int],
        exchange: Exchange,
        graphs: ExpertGraphs,
        arena: Arena,
        policy: Policy,
        n_ahead: int,
        novices: Novices,
    ) -> None:
        self._layers, self._exchange, self._graphs, self._arena = layers, exchange, graphs, arena
        self._policy, self._novices = policy, novices
        self.layers, self.n_ahead = tuple(cut), n_ahead
        self._next = dict(pairwise(cut))
        self._predicted: dict[int, list[Key]] = {}
        self._is_decode = np.zeros(0, np.bool_)

    @property
    def compute_bytes(self) -> int:
        """Size of the graphs' buffer."""
        return self._graphs.compute_bytes

    def begin(self, batch: Batch) -> None:
        """Notes which rows of a batch continue an answer, and which read a prompt."""
        self._is_decode = np.concatenate([np.full(run.n_tokens, run.n_tokens == 1) for run in batch.runs])
        self._predicted.clear()

    def run(self, segment: Segment, n_rows: int, is_cancelled: Callable[[], bool] | None) -> None:
        """Fills the outputs of layer `segment.end`. Raises EngineAbortedError and ReadFailedError."""
        index = segment.end
        layer = self._layers[index]
        assert layer is not None
        n_expert, n_used = len(layer.target), layer.n_expert_used
        rows = self._exchange.read("ranked", n_rows, n_expert)[:, :n_used]
        stored = np.asarray(layer.target, np.int64)[rows]
        self._observe(index, stored, n_rows)
        if index in self._novices:
            write_novices(self._exchange, self._novices[index], stored)
        picks = self._picks(index, layer, stored)
        if n_rows == 1:
            self._single(picks, segment, is_cancelled)
        else:
            self._batch(picks, n_rows, index, is_cancelled)

    def end(self) -> None:
        """A step is complete."""
        if self._is_decode.any():
            self._policy.end_token()

    def _observe(self, index: int, stored: NDArray[np.int64], n_rows: int) -> None:
        """Tells the policy what was chosen: answers count, prompts at most seed."""
        is_decode = self._is_decode[-n_rows:]
        for row in stored[is_decode]:
            self._policy.decode(index, [int(expert) for expert in row if expert >= 0])
        if is_decode.all():
            return
        layer = self._layers[index]
        assert layer is not None
        read = stored[~is_decode]
        self._policy.prompt(index, np.bincount(read[read >= 0].ravel(), minlength=len(layer.experts)))

    def _picks(self, index: int, layer: ExpertLayer, stored: NDArray[np.int64]) -> list[_Picks]:
        flat = stored.ravel()
        n_used = stored.shape[1]
        if len(stored) == 1:
            chosen = [int(expert) for expert in flat]
            zero = np.zeros(1, np.int32)
            return [
                _Picks((index, expert), layer.experts[expert][0], zero, np.array([column], np.int64))
                for column, expert in enumerate(chosen)
                if expert >= 0
            ]
        order = np.argsort(flat, kind="stable")
        experts, begins = np.unique(flat[order], return_index=True)
        return [
            _Picks((index, int(expert)), layer.experts[expert][0], (columns // n_used).astype(np.int32), columns)
            for expert, columns in zip(experts, np.split(order.astype(np.int64), begins[1:]), strict=True)
            if expert >= 0
        ]

    # --- one token ------------------------------------------------------------------------------------------

    def _single(self, picks: list[_Picks], segment: Segment, is_cancelled: Callable[[], bool] | None) -> None:
        self._predicted.pop(segment.end, None)
        ahead = {key for keys in self._predicted.values() for key in keys}
        self._arena.pin({pick.key for pick in picks} | ahead)
        loaded = [self._arena.demand(pick.key, pick.copy) for pick in picks]
        self._look_ahead(segment, {pick.key for pick in picks})
        ready = [one.is_ready for one in loaded]
        works = [self._work(pick, one) for pick, one, is_ready in zip(picks, loaded, ready, strict=True) if is_ready]
        if works:
            self._graphs.run(works, 1, is_cancelled)
        for pick, one, is_ready in zip(picks, loaded, ready, strict=True):
            if not is_ready:
                self._graphs.run([self._work(pick, one)], 1, is_cancelled)

    def _look_ahead(self, segment: Segment, needed: set[Key]) -> None:
        """Has experts read that the next layers' routers would choose now; the nearest layer's first."""
        if not segment.ahead:
            return
        logits = self._exchange.read("ahead", len(segment.ahead), self._exchange.shape.n_expert)
        for row, index in enumerate(segment.ahead):
            layer = self._layers[index]
            assert layer is not None
            scores = logits[row, : len(layer.target)]
            chosen = np.argpartition(-scores, layer.n_expert_used - 1)[: layer.n_expert_used]
            keys = [(index, layer.target[int(expert)]) for expert in chosen if layer.target[int(expert)] >= 0]
            self._predicted[index] = keys
        self._arena.pin(needed | {key for keys in self._predicted.values() for key in keys})
        for index in segment.ahead:
            layer = self._layers[index]
            assert layer is not None
            for key in self._predicted[index]:
                self._arena.prefetch(key, layer.experts[key[1]][0])

    def _work(self, pick: _Picks, loaded: Loaded) -> ExpertWork:
        addresses = self._arena.addresses(loaded)
        return ExpertWork(pick.copy.slot_class, addresses, pick.tokens, pick.columns)

    # --- a batch --------------------------------------------------------------------------------------------

    def _batch(self, picks: list[_Picks], n_rows: int, index: int, is_cancelled: Callable[[], bool] | None) -> None:
        """Visits each expert once: those that are here first, while the others are read."""
        # Asked once: an expert that arrives between two questions would be on neither list.
        is_here = [self._arena.holds(pick.key, pick.copy) for pick in picks]
        here = list(compress(picks, is_here))
        queue = here + [pick for pick, held in zip(picks, is_here, strict=True) if not held]
        coming = self._following(index)
        loaded: list[Loaded] = []
        for at, pick in enumerate(queue):
            if is_cancelled is not None and is_cancelled():
                raise EngineAbortedError
            n_wanted = min(max(at + 1, len(here)) + _IN_FLIGHT, at + self._arena.least_slots)
            window = queue[at:n_wanted]
            after = coming[: max(0, n_wanted - len(queue))]
            self._arena.pin({one.key for one in window} | {key for key, _ in after})
            while len(loaded) < min(n_wanted, len(queue)):
                one = queue[len(loaded)]
                loaded.append(self._arena.demand(one.key, one.copy))
            for key, copy in after:
                self._arena.prefetch(key, copy)
            self._graphs.run([self._work(pick, loaded[at])], n_rows, is_cancelled)

    def _following(self, index: int) -> list[tuple[Key, ExpertCopy]]:
        """Experts of the next layer that are not here: a batch is taken to need them all."""
        following = self._next.get(index)
        layer = None if following is None else self._layers[following]
        if following is None or layer is None:
            return []
        copies = [((following, expert), copies[0]) for expert, copies in enumerate(layer.experts)]
        return [(key, copy) for key, copy in copies if not self._arena.holds(key, copy)]

    def close(self) -> None:
        """Frees the graphs."""
        self._graphs.close()
