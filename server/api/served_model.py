"""The one model that a server offers, as clients know it."""

import hashlib
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from slimoe.server.models.plans import PlannedModel

_SHARD_NUMBER = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """`id` is the name in every answer.

    Of a model in a folder the bytes of its files are known, and the plan that was made before anything was loaded.
    """

    id: str
    path: Path
    version: str
    created: int = field(default_factory=lambda: int(time.time()))
    n_bytes: int | None = None
    plan: PlannedModel | None = None

    @property
    def fingerprint(self) -> str:
        """Changes with the program and the model, as clients that compare runs expect."""
        digest = hashlib.sha256(f"{self.version} {self.path.name} {self.id}".encode()).hexdigest()
        return f"slimoe-{self.version}-{digest[:8]}"


def model_id(path: Path, alias: str | None) -> str:
    """The name to serve `path` under: the alias, or the file's name without its ending and shard number."""
    return alias or _SHARD_NUMBER.sub("", path.stem)
