"""The MoE step of a cut layer, between two segments: each selected expert is computed where it lies."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Event

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.expert_uses import ExpertUses
from slimoe.offload.cache.policy import Policy
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.routed_tokens import RoutedTokens, group_by_expert
from slimoe.offload.cache.router_trace import ANSWER, PROMPT, TraceRun, TraceWriter
from slimoe.offload.experts.constant_experts import ConstantExperts, write_constant_experts
from slimoe.offload.experts.device_part import DevicePart
from slimoe.offload.experts.hit_path import HitPath
from slimoe.offload.experts.host_experts import NO_LOGITS, EarlyLogits, HostExperts
from slimoe.offload.graph.batch import Batch
from slimoe.offload.graph.exchange import Exchange
from slimoe.offload.graph.segment import Segment
from slimoe.offload.lossy.step import LossyStep
from slimoe.offload.machine.expert_times import choose_streams
from slimoe.offload.model.experts import ExpertLayer

_INVEST_MARGIN = 1.3
"""How much more often an expert must be used than the one whose place it takes for good."""

_NEARLY_ALL = 2
"""A batch whose tokens select so many times as many experts as a layer has is taken to need all of them: 86 of 100, if
they are selected independently of each other."""

_STREAMED, _AHEAD, _SWAPPED = "streamed", "ahead", "swapped"
"""Why experts are kept in host memory while they are copied."""

_ELSEWHERE = -1
"""In place of a stored expert that the host does not compute."""

Cancelled = Callable[[], bool] | None


class MoEStep:
    """The experts of all cut layers, whose segments run on `parts`; `host` is the exchange of the CPU's experts.

    `hit_path` is None where an expert can be elsewhere than in host memory and on disk, or something else than
    computed.
    """

    def __init__(
        self,
        layers: Sequence[ExpertLayer | None],
        parts: Sequence[DevicePart],
        host: Exchange,
        host_experts: HostExperts,
        policy: Policy,
        constants: ConstantExperts,
        trace: TraceWriter | None,
        lossy: LossyStep | None,
        uses: ExpertUses,
        hit_path: HitPath | None,
    ) -> None:
        self._uses = uses
        self.layers, self._host, self._host_experts = layers, host, host_experts
        self._policy, self._constants, self._trace, self._lossy = policy, constants, trace, lossy
        self.parts = {layer: part for part in parts for layer in part.layers}
        self._devices = [part.experts for part in parts if part.experts is not None]
        self._hit_path = hit_path
        self._is_on_host = not self._devices and all(part.exchange is host for part in self.parts.values())
        self._missed: list[tuple[int, NDArray[np.int64]]] = []
        self._lowered: set[Key] = set()
        # A device that fills its slots over the link would keep the CPU from its own experts.
        self._link, self._behind = ThreadPoolExecutor(1, "link"), ThreadPoolExecutor(1, "swap")
        self._ahead: list[Key] = []
        self._copying_ahead: Future[None] | None = None
        self._is_swapping = False
        self._given_up = Event()
        self._n_out, self._n_used = 1, max((one.n_expert_used for one in layers if one is not None), default=1)
        self._is_decode = np.zeros(0, np.bool_)
        self._is_token = False
        self._arrived, self._exchanged = list[Key](), list[Key]()

    @property
    def compute_bytes(self) -> int:
        """Size of the graphs' buffers in host memory."""
        return self._host_experts.compute_bytes

    def begin(self, batch: Batch) -> None:
        """Notes which rows of a batch continue an answer, and which read a prompt."""
        self._is_decode = np.concatenate([np.full(run.n_tokens, run.is_answer) for run in batch.runs])
        self._given_up.set()
        self._forget_ahead()
        self._host_experts.begin()
        if self._hit_path is not None:
            self._hit_path.begin()
        self._n_out = batch.n_out
        self._missed.clear()
        self._lowered.clear()
        self._arrived.clear()
        self._exchanged.clear()
        self._is_token = batch.n_tokens == 1 and bool(self._is_decode[0])
        if not self._is_token or any(device.uploads is not None for device in self._devices):
            self._arrive()
        for device in self._devices if self._is_token else ():
            device.begin_token()
        if self._lossy is not None:
            self._lossy.begin(batch.n_tokens)
        if self._trace is not None:
            firsts = np.cumsum([0, *(run.n_tokens for run in batch.runs)])
            self._trace.step(
                [
                    TraceRun(ANSWER if run.is_answer else PROMPT, index, int(batch.positions[first]), run.n_tokens)
                    for index, (run, first) in enumerate(zip(batch.runs, firsts, strict=False))
                ]
            )

    def run(self, segment: Segment, n_rows: int, is_cancelled: Cancelled) -> None:
        """Fills the outputs of layer `segment.last`. Raises EngineAbortedError and ReadFailedError."""
        index = segment.last
        if n_rows == 1 and self._hit_path is not None and self._is_decode[-1]:
            if self._hit_path.run(index, segment.predicted):
                return
            self._hit_path.flush(self._policy, self._uses)
        layer, banks, exchange = self.layers[index], self._host_experts.banks[index], self.parts[index].exchange
        assert layer is not None
        assert banks is not None
        if n_rows == 1:
            exchange.fetch_token()
        ranked = exchange.read("ranked", n_rows, len(layer.target))[:, : layer.n_expert_used]
        self._uses.add(index, ranked)
        selected, copies = banks.target[ranked], None
        if self._trace is not None:
            self._trace.layer(index, np.maximum(selected, -1), exchange.read("expert_weights", *selected.shape))
        if self._lossy is not None:
            decision = self._lossy.decide(index, selected, exchange.read("expert_weights", *selected.shape))
            if decision.weights is not None:
                exchange.write("expert_weights", decision.weights)
            selected, copies = decision.stored, decision.copies
            self._lowered |= {(index, int(expert)) for expert in selected[copies > 0]}
        self._tell_policy(index, selected, len(layer.experts))
        if index in self._constants or self._lossy is not None:
            write_constant_experts(exchange, self._constants.get(index), selected)
        early_logits = self._early_logits(segment) if n_rows == 1 else NO_LOGITS
        if self._is_on_host:
            self._host_experts.run(index, selected, copies, early_logits, is_cancelled)
        else:
            self._compute_apart(index, selected, copies, early_logits, is_cancelled)
        if self._trace is not None and n_rows == 1:
            self._trace.predicted(self._host_experts.predicted)

    def _tell_policy(self, index: int, selected: NDArray[np.int64], n_expert: int) -> None:
        """Answers count for the policy, prompts at most seed it."""
        is_decode = self._is_decode[-len(selected) :]
        if len(selected) == 1 and is_decode[0] and selected.min() >= 0:
            self._policy.decode(index, selected[0])
            return
        if is_decode.all():
            decoded, read = selected, selected[:0]
        else:
            decoded, read = selected[is_decode], selected[~is_decode]
        for row in decoded:
            self._policy.decode(index, row[row >= 0])
        if len(read):
            self._policy.prompt(index, np.bincount(read[read >= 0], minlength=n_expert))

    def _compute_apart(
        self,
        index: int,
        selected: NDArray[np.int64],
        copies: NDArray[np.int64] | None,
        early_logits: EarlyLogits,
        is_cancelled: Cancelled,
    ) -> None:
        """Computes each expert on the side where it lies, both sides at once."""
        part, host, n_rows, banks = self.parts[index], self._host, len(selected), self._host_experts.banks[index]
        device, exchange, shape = part.experts, part.exchange, host.shape
        assert banks is not None
        assert device is not None
        columns = np.flatnonzero(selected >= 0)
        experts = selected.ravel()[columns]
        is_there = device.find(index, experts)
        if copies is not None:  # devices have best copies only
            is_there &= copies.ravel()[columns] == 0
        there, absent = experts[is_there], experts[~is_there]
        if self._is_decode[-n_rows:].all():
            self._missed.append((index, absent if n_rows == 1 else np.unique(absent)))
        hosts = selected.copy()
        hosts.ravel()[columns[is_there]] = _ELSEWHERE
        if n_rows > 1:
            streamed = self._choose_streamed(index, there, hosts, copies)
        else:
            streamed = self._choose_uploaded(index, absent, hosts, copies, len(there))
        for one in streamed:
            hosts.ravel()[one.columns] = _ELSEWHERE
        on_host = np.flatnonzero(hosts >= 0)
        if on_host.size:
            host.write("normed", exchange.read("normed", n_rows, shape.n_embd_expert))
            host.write("expert_weights", exchange.read("expert_weights", n_rows, shape.n_used))
        if there.size:
            device.begin(index, there, columns[is_there], n_rows, is_token=n_rows == 1 and not banks.may_repeat)
        with self._streaming(index, streamed, n_rows):
            elsewhere = np.append(there, [one.key[1] for one in streamed]) if streamed else there
            self._host_experts.run(index, hosts, copies, early_logits, is_cancelled, elsewhere)
        if on_host.size:
            device.write(on_host, host.read("outputs", int(on_host[-1]) + 1, shape.n_embd_expert)[on_host])

    def _early_logits(self, segment: Segment) -> EarlyLogits:
        """What the routers of later layers say to this layer's input."""
        exchange = self.parts[segment.last].exchange
        n_row = exchange.shape.n_expert
        return segment.predicted, exchange.read("early_logits", len(segment.predicted), n_row)

    def _choose_streamed(
        self, index: int, there: NDArray[np.int64], hosts: NDArray[np.int64], copies: NDArray[np.int64] | None
    ) -> list[RoutedTokens]:
        """Which of the experts that `hosts` leaves to the host are worth being copied to the device for a batch.

        `there` are experts that the device computes, each as often as a token has selected it.
        """
        device, layer = self.parts[index].experts, self.layers[index]
        assert layer is not None
        if device is None or device.times is None:
            return []
        here = [
            one
            for one in group_by_expert(index, layer, hosts, copies)
            if not one.copy_index and device.bank_of(one.key) is not None and self._host_experts.has(one.key)
        ]
        copied = [one for one in here if one.key in self._ahead]
        left = [one for one in here if one.key not in self._ahead]
        n_device = np.unique(there, return_counts=True)[1].tolist() + [len(one.columns) for one in copied]
        # What is streamed keeps its slot, and the host needs one for the others.
        n_most = max(0, self._host_experts.n_free_to_pin - 1)
        chosen = choose_streams([len(one.columns) for one in left], n_device, device.times)
        return copied + [left[number] for number in chosen[:n_most]]

    def _choose_ahead(self, index: int, n_streamed: int) -> list[Key]:
        """Which experts of the next layer are copied as soon as this one's are, of which `n_streamed` were.

        The most valuable of those that a batch would have copied then, if it is one that needs nearly all of them.
        """
        part, later, host = self.parts[index], index + 1, self._host_experts
        layer = self.layers[later] if later < len(self.layers) else None
        device, n_rows = part.experts, self._n_out if later == len(self.layers) - 1 else len(self._is_decode)
        if layer is None or device is None or not device.link.is_apart or self.parts.get(later) is not part:
            return []
        if n_rows * layer.n_expert_used < _NEARLY_ALL * len(layer.experts):
            return []
        keys = [(later, expert) for expert in range(len(layer.experts))]
        able = [one for one in keys if one not in device and device.bank_of(one) is not None and host.has(one)]
        n_most = min(n_streamed, host.n_free_to_pin - 2)
        return sorted(able, key=self._policy.rank, reverse=True)[: max(0, n_most)]

    def _forget_ahead(self) -> None:
        """Waits until nothing is copied ahead any more, and lets it go, whether it arrived or failed."""
        if self._copying_ahead is not None:
            wait([self._copying_ahead])
            self._copying_ahead = None
            self._ahead = []
            self._host_experts.hold((), _AHEAD)

    def _choose_uploaded(
        self,
        index: int,
        absent: NDArray[np.int64],
        hosts: NDArray[np.int64],
        copies: NDArray[np.int64] | None,
        n_here: int,
    ) -> list[RoutedTokens]:
        """Which of a single token's `absent` experts, that `hosts` leaves to the host, the device gets now.

        Those that are to stay have their slots reserved.
        """
        device, layer, banks = self.parts[index].experts, self.layers[index], self._host_experts.banks[index]
        assert layer is not None
        assert banks is not None
        assert device is not None
        if device.uploads is None or not self._is_token or banks.may_repeat or not absent.size:
            return []
        here = {
            one.key[1]: one
            for one in group_by_expert(index, layer, hosts, copies)
            if not one.copy_index and device.bank_of(one.key) is not None and self._host_experts.has(one.key)
        }
        chosen = device.uploads.choose(index, np.array([*here], np.int64), n_here, len(absent) - len(here))
        chosen = chosen[: max(0, self._host_experts.n_free_to_pin - 1)]
        device.reserve(index, chosen)
        self._exchanged += [upload.victim for upload in chosen if upload.victim is not None]
        return [here[upload.expert] for upload in chosen]

    @contextmanager
    def _streaming(self, index: int, streamed: list[RoutedTokens], n_rows: int) -> Iterator[None]:
        """Streams experts while the host does its own; nobody else may begin graphs on the device meanwhile."""
        if not streamed:
            self._forget_ahead()
            yield
            return
        device, host = self.parts[index].experts, self._host_experts
        assert device is not None
        # What was copied ahead, perhaps for nothing, may still be read until this layer's begin to be copied.
        host.hold([*self._ahead, *(one.key for one in streamed)], _STREAMED)
        work = [(one, host.addresses(one.key)) for one in streamed]
        self._given_up = given_up = Event()
        copied_ahead = self._copying_ahead
        streaming = self._link.submit(device.stream, work, n_rows, given_up.is_set)
        self._ahead = self._choose_ahead(index, len(streamed)) if n_rows > 1 else []
        host.hold(self._ahead, _AHEAD)
        ahead = [(key, host.addresses(key)) for key in self._ahead]
        self._copying_ahead = self._link.submit(device.stream_ahead, ahead, given_up.is_set) if ahead else None
        try:
            yield
        except BaseException:
            given_up.set()
            raise
        finally:
            try:
                streaming.result()
                if copied_ahead is not None:
                    copied_ahead.result()
            finally:
                host.hold((), _STREAMED)
                self._arrived += device.settle()

    def end(self) -> None:
        """A step is complete: what is worth more than what a device has takes its place."""
        if self._lossy is not None and self._lossy.invests:
            margin = _INVEST_MARGIN if self._policy.in_uses_per_token else 1.0
            self._host_experts.invest(sorted(self._lowered, key=self._policy.rank, reverse=True), margin)
        if not self._is_decode.any():
            return
        if self._hit_path is not None:
            self._hit_path.flush(self._policy, self._uses)
        missed = [(layer, expert) for layer, experts in self._missed for expert in experts.tolist()]
        host, coming = self._host_experts, list[Key]()
        for newcomer, victim in zip(self._arrived, self._exchanged, strict=False):
            host.replace(newcomer, victim)
        self._arrive()
        for device in self._devices:
            is_done = device.swaps is None or (self._is_token and device.uploads is not None)
            swaps = [] if is_done or device.swaps is None else device.swaps.choose(device, missed, host.has)
            for victim, newcomer in swaps:
                coming.append(newcomer)
                host.hold(coming, _SWAPPED)
                if host.n_free_to_pin >= self._n_used:
                    device.swap(newcomer, host.addresses(newcomer), victim, self._behind)
                    self._is_swapping = True
                else:
                    device.put(newcomer, host.addresses(newcomer), victim)
                    coming.remove(newcomer)
                    host.hold(coming, _SWAPPED)
                host.replace(newcomer, victim)
        self._policy.end_token()

    def watch(self, seconds: float) -> None:
        """The step's logits are there, so many seconds after it began: devices ask whether their choices still hold."""
        for device in self._devices:
            if device.watch is not None:
                device.watch.step(seconds, is_token=self._is_token)

    def _arrive(self) -> None:
        """Waits for experts that the last step has swapped in: as long as another step they had."""
        if self._is_swapping:
            for device in self._devices:
                device.arrive()
            self._host_experts.hold((), _SWAPPED)
            self._is_swapping = False

    def rest(self) -> None:
        """Waits until nothing is copied any more, for good: host memory may go then."""
        self._given_up.set()
        self._link.shutdown()
        self._behind.shutdown()

    def close(self) -> None:
        """Frees the graphs and ends the trace."""
        self.rest()
        self._host_experts.close()
        if self._trace is not None:
            self._trace.close()
        for device in self._devices:
            device.close()
