"""What is installed: libraries that only some commands need, and versions."""

import importlib.util
from importlib import metadata

from slimoe.offload.errors import UsageError

CONVERTERS = ("torch", "safetensors", "scipy")
"""Libraries that compressing needs and plain conversion does not."""


def check_installed(work: str, *modules: str, extra: str = "convert") -> None:
    """Raises UsageError where one of `modules` is not installed; `work` names what needs it, such as `Compressing`.

    All of them come with an `extra` of this package.
    """
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"{work} needs {name}. Install it: scripts/install {extra}, or pip install 'slimoe[{extra}]'"
            )


def version_of(package: str) -> str:
    """The version of an installed package; `unknown` for one that is not, such as a source tree in use."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
