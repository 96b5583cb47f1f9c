"""Says whether moving experts to a device pays, and which ones: pure arithmetic on measured seconds.

A token's layer is computed on two sides at once. The device multiplies with the experts in its slots, then takes
others over the link, and multiplies with these; the CPU multiplies with the rest meanwhile, and the slower side counts.
Both read the host's memory, so that each may be slower while the other is busy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from slimoe.offload.cache.policy import FUTURE_TOKENS

MARGIN = 1.3
"""How far what an expert is expected to gain must exceed what moving it costs."""

_HIDDEN_BY = 5
"""So many times as long as a layer's experts take on the host a copy may take that is to begin within the layer: of a
longer one the host's work hides next to nothing, and there is time to choose from all experts after the token."""

ExchangeMode = Literal["static", "swap", "upload"]


@dataclass(frozen=True, slots=True)
class UploadCosts:
    """Seconds that one expert takes for one token: on the host, on the device, and to be copied there.

    `host_beside` and `copy_beside` are what the host's product and the copy take while the other is under way.
    """

    host: float
    device: float
    copy: float
    host_beside: float
    copy_beside: float

    def as_ms(self) -> dict[str, float]:
        """Milliseconds of an expert by what it is done: `copy`, and `host` and `device` for a token."""
        return {"copy": 1e3 * self.copy, "host": 1e3 * self.host, "device": 1e3 * self.device}

    @property
    def gain(self) -> float:
        """What an expert's use costs less on the device."""
        return max(0.0, self.host - self.device)

    def layer_seconds(self, n_here: int, n_copied: int, n_host: int) -> float:
        """Seconds of a layer with `n_here` experts in slots, `n_copied` to be copied first and `n_host` on the host."""
        before, on_host = n_here * self.device, n_host * self.host
        copying, after = n_copied * self.copy, n_copied * self.device
        left = on_host - before
        if left <= 0 or not copying:
            return max(on_host, before + copying + after)
        slow_host, slow_copy = self.host_beside / self.host, self.copy_beside / self.copy
        both = min(left * slow_host, copying * slow_copy)
        return before + both + max(left - both / slow_host, copying - both / slow_copy + after)

    def best_copies(self, n_here: int, worths: Sequence[float], n_host: int = 0) -> int:
        """How many of a layer's missed experts to copy, so that the layer ends soonest, less what the copies are worth.

        `worths` are the seconds that each copy is expected to save later, the most useful expert first. `n_host`
        further experts are computed on the host in any case.
        """
        n_missed, best = len(worths), 0
        least, worth = self.layer_seconds(n_here, 0, n_missed + n_host), 0.0
        for n_copied in range(1, n_missed + 1):
            worth += worths[n_copied - 1]
            seconds = self.layer_seconds(n_here, n_copied, n_missed + n_host - n_copied) - worth
            if seconds < least:
                best, least = n_copied, seconds
        return best

    def worth(self, more_uses: float) -> float:
        """Seconds that an expert saves in another's place, if it is used `more_uses` times more often, by a margin.

        What is missing is done by the host and over the link side by side, so that one less saves neither's seconds in
        full.
        """
        host, copy = self.host_beside, self.copy_beside
        missed = host * copy / (host + copy) if copy else 0.0
        return max(0.0, (missed - self.device) * more_uses / MARGIN)


@dataclass(frozen=True, slots=True)
class ExchangeChoice:
    """What becomes of experts that a device lacks, and why, in words.

    `static`: the CPU computes them, and the device keeps those that it has. `swap`: so too, but between tokens an
    expert takes another's place when that pays. `upload`: a layer may also copy experts and compute them there at once.
    """

    mode: ExchangeMode
    reason: str


def choose_exchange(costs: UploadCosts, n_used: int) -> ExchangeChoice:
    """The choice for a model whose tokens select `n_used` experts of a layer."""
    upload = f"an upload takes {shown_ms(costs.copy)}"
    if not costs.gain:
        on_host, there = shown_ms(costs.host), shown_ms(costs.device)
        return ExchangeChoice("static", f"experts on the card stay: one takes {there} there, {on_host} on the CPU")
    saved = f"saves {shown_ms(costs.gain)} per use"
    if not costs.gain * FUTURE_TOKENS > MARGIN * costs.copy:
        return ExchangeChoice("static", f"experts on the card stay: {upload}, {saved}")
    if costs.copy < _HIDDEN_BY * n_used * costs.host:
        return ExchangeChoice("upload", f"experts go to the card when that is sooner or pays: {upload}, {saved}")
    return ExchangeChoice("swap", f"experts change places between tokens when that pays: {upload}, {saved}")


def shown_ms(seconds: float) -> str:
    """Milliseconds for a person, two digits of them."""
    return f"{1e3 * seconds:.2g} ms" if seconds < 0.0995 else f"{1e3 * seconds:.0f} ms"
