"""How fast a file comes from its disk: pieces at random places, read around the page cache into plain memory.

The yardstick for what is read while a model runs, so it owes nothing to the engine's own reader: threads that do
nothing but read, as many and with requests as large as bring the most. Run it under the limit that the candidates
have. The last line of stdout is one JSON document.

    python -m bench.disk_speed model.gguf --piece-mib 8
"""

import json
import mmap
import os
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from slimoe.offload.errors import ModelFileError, SlimoeError

THREADS = (1, 2, 4, 8)
REQUESTS = (1 << 21, 1 << 30)
"""Bytes asked for at once, at most: some disks like whole pieces, others parts of them."""
_ALIGNED = 4096
_LEAST_MEMORY = 4 << 20
"""Less than two huge pages would lie on small ones."""


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """The most bytes per second, with how many threads and how large requests, and whether reads were direct."""

    bytes_per_second: float
    n_threads: int
    is_direct: bool
    request_bytes: int = REQUESTS[-1]


def disk_speed(path: Path, piece_bytes: int, seconds: float) -> DiskSpeed:
    """The fastest of all numbers of threads and sizes of requests, each tried for `seconds` on pieces at random places.

    Raises ModelFileError for a file that cannot be read.
    """
    try:
        try:
            file, is_direct = os.open(path, os.O_RDONLY | os.O_DIRECT), True
        except OSError:  # some file systems know no direct reads
            file, is_direct = os.open(path, os.O_RDONLY), False
    except OSError as error:
        raise ModelFileError(path, f"the file cannot be opened ({error.strerror}).") from None
    try:
        size = os.fstat(file).st_size // _ALIGNED * _ALIGNED
        piece = min(piece_bytes // _ALIGNED * _ALIGNED, size)
        if not piece:
            raise ModelFileError(path, "the file is too small to time its disk.")
        requests = sorted({min(request, piece) for request in REQUESTS})
        speeds = {
            (n, request): _speed(file, size, (piece, request), n, seconds) for n in THREADS for request in requests
        }
    finally:
        os.close(file)
    best = max(speeds, key=lambda way: speeds[way])
    return DiskSpeed(speeds[best], best[0], is_direct, best[1])


def _speed(file: int, size: int, pieces: tuple[int, int], n_threads: int, seconds: float) -> float:
    """Bytes per second of so many threads, each with memory of its own that is touched before the clock starts.

    `pieces`: bytes that lie together, and bytes of one request.
    """
    piece, request = pieces
    n_bytes = max(piece, _LEAST_MEMORY)
    memories = [mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(n_threads)]
    for memory in memories:
        # In small pages a disk takes up to twice as long, and shared memory, mmap's default, gets no others.
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory[::_ALIGNED] = bytes(len(range(0, n_bytes, _ALIGNED)))
    read = [0] * n_threads
    begin = time.perf_counter()

    def work(index: int) -> None:
        rng = np.random.default_rng([index, n_threads])
        while time.perf_counter() - begin < seconds:
            offset = int(rng.integers(0, (size - piece) // _ALIGNED + 1)) * _ALIGNED
            for begin_at in range(0, piece, request):
                part = memoryview(memories[index])[begin_at : begin_at + request]
                read[index] += os.preadv(file, [part], offset + begin_at)
                part.release()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - begin
    for memory in memories:
        memory.close()
    return sum(read) / elapsed


@click.command()
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--piece-mib", default=8.0, show_default=True, help="Size of one read, as of a matrix of an expert.")
@click.option("--seconds", default=1.0, show_default=True, help="For each way of reading.")
@click.option("--smoke", is_flag=True, help="Moments only, on a small file of its own.")
def main(path: Path | None, piece_mib: float, seconds: float, smoke: bool) -> None:
    """Time the disk that PATH lies on."""
    try:
        if smoke:
            with tempfile.NamedTemporaryFile() as file:
                file.write(os.urandom(1 << 20))
                file.flush()
                speed = disk_speed(Path(file.name), 1 << 16, 0.02)
        elif path is None:
            raise click.UsageError("Name a file.")
        else:
            speed = disk_speed(path, int(piece_mib * (1 << 20)), seconds)
    except SlimoeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(asdict(speed)))


if __name__ == "__main__":
    main()
