"""How to open a model, as a person or a program asks for it: one configuration, from the command line to the engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

WEIGHT_MODES = ("auto", "mapped", "copied", "repacked", "both")
"""The values of `MemoryConfig.weights`, see `slimoe.offload.plan.weight_forms.WeightForms`."""


@dataclass(frozen=True, slots=True)
class ContextConfig:
    """How many tokens the KV cache holds and a step reads.

    Each of `n_parallel` requests at once has `n_ctx` tokens, None for the model's own number within reason; a step has
    `n_batch`. `kv_type` is f32, f16, q8_0 or q4_0. With `has_all_logits` those of all of a prompt's tokens are read,
    as an evaluation does, and not the last one's.
    """

    n_ctx: int | None = None
    n_batch: int = 512
    n_parallel: int = 1
    kv_type: str = "f16"
    has_all_logits: bool = False


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """Host memory: how much, in which form the weights lie there, and which experts stay.

    `ram` is a size as `budget.parse_size` reads it, None for what is free; `weights` is one of `WEIGHT_MODES`, `policy`
    the name of a cache policy; `direct_io` reads experts past the system's page cache. Other processes of ours take at
    most `reserve_bytes`, which count inside `ram`, and hold `held_bytes` of these already.
    """

    ram: str | None = None
    weights: str = "auto"
    policy: str = "lfu-decay"
    direct_io: bool = True
    reserve_bytes: int = 0
    held_bytes: int = 0


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """Devices besides the CPU: `device` is auto, none or names with commas between.

    `vram` has one size for each device or one for all; `rpc` has endpoints HOST:PORT of machines that lend theirs.
    """

    device: str = "auto"
    vram: tuple[str, ...] = ()
    rpc: tuple[str, ...] = ()

    @property
    def is_automatic(self) -> bool:
        """Whether a device that cannot be used is left out; one that was named, or given a limit, is an error."""
        return self.device == "auto" and not self.vram


@dataclass(frozen=True, slots=True)
class LossConfig:
    """How much exactness may be given up for speed: none by default.

    `lossy` is the name of a lossy mode and, after a colon, its value; `max_kl` is the KL divergence allowed, in nats
    per token.
    """

    lossy: str | None = None
    max_kl: float | None = None


@dataclass(frozen=True, slots=True)
class PromptConfig:
    """The folder in which keys and values of prompts are kept, None for none, and how many bytes of them at most."""

    prompt_cache: Path | None = None
    prompt_cache_size: int = 4 << 30


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to open a model; None means that the engine decides. `trace` is the file to record routing to.

    `draft` is one of `slimoe.offload.requests.drafting.DRAFT_MODES`: which tokens of answers are guessed beforehand.
    """

    model: Path
    n_threads: int | None = None
    trace: Path | None = None
    draft: str = "none"
    context: ContextConfig = field(default_factory=ContextConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    devices: DeviceConfig = field(default_factory=DeviceConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)

    @property
    def is_budgeted(self) -> bool:
        """Whether the kernels must be those that every budget can have, so that all budgets give the same tokens."""
        return self.memory.ram is not None or bool(self.devices.vram)


_GROUPS = {
    "context": ContextConfig,
    "memory": MemoryConfig,
    "devices": DeviceConfig,
    "loss": LossConfig,
    "prompts": PromptConfig,
}


def setting_names() -> list[str]:
    """The names of all settings, also of those in groups: each name stands in one group only."""
    own = [item.name for item in fields(EngineConfig) if item.name not in _GROUPS]
    return own + [item.name for group in _GROUPS.values() for item in fields(group)]


def changed(config: EngineConfig, settings: Mapping[str, Any]) -> EngineConfig:
    """The configuration with some settings changed, each by its own name, whichever group it stands in."""
    left = dict(settings)
    for name, group in _GROUPS.items():
        inside = {item.name: left.pop(item.name) for item in fields(group) if item.name in left}
        if inside:
            left[name] = replace(getattr(config, name), **inside)
    return replace(config, **left)
