"""Seconds of experts on both sides of a link, and which of a batch's are worth being copied over it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertTimes:
    """Seconds that an expert takes for one token and for `n_many`; between and beyond them a straight line."""

    one: float
    many: float
    n_many: int

    def seconds(self, n_tokens: int) -> float:
        """Seconds that an expert takes for `n_tokens` tokens."""
        if self.n_many == 1:
            return self.one * n_tokens
        return max(0.0, self.one + (self.many - self.one) * (n_tokens - 1) / (self.n_many - 1))

    def at(self, one: float) -> "ExpertTimes":
        """The times of a side that takes so long for one token now, and for many as much longer or shorter."""
        return self if not self.one else ExpertTimes(one, self.many * one / self.one, self.n_many)


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
