"""This program's version, as it was installed."""

from importlib import metadata


def version() -> str:
    """Such as `0.1.0`; `unknown` in a source tree that was not installed."""
    try:
        return metadata.version("slimoe")
    except metadata.PackageNotFoundError:
        return "unknown"
