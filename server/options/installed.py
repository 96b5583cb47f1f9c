"""What is installed: libraries that only some commands need, and versions."""

import importlib.util
from importlib import metadata
from pathlib import Path

from slimoe.offload.errors import UsageError

CONVERTERS = ("torch", "safetensors", "scipy")
"""Libraries that compressing needs and plain conversion does not."""


def check_installed(work: str, *modules: str, extra: str = "convert", source: Path | None = None) -> None:
    """Raises UsageError where one of `modules` is not installed; `work` names what needs it, such as `Compressing`.

    All of them come with an `extra` of this package. What is wrong with the model `source` is told before that, as
    `open_source` raises it: who installs torch for an empty directory has done so in vain.
    """
    missing = next((name for name in modules if importlib.util.find_spec(name) is None), None)
    if missing is None:
        return
    if source is not None:
        from slimoe.converter.source.open_source import open_source

        open_source(source)
    raise UsageError(f"{work} needs {missing}. Install it: scripts/install {extra}, or pip install 'slimoe[{extra}]'")


def version_of(package: str) -> str:
    """The version of an installed package; `unknown` for one that is not, such as a source tree in use."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
