"""How to open a model, as a person or a program asks for it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to open a model; None means: decide for me.

    `n_ctx` are the tokens of each of `n_parallel` requests at once, `n_batch` those of a step; `kv_type` is f32, f16 or
    q8_0, `weights` a mode of `Placement` or auto. `ram` and `vram` (one for each device, or one for all) are sizes as
    `budget.parse_size` reads them; `device` is auto, none or names with commas between, `rpc` are endpoints HOST:PORT.
    `trace` is the file to record routing to, `policy` the name of a cache policy, `max_kl` the loss allowed in nats per
    token, `lossy` the name of a lossy mode and, after a colon, its value. `reserve_bytes` are what other processes
    of ours take at most and count inside `ram`; `held_bytes` of these they hold already.
    """

    model: Path
    n_ctx: int | None = None
    n_batch: int = 512
    n_parallel: int = 1
    n_threads: int | None = None
    kv_type: str = "f16"
    weights: str = "auto"
    ram: str | None = None
    vram: tuple[str, ...] = ()
    device: str = "auto"
    rpc: tuple[str, ...] = ()
    trace: Path | None = None
    policy: str = "heat"
    max_kl: float | None = None
    lossy: str | None = None
    direct_io: bool = True
    reserve_bytes: int = 0
    held_bytes: int = 0

    @property
    def is_budgeted(self) -> bool:
        """Whether the kernels must be those that every budget can have, so that all budgets give the same tokens."""
        return self.ram is not None or bool(self.vram)
