"""How this program starts further processes of itself."""

import sys


def module_command(module: str) -> tuple[str, ...]:
    """Runs a module of this program; modules are not looked for in the working directory."""
    return sys.executable, "-P", "-m", module
