"""Tries a device: opens it, copies to it, and runs each kind of kernel that models use; tells what that takes.

Run as `python -m slimoe.offload.machine.driver_trial NAME` by `driver_memory`, in a process of its own: what its driver
and the compiler for its kernels take of the host's memory can be told there from all else, and a driver that crashes
ends nobody else. Each line of stdout has the bytes until then as a `DriverMemory` in JSON, the last one all of them.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
from gguf import GGMLQuantizationType as Type

from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.device_backend import DeviceBackend
from slimoe.offload.ggml.devices import Device, DriverMemory, choose_devices
from slimoe.offload.resources.memory import give_back_freed, peak_resident_bytes, resident_bytes

TYPES = (Type.F16, Type.Q8_0, Type.Q4_K, Type.Q6_K)
"""Types of the matrices: each has kernels of its own, and models have some of them."""
_BATCHES = (32, 1)
_PIECE = 16 << 20
"""As large as the pieces in which weights go to a device."""
_MOST_SECONDS = 60.0
"""The processor's. A card needs few; a software device compiles single kernels for a minute, the largest come first."""
_N_EMBD, _N_HEAD, _N_EXPERT, _N_CELLS = 256, 4, 8, 256
Kernel = Callable[[int], int]
"""Adds one operation to a ggml context."""


def measure(device: Device, tell: Callable[[DriverMemory], None] = lambda taken: None) -> DriverMemory:
    """What the driver of a device that is not open yet takes in this process; `tell` hears each second what is known.

    Raises DeviceError and DoesNotFitError.
    """
    before, begin = resident_bytes(), time.process_time()
    with contextlib.suppress(OSError):  # forgets what was held at most until now
        Path("/proc/self/clear_refs").write_text("5")
    piece, is_over = np.ones(_PIECE, np.uint8), threading.Event()
    with closing(DeviceBackend(device)) as backend, _tensor(backend, _PIECE) as tensor:
        empty = resident_bytes()
        backend.set(tensor, piece)
        backend.get(tensor, piece)
        give_back_freed()  # what sending took for a moment
        # The driver's own copy on the way there may be as large as the piece: half as much again is one of both.
        is_resident = device.shares_host_memory and resident_bytes() - empty > _PIECE // 2
        held = before + piece.nbytes + (_PIECE if is_resident else 0)
        opened = max(0, resident_bytes() - held)

        def taken() -> DriverMemory:
            return DriverMemory(opened, max(0, peak_resident_bytes() - held - opened), is_resident)

        def watch() -> None:
            while not is_over.wait(1.0):
                tell(taken())

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            for kernel in _kernels():
                if time.process_time() - begin < _MOST_SECONDS:
                    _run(backend, kernel)
        finally:
            is_over.set()
            watching.join()
        return taken()


@contextlib.contextmanager
def _tensor(backend: DeviceBackend, n_bytes: int) -> Iterator[int]:
    """A tensor of bytes on the device."""
    ctx = ggml.ggml_init(ggml.InitParams(1 << 12, None, True))
    tensor = int(ggml.ggml_new_tensor_1d(ctx, Type.I8, n_bytes))
    buffer = backend.allocate(n_bytes)
    ggml_backend.ggml_backend_tensor_alloc(buffer, tensor, ggml_backend.ggml_backend_buffer_get_base(buffer))
    try:
        yield tensor
    finally:
        ggml_backend.ggml_backend_buffer_free(buffer)
        ggml.ggml_free(ctx)


def _run(backend: DeviceBackend, kernel: Kernel) -> None:
    """Runs one operation, if the device has it, on zeros."""
    ctx = ggml.ggml_init(ggml.InitParams(1 << 16, None, True))
    graph, result = ggml.ggml_new_graph_custom(ctx, 16, False), kernel(ctx)
    allocator = ggml_backend.ggml_gallocr_new(backend.buft)
    try:
        ggml.ggml_build_forward_expand(graph, result)
        nodes = [ggml.ggml_graph_node(graph, index) for index in range(ggml.ggml_graph_n_nodes(graph))]
        if all(map(backend.supports, nodes)) and ggml_backend.ggml_gallocr_alloc_graph(allocator, graph):
            leaves = {source for node in nodes for source in ggml.tensor_at(node).src if source} - {*nodes}
            for leaf in leaves:
                backend.set(leaf, np.zeros(ggml.ggml_nbytes(leaf), np.uint8))
            backend.compute(graph)
    finally:
        ggml_backend.ggml_gallocr_free(allocator)
        ggml.ggml_free(ctx)


