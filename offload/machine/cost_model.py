"""Predicts how long a step takes, and how long it takes at least: pure arithmetic on measured speeds.

A step computes for C seconds and reads from the disk for R seconds. Layers follow each other, so C is a sum: matrices
that every token meets, attention, small operations, the cuts at the routers, and for each layer its experts, where
device and CPU work side by side and the slower one counts. Reading runs beside computing, but only for a share a of the
experts, those that were predicted in time; for the others everything waits, and until they are known the disk does. So
a step takes

    T = max(R + (1 - a) C, C + (1 - a) R)

which is exact at both ends: with a = 1 the disk or the processors are always busy, with a = 0 never both at once. What
is read takes cores and memory from what is computed: graphs take longer meanwhile, and Python works for each expert.

The bound is what moving the bytes takes, each tier at its measured speed and all of them at once: the busiest tier.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.machine.speed import MachineSpeed, ProcessorSpeed
from slimoe.offload.machine.workload import Workload

LOOK_AHEAD = 0.6
"""Share of the missed experts whose reads begin before they are selected: 0.56 to 0.71 were measured.

Of all selected experts more are predicted (0.8 to 0.9 are published for Mixtral), but those that a cache has not got
are rarer ones, which routers are less sure of.
"""
_TAKEN_BY_READS = 0.2
"""By what part graphs take longer while the disk is read, on two cores: 0.1 to 0.4 were measured."""
_CHOICE_SECONDS, _READ_SECONDS = 3e-4, 1.4e-4
"""Python's work for a single token in a layer whose experts may be missing, and for each expert that is read: as it was
on an EPYC. It finds the processor's caches full of weights."""
CPU, DISK, LINK = "cpu", "disk", "link"
_OPS_PER_ATTENTION = 10
_OPS_PER_FEED_FORWARD = 8
_OPS_PER_CUT_EXPERT = 4
_VIEWS_PER_ATTENTION, _VIEWS_PER_FEED_FORWARD = 20, 17
_VIEWS_PER_CUT, _VIEWS_OF_SLOTS, _VIEWS_OF_ROWS = 15, 23, 6
"""Tensors of graphs beside their operations: of a layer, of what a cut adds to it, of the graph over a device's slots,
and of the one that puts the CPU's outputs to the others."""


@dataclass(frozen=True, slots=True)
class Residency:
    """Shares of the selected experts that are in a device's slots and in the host expert cache; the rest is on disk.

    `is_cut`: whether a step stops at each router. Where everything is on one processor it does not. `by_layer` are the
    shares on the device of each layer with experts, whose mean is `device`; without them all layers have that.
    """

    device: float
    host: float
    is_cut: bool = True
    by_layer: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert min(self.device, self.host) >= 0, self
        assert self.device + self.host <= 1 + 1e-9, self

    @property
    def disk(self) -> float:
        """The share of the selected experts that are in no memory."""
        share = 1.0 - self.device - self.host
        return share if share > 1e-9 else 0.0

    def disk_of(self, device: float) -> float:
        """The share that is in no memory, of a layer of which `device` is on the device."""
        return self.disk * (1 - device) / (1 - self.device) if self.disk else 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """One step: `n_tokens` tokens with `n_past` before them, and logits of the last `n_out`.

    The last layer is computed for these only. `look_ahead` is the share of the reads that are known in time.
    """

    n_tokens: int = 1
    n_past: int = 0
    n_out: int = 1
    look_ahead: float = LOOK_AHEAD


@dataclass(frozen=True, slots=True)
class Prediction:
    """Milliseconds per token: `ms_per_token` as expected, and `bound_ms`, below which it cannot be.

    `tier_ms` are what each tier needs for its bytes; the tier of the largest, `bound_name`, sets the bound.
    """

    ms_per_token: float
    bound_ms: float
    bound_name: str
    tier_ms: Mapping[str, float]

    @property
    def tokens_per_second(self) -> float:
        """The tokens of a second at `ms_per_token`."""
        return 1000 / self.ms_per_token


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's experts: seconds until all are done, cuts included, and the seconds that each tier is busy."""

    seconds: float
    tiers: Mapping[str, float]


