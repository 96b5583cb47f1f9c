"""Copies from host memory to a device's, in a queue beside its graphs, through pinned memory where the device has it.

A card's driver copies by itself, and while it computes, from pinned memory only: pages that the system may not move.
Of that there is little, so that what is copied passes through it piece by piece, and one piece is filled while others
are on their way.
"""

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Lock

import numpy as np

from slimoe.offload.cache.host_slots import matrix_bytes
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import device as ggml_device
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.device_backend import DeviceBackend
from slimoe.offload.ggml.devices import Device
from slimoe.offload.model.experts import SlotClass
from slimoe.offload.resources.memory import human

_N_PIECES, _MOST_PIECE_BYTES = 8, 4 << 20
_STEP_BYTES = 256 << 10
"""What is copied at once for something that gives way, where there is no pinned memory: networks are slow."""


def pinned_bytes(device: Device, classes: Iterable[SlotClass]) -> int:
    """Pinned memory for uploads of experts of these classes: none where the device has no use for it."""
    if not device.pins_host_memory:
        return 0
    largest = max((matrix_bytes(kind, ne) for slot_class in classes for kind, ne in slot_class), default=0)
    return _N_PIECES * min(_MOST_PIECE_BYTES, -(-largest // 256) * 256)


class Uploads:
    """A queue of copies to one device, for several threads, with `n_bytes` of pinned memory.

    What is begun is done in that order. `is_apart` says that copies go on while the device computes. Where pinned
    memory is refused, `note` says so, and copies take longer.
    """

    def __init__(self, device: Device, n_bytes: int) -> None:
        self.is_apart, self.note = device.pins_host_memory, ""
        self._queue = DeviceBackend(device)
        self._lock, self._is_idle = Lock(), Event()
        self._is_idle.set()
        self._buffer = self._pinned(device, n_bytes) if n_bytes else 0
        self.n_bytes = n_bytes if self._buffer else 0
        self._piece_bytes = self.n_bytes // _N_PIECES
        base = ggml_backend.ggml_backend_buffer_get_base(self._buffer) if self._buffer else 0
        self._addresses = [base + index * self._piece_bytes for index in range(_N_PIECES)]
        self._marks = [0] * _N_PIECES
        self._next = 0

    def _pinned(self, device: Device, n_bytes: int) -> int:
        buft = ggml_device.ggml_backend_dev_host_buffer_type(device.handle)
        buffer = ggml_backend.ggml_backend_buft_alloc_buffer(buft, n_bytes) if buft else None
        if buffer and ggml_backend.ggml_backend_buffer_get_type(buffer) == buft:
            # Touched now, so that whoever looks at this process's memory finds it.
            ctypes.memset(ggml_backend.ggml_backend_buffer_get_base(buffer), 0, n_bytes)
            return int(buffer)
        if buffer:  # drivers that are refused it give plain memory instead
            ggml_backend.ggml_backend_buffer_free(buffer)
        self.note = (
            f"The system gave {device.name} no {human(n_bytes)} of pinned memory: experts are copied there without it, "
            "which takes longer. `ulimit -l` may be what limits it."
        )
        return 0

    def copy(self, tensor: int, address: int, n_bytes: int, offset: int) -> None:
        """Begins to copy host memory into a tensor from byte `offset` on; the memory may change afterwards."""
        if not self.n_bytes:
            with self._lock:
                self._send(tensor, address, n_bytes, offset)
                self._queue.synchronize()
            return
        for begin in range(0, n_bytes, self._piece_bytes):
            with self._lock:
                self._send_piece(tensor, address + begin, min(self._piece_bytes, n_bytes - begin), offset + begin)

    def copy_behind(self, tensor: int, address: int, n_bytes: int, offset: int) -> None:
        """Copies host memory into a tensor, and lets everything that is demanded go first, after a piece at most."""
        step = self._piece_bytes or _STEP_BYTES
        for begin in range(0, n_bytes, step):
            self._is_idle.wait()
            part = tensor, address + begin, min(step, n_bytes - begin), offset + begin
            if not self.n_bytes:
                with self._lock:
                    self._send(*part)
                    self._queue.synchronize()
                continue
            with self._lock:
                mark = self._send_piece(*part)
            self._queue.reach(mark)

    @contextmanager
    def demanded(self) -> Iterator[None]:
        """What is copied meanwhile is waited for: others give way."""
        self._is_idle.clear()
        try:
            yield
        finally:
            self._is_idle.set()

    def mark(self) -> int:
        """Marks the end of what was begun so far, for the device's graphs to wait for."""
        with self._lock:
            return self._queue.mark()

    def wait(self, mark: int) -> None:
        """Lets what is copied from now on begin after a mark of the device's graphs."""
        with self._lock:
            self._queue.wait(mark)

    def settle(self) -> None:
        """Waits for everything that was begun."""
        with self._lock:
            self._queue.synchronize()

    def _send(self, tensor: int, address: int, n_bytes: int, offset: int) -> None:
        self._queue.set_async(tensor, ggml.array_at(address, np.uint8, n_bytes), offset)

    def _send_piece(self, tensor: int, address: int, n_bytes: int, offset: int) -> int:
        """Sends what fits into a piece of pinned memory, when what was there before has been sent; its mark."""
        piece, self._next = self._next, (self._next + 1) % _N_PIECES
        self._queue.reach(self._marks[piece])
        ctypes.memmove(self._addresses[piece], address, n_bytes)
        self._send(tensor, self._addresses[piece], n_bytes, offset)
        self._marks[piece] = self._queue.mark()
        return self._marks[piece]

    def close(self) -> None:
        """Waits for what is under way, and frees the memory."""
        self._queue.synchronize()
        if self._buffer:
            ggml_backend.ggml_backend_buffer_free(self._buffer)
            self._buffer = self.n_bytes = 0
        self._queue.close()
