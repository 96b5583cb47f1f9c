"""How long an expert takes, by the number of its picks: measured once, where it lies."""

import time
from collections.abc import Callable
from dataclasses import dataclass

_ROUNDS = 3
_MANY = 64


@dataclass(frozen=True, slots=True)
class ExpertTimes:
    """Seconds for one pick and for `n_many`; between and beyond them a straight line."""

    one: float
    many: float
    n_many: int

    def seconds(self, n_picks: int) -> float:
        """Of so many picks."""
        if self.n_many == 1:
            return self.one * n_picks
        return max(0.0, self.one + (self.many - self.one) * (n_picks - 1) / (self.n_many - 1))


def measure_times(run: Callable[[int], None], n_batch: int) -> ExpertTimes:
    """Times `run`, which computes an expert for a number of picks, at most `n_batch`: the fastest of several runs."""
    n_many = min(_MANY, n_batch)
    return ExpertTimes(_fastest(run, 1), _fastest(run, n_many), n_many)


def _fastest(run: Callable[[int], None], n_picks: int) -> float:
    taken = []
    for _ in range(_ROUNDS + 1):  # the first builds the graph
        begin = time.perf_counter()
        run(n_picks)
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

    The arguments are picks per expert of either side; the result are indices into the first. The largest are the first
    to be copied, since a copy costs the same for all.
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
