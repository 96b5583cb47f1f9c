"""Settings of our engine that a bench varies: changes of an EngineConfig, as data."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from slimoe.offload.errors import UsageError
from slimoe.offload.plan.engine_config import setting_names

Changes = Mapping[str, Any]
"""Names of settings and their values."""
_OWN = ("model", "n_ctx", "n_threads", "ram")  # every candidate's, or the bench's to set


def parse_changes(texts: Iterable[str]) -> dict[str, Any]:
    """Reads changes written as FIELD=VALUE, values as JSON where they are JSON. Raises UsageError."""
    changes = {}
    names = [name for name in setting_names() if name not in _OWN]
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or name not in names:
            raise UsageError(f"--engine takes FIELD=VALUE, not {text!r}. The fields are {' '.join(names)}.")
        try:
            changes[name] = json.loads(value)
        except ValueError:
            changes[name] = value
    return changes
