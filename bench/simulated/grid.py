"""The grid of machines, models and budgets on which ways of using a device are compared, and what comes out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from bench.simulated.caches import ClassLru, Counts, Lru, most_used, placed, uploading
from bench.simulated.engine import played
from bench.simulated.foresight import foreseen
from bench.simulated.machine import Machine, layer_seconds
from bench.simulated.routing import Habits, Routed, routed
from slimoe.offload.machine.cost_model import expected_uses

GB = 1e9
STATIC, UNIFORM, LRU = "static, calibrated", "static, uniform", "full cache, LRU"
ENGINE, ENGINE_UNIFORM, ORACLE = "slimoe", "slimoe, uniform", "oracle"
CPU_SHARES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
"""Those that llama.cpp's own script tries."""


def shared(cpu_share: float) -> str:
    """The name of a cache whose CPU computes a share of the misses."""
    return f"cache, CPU share {cpu_share:g}" if cpu_share else "full cache, llama.cpp"


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a model: bytes of an expert and of all else in a layer in Q4_K, and of the output in Q6_K.

    `texts` are kinds of texts by name, made up by habits or recorded.
    """

    name: str
    n_layer: int
    n_expert: int
    n_used: int
    expert_bytes: float
    layer_bytes: float
    output_bytes: float
    texts: Mapping[str, Habits | Routed]

    def n_slots(self, vram: float) -> int:
        """The experts that a device has room for beside the rest, and beside 1.2 GB of KV cache, buffers and driver."""
        room = vram - self.n_layer * self.layer_bytes - self.output_bytes - 1.2e9
        return max(0, min(self.n_layer * self.n_expert, int(room / self.expert_bytes)))

    def routing(self, name: str, n_tokens: int, seed: int) -> Routed:
        """Tokens of the texts of this name: as many as there are where they were recorded."""
        texts = self.texts[name]
        if isinstance(texts, Routed):
            return texts
        return routed(self.n_layer, self.n_expert, self.n_used, texts, n_tokens, seed)


_Q4_K = 144 / 256
COARSE = {"even": Habits(0.3, 0.15, 0.1), "local": Habits(0.3, 0.45, 0.2)}
FINE = {"even": Habits(0.5, 0.5, 0.3), "local": Habits(0.5, 1.6, 0.3)}
MODELS = (
    Model("Mixtral 8x7B", 32, 8, 2, 3 * 4096 * 14336 * _Q4_K, 42e6 * _Q4_K, 108e6, COARSE),
    Model("Qwen3-30B-A3B", 48, 128, 8, 3 * 2048 * 768 * _Q4_K, 19e6 * _Q4_K, 255e6, FINE),
    Model("GLM-4.5-Air", 45, 128, 8, 3 * 4096 * 1408 * _Q4_K, 126e6 * _Q4_K, 510e6, FINE),
)
TINY = Model("tiny", 4, 16, 2, 300e6, 1e6, 4e6, FINE)
"""Of 64 large experts, of which 24 find room in 8 GiB."""
HOSTS = {"DDR4": (30 * GB, 38 * GB), "DDR5": (60 * GB, 72 * GB), "DDR5, few cores": (25 * GB, 72 * GB)}
"""Bytes per second of multiplying, and of the memory."""
LINKS = {"3.0 x4": 3.5 * GB, "4.0 x4": 7 * GB, "3.0 x16": 13 * GB, "4.0 x16": 26 * GB, "5.0 x16": 55 * GB}
DEVICES = {"8 GiB": (8 * 2**30, 200 * GB), "12 GiB": (12 * 2**30, 375 * GB), "24 GiB": (24 * 2**30, 700 * GB)}
"""Memory, and bytes per second of multiplying: some three quarters of a memory's 270, 500 and 930 GB/s."""


