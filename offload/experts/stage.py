"""Between two segments: takes the router's choice and has every expert multiplied where it lies."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.policy import Policy
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.router_trace import ANSWER, PROMPT, TraceRun, TraceWriter
from slimoe.offload.cache.routing import Picks, group_picks
from slimoe.offload.cache.swap import SlotExchange
from slimoe.offload.experts.constant_experts import Novices, write_novices
from slimoe.offload.experts.device_experts import DeviceExperts, choose_streams
from slimoe.offload.experts.host_experts import HostExperts
from slimoe.offload.ggml.cpu_backend import Backend
from slimoe.offload.graph.batch import Batch
from slimoe.offload.graph.exchange import Exchange
from slimoe.offload.graph.segment import Segment
from slimoe.offload.lossy.step import LossyStep
from slimoe.offload.model.experts import ExpertLayer

_INVEST_MARGIN = 1.3
"""How much more often an expert must be used than the one whose place it takes for good."""

Cancelled = Callable[[], bool] | None


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """Where a segment runs: its backend, the tensors it shares with others, and experts in slots if it has any."""

    backend: Backend
    exchange: Exchange
    experts: DeviceExperts | None = None


def _is_on(device: DeviceExperts | None, pick: Picks) -> bool:
    """Devices have best copies only."""
    return device is not None and not pick.copy_index and device.holds(pick.key)


class ExpertStage:
    """The experts of all cut layers. `sites` by cut layer; `host` is the CPU's exchange, for its own experts."""

    def __init__(
        self,
        layers: Sequence[ExpertLayer | None],
        sites: Mapping[int, Site],
        host: Exchange,
        host_experts: HostExperts,
        policy: Policy,
        novices: Novices,
        trace: TraceWriter | None,
        lossy: LossyStep | None = None,
    ) -> None:
        self._layers, self._sites, self._host, self._host_experts = layers, sites, host, host_experts
        self._policy, self._novices, self._trace = policy, novices, trace
        self._lossy = lossy
        has_devices = any(site.experts is not None or site.exchange is not host for site in sites.values())
        self._is_plain = not (novices or trace or lossy or has_devices)
        self._single_picks: dict[tuple[int, int, int], Picks] = {}
        self._missed: list[Key] = []
        self._lowered: set[Key] = set()
        # A device that fills its slots over the link would keep the CPU from its own share.
        self._link = ThreadPoolExecutor(1, "link")
        self._is_decode = np.zeros(0, np.bool_)

    @property
    def compute_bytes(self) -> int:
        """Size of the graphs' buffers in host memory."""
        return self._host_experts.compute_bytes

    def begin(self, batch: Batch) -> None:
        """Notes which rows of a batch continue an answer, and which read a prompt."""
        self._is_decode = np.concatenate([np.full(run.n_tokens, run.n_tokens == 1) for run in batch.runs])
        self._host_experts.begin()
        self._missed.clear()
        self._lowered.clear()
        if self._lossy is not None:
            self._lossy.begin(batch.n_tokens)
        if self._trace is not None:
            firsts = np.cumsum([0, *(run.n_tokens for run in batch.runs)])
            self._trace.step(
                [
                    TraceRun(ANSWER if run.n_tokens == 1 else PROMPT, index, int(batch.positions[first]), run.n_tokens)
                    for index, (run, first) in enumerate(zip(batch.runs, firsts, strict=False))
                ]
            )

    def run(self, segment: Segment, n_rows: int, is_cancelled: Cancelled) -> None:
        """Fills the outputs of layer `segment.last`. Raises EngineAbortedError and ReadFailedError."""
        index = segment.last
        layer, site = self._layers[index], self._sites[index]
        assert layer is not None
        ranked = site.exchange.read("ranked", n_rows, len(layer.target))[:, : layer.n_expert_used]
        if n_rows == 1 and self._is_plain and self._is_decode[-1]:
            self._run_plain(segment, layer, ranked[0].tolist(), is_cancelled)
            return
        stored = np.asarray(layer.target, np.int64)[ranked]
        if self._trace is not None:
            shares = site.exchange.read("shares", n_rows, layer.n_expert_used)
            self._trace.layer(index, np.maximum(stored, -1), shares)
        copies = None
        if self._lossy is not None:
            stored, copies = self._decide(self._lossy, site.exchange, index, stored)
        self._observe(index, stored, n_rows)
        if index in self._novices or self._lossy is not None:
            write_novices(site.exchange, self._novices.get(index), stored)
        picks = group_picks(index, layer, stored, copies)
        device = site.experts
        on_device = [pick for pick in picks if _is_on(device, pick)]
        on_host = [pick for pick in picks if not _is_on(device, pick)]
        if device is not None and self._is_decode[-n_rows:].all():
            self._missed += [pick.key for pick in on_host]
        streamed = self._streamed(device, on_device, on_host) if n_rows > 1 else []
        on_host = [pick for pick in on_host if pick not in streamed]
        # A device answers what it is asked after all that it was given: ask first, give it work then.
        ahead = self._ahead(segment) if n_rows == 1 else {}
        is_apart = site.exchange is not self._host and bool(on_host)
        if is_apart:
            self._fetch(site.exchange, n_rows)
        if device is not None and on_device:
            device.begin(on_device, n_rows)
        with self._streaming(device, streamed, n_rows):
            if n_rows == 1:
                elsewhere = [pick.key for pick in on_device]
                self._host_experts.run_single(index, on_host, ahead, is_cancelled, elsewhere)
            elif on_host:
                self._host_experts.run_batch(index, on_host, n_rows, is_cancelled)
        if is_apart:
            self._send(site.exchange, on_host)
        if self._trace is not None and n_rows == 1:
            self._trace.predicted(self._host_experts.predicted)

    def _run_plain(self, segment: Segment, layer: ExpertLayer, rows: list[int], is_cancelled: Cancelled) -> None:
        """One token's experts, where nothing but the host's memory and the disk is there to find them.

        The same as the long way, without what only other cases need: it runs for every layer of every token.
        """
        index = segment.last
        experts = [layer.target[row] for row in rows]
        self._policy.decode(index, experts)
        picks = [self._one_pick(index, layer, expert, column) for column, expert in enumerate(experts)]
        self._host_experts.run_single(index, picks, self._ahead(segment), is_cancelled)

    def _one_pick(self, index: int, layer: ExpertLayer, expert: int, column: int) -> Picks:
        key = (index, expert, column)
        pick = self._single_picks.get(key)
        if pick is None:
            stored = np.full((1, column + 1), -1, np.int64)
            stored[0, column] = expert
            (pick,) = group_picks(index, layer, stored)
            self._single_picks[key] = pick
        return pick

    def end(self) -> None:
        """A step is complete: what is worth more than what a device has takes its place."""
        if self._lossy is not None and self._lossy.invests:
            values = self._policy.values
            margin = _INVEST_MARGIN if self._policy.in_uses_per_token else 1.0
            self._host_experts.invest(sorted(self._lowered, key=lambda key: -values[key]), margin)
        if not self._is_decode.any():
            return
        for site in {id(site): site for site in self._sites.values()}.values():
            device = site.experts
            if device is not None and device.swaps is not None:
                self._swap(device, device.swaps)
        self._policy.end_token()

    def _swap(self, device: DeviceExperts, exchange: SlotExchange) -> None:
        def can_come(key: Key) -> bool:
            return key in device.copies and self._host_experts.has(key)

        for victim, newcomer in exchange.choose(set(device), self._missed, can_come):
            device.put(newcomer, self._host_experts.addresses(newcomer), victim)
            self._host_experts.replace(newcomer, victim)

    def _decide(
        self, lossy: LossyStep, exchange: Exchange, index: int, stored: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What a lossy mode makes of a layer's picks: stored experts and the copies to use, both [n_rows, n_used]."""
        decision = lossy.decide(index, stored, exchange.read("shares", *stored.shape))
        if decision.weights is not None:
            exchange.write("shares", decision.weights)
        self._lowered |= {(index, int(expert)) for expert in decision.stored[decision.copies > 0]}
        return decision.stored, decision.copies

    # --- the two sides --------------------------------------------------------------------------------------

    def _streamed(self, device: DeviceExperts | None, on_device: list[Picks], on_host: list[Picks]) -> list[Picks]:
        """Experts of a batch that are worth being copied to the device for it."""
        if device is None or device.times is None:
            return []
        here = [
            pick
            for pick in on_host
            if not pick.copy_index and device.takes(pick.copy) and self._host_experts.has(pick.key)
        ]
        n_host, n_device = ([len(pick.columns) for pick in picks] for picks in (here, on_device))
        # What is streamed keeps its slot, and the host needs one for the others.
        n_most = max(0, self._host_experts.n_free_to_pin - 1)
        return [here[index] for index in choose_streams(n_host, n_device, device.times)[:n_most]]

    @contextmanager
    def _streaming(self, device: DeviceExperts | None, streamed: list[Picks], n_rows: int) -> Iterator[None]:
        """Streams experts while the host does its own; nobody else may use the device meanwhile."""
        if device is None or not streamed:
            yield
            return
        given_up = Event()
        with self._host_experts.held(pick.key for pick in streamed):
            work = [(pick, self._host_experts.addresses(pick.key)) for pick in streamed]
            streaming = self._link.submit(device.stream, work, n_rows, given_up.is_set)
            try:
                yield
            except BaseException:
                given_up.set()
                raise
            finally:
                streaming.result()

    def _fetch(self, exchange: Exchange, n_rows: int) -> None:
        """Copies what the host's experts need from the site."""
        shape = self._host.shape
        self._host.write("normed", exchange.read("normed", n_rows, shape.n_embd))
        self._host.write("shares", exchange.read("shares", n_rows, shape.n_used))

    def _ahead(self, segment: Segment) -> dict[int, NDArray[np.float32]]:
        """What later layers' routers say, by layer."""
        if not segment.ahead:
            return {}
        exchange = self._sites[segment.last].exchange
        scores = exchange.read("ahead", len(segment.ahead), exchange.shape.n_expert)
        layers = [(index, self._layers[index]) for index in segment.ahead]
        return {index: row[: len(layer.target)] for row, (index, layer) in zip(scores, layers, strict=True) if layer}

    def _send(self, exchange: Exchange, picks: list[Picks]) -> None:
        """Copies the columns that the host computed to the site."""
        columns = np.concatenate([pick.columns for pick in picks])
        outputs = self._host.read("outputs", int(columns.max()) + 1, self._host.shape.n_embd)
        exchange.write_rows("outputs", columns, outputs[columns])

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

    def close(self) -> None:
        """Frees the graphs and ends the trace."""
        self._link.shutdown()
        self._host_experts.close()
        if self._trace is not None:
            self._trace.close()
        for site in {id(site): site for site in self._sites.values()}.values():
            if site.experts is not None:
                site.experts.close()
