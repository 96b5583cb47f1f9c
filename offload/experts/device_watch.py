"""Decides what becomes of experts that a device lacks: by measuring at opening, and again in passing while it runs."""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Event

from slimoe.offload.cache.device_pool import Bank
from slimoe.offload.cache.policy import Policy
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.swap import SlotExchange, SwapRule
from slimoe.offload.experts.device_experts import DeviceExperts
from slimoe.offload.experts.host_experts import HostExperts
from slimoe.offload.experts.layer_uploads import LayerUploads
from slimoe.offload.graph.exchange import Exchange
from slimoe.offload.machine.expert_times import ExpertTimes, LinkTimes
from slimoe.offload.machine.upload_costs import UploadCosts
from slimoe.offload.machine.watchdog import Part, Watchdog
from slimoe.offload.text.generation import ExchangeNow

_log = logging.getLogger(__name__)
_ROUNDS = 3
TIMED_TOKENS = 1, 8, 64
_MEASURED = "measured"
"""Why an expert is kept in host memory while it is copied and computed over and over."""
Probe = Callable[[Part], float | None]
"""Seconds of an expert for one token as measured now, None where none can be measured."""


def measure_times(run: Callable[[int], None], n_batch: int, wait: Callable[[], None] | None = None) -> ExpertTimes:
    """Times `run`, which computes an expert for some numbers of tokens, at most `n_batch`: the fastest of several runs.

    `wait` returns when what `run` has begun is done. What it takes when there is nothing to wait for does not count: a
    step waits once for all experts.
    """
    counts = tuple(dict.fromkeys(min(n_tokens, n_batch) for n_tokens in TIMED_TOKENS))
    return ExpertTimes(counts, tuple(fastest(partial(run, n_tokens), wait) for n_tokens in counts))


def fastest(
    run: Callable[[], None], wait: Callable[[], None] | None = None, n_rounds: int = _ROUNDS, n_warm: int = 1
) -> float:
    """The least seconds of several runs, until all is done, without those of a `wait` for nothing.

    The first `n_warm`, which may build a graph, do not count.
    """
    taken, idle = [], []
    for _ in range(n_warm + n_rounds):
        begin = time.perf_counter()
        run()
        if wait is not None:
            wait()
        taken.append(time.perf_counter() - begin)
        if wait is not None:
            begin = time.perf_counter()
            wait()
            idle.append(time.perf_counter() - begin)
    return max(0.0, min(taken[n_warm:]) - min(idle, default=0.0))


def measure_beside(
    run: Callable[[], None], copy: Callable[[], None], wait: Callable[[], None] = lambda: None
) -> tuple[float, float]:
    """Seconds of `run` and of `copy` while the other is under way: another thread copies over and over.

    `wait` returns when a copy that has begun is done.
    """
    ended = Event()

    def copy_on() -> int:
        n_copies = 0
        while not ended.is_set():
            copy()
            wait()
            n_copies += 1
        return n_copies

    with ThreadPoolExecutor(1, "link") as link:
        begin = time.perf_counter()
        copies = link.submit(copy_on)
        try:
            seconds = fastest(run)
        finally:
            ended.set()
        n_copies = copies.result()
    return seconds, (time.perf_counter() - begin) / max(1, n_copies)


class LinkProbes:
    """One expert after the other on a device, over the link and on the host, between two steps.

    All measurements are of experts of one class, which are copied to slots for passing through. `exchange` is that of
    the device's part.
    """

    def __init__(self, exchange: Exchange, device: DeviceExperts, host: HostExperts) -> None:
        self._exchange, self._device, self._host = exchange, device, host
        banks = {key: bank for key in device.copies if (bank := device.bank_of(key)) is not None}
        first = next((key for key in banks if host.has(key)), next(iter(banks), None))
        self._bank: Bank | None = None if first is None else banks[first]
        self._able = [key for key, bank in banks.items() if bank is self._bank]
        self._key = first

    def open(self, n_batch: int) -> tuple[LinkTimes, UploadCosts] | None:
        """What everything takes now, measured thoroughly; None where the device has no slots."""
        key, bank, device, host = self._key, self._bank, self._device, self._host
        if key is None or bank is None:
            return None
        with self._held(key):
            copy = partial(device.copy_passing, host.addresses(key), bank)
            copied = fastest(copy, self._wait)
            there = measure_times(lambda n: device.run_passing(bank, n), n_batch, self._wait)
            here = measure_times(lambda n: host.run_one(key, n), n_batch)
            beside = measure_beside(lambda: host.run_one(key, 1), copy, self._wait)
        costs = UploadCosts(here.one, there.one, copied, max(here.one, beside[0]), max(copied, beside[1]))
        return LinkTimes(here, there, copied, device.link.is_apart), costs

    def seconds(self, part: Part) -> float | None:
        """A `Probe`."""
        key, bank = self._key, self._bank
        if key is None or not self._host.has(key):
            key = self._key = next((one for one in self._able if self._host.has(one)), None)
        if key is None or bank is None:
            return None
        self._device.arrive()
        with self._held(key):
            if part == "host":
                return fastest(partial(self._host.run_one, key, 1), n_rounds=1)
            self._wait()
            if part == "device":
                return fastest(partial(self._device.run_passing, bank, 1), self._wait, n_rounds=1)
            run = partial(self._device.copy_passing, self._host.addresses(key), bank)
            return fastest(run, self._wait, n_rounds=1, n_warm=0)

    @contextmanager
    def _held(self, key: Key) -> Iterator[None]:
        self._host.hold([key], _MEASURED)
        try:
            yield
        finally:
            self._host.hold((), _MEASURED)

    def _wait(self) -> None:
        """Reads a number: an RPC server has then done all before, of which others only know that it was sent."""
        self._exchange.read("positions", 1)


