"""Tries a library that this machine does not know yet in a process of its own, and remembers what has passed.

Another version's functions may take other arguments and return larger structures: calling them can end a process, or
spoil its memory without a word. So `self_test` runs where nothing is lost, once for each library and processor.
"""

import contextlib
import re
import signal
import subprocess
import sys
import zlib

from slimoe.offload.files.cache_folder import cache_folder
from slimoe.offload.ggml.packages import PARTS, Library

_FORMAT = 1
"""Raise it when `self_test` asks for more than before."""
_SECONDS = 120.0
"""More than any machine takes: the test is done in a fraction of a second."""


def problem(library: Library) -> str | None:
    """Why a library cannot be used, a sentence without its stop; None where it can be. Raises nothing.

    What has passed once is not tried again until one of its files changes or the processor is another. Where no
    process can be started the library counts as good.
    """
    missing = next((path for part in PARTS if not (path := library.path(part)).is_file()), None)
    if missing is not None:
        return f"{library} lacks {missing}"
    passed = cache_folder() / "libraries" / _key(library)
    if passed.exists():
        return None
    why = _tried(library)
    if why is None:
        # What cannot be remembered is tried again at the next start, and nothing else.
        with contextlib.suppress(OSError):
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()
    return why


def _key(library: Library) -> str:
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in library.files]
    processor = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        processor = next((line for line in file if line.startswith(("flags", "Features"))), "")
    return f"{zlib.crc32(repr((_FORMAT, str(library.folder), stats, processor)).encode()):08x}"


def _tried(library: Library) -> str | None:
    command = (sys.executable, "-P", "-m", "slimoe.offload.ggml.self_test", library.package.name, str(library.folder))
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"{library} did not end its test within {_SECONDS:.0f} seconds"
    except OSError:
        return None
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"{library} ended its test by {name}" + (", built for another processor" if name == "SIGILL" else "")
    said = (done.stdout or done.stderr).strip().rpartition("\n")[2]
    openmp = re.search(r"libgomp\.so\.\d+(?=: cannot open)", said)
    if openmp:
        return f"{library} needs {openmp[0]}, which on Debian and Ubuntu comes with: apt install libgomp1"
    return said or f"{library} ended its test with status {done.returncode}"
