"""What to do about a model that does not fit: the least budgets that it can be opened with."""

from collections.abc import Callable, Sequence

from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.plan.engine_config import EngineConfig, changed
from slimoe.offload.resources.memory import human_up

_SMALLER = "lower --ctx or --batch, or use a smaller file"


def advised(
    config: EngineConfig,
    devices: Sequence[str],
    shortfall: DoesNotFitError,
    lack: Callable[[EngineConfig], DoesNotFitError | None],
) -> DoesNotFitError:
    """The error with the sizes for --ram and --vram to raise, or with other ways out where there is no more to give.

    `lack` plans with another config, and says what that lacks: only what was tried is advised. `devices` are the
    names of those that are used, in the order of --vram.
    """
    tried, missing = config, shortfall
    while True:
        tried = _with_more(tried, devices, missing)
        left = lack(tried)
        if left is None:
            return _hinted(shortfall, f"Raise {_raised(config, tried)}, {_SMALLER}.")
        if left.device == missing.device and left.available_bytes < missing.required_bytes:
            return _hinted(
                shortfall, f"There is no more to give now: free memory of {left.device or 'the host'}, {_SMALLER}."
            )
        missing = left


def _with_more(config: EngineConfig, devices: Sequence[str], missing: DoesNotFitError) -> EngineConfig:
    """The config with the size raised that is too small: one device's own where each has its own."""
    enough = human_up(missing.required_bytes)
    if not missing.device:
        return changed(config, {"ram": enough})
    if len(config.devices.vram) < 2:
        return changed(config, {"vram": (enough,)})
    sizes = zip(devices, config.devices.vram, strict=True)
    return changed(config, {"vram": tuple(enough if name == missing.device else size for name, size in sizes)})


def _raised(config: EngineConfig, tried: EngineConfig) -> str:
    sizes = {"--ram": tried.memory.ram if tried.memory.ram != config.memory.ram else None}
    sizes["--vram"] = ",".join(tried.devices.vram) if tried.devices.vram != config.devices.vram else None
    return " and ".join(f"{flag} to {size}" for flag, size in sizes.items() if size)


def _hinted(error: DoesNotFitError, hint: str) -> DoesNotFitError:
    return DoesNotFitError(
        error.problem,
        required_bytes=error.required_bytes,
        available_bytes=error.available_bytes,
        device=error.device,
        hint=f"{hint} {error.hint}".rstrip(),
    )
