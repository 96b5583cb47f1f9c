"""A device at work: memory on it, data to and from it, graphs run on it."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from slimoe.offload.errors import DeviceError, DeviceFullError
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import device as ggml_device
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import EngineAbortedError
from slimoe.offload.ggml.device_calls import AnsweredBy, answers_for, waiting_for
from slimoe.offload.ggml.devices import Device, free_now
from slimoe.offload.resources.memory import human

_MAX_MARKS = 32
"""So many marks of a queue may be waited for later; setting a further one waits until the first of them is reached."""


def waiting_for_tensor(tensor: int) -> AbstractContextManager[None]:
    """A context in which a thread waits for the device that has a tensor, if one has it."""
    return waiting_for(int(ggml_backend.ggml_backend_buffer_get_type(ggml.tensor_at(tensor).buffer) or 0))


class DeviceBackend:
    """One queue of work on a device. Everything given to it is carried out in the order it was given.

    A second one on the same device is a second queue that runs beside the first, as for uploads during a graph; only
    marks and `synchronize` put their work in order. An RPC server has one queue for all. `seconds` is the running total
    of time spent waiting for graphs.

    When an RPC server ends or its connection breaks, ggml ends this process (SIGABRT, from its own sending thread,
    with "Remote RPC server crashed or returned malformed response" on standard error). It does so in each call that
    waits for an answer, which are `get`, `allocate` and opening. A call that only sends, which are `set`, `compute`
    and freeing a buffer, may still succeed once after the other side has gone, and the process ends with the next.
    A server that fails at a graph ends itself. A connection that falls silent, as when the other machine loses power,
    is noticed by nobody: `get` waits for as long as the system's TCP does, and `device_calls` tells other threads for
    whom. No error can be raised for any of this, so an engine that uses such a device belongs in a process of its own
    that is started again; `abort` lets it say why.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.seconds = 0.0
        self._answer = AnsweredBy(f"{device.name} ({device.description})", is_lent=device.is_lent)
        with self._answer:
            handle = ggml_device.ggml_backend_dev_init(device.handle, None)
        if not handle:
            raise DeviceError(f"{device.name} ({device.description}) cannot be opened. Choose another with --device.")
        self._handle: int | None = handle
        self._marks: list[int] = []
        self._n_marks = 0
        self._buft = int(ggml_device.ggml_backend_dev_buffer_type(device.handle) or 0)
        answers_for(self._buft, self._answer)

    # --- memory --------------------------------------------------------------------------------------------

    @property
    def buft(self) -> int:
        """The ggml buffer type of the device's memory."""
        return self._buft

    @property
    def is_host(self) -> bool:
        """Whether its memory can be looked at."""
        return bool(ggml_device.ggml_backend_buft_is_host(self._buft))

    @property
    def alignment(self) -> int:
        """Bytes that the addresses of tensors are multiples of."""
        return int(ggml_device.ggml_backend_buft_get_alignment(self._buft))

    @property
    def max_buffer_bytes(self) -> int:
        """The largest single buffer."""
        return int(ggml_device.ggml_backend_buft_get_max_size(self._buft))

    def allocate(self, n_bytes: int) -> int:
        """A buffer on the device; raises DeviceFullError when it gives none.

        Leave its usage at any: an RPC device hashes what is written to a buffer of weights, and asks for it first.
        """
        buffer: int | None = None
        if n_bytes <= self.max_buffer_bytes:
            with self._answer:
                buffer = ggml_backend.ggml_backend_buft_alloc_buffer(self._buft, n_bytes)
        if buffer:
            return buffer
        name, most = self.device.name, self.max_buffer_bytes
        free = min(self.free_bytes(), most)
        reason = f"{human(free)} of it seem free" if n_bytes <= most else f"one piece there has at most {human(most)}"
        raise DeviceFullError(
            f"{name} gave no {human(n_bytes)} of memory, {reason}. Lower --vram, or end what else uses {name}.",
            required_bytes=n_bytes,
            available_bytes=free,
        )

    def free_bytes(self) -> int:
        """What the device has free now, of all programs' memory."""
        with self._answer:
            return free_now(self.device)

    # --- data ----------------------------------------------------------------------------------------------

    def set(self, tensor: int, values: NDArray[Any], offset: int = 0) -> None:
        """Copies a contiguous array into a tensor, `offset` in bytes; the array may change afterwards."""
        self.set_async(tensor, values, offset)
        with self._answer:
            ggml_device.ggml_backend_synchronize(self._handle)

    def set_async(self, tensor: int, values: NDArray[Any], offset: int = 0) -> None:
        """Begins to copy an array into a tensor; it must stay as it is until `synchronize`."""
        assert values.flags.c_contiguous
        data = values.ctypes.data
        with self._answer:
            ggml_device.ggml_backend_tensor_set_async(self._handle, tensor, data, offset, values.nbytes)

    def get(self, tensor: int, values: NDArray[Any], offset: int = 0) -> None:
        """Fills a contiguous array from a tensor, after all work given so far."""
        assert values.flags.c_contiguous
        begin = time.perf_counter()
        data = values.ctypes.data
        with self._answer:
            ggml_device.ggml_backend_tensor_get_async(self._handle, tensor, data, offset, values.nbytes)
        self._wait(begin)

    # --- graphs --------------------------------------------------------------------------------------------

    def supports(self, operation: int) -> bool:
        """Whether the device computes this tensor; an RPC device says so of everything."""
        return bool(ggml_device.ggml_backend_dev_supports_op(self.device.handle, operation))

    def check(self, graph: int) -> None:
        """Raises DeviceError if there is something in a graph that the device does not compute."""
        for index in range(ggml.ggml_graph_n_nodes(graph)):
            node = ggml.ggml_graph_node(graph, index)
            if not self.supports(node):
                source = ggml.tensor_at(node).src[0] or node
                what = f"{ggml.ggml_op_desc(node).decode()} of {GGMLQuantizationType(ggml.tensor_at(source).type).name}"
                raise DeviceError(
                    f"{self.device.name} ({self.device.description}) does not compute {what}. "
                    "Use --device none or another device, or a file of other types."
                )

    def compute(self, graph: int) -> None:
        """Runs a whole graph."""
        begin = time.perf_counter()
        self._begin(graph)
        self._wait(begin)

    def compute_async(self, graph: int) -> None:
        """Begins to run a graph, whose tensors must stay until `synchronize` or a `get`."""
        begin = time.perf_counter()
        self._begin(graph)
        self.seconds += time.perf_counter() - begin

    def compute_until(self, graph: int, is_cancelled: Callable[[], bool]) -> None:
        """Runs a graph; raises EngineAbortedError instead when `is_cancelled` says so before.

        A device cannot stop within a graph.
        """
        if is_cancelled():
            raise EngineAbortedError
        self.compute(graph)

    def synchronize(self) -> None:
        """Waits for all work given so far."""
        self._wait(time.perf_counter())

    def mark(self) -> int:
        """Marks the end of all work given so far, for another queue of the same device to `wait` for; 0 if it is done.

        A mark is good until so many further ones were set as a queue can have.
        """
        event = ggml_device.ggml_backend_event_new(self.device.handle) if len(self._marks) < _MAX_MARKS else None
        if event:
            self._marks.append(event)
        elif not self._marks:  # the device knows no events
            self.synchronize()
            return 0
        mark = self._marks[self._n_marks % len(self._marks)]
        self._n_marks += 1
        # Reached long ago, but only who has waited for it may set it again: some drivers would keep every one.
        with self._answer:
            ggml_device.ggml_backend_event_synchronize(mark)
        ggml_device.ggml_backend_event_record(mark, self._handle)
        return mark

    def wait(self, mark: int) -> None:
        """Lets what is given from now on begin after a mark of another queue of this device."""
        if mark:
            ggml_device.ggml_backend_event_wait(self._handle, mark)

    def reach(self, mark: int) -> None:
        """Waits here until a mark of this queue is reached."""
        if mark:
            with self._answer:
                ggml_device.ggml_backend_event_synchronize(mark)

    def _begin(self, graph: int) -> None:
        with self._answer:
            status = ggml_device.ggml_backend_graph_compute_async(self._handle, graph)
        if status != ggml_backend.STATUS_SUCCESS:
            raise DeviceError(
                f"{self.device.name} failed to compute (ggml status {status}). Lower --vram, or try --device none."
            )

    def _wait(self, begin: float) -> None:
        with self._answer:
            ggml_device.ggml_backend_synchronize(self._handle)
        self.seconds += time.perf_counter() - begin

    def close(self) -> None:
        """Ends the queue; buffers are to be freed before. The object is dead afterwards."""
        if self._handle:
            if self._marks:
                self.synchronize()
            for mark in self._marks:
                ggml_device.ggml_backend_event_free(mark)
            self._marks.clear()
            with self._answer:
                ggml_backend.ggml_backend_free(self._handle)
            self._handle = None