def _kernels() -> Iterator[Kernel]:
    """The operations of a layer of attention and experts, for a batch and for a single token."""
    for n in _BATCHES:
        yield _attention(n)
    for n in _BATCHES:
        yield from (_rows(n, ggml.ggml_add), _rows(n, ggml.ggml_mul), _rows(n, ggml.ggml_swiglu_split))
        yield from (_of_rows(n, _normed), _of_rows(n, ggml.ggml_soft_max), _of_rows(n, ggml.ggml_cont))
        yield from (_of_rows(n, _scaled), _of_rows(n, _ranked), _of_rows(n, ggml.ggml_sum_rows))
        yield from (_rotation(n), _lookup(n), _store(n))
    for kind, n in product((Type.F32, *TYPES), _BATCHES):
        yield from (_product(kind, n), _expert_product(kind, n))


def _rows(n: int, add: Callable[[int, int, int], int]) -> Kernel:
    return lambda ctx: int(add(ctx, _input(ctx, Type.F32, _N_EMBD, n), _input(ctx, Type.F32, _N_EMBD, n)))


def _of_rows(n: int, add: Callable[[int, int], int]) -> Kernel:
    return lambda ctx: int(add(ctx, _input(ctx, Type.F32, _N_EMBD, n)))


def _normed(ctx: int, rows: int) -> int:
    return int(ggml.ggml_rms_norm(ctx, rows, 1e-6))


def _scaled(ctx: int, rows: int) -> int:
    return int(ggml.ggml_scale(ctx, rows, 2.0))


def _ranked(ctx: int, rows: int) -> int:
    return int(ggml.ggml_argsort(ctx, rows, ggml.SORT_DESCENDING))


def _rotation(n: int) -> Kernel:
    def add(ctx: int) -> int:
        heads, positions = _input(ctx, Type.F32, _N_EMBD // _N_HEAD, _N_HEAD, n), _input(ctx, Type.I32, n)
        settings = _N_EMBD // _N_HEAD, 0, 0, 1e4, 1.0, 0.0, 1.0, 32.0, 1.0
        return int(ggml.ggml_rope_ext(ctx, heads, positions, None, *settings))

    return add


def _lookup(n: int) -> Kernel:
    return lambda ctx: int(ggml.ggml_get_rows(ctx, _input(ctx, Type.F32, _N_EMBD, 64), _input(ctx, Type.I32, n)))


def _store(n: int) -> Kernel:
    def add(ctx: int) -> int:
        cells, rows = _input(ctx, Type.F16, _N_EMBD, _N_CELLS), _input(ctx, Type.F32, _N_EMBD, n)
        return int(ggml.ggml_set_rows(ctx, cells, rows, _input(ctx, Type.I64, n)))

    return add


def _attention(n: int) -> Kernel:
    def add(ctx: int) -> int:
        n_value = _N_EMBD // _N_HEAD
        query = _input(ctx, Type.F32, n_value, n, _N_HEAD)
        keys, values = (_input(ctx, Type.F16, n_value, _N_CELLS, _N_HEAD) for _ in range(2))
        attended = ggml.ggml_flash_attn_ext(ctx, query, keys, values, _input(ctx, Type.F16, _N_CELLS, n), 1.0, 0.0, 0.0)
        ggml.ggml_prec_set_acc(attended, ggml.PREC_F32)
        return int(attended)

    return add


def _product(kind: Type, n: int) -> Kernel:
    return lambda ctx: int(
        ggml.ggml_mul_mat(ctx, _input(ctx, kind, _N_EMBD, _N_EMBD), _input(ctx, Type.F32, _N_EMBD, n))
    )


def _expert_product(kind: Type, n: int) -> Kernel:
    def add(ctx: int) -> int:
        stack, rows = _input(ctx, kind, _N_EMBD, _N_EMBD, _N_EXPERT), _input(ctx, Type.F32, _N_EMBD, 1, n)
        return int(ggml.ggml_mul_mat_id(ctx, stack, rows, _input(ctx, Type.I32, 1, n)))

    return add


def _input(ctx: int, kind: Type, *ne: int) -> int:
    make = (ggml.ggml_new_tensor_1d, ggml.ggml_new_tensor_2d, ggml.ggml_new_tensor_3d)[len(ne) - 1]
    tensor = int(make(ctx, kind, *ne))
    ggml.ggml_set_input(tensor)
    return tensor


def _tell(taken: DriverMemory) -> None:
    print(msgspec.json.encode(taken).decode(), flush=True)


if __name__ == "__main__":
    (found,) = choose_devices(sys.argv[1])
    _tell(measure(found, _tell))