def as_large_as_mixtral(name: str, recorded: Routed) -> Model:
    """A model whose routing was recorded, and whose layers together have the bytes of Mixtral's."""
    mixtral, (n_layer, n_expert), n_used = MODELS[0], recorded.likings.shape, recorded.selected.shape[2]
    times = mixtral.n_layer / n_layer
    sizes = times * mixtral.n_expert / n_expert * mixtral.expert_bytes, times * mixtral.layer_bytes
    return Model(name, n_layer, n_expert, n_used, *sizes, mixtral.output_bytes, {"recorded": recorded})


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is played: tokens that only warm caches up, and tokens that count."""

    n_warm: int = 192
    n_counted: int = 256
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Cell:
    """A point of the grid, and milliseconds per token of each way; `choice` is what the engine decided, in words."""

    model: str
    habits: str
    device: str
    host: str
    link: str
    n_slots: int
    ms: Mapping[str, float]
    mode: str
    choice: str

    def best(self, *, calibrated: bool) -> str:
        """The best way that does not know the future; without calibration the static placement is uniform."""
        left_out = {ORACLE, ENGINE, ENGINE_UNIFORM} | (set() if calibrated else {STATIC})
        return min((name for name in self.ms if name not in left_out), key=lambda name: self.ms[name])

    def to_static(self, *, calibrated: bool) -> float:
        """The engine's time over that of experts that stay, with the same knowledge."""
        return self.ms[ENGINE] / self.ms[STATIC] if calibrated else self.ms[ENGINE_UNIFORM] / self.ms[UNIFORM]

    @property
    def to_oracle(self) -> float:
        """The engine's time over the oracle's, which is the least of all ways."""
        return self.ms[ENGINE] / self.ms[ORACLE]

    def of_best(self, *, calibrated: bool) -> float:
        """The best other way's time over the engine's: at least 1 where the engine is the best."""
        return self.ms[self.best(calibrated=calibrated)] / self.ms[ENGINE if calibrated else ENGINE_UNIFORM]


def step_ms(model: Model, machine: Machine, counts: Counts, scale: Scale) -> float:
    """Milliseconds of a token, on average over those that count."""
    n_used, n_bytes = model.n_used, model.expert_bytes
    table = np.zeros((n_used + 1, n_used + 1))
    for n_here, n_uploaded in np.ndindex(table.shape):
        if n_here + n_uploaded <= n_used:
            n_host = n_used - n_here - n_uploaded
            table[n_here, n_uploaded] = layer_seconds(machine, n_bytes, n_here, n_uploaded, n_host)
    segment = model.layer_bytes / machine.device_rate + machine.device_launch + machine.link_delay
    seconds = model.n_layer * segment + model.output_bytes / machine.device_rate
    seconds += table[counts.here, counts.uploaded].sum(axis=1) + counts.moved * machine.copy_seconds(n_bytes)
    return 1e3 * float(seconds[scale.n_warm :].mean())


@dataclass(frozen=True, slots=True)
class Part:
    """The cells of a model, a kind of texts and a device, on hosts and over links of these names."""

    model: Model
    habits: str
    device: str
    hosts: tuple[str, ...]
    links: tuple[str, ...]
    scale: Scale


def parts(
    models: Sequence[Model], devices: Sequence[str], hosts: Sequence[str], links: Sequence[str], scale: Scale
) -> list[Part]:
    """The parts of a grid in which a model does not fit on the device as a whole, but its dense part does."""
    return [
        Part(model, habits, device, tuple(hosts), tuple(links), scale)
        for model in models
        for habits in model.texts
        for device in devices
        if model.n_used * 2 <= model.n_slots(DEVICES[device][0]) < model.n_layer * model.n_expert
    ]


def cells(part: Part) -> list[Cell]:
    """Every cell of a part of the grid."""
    model, scale = part.model, part.scale
    sizes = model.n_layer, model.n_expert, model.n_used
    routing = model.routing(part.habits, scale.n_warm + scale.n_counted, scale.seed)
    selected, flat = routing.selected, np.full(routing.likings.shape, model.n_used / model.n_expert)
    uses = expected_uses(routing.likings, *sizes)
    vram, device_rate = DEVICES[part.device]
    n_slots = model.n_slots(vram)
    fixed = {
        STATIC: placed(selected, most_used(uses, n_slots)),
        UNIFORM: placed(selected, most_used(flat, n_slots)),
        LRU: uploading(selected, n_slots, Lru),
        **{shared(share): uploading(selected, n_slots, ClassLru, share) for share in CPU_SHARES},
    }
    found = []
    for host, link in product(part.hosts, part.links):
        machine = Machine(device_rate, *HOSTS[host], LINKS[link])
        room = n_slots, machine, model.expert_bytes
        engine = played(selected, model.n_expert, uses, *room)
        every = {
            **fixed,
            ENGINE: engine.counts,
            ENGINE_UNIFORM: played(selected, model.n_expert, None, *room).counts,
            ORACLE: foreseen(selected, uses, *room),
        }
        ms = {name: step_ms(model, machine, counts, scale) for name, counts in every.items()}
        ms[ORACLE] = min(ms.values())
        choice = engine.choice
        found.append(Cell(model.name, part.habits, part.device, host, link, n_slots, ms, choice.mode, choice.reason))
    return found
