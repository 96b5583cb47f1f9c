"""Predicts how long a step takes, and how long it takes at least: pure arithmetic on measured speeds.

A step computes for C seconds and reads from the disk for R seconds. Layers follow each other, so C is a sum: matrices
that every token meets, attention, small operations, the cuts at the routers, and for each layer its experts, where
device and CPU work side by side and the slower one counts. Reading runs beside computing, but only for experts that the
look-ahead router named in time, a share a of them; for the others everything waits. So a step takes

    T = max(R, C + (1 - a) R)

which is exact at both ends: with a = 1 the disk or the processors are always busy, with a = 0 never both at once. Left
out is that a layer's experts at hand are multiplied while its missing ones are read: T errs on the slow side.

The bound is what moving the bytes takes, each tier at its measured speed and all of them at once: the busiest tier.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offload.machine_speed import MachineSpeed, ProcessorSpeed
from offload.model_load import Matrices, ModelLoad

LOOK_AHEAD = 0.8
"""Share of picks that the next layer's router names one layer early; 0.8 to 0.9 are published for Mixtral."""
CPU, DISK, LINK = "cpu", "disk", "link"
_OPS_PER_LAYER = 18
_OPS_PER_CUT_EXPERT = 4
_MAX_PAIRS = 1 << 14


@dataclass(frozen=True, slots=True)
class Residency:
    """Shares of the picks whose expert is in a device's slots and in the host's arena; the rest is on the disk.

    `is_cut`: whether a step stops at each router. Where everything is on one processor it does not.
    """

    device: float
    host: float
    is_cut: bool = True

    def __post_init__(self) -> None:
        assert min(self.device, self.host) >= 0, self
        assert self.device + self.host <= 1 + 1e-9, self

    @property
    def disk(self) -> float:
        """The share that is in no memory."""
        share = 1.0 - self.device - self.host
        return share if share > 1e-9 else 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """One pass: so many tokens, with so many before them. `look_ahead`: the share of the reads known in time."""

    n_tokens: int = 1
    n_past: int = 0
    look_ahead: float = LOOK_AHEAD


@dataclass(frozen=True, slots=True)
class Prediction:
    """`ms_per_token` as expected, `bound_ms` as physics allow, and the tier that sets the bound.

    `tier_ms`: what each tier needs for its bytes, per token; the largest is the bound.
    """

    ms_per_token: float
    bound_ms: float
    bound_name: str
    tier_ms: Mapping[str, float]

    @property
    def tokens_per_second(self) -> float:
        """The same the other way round."""
        return 1000 / self.ms_per_token


@dataclass(frozen=True, slots=True)
class _Experts:
    """One layer's experts: seconds until all are done, and seconds of each tier."""

    seconds: float
    tiers: Mapping[str, float]


def predict(
    load: ModelLoad, residency: Residency, speed: MachineSpeed, step: Step | None = None, device: str | None = None
) -> Prediction:
    """The time of one step, by token. With a `device`, everything but the experts on the CPU is computed there.

    Several devices take turns, since layers follow each other: they count as one, the slowest. A prompt's batch is a
    step of many tokens, with a look-ahead of 1: each of its experts computes long enough for the next to be read.
    """
    step = step or Step()
    main = speed.devices[device] if device else speed.cpu
    experts = _experts(load, residency, speed, step, device)
    fixed = _dense_seconds(load, main, step)
    tiers = {tier: load.n_routed * seconds for tier, seconds in experts.tiers.items()}
    tiers[device or CPU] = tiers.get(device or CPU, 0.0) + fixed
    if residency.disk:
        assert speed.disk, "experts on a disk that was not measured"
        tiers[DISK] = load.n_routed * _visited(load, step) * residency.disk * load.read_bytes / speed.disk
    reading = tiers.get(DISK, 0.0)
    computing = fixed + _overhead_seconds(load, residency, speed, step, device) + load.n_routed * experts.seconds
    taken = max(reading, computing + (1 - step.look_ahead) * reading)
    tier_ms = {tier: 1000 * seconds / step.n_tokens for tier, seconds in tiers.items()}
    bound_name = max(tier_ms, key=lambda tier: tier_ms[tier])
    return Prediction(1000 * taken / step.n_tokens, tier_ms[bound_name], bound_name, tier_ms)


def _seconds(processor: ProcessorSpeed, matrices: Matrices, n_rows: float) -> float:
    return sum(processor.seconds(kernel, n_bytes, n_rows) for kernel, n_bytes in matrices.items())


def _dense_seconds(load: ModelLoad, main: ProcessorSpeed, step: Step) -> float:
    """Matrices that every token meets, and attention to all tokens before."""
    n_pairs = step.n_tokens * (step.n_past + (step.n_tokens + 1) / 2)
    attention = load.n_layer * n_pairs * main.attention_seconds
    return _seconds(main, load.dense, step.n_tokens) + _seconds(main, load.output, 1) + attention


