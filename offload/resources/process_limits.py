"""What a process may take that runs what strangers wrote: it limits itself, and the kernel sees to it."""

import os
import signal
import sys
from pathlib import Path

KEPT_VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_TIME", "TZ", "SYSTEMROOT")
"""What such a process knows of the environment of the one that started it."""


def kept_environment() -> dict[str, str]:
    """The variables that such a process is given."""
    return {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}


def limit_memory(n_bytes: int) -> None:
    """Lets this process map so many bytes more than it has now; systems that cannot are left without the limit."""
    if sys.platform != "linux":
        return
    import resource

    n_mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (n_mapped + n_bytes, n_mapped + n_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_stack(n_bytes: int) -> None:
    """Lets the main thread's stack grow to so many bytes."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_STACK, (n_bytes, resource.getrlimit(resource.RLIMIT_STACK)[1]))


def resident_bytes() -> int:
    """The memory that this process has in use, on systems that tell."""
    if sys.platform != "linux":
        return 0
    import resource

    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def limit_time(cpu_seconds: float) -> None:
    """Ends this process by SIGPROF once it has taken so much processor time more, in whatever C code; 0 for never."""
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
