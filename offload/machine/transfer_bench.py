"""Times how fast bytes come from the disk that a model lies on, and how fast they cross to a device and back."""

import mmap
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Protocol

import numpy as np
from gguf import GGMLQuantizationType as Type

from slimoe.offload.cache.disk_reader import DiskReader, Read, padded
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import Backend
from slimoe.offload.gguf.header import GGUFFile
from slimoe.offload.machine.kernel_bench import Clock, lower_quartile
from slimoe.offload.machine.speed import LinkSpeed
from slimoe.offload.model.tensors import Span
from slimoe.offload.resources.memory import advise_huge_pages

MAX_PIECE = 32 << 20
"""Reading more at once is no faster, on any disk."""
_ROUNDS, _ROUND_BYTES, _ROUND_SECONDS = 4, 128 << 20, 0.125
N_UNDER_WAY = 6
"""Matrices of two experts, one of which is read while the next waits."""
_LINK_ROUNDS = 6
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
"""Shared memory, mmap's default, gets no huge pages."""
_LEAST_MEMORY = 8 << 20
"""Less would lie on small pages for the most part."""


class Reader(Protocol):
    """The part of `DiskReader` that is timed."""

    def submit(self, parts: list[tuple[Span, int]], *, demanded: bool) -> Read:
        """Begins to read."""

    def wait(self, read: Read) -> None:
        """Returns when it is read."""


def disk_bytes_per_second(gguf: GGUFFile, matrix_bytes: int, direct: bool, clock: Clock = time.perf_counter) -> float:
    """Bytes per second when experts with matrices of that size are read as the engine reads them, two at a time.

    Takes half a second, or as long as 512 MB take, and memory for `N_UNDER_WAY` matrices of at most `MAX_PIECE` each.
    Raises ModelFileError and ReadFailedError.
    """
    with closing(DiskReader(gguf, direct=direct)) as reader:
        return read_speed(reader, random_pieces(gguf, matrix_bytes), clock)


def read_speed(reader: Reader, pieces: Iterator[Span], clock: Clock) -> float:
    """Bytes per second: the median of several rounds, since what disturbs a disk can also hasten it."""
    first = next(pieces)
    room = padded(first.n_bytes)
    # On huge pages, as the engine's slots: to small ones, which memory that was freed before has, a disk is slower.
    memory = np.frombuffer(mmap.mmap(-1, max(N_UNDER_WAY * room, _LEAST_MEMORY), flags=_FLAGS), np.uint8)
    base = int(memory.ctypes.data)
    advise_huge_pages(base, memory.nbytes)
    addresses = [base + index * room for index in range(N_UNDER_WAY)]
    speeds = [_read_round(reader, pieces, addresses, clock) for _ in range(_ROUNDS)]
    return float(np.median(speeds))


def _read_round(reader: Reader, pieces: Iterator[Span], addresses: list[int], clock: Clock) -> float:
    under_way: deque[tuple[Read, int, int]] = deque()
    free = list(addresses)
    n_begun = n_done = 0
    begin = clock()
    while True:
        while free and n_begun < _ROUND_BYTES and (not n_done or clock() - begin < _ROUND_SECONDS):
            piece = next(pieces)
            under_way.append((reader.submit([(piece, free[-1])], demanded=True), free.pop(), piece.n_bytes))
            n_begun += piece.n_bytes
        if not under_way:
            return n_done / max(clock() - begin, 1e-9)
        read, address, n_bytes = under_way.popleft()
        reader.wait(read)
        free.append(address)
        n_done += n_bytes


def random_pieces(gguf: GGUFFile, matrix_bytes: int) -> Iterator[Span]:
    """Stretches of the file as large as an expert's matrix, at random places, none of them in the page cache."""
    sizes = [path.stat().st_size for path in gguf.paths]
    shard = sizes.index(max(sizes))
    n_bytes = max(1, min(matrix_bytes, MAX_PIECE, sizes[shard]))
    # Not the same places each time: a disk, or what simulates it, may remember what it read last.
    places = random.Random()
    while True:
        piece = Span(shard, places.randint(0, sizes[shard] - n_bytes), n_bytes)
        if "posix_fadvise" in dir(os):
            # Where direct reads are not to be had, the page cache would be measured instead.
            file = os.open(gguf.paths[shard], os.O_RDONLY)
            try:
                os.posix_fadvise(file, piece.offset, piece.n_bytes, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)
        yield piece


def link_speed(backend: Backend, n_bytes: int, clock: Clock = time.perf_counter) -> LinkSpeed:
    """Bandwidths to a device's memory and back, for transfers of `n_bytes`, and the time of the smallest read.

    Takes `n_bytes` of memory on both sides.
    """
    ctx = ggml.ggml_init(ggml.InitParams(1 << 12, None, True))
    buffer = backend.allocate(n_bytes)
    tensor = ggml.ggml_new_tensor_1d(ctx, Type.I8, n_bytes)
    ggml_backend.ggml_backend_tensor_alloc(buffer, tensor, ggml_backend.ggml_backend_buffer_get_base(buffer))
    values, word = np.ones(n_bytes, np.uint8), np.empty(4, np.uint8)

    def there(n: int) -> float:
        begin = clock()
        backend.set(tensor, values[:n])
        backend.get(tensor, word)  # a device may take bytes in later than it says; a read waits for them
        return clock() - begin

    def back(n: int) -> float:
        begin = clock()
        backend.get(tensor, values[:n])
        return clock() - begin

    def speed(transfer: Callable[[int], float]) -> tuple[float, float]:
        transfer(n_bytes)
        whole, nothing = (lower_quartile([transfer(n) for _ in range(_LINK_ROUNDS)]) for n in (n_bytes, 4))
        return n_bytes / max(whole - nothing, 1e-9), nothing

    try:
        (to_device, _), (from_device, round_trip) = speed(there), speed(back)
        return LinkSpeed(to_device, from_device, round_trip)
    finally:
        ggml_backend.ggml_backend_buffer_free(buffer)
        ggml.ggml_free(ctx)
