"""Engine configurations by the names of single settings, whichever group each stands in."""

from pathlib import Path
from typing import Any

from slimoe.offload.plan.engine_config import EngineConfig, changed


def engine_config(model: Path, **settings: Any) -> EngineConfig:
    """How to open a model, with these settings."""
    return changed(EngineConfig(model), settings)


def reconfigured(config: EngineConfig, **settings: Any) -> EngineConfig:
    """The same with other settings."""
    return changed(config, settings)
