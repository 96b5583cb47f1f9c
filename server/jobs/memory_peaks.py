"""The most memory that this program's processes took while something ran. Apart: it knows no evaluation."""

from collections import Counter
from collections.abc import Mapping

import psutil


class MemoryPeaks:
    """Peaks of resident bytes by process, sampled; `names` says what processes are, by their ids.

    A process that is not named is counted with the nearest one above it that is.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = names
        self._processes: dict[str, int] = {}
        self._together = 0

    def sample(self) -> None:
        """Looks at all processes once."""
        found: Counter[str] = Counter()
        private = shared = 0
        own = psutil.Process()
        for process in [own, *own.children(recursive=True)]:
            try:
                family = (process.pid, *(parent.pid for parent in process.parents()))
                name = next(self._names[pid] for pid in family if pid in self._names)
                memory = process.memory_info()
            except psutil.Error:  # it has ended meanwhile
                continue
            found[name] += memory.rss
            # Linux tells how much of it others may hold as well: libraries, and files that are mapped.
            other = getattr(memory, "shared", 0)
            private, shared = private + memory.rss - other, max(shared, other)
        for name, n_bytes in found.items():
            self._processes[name] = max(n_bytes, self._processes.get(name, 0))
        self._together = max(self._together, private + shared)

    def as_json(self) -> dict[str, int]:
        """Peaks of each, and of all at one time, in which what they share is counted once."""
        return {**self._processes, "all_together": self._together}
