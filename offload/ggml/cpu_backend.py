"""The CPU as a ggml backend: its threads, its buffer types, and running a graph on it."""

import ctypes
import functools
import re
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from numpy.typing import NDArray

from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.printable import printable
from slimoe.offload.resources.memory import advise_huge_pages, out_of_memory
from slimoe.offload.resources.thread_room import require_threads

REPACK_BUFFER = "CPU_REPACK"


_LOG_WARN = 3
_BROKEN_CONNECTION = re.compile(rb"(send|recv) failed \(bytes_")
"""How ggml-rpc begins what it reports of a connection before it gives up, which `abort` says in a person's words."""


def _log(level: int, text: bytes, user_data: int | None) -> None:
    """Passes on ggml's warnings and errors; it reports every repacked tensor otherwise."""
    if _LOG_WARN <= level <= _LOG_WARN + 1 and not _BROKEN_CONNECTION.match(text):
        sys.stderr.write("\n".join(map(printable, text.decode("utf-8", "replace").split("\n"))))


_LOG = ggml.LOG_CALLBACK(_log)  # held for as long as ggml may call it
ggml.ggml_log_set(_LOG, None)


def allocate(buft: int | None, n_bytes: int) -> int:
    """A buffer of a buffer type, on huge pages if the system likes; raises DoesNotFitError when it gives no memory."""
    buffer: int | None = ggml_backend.ggml_backend_buft_alloc_buffer(buft, n_bytes)
    if not buffer:
        raise out_of_memory(n_bytes)
    advise_huge_pages(ggml_backend.ggml_backend_buffer_get_base(buffer), n_bytes)
    return buffer


class EngineAbortedError(Exception):
    """A graph was stopped between two operations because its caller asked for it."""


@functools.cache
def repack_buffer_type() -> int | None:
    """The buffer type that rearranges weights for this CPU's matrix-vector kernels, None if it has none.

    The AMX buffer type, which stands in the same list, is never returned: it crashes the process in builds whose
    compiler drops the tile configuration (llama.cpp issue 20824).
    """
    registry = ggml_backend.ggml_backend_cpu_reg()
    address = ggml_backend.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    get_extra = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
    types = get_extra(ggml_backend.ggml_backend_reg_dev_get(registry, 0))
    index = 0
    while types and types[index]:
        if ggml_backend.ggml_backend_buft_name(types[index]).decode() == REPACK_BUFFER:
            return int(types[index] or 0)
        index += 1
    return None


@functools.cache
def can_repack(kind: int, ne0: int, ne1: int) -> bool:
    """Whether the repack buffer type takes matrices of this type and shape (ne0 columns, ne1 rows)."""
    buft = repack_buffer_type()
    if buft is None or ne1 % 8:
        return False
    ctx = ggml.ggml_init(ggml.InitParams(1 << 12, None, True))
    tensor = ggml.ggml_new_tensor_2d(ctx, kind, ne0, 64 + ne1 % 64)
    buffer = allocate(buft, ggml_backend.ggml_backend_buft_get_alloc_size(buft, tensor) + 256)
    ggml_backend.ggml_backend_tensor_alloc(buffer, tensor, ggml_backend.ggml_backend_buffer_get_base(buffer))
    taken = bool(ggml.tensor_at(tensor).extra)
    ggml_backend.ggml_backend_buffer_free(buffer)
    ggml.ggml_free(ctx)
    return taken


class Backend(Protocol):
    """Whatever computes graphs: the CPU, or another device with memory of its own."""

    seconds: float

    @property
    def buft(self) -> int:
        """The ggml buffer type of its memory."""

    @property
    def is_host(self) -> bool:
        """Whether the host can read and write its memory at its addresses."""

    def allocate(self, n_bytes: int) -> int:
        """A buffer of `n_bytes` in its memory; raises DoesNotFitError when there is no room for it."""

    def set(self, tensor: int, values: NDArray[Any], offset: int = 0) -> None:
        """Copies an array into a tensor, `offset` in bytes."""

    def set_async(self, tensor: int, values: NDArray[Any], offset: int = 0) -> None:
        """Begins to copy an array into a tensor; it must stay as it is until `synchronize`."""

    def synchronize(self) -> None:
        """Waits until all work that was begun is done."""

    def get(self, tensor: int, values: NDArray[Any], offset: int = 0) -> None:
        """Fills an array from a tensor."""

    def check(self, graph: int) -> None:
        """Raises DeviceError if the backend cannot compute an operation of a graph."""

    def compute(self, graph: int) -> None:
        """Runs a whole graph."""

    def compute_until(self, graph: int, is_cancelled: Callable[[], bool]) -> None:
        """Runs a graph; raises EngineAbortedError, as early as it can, when `is_cancelled` says so."""


