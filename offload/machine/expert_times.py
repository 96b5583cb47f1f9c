"""Seconds of experts on both sides of a link, and which of a batch's are worth being copied over it."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ExpertTimes:
    """Seconds that an expert takes for numbers of tokens, ascending from 1; between and beyond them straight lines.

    Up to some tokens an expert takes as long as reading it does, and beyond as long as its arithmetic.
    """

    n_tokens: tuple[int, ...]
    taken: tuple[float, ...]

    @property
    def one(self) -> float:
        """Seconds for one token."""
        return self.taken[0]

    def seconds(self, n_tokens: int) -> float:
        """Seconds that an expert takes for `n_tokens` tokens."""
        points, taken = self.n_tokens, self.taken
        if len(points) == 1:
            return taken[0] * n_tokens
        right = min(max(1, bisect_left(points, n_tokens)), len(points) - 1)
        slope = (taken[right] - taken[right - 1]) / (points[right] - points[right - 1])
        return max(0.0, taken[right] + slope * (n_tokens - points[right]))

    def at(self, one: float) -> "ExpertTimes":
        """The times of a side that takes so long for one token now, and for many as much longer or shorter."""
        return self if not self.one else replace(self, taken=tuple(each * one / self.one for each in self.taken))


@dataclass(frozen=True, slots=True)
class LinkTimes:
    """What streaming is decided by: experts on the host, on the device, and seconds to copy one there.

    `is_apart` says that the device computes while the next expert is copied.
    """

    host: ExpertTimes
    device: ExpertTimes
    copy_seconds: float
    is_apart: bool = False


def choose_streams(n_host: Sequence[int], n_device: Sequence[int], times: LinkTimes) -> list[int]:
    """Which of the host's experts a batch should copy to the device, so that both sides end soonest.

    `n_host` and `n_device` are the tokens of each expert on either side; the result are indices into `n_host`. The
    experts with most tokens are the first to be copied, since a copy costs the same for all.
    """
    on_host = sum(times.host.seconds(n) for n in n_host)
    copied, computed = 0.0, sum(times.device.seconds(n) for n in n_device)
    chosen = []
    for index in sorted(range(len(n_host)), key=lambda index: -n_host[index]):
        less = on_host - times.host.seconds(n_host[index])
        # An expert is computed when it is there and those before it are done; one queue does one thing after another.
        there = (copied if times.is_apart else computed) + times.copy_seconds
        more = max(there, computed) + times.device.seconds(n_host[index])
        if max(less, more) >= max(on_host, computed):
            break
        on_host, copied, computed = less, there, more
        chosen.append(index)
    return chosen