def _overhead_seconds(
    load: ModelLoad, residency: Residency, speed: MachineSpeed, step: Step, device: str | None
) -> float:
    """Small operations, and at each cut: reading back, the experts' graphs, and activations over the link."""
    main = speed.devices[device] if device else speed.cpu
    seconds = main.overheads.graph_seconds + load.n_layer * _OPS_PER_LAYER * main.overheads.op_seconds
    if not residency.is_cut:
        return seconds
    visited = _visited(load, step)
    n_graphs = 1.0 if step.n_tokens == 1 else visited
    cut = main.overheads.graph_seconds + n_graphs * speed.cpu.overheads.graph_seconds
    cut += visited * _OPS_PER_CUT_EXPERT * speed.cpu.overheads.op_seconds
    if device:
        row_bytes = 4 * load.n_embd * step.n_tokens
        cut += row_bytes / speed.links[device].from_device
        cut += row_bytes * load.n_used * (1 - residency.device) / speed.links[device].to_device
    return seconds + load.n_routed * cut


def _visited(load: ModelLoad, step: Step) -> float:
    """Expected number of different experts of a layer in a step, for picks that are independent of each other."""
    if step.n_tokens == 1 or not load.n_expert:
        return load.n_used
    return load.n_expert * (1 - (1 - load.n_used / load.n_expert) ** step.n_tokens)


def _experts(load: ModelLoad, residency: Residency, speed: MachineSpeed, step: Step, device: str | None) -> _Experts:
    visited = _visited(load, step)
    n_pairs = step.n_tokens * load.n_used / visited if visited else 0.0
    on_cpu = _seconds(speed.cpu, load.host_expert, n_pairs)
    if not device:
        assert not residency.device, "experts on a device that is not used"
        return _Experts(visited * on_cpu, {CPU: visited * on_cpu})
    on_device = _seconds(speed.devices[device], load.device_expert, n_pairs)
    share = residency.device
    tiers = {device: visited * share * on_device, CPU: visited * (1 - share) * on_cpu}
    if step.n_tokens == 1:
        return _Experts(_slower_side(load.n_used, share, on_device, on_cpu), tiers)
    beside = _Experts(max(tiers.values()), tiers)
    copied = visited * (1 - share) * sum(load.device_expert.values()) / speed.links[device].to_device
    tiers = {device: visited * on_device, LINK: copied}
    return min(beside, _Experts(max(tiers.values()), tiers), key=lambda experts: experts.seconds)


def _slower_side(n_used: int, share: float, on_device: float, on_cpu: float) -> float:
    """Expected time of one token's experts when each pick is on the device with probability `share`."""
    return sum(
        math.comb(n_used, n) * share**n * (1 - share) ** (n_used - n) * max(n * on_device, (n_used - n) * on_cpu)
        for n in range(n_used + 1)
    )


def prefill_crossover(load: ModelLoad, speed: MachineSpeed, device: str) -> int | None:
    """From how many pairs per expert on it is faster to copy an expert to the device than to compute it on the CPU.

    While one is multiplied there the next is copied, so that the slower of both counts. None if it never is.
    """
    copying = sum(load.device_expert.values()) / speed.links[device].to_device
    for n_pairs in range(1, _MAX_PAIRS + 1):
        there = max(copying, _seconds(speed.devices[device], load.device_expert, n_pairs))
        if there < _seconds(speed.cpu, load.host_expert, n_pairs):
            return n_pairs
    return None


def expected_uses(priors: NDArray[np.float64] | None, n_layer: int, n_expert: int, n_used: int) -> NDArray[np.float64]:
    """Probabilities [n_layer, n_expert] that a token picks each expert; each row sums to `n_used`.

    `priors` are proportional to how often each is picked; a row of zeros, or None, means alike. Nothing is picked twice
    by a token, so that what would exceed 1 goes to the others of the layer.
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
    """Values proportional to `weights`, at most 1, that sum to `total`; when no weight is left, the others alike."""
    uses = np.zeros(len(weights))
    is_open = np.ones(len(weights), np.bool_)
    while is_open.any():
        left = total - np.count_nonzero(~is_open)
        share = weights[is_open]
        share = np.full(len(share), 1 / len(share)) if not share.sum() else share / share.sum()
        uses[is_open] = left * share
        over = is_open & (uses > 1)
        if not over.any():
            break
        uses[over] = 1.0
        is_open &= ~over
    return uses


def expected_hits(priors: NDArray[np.float64] | None, resident: NDArray[np.bool_], n_used: int) -> float:
    """Expected share of the picks that fall on resident experts, `resident` being a mask [n_layer, n_expert].

    For caches that follow the routing it is the least to expect: what was used lately is used again.
    """
    n_layer, n_expert = resident.shape
    if not n_layer or not n_used:
        return 1.0
    uses = expected_uses(priors, n_layer, n_expert, n_used)
    return float((uses * resident).sum() / (n_layer * n_used))