class CpuBackend:
    """Runs graphs on `n_threads` threads of its own pool; the calling thread is one of them.

    `seconds` is the running total of time spent inside graphs.
    """

    def __init__(self, n_threads: int) -> None:
        """Starts the threads; raises NoThreadsError where the system does not give so many."""
        require_threads(n_threads)
        self.n_threads = n_threads
        self.seconds = 0.0
        self._handle = ggml_backend.ggml_backend_cpu_init()
        params = ggml_backend.ThreadpoolParams()
        ggml_backend.ggml_threadpool_params_init(ctypes.addressof(params), n_threads)
        self._pool = ggml_backend.ggml_threadpool_new(ctypes.addressof(params))
        ggml_backend.ggml_backend_cpu_set_n_threads(self._handle, n_threads)
        ggml_backend.ggml_backend_cpu_set_threadpool(self._handle, self._pool)
        self._no_callback = ggml_backend.ABORT_CALLBACK(0)

    @property
    def buft(self) -> int:
        """Plain host memory."""
        return int(ggml_backend.ggml_backend_cpu_buffer_type() or 0)

    @property
    def is_host(self) -> bool:
        """True: the host can read and write its memory at its addresses."""
        return True

    def allocate(self, n_bytes: int) -> int:
        """A buffer of plain memory; raises DoesNotFitError."""
        return allocate(self.buft, n_bytes)

    def set(self, tensor: int, values: NDArray[Any], offset: int = 0) -> None:
        """Copies an array into a tensor, `offset` in bytes."""
        ctypes.memmove(ggml.ggml_get_data(tensor) + offset, values.ctypes.data, values.nbytes)

    def set_async(self, tensor: int, values: NDArray[Any], offset: int = 0) -> None:
        """Copies an array into a tensor, at once."""
        self.set(tensor, values, offset)

    def synchronize(self) -> None:
        """Returns at once: all work of the CPU is done when its call returns."""

    def get(self, tensor: int, values: NDArray[Any], offset: int = 0) -> None:
        """Fills an array from a tensor."""
        ctypes.memmove(values.ctypes.data, ggml.ggml_get_data(tensor) + offset, values.nbytes)

    def check(self, graph: int) -> None:
        """Accepts every graph: the CPU computes all operations."""

    def compute(self, graph: int) -> None:
        """Runs a whole graph."""
        begin = time.perf_counter()
        status = ggml_backend.ggml_backend_graph_compute(self._handle, graph)
        self.seconds += time.perf_counter() - begin
        if status == ggml_backend.STATUS_ABORTED:
            raise EngineAbortedError
        assert status == ggml_backend.STATUS_SUCCESS, f"ggml status {status}"

    def compute_until(self, graph: int, is_cancelled: Callable[[], bool]) -> None:
        """Runs a graph and asks `is_cancelled` between operations; raises EngineAbortedError when it says so."""
        callback = ggml_backend.ABORT_CALLBACK(lambda _: is_cancelled())
        ggml_backend.ggml_backend_cpu_set_abort_callback(self._handle, callback, None)
        try:
            self.compute(graph)
        finally:
            ggml_backend.ggml_backend_cpu_set_abort_callback(self._handle, self._no_callback, None)

    def close(self) -> None:
        """Ends the threads; the object is dead afterwards."""
        if self._handle:
            ggml_backend.ggml_backend_free(self._handle)
            ggml_backend.ggml_threadpool_free(self._pool)
            self._handle = None
