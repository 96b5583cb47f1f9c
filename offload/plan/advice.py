"""The least budgets that a model which does not fit can be opened with. Apart: it plans by calling back only."""

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
    """The error with what to do: raise --ram or --vram to a size, or something else where there is no more to give.

    `lack` plans with another configuration and returns what that lacks: only what was tried is advised. `devices` are
    the names of those that are used, in the order of --vram.
    """
    tried, missing = config, shortfall
    while True:
        tried = _with_more(tried, devices, missing)
        left = lack(tried)
        if left is None:
            raised = [f"--ram to {tried.memory.ram}"] if tried.memory.ram != config.memory.ram else []
            raised += [f"--vram to {','.join(tried.devices.vram)}"] if tried.devices.vram != config.devices.vram else []
            return _hinted(shortfall, f"Raise {' and '.join(raised)}, {_SMALLER}.")
        if left.device == missing.device and left.available_bytes < missing.required_bytes:
            return _hinted(
                shortfall, f"There is no more to give now: free memory of {left.device or 'the host'}, {_SMALLER}."
            )
        missing = left


def _with_more(config: EngineConfig, devices: Sequence[str], missing: DoesNotFitError) -> EngineConfig:
    """The configuration with the size raised that is too small: one device's own where each has its own."""
    enough = human_up(missing.required_bytes)
    if not missing.device:
        return changed(config, {"ram": enough})
    if len(config.devices.vram) < 2:
        return changed(config, {"vram": (enough,)})
    sizes = zip(devices, config.devices.vram, strict=True)
    return changed(config, {"vram": tuple(enough if name == missing.device else size for name, size in sizes)})


def _hinted(error: DoesNotFitError, hint: str) -> DoesNotFitError:
    return DoesNotFitError(
        error.problem,
        required_bytes=error.required_bytes,
        available_bytes=error.available_bytes,
        device=error.device,
        hint=f"{hint} {error.hint}".rstrip(),
    )
