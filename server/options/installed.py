"""Whether libraries are there that only some commands need."""

import importlib.util

from slimoe.offload.errors import UsageError

CONVERTERS = ("torch", "safetensors", "scipy")
"""What methods that choose by measurements stand on."""


def check_installed(work: str, *modules: str) -> None:
    """Raises UsageError where one of `modules` is absent; `work` is what needs it, the subject of the sentence."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"{work} needs {name}. Install it: pip install 'slimoe[convert]'")