class DeviceWatch:
    """Lets a device exchange experts as its watchdog chooses, by `times` at opening and what `probe` measures since."""

    def __init__(
        self, name: str, device: DeviceExperts, policy: Policy, times: LinkTimes, watchdog: Watchdog, probe: Probe
    ) -> None:
        self.watchdog, self.probe = watchdog, probe
        self._name, self._device, self._policy, self._times = name, device, policy, times
        self._n_moved = 0
        self._apply()

    def step(self, seconds: float, *, is_token: bool) -> None:
        """Takes note of a step, measures something again when it is due, and carries out what is chosen anew."""
        watchdog, n_moved = self.watchdog, self._device.n_swaps + self._device.n_streamed
        has_moved, self._n_moved = n_moved > self._n_moved, n_moved
        n_changes = watchdog.n_changes
        has_changed = watchdog.step(seconds, is_token=is_token, has_moved=has_moved)
        part = watchdog.due()
        if part is not None:
            begin = time.perf_counter()
            found = self.probe(part)
            has_changed |= watchdog.measured(part, found, time.perf_counter() - begin)
        if has_changed:
            self._apply()
        if watchdog.n_changes != n_changes:
            _log.warning("%s: %s, so %s.", self._name, watchdog.cause, watchdog.choice.reason)

    def _apply(self) -> None:
        """Carries out the choice of the moment."""
        watchdog, policy, times, device = self.watchdog, self._policy, self._times, self._device
        costs, device.choice = watchdog.costs, watchdog.choice
        host, there = times.host.at(costs.host), times.device.at(costs.device)
        device.times = LinkTimes(host, there, costs.copy, times.is_apart)
        rule = SwapRule(costs.gain, costs.copy)
        device.swaps = None if watchdog.is_still else SlotExchange(policy, rule, device.bank_of)
        does_upload = watchdog.choice.mode == "upload" and policy.in_uses_per_token and not watchdog.is_still
        device.uploads = LayerUploads(policy, costs, device.kinds) if does_upload else None


def exchange_now(name: str, device: DeviceExperts) -> tuple[ExchangeNow, ...]:
    """How a device exchanges experts; nothing of one that is not watched."""
    if device.watch is None:
        return ()
    dog = device.watch.watchdog
    measured: dict[str, float] = {part: 1e3 * seconds for part, seconds in dog.latest.items()}
    if dog.tokens is not None:
        measured |= {"token_uploading": 1e3 * dog.tokens.uploading, "token_staying": 1e3 * dog.tokens.staying}
    told = dog.choice.mode, dog.choice.reason, dog.since, dog.n_changes, dog.opened.as_ms(), measured
    return (ExchangeNow(name, *told),)


def choose_and_watch(
    name: str, device: DeviceExperts, policy: Policy, probes: LinkProbes, n_batch: int, n_used: int
) -> None:
    """Measures what moving experts takes, and lets the device exchange them by that; nothing where it has no slots.

    Policies that do not count in uses per token load what they miss whatever it costs: there is nothing to watch.
    """
    found = probes.open(n_batch)
    if found is not None:
        times, costs = found
        watch = DeviceWatch(name, device, policy, times, Watchdog(costs, n_used), probes.seconds)
        device.watch = watch if policy.in_uses_per_token else None
