"""Where the kernel tells about itself and this process. Apart: whoever asks can be shown other files."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SystemFiles:
    """Directories of the kernel's own files: `proc`, and `cpus` with the topology of each processor."""

    proc: Path = Path("/proc")
    cpus: Path = Path("/sys/devices/system/cpu")


SYSTEM = SystemFiles()