def predict(
    load: Workload, residency: Residency, speed: MachineSpeed, step: Step | None = None, device: str | None = None
) -> Prediction:
    """Predicts the time of one step, per token. With a `device`, all but the experts on the CPU is computed there.

    Several devices take turns, since layers follow each other: they count as one, the slowest. A prompt's batch is a
    step of many tokens, with a `look_ahead` of 1: each of its experts computes long enough for the next to be read.
    """
    step = step or Step()
    setting = _Setting(load, residency, speed, device)
    fixed = setting.dense_seconds(step)
    computing, tiers = fixed + setting.op_seconds() + setting.passing_seconds(step), {device or CPU: fixed}
    shares = residency.by_layer or (residency.device,) * load.n_routed
    by_layer = zip(load.routed_layers, shares, strict=True)
    alike = Counter((step.n_out if layer == load.n_layer - 1 else step.n_tokens, share) for layer, share in by_layer)
    for (n_tokens, share), n_routed in alike.items():
        layer = setting.layer(n_tokens, share)
        computing += n_routed * layer.seconds
        for tier, seconds in layer.tiers.items():
            tiers[tier] = tiers.get(tier, 0.0) + n_routed * seconds
    reading = tiers.get(DISK, 0.0)
    computing += _TAKEN_BY_READS * min(reading, computing)
    late = 1 - step.look_ahead
    taken = max(reading + late * computing, computing + late * reading)
    tier_ms = {tier: 1000 * seconds / step.n_tokens for tier, seconds in tiers.items()}
    bound_name = max(tier_ms, key=lambda tier: tier_ms[tier])
    return Prediction(1000 * taken / step.n_tokens, tier_ms[bound_name], bound_name, tier_ms)


@dataclass(frozen=True, slots=True)
class _Setting:
    """A model on a machine; `main` computes everything but the experts on the CPU."""

    load: Workload
    residency: Residency
    speed: MachineSpeed
    device: str | None

    @property
    def main(self) -> ProcessorSpeed:
        return self.speed.devices[self.device] if self.device else self.speed.cpu

    def dense_seconds(self, step: Step) -> float:
        """Matrices that every token meets, and attention to the tokens before."""
        load, main = self.load, self.main
        n_last = int(load.n_layer - 1 in load.attention_layers)
        last = n_last / len(load.attention_layers)
        windows = load.windows or (0,) * len(load.attention_layers)
        n_before = len(load.attention_layers) - n_last
        pairs = sum(_pairs(step.n_past, step.n_tokens, window) for window in windows[:n_before])
        n_unwanted = step.n_tokens - step.n_out
        pairs += sum(_pairs(step.n_past + n_unwanted, step.n_out, window) for window in windows[n_before:])
        attention = pairs * main.pair_seconds(step.n_tokens)
        inner = (1 - last) * main.matrix_seconds(load.dense, step.n_tokens)
        return (
            inner
            + last * main.matrix_seconds(load.dense, step.n_out)
            + main.output_seconds(load.output, step.n_out)
            + attention
        )

    def op_seconds(self) -> float:
        """Starting the graph, its small operations, and naming its other tensors."""
        load, overheads = self.load, self.main.overheads
        n_attention = len(load.attention_layers)
        n_feed_forward = load.n_routed or load.n_layer  # a model without experts is dense in every layer
        n_ops = n_attention * _OPS_PER_ATTENTION + n_feed_forward * _OPS_PER_FEED_FORWARD
        n_views = n_attention * _VIEWS_PER_ATTENTION + n_feed_forward * _VIEWS_PER_FEED_FORWARD
        return overheads.graph_seconds + n_ops * overheads.op_seconds + n_views * overheads.view_seconds

    def passing_seconds(self, step: Step) -> float:
        """Handing a device the tokens' rows and what they attend to, and reading their logits."""
        if not self.device:
            return 0.0
        link, load = self.speed.links[self.device], self.load
        there = step.n_tokens * (4 * load.n_embd + 2 * (step.n_past + step.n_tokens))
        return there / link.to_device + 4 * step.n_out * load.n_vocab / link.from_device

    def layer(self, n_tokens: int, share: float) -> _Layer:
        """The experts of one layer, a `share` of the selected ones on the device."""
        load = self.load
        # The expected number of different experts, as if tokens selected them independently of each other.
        visited: float = load.n_used
        if n_tokens > 1 and load.n_expert:
            visited = load.n_expert * (1 - (1 - load.n_used / load.n_expert) ** n_tokens)
        n_pairs = n_tokens * load.n_used / visited if visited else 0.0
        layer = self._experts(n_tokens, visited, n_pairs, share)
        tiers = dict(layer.tiers)
        if on_disk := self.residency.disk_of(share):
            assert self.speed.disk, "experts on a disk that was not measured"
            tiers[DISK] = visited * on_disk * load.read_bytes / self.speed.disk
        cut = self._cut_seconds(n_tokens, visited, share) if self.residency.is_cut else 0.0
        if on_disk:
            cut += visited * on_disk * _READ_SECONDS + (_CHOICE_SECONDS if n_tokens == 1 else 0.0)
        return _Layer(layer.seconds + cut, tiers)

    def _experts(self, n_tokens: int, visited: float, n_pairs: float, share: float) -> _Layer:
        on_cpu = self.speed.cpu.matrix_seconds(self.load.expert, n_pairs)
        if not self.device:
            assert not share, "experts on a device that is not used"
            return _Layer(visited * on_cpu, {CPU: visited * on_cpu})
        on_device = self.main.matrix_seconds(self.load.expert, n_pairs)
        tiers = {self.device: visited * share * on_device, CPU: visited * (1 - share) * on_cpu}
        if n_tokens == 1:
            # The expected time of the slower side, where each expert is on the device with probability `share`.
            n_used = self.load.n_used
            seconds = sum(
                math.comb(n_used, n)
                * share**n
                * (1 - share) ** (n_used - n)
                * max(n * on_device, (n_used - n) * on_cpu)
                for n in range(n_used + 1)
            )
            return _Layer(seconds, tiers)
        # As the engine does, whole experts are copied to the device as long as both sides end sooner.
        link = self.speed.links[self.device]
        copy = sum(self.load.expert.values()) / link.to_device
        best = _Layer(max(tiers.values()), tiers)
        # Seconds until the device is done, as sums of a fixed part and one for each copied expert: the largest counts.
        ends = [(tiers[self.device], copy + on_device)]
        if link.is_apart:
            ends = [(tiers[self.device], on_device), (on_device, copy), (copy, on_device)]
        n_even = min((tiers[CPU] - fixed) / (on_cpu + each) for fixed, each in ends)
        for n_copied in (math.floor(n_even), math.ceil(n_even)):
            if 0 < n_copied <= visited * (1 - share):
                more = {self.device: n_copied * on_device, LINK: n_copied * copy, CPU: -n_copied * on_cpu}
                moved = {tier: tiers.get(tier, 0.0) + seconds for tier, seconds in more.items()}
                seconds = max(moved[CPU], *(fixed + n_copied * each for fixed, each in ends))
                best = min(best, _Layer(seconds, moved), key=lambda layer: layer.seconds)
        return best

    def _cut_seconds(self, n_tokens: int, visited: float, share: float) -> float:
        """Seconds for reading the router's results back, for the experts' graphs, and for activations over the link.

        A device is asked once for all of a single token; for a batch that the CPU has a part in, three times.
        """
        load, of_cpu = self.load, self.speed.cpu.overheads
        n_graphs = 1.0 if n_tokens == 1 else visited
        seconds = self.main.overheads.graph_seconds + n_graphs * of_cpu.graph_seconds
        seconds += visited * _OPS_PER_CUT_EXPERT * of_cpu.op_seconds
        if self.device:
            link, n_selected = self.speed.links[self.device], n_tokens * load.n_used
            by_device, by_cpu = 1 - (1 - share) ** n_selected, 1 - share**n_selected
            n_views = _VIEWS_PER_CUT + by_device * _VIEWS_OF_SLOTS + by_cpu * _VIEWS_OF_ROWS
            seconds += n_views * self.main.overheads.view_seconds
            # Graphs for which nobody waits.
            seconds += (by_device + by_cpu) * max(0.0, self.main.overheads.graph_seconds - link.round_trip)
            if n_tokens > 1:
                seconds += 2 * by_cpu * link.round_trip
            length, n_written = load.n_embd_expert, n_selected * (1 - share)
            n_read = n_tokens * (load.n_expert + load.n_used + length * (by_cpu if n_tokens > 1 else 1.0))
            seconds += 4 * n_read / link.from_device + 4 * length * n_written / link.to_device
        return seconds


