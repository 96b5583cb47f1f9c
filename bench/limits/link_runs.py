"""Engines whose device lies behind a network: their speed beside what is predicted, and while the network changes.

Where it changes two engines take turns, some tokens each: one as it is, and one whose experts stay where they are.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from rich.table import Table

from bench.baselines.shaped_link import Link, measured_link
from slimoe.offload.engine import Engine
from slimoe.offload.experts.device_experts import DeviceExperts

BLOCK = 16
"""Tokens of one engine before it is the other's turn."""
N_SOON = 64
"""Tokens after a change in which it may be noticed."""


@dataclass(frozen=True, slots=True)
class LinkRun:
    """Milliseconds per token of a plan, measured and as predicted for it: of answers and of a prompt's batch.

    `room` is what the device holds of the model: none, half of the experts or all; without a link "half on disk" says
    that host memory holds the other half.
    """

    link: str
    room: str
    decode_ms: float
    predicted_decode_ms: float
    prefill_ms: float
    predicted_prefill_ms: float

    @property
    def errors(self) -> tuple[float, float]:
        """What the predictions of both phases are off by, relative to what was measured."""
        return self.predicted_decode_ms / self.decode_ms - 1, self.predicted_prefill_ms / self.prefill_ms - 1


def link_table(runs: Sequence[LinkRun]) -> Table:
    """The figures for a person."""
    drawn = Table("link", "on the device", "answer ms", "predicted", "off by", "prompt ms", "predicted", "off by")
    for run in runs:
        decode, prefill = (f"{error:+.0%}" for error in run.errors)
        cells = f"{run.decode_ms:.2f}", f"{run.predicted_decode_ms:.2f}", decode
        drawn.add_row(run.link, run.room, *cells, f"{run.prefill_ms:.3f}", f"{run.predicted_prefill_ms:.3f}", prefill)
    return drawn


def links_as_json(runs: Sequence[LinkRun], links: Sequence[Link], n_bytes: int) -> dict[str, Any]:
    """All figures, and each link as a byte and `n_bytes` find it."""
    found = {str(link): measured_link(link, n_bytes) for link in links}
    return {
        "largest_error": max(abs(error) for run in runs for error in run.errors),
        "links": {
            name: {"gbit": 8e-9 * one.bytes_per_second, "one_way_ms": 1e3 * one.seconds} for name, one in found.items()
        },
        "runs": [asdict(run) for run in runs],
    }


# --- a network that changes ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Stretch:
    """Seconds of tokens over a `link` that has just changed (`is_soon`) or not: of the engine and of one that is still.

    `n_uploads` experts were copied for a layer, `n_swaps` have changed places; `mode` is the engine's at the end, and
    `since` what it says of the token at which it was chosen.
    """

    link: str
    is_soon: bool
    seconds: list[float] = field(default_factory=list)
    still_seconds: list[float] = field(default_factory=list)
    n_uploads: int = 0
    n_swaps: int = 0
    mode: str = ""
    since: int = 0

    @property
    def ratio(self) -> float:
        """The engine's time over the other's, all tokens together."""
        return sum(self.seconds) / sum(self.still_seconds)

    def as_json(self) -> dict[str, Any]:
        """Medians in milliseconds, and what was moved."""
        figures = asdict(self) | {"seconds": None, "still_seconds": None, "n_tokens": len(self.seconds)}
        medians = {"ms": 1e3 * median(self.seconds), "still_ms": 1e3 * median(self.still_seconds), "ratio": self.ratio}
        return {name: value for name, value in figures.items() if value is not None} | medians


def keep_still(engine: Engine) -> None:
    """Lets the experts on an engine's devices stay there, and no other go there."""
    for device in engine.device_experts:
        device.swaps = device.uploads = device.times = device.watch = None


def over_changes(
    engines: tuple[Engine, Engine], tokens: Sequence[int], links: Sequence[Link], change: Callable[[Link], None]
) -> list[Stretch]:
    """Reads the tokens one by one, as many over each link, `change` making it so; the second engine is to be still."""
    moving, still = engines
    (device,) = moving.device_experts
    stretches = list[Stretch]()
    n_each = len(tokens) // len(links) // BLOCK * BLOCK
    for number, link in enumerate(links):
        if number:
            change(link)
        for begin in range(0, n_each, BLOCK):
            if begin in (0, N_SOON):
                stretches.append(Stretch(str(link), begin == 0))
            block = tokens[number * n_each + begin : number * n_each + begin + BLOCK]
            moved = device.n_streamed, device.n_swaps
            stretch = stretches[-1]
            # Who comes first finds another memory's caches than who comes second.
            turns = [(moving, stretch.seconds), (still, stretch.still_seconds)]
            for engine, seconds in turns if begin // BLOCK % 2 == 0 else reversed(turns):
                seconds += _timed(engine, block)
            stretch.n_uploads += device.n_streamed - moved[0]
            stretch.n_swaps += device.n_swaps - moved[1]
            stretch.mode, stretch.since = _mode(device)
    return stretches


def _mode(device: DeviceExperts) -> tuple[str, int]:
    assert device.watch is not None
    return device.watch.watchdog.choice.mode, device.watch.watchdog.since


def _timed(engine: Engine, tokens: Sequence[int]) -> list[float]:
    seconds = []
    for token in tokens:
        begin = time.perf_counter()
        engine.decode(token)
        seconds.append(time.perf_counter() - begin)
    return seconds


def stretch_table(stretches: Sequence[Stretch]) -> Table:
    """The figures for a person."""
    drawn = Table("link", "tokens", "ms", "experts stay, ms", "over that", "uploads", "swaps", "mode", "since")
    for one in stretches:
        when = f"first {len(one.seconds)}" if one.is_soon else f"next {len(one.seconds)}"
        medians = (f"{1e3 * median(found):.2f}" for found in (one.seconds, one.still_seconds))
        counts = str(one.n_uploads), str(one.n_swaps), one.mode, str(one.since)
        drawn.add_row(one.link, when, *medians, f"{one.ratio:.2f}", *counts)
    return drawn
