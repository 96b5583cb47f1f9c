"""How this program starts further processes of itself."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_ROOT = str(Path(__file__).parent.parent)


def module_command(module: str) -> tuple[str, ...]:
    """Runs a module of this program; modules are not looked for in the working directory."""
    return sys.executable, "-P", "-m", module


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a process that finds its modules where this program lies."""
    path = os.pathsep.join(filter(None, (_ROOT, environment.get("PYTHONPATH"))))
    return {**environment, "PYTHONPATH": path}
