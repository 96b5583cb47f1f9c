"""Where this program remembers what it has found out about the machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder that SLIMOE_CACHE names, or `slimoe` in the user's cache directory; it need not exist."""
    named = os.environ.get("SLIMOE_CACHE")
    if named:
        return Path(named)
    from platformdirs import user_cache_dir  # only where it is needed: every start of the program comes by here

    return Path(user_cache_dir("slimoe"))