def _pairs(n_past: int, n_tokens: int, window: int) -> float:
    """How many tokens, itself included, each of `n_tokens` tokens sees behind `n_past` others, summed up."""
    n_growing = max(0, min(n_tokens, window - n_past)) if window else n_tokens
    return n_growing * (n_past + (n_growing + 1) / 2) + (n_tokens - n_growing) * window


def expected_uses(priors: NDArray[np.float64] | None, n_layer: int, n_expert: int, n_used: int) -> NDArray[np.float64]:
    """Probabilities [n_layer, n_expert] that a token selects each expert; each row sums to `n_used`.

    `priors` are proportional to how often each is selected; a row of zeros, or None, means alike. A token selects no
    expert twice, so that what would exceed 1 goes to the layer's others.
    """
    shape = (n_layer, n_expert)
    weights = np.ones(shape) if priors is None else np.asarray(priors, np.float64).copy()
    assert weights.shape == shape
    assert np.isfinite(weights).all(), "the loader checks priors"
    assert (weights >= 0).all(), "the loader checks priors"
    assert 0 <= n_used <= n_expert
    weights[weights.sum(axis=1) == 0] = 1.0
    return np.stack([_capped(row, n_used) for row in weights]) if n_layer else weights


def _capped(weights: NDArray[np.float64], total: int) -> NDArray[np.float64]:
    """Values proportional to `weights`, but at most 1, that sum to `total`; alike for those left without weight."""
    uses = np.zeros(len(weights))
    is_open = np.ones(len(weights), np.bool_)
    while is_open.any():
        left = total - np.count_nonzero(~is_open)
        parts = weights[is_open]
        parts = parts / parts.sum() if parts.sum() else np.full(len(parts), 1 / len(parts))
        uses[is_open] = left * parts
        over = is_open & (uses > 1)
        if not over.any():
            break
        uses[over] = 1.0
        is_open &= ~over
    return uses
