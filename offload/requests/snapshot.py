"""What an open engine holds and does at one moment, as plain values that are sent from process to process.

docs/events.md explains every field: programs draw the map of experts from these.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

REMOVED, ON_DISK, IN_HOST, ON_DEVICE = "x.hd"
"""The marks of `LayerMap.tiers` for an expert: not in the file, on disk only, in host memory, on a device."""


@dataclass(frozen=True, slots=True)
class ExpertFormat:
    """The types of an expert's gate, up and down, and the bytes of all three."""

    types: str
    bytes: int


@dataclass(frozen=True, slots=True)
class LayerMap:
    """The experts of one layer, in the order of the router's rows.

    `tiers` has one mark for each. `formats` has for each the index in `ExpertMap.formats` of the copy that is held, or
    that would be read; -1 for an expert that the file lacks. `reading` lists those whose read is under way. `uses`
    counts how often the running or last answer selected each, `total_uses` since the model was opened; both are None
    where the routers are computed in a device's whole graph, which tells nobody.
    """

    layer: int
    tiers: str
    formats: tuple[int, ...]
    reading: tuple[int, ...] = ()
    uses: tuple[int, ...] | None = None
    total_uses: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """Layers with experts, and the formats that they have; no layers in a dense model."""

    formats: tuple[ExpertFormat, ...] = ()
    layers: tuple[LayerMap, ...] = ()


@dataclass(frozen=True, slots=True)
class MemoryPlace:
    """Bytes in one memory: the host's, whose name is `host`, or a device's.

    `setting` is what was asked for, such as 8GiB or auto; `budget` are the bytes that may be taken for it, of which
    other processes of the server may take `reserve`. `by_use` has what is held, by use.
    """

    name: str
    setting: str
    budget: int
    reserve: int
    by_use: dict[str, int]


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """The engine's memory, place by place, the host first; `resident` and `peak` are its process's own figures."""

    places: tuple[MemoryPlace, ...]
    resident: int
    peak: int


@dataclass(frozen=True, slots=True)
class Spent:
    """Where the time of `seconds` of steps went.

    `compute_seconds` in the CPU's graphs, `disk_seconds` waiting for reads, `device_seconds` waiting for devices and
    what is copied to and from them, the rest in neither. `n_prompt` and `n_predicted` tokens were computed. `hit_share`
    of the selected experts were in memory; None where all are, or none was selected.
    """

    seconds: float = 0.0
    compute_seconds: float = 0.0
    disk_seconds: float = 0.0
    device_seconds: float = 0.0
    other_seconds: float = 0.0
    n_prompt: int = 0
    n_predicted: int = 0
    hit_share: float | None = None


@dataclass(frozen=True, slots=True)
class Speed:
    """Answers' tokens per second: as the plan predicts, at most, and as the running or last answer was.

    `bound` names what sets the most: cpu, disk, link or a device. What is not known is None.
    """

    predicted: float | None = None
    most: float | None = None
    bound: str | None = None
    measured: float | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """What the engine is at: requests that it answers now, and the time of the `answer` that began last and of all."""

    n_running: int = 0
    answer: Spent = field(default_factory=Spent)
    total: Spent = field(default_factory=Spent)
    speed: Speed = field(default_factory=Speed)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The map of experts, memory, and work."""

    experts: ExpertMap
    memory: MemoryUse
    work: Work


class Rebudgeted(NamedTuple):
    """How new limits were taken: in how many seconds, with bytes loaded; `is_kept` says that the model stayed open."""

    seconds: float
    loaded_bytes: int
    is_kept: bool
