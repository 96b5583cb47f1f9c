"""Engine configurations by the names of single settings, and the machines that plans are made for."""

from pathlib import Path
from typing import Any

from slimoe.offload.plan.engine_config import EngineConfig, changed
from slimoe.offload.plan.machine import Machine
from slimoe.offload.resources.memory import HostMemory


def roomy_machine(held: int = 1 << 20) -> Machine:
    """One that never lacks memory, for a process that holds as much as is said: every plan for it is the same."""
    return Machine(HostMemory(1 << 40, 1 << 40, 1 << 40), (), 1, held)


def engine_config(model: Path, **settings: Any) -> EngineConfig:
    """How to open a model, with these settings."""
    return changed(EngineConfig(model), settings)


def reconfigured(config: EngineConfig, **settings: Any) -> EngineConfig:
    """The same with other settings."""
    return changed(config, settings)
