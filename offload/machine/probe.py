"""Measures, on this machine, whether plain or repacked weights multiply faster, and remembers the answer.

Nothing about it can be assumed: with AVX-512, repacked Q4_K is 1.4 times as fast as plain Q4_K for one token and
2.5 times as slow for a batch; elsewhere it is another number.
"""

import ctypes
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import CpuBackend, allocate, can_repack, repack_buffer_type
from slimoe.offload.machine.kernel_bench import random_rows
from slimoe.offload.machine.measurement_cache import MeasurementCache
from slimoe.offload.machine.speed import Positive

# More than a last-level cache holds, so that the single token finds its weights in memory, as in a real model.
_N_COLUMNS, _N_ROWS, _N_STACK = 2048, 7168, 16
_N_BATCH, _N_BATCH_STACK = 256, 4
_ROUNDS = 5
_MOST_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class KernelSpeed:
    """Seconds for a fixed amount of work, with plain and with repacked weights, for one token and for a batch."""

    single_plain: Positive
    single_repacked: Positive
    batch_plain: Positive
    batch_repacked: Positive


def measured_speeds(
    kinds: Iterable[GGMLQuantizationType],
    backend: CpuBackend,
    max_bytes: int = _MOST_BYTES,
    cache: MeasurementCache | None = None,
) -> dict[str, KernelSpeed]:
    """Speeds by type name, of those of `kinds` that can be repacked here.

    Measures what is not known, a second each, in `max_bytes` of memory but not less than three stacks of four matrices.
    Raises DoesNotFitError.
    """
    cache = cache or MeasurementCache()
    speeds = {}
    for kind in kinds:
        if not can_repack(kind, _N_COLUMNS, _N_ROWS):
            continue
        name = f"CPU, {backend.n_threads} threads: {kind.name} plain and repacked"
        speeds[kind.name] = cache.measured(name, KernelSpeed, partial(_measure, kind, backend, max_bytes))
    return speeds


def _measure(kind: GGMLQuantizationType, backend: CpuBackend, max_bytes: int) -> KernelSpeed:
    # 64 random rows quantised, and repeated: [n_stack, bytes of a matrix]. Two buffers will hold as much.
    n_rows = 64
    matrix = np.tile(random_rows(kind, _N_COLUMNS, n_rows), _N_ROWS // n_rows)
    data = np.tile(matrix, (min(_N_STACK, max(_N_BATCH_STACK, max_bytes // (3 * matrix.nbytes))), 1))
    benches = [_Bench(kind, buft, data) for buft in (ggml_backend.ggml_backend_cpu_buffer_type(), repack_buffer_type())]
    single: list[list[float]] = [[], []]
    batch: list[list[float]] = [[], []]
    for _ in range(_ROUNDS):
        # In turn, so that each finds the caches full of the other's weights, as one layer finds another's.
        for first in range(0, len(data) - 1, 2):
            for index, bench in enumerate(benches):
                single[index].append(bench.seconds(backend, 1, first))
        for index, bench in enumerate(benches):
            batch[index].append(bench.seconds(backend, _N_BATCH, 0))
    for bench in benches:
        bench.close()
    medians = [float(np.median(seconds[len(seconds) // _ROUNDS :])) for seconds in (*single, *batch)]
    return KernelSpeed(*medians)


class _Bench:
    """A stack of expert matrices in one kind of buffer, and products with it."""

    def __init__(self, kind: int, buft: int | None, data: NDArray[np.uint8]) -> None:
        self._ctx = ggml.ggml_init(ggml.InitParams(1 << 20, None, True))
        self._stack = ggml.ggml_new_tensor_3d(self._ctx, kind, _N_COLUMNS, _N_ROWS, len(data))
        n_bytes = ggml_backend.ggml_backend_buft_get_alloc_size(buft, self._stack)
        self._buffer = allocate(buft, n_bytes)
        base = ggml_backend.ggml_backend_buffer_get_base(self._buffer)
        ggml_backend.ggml_backend_tensor_alloc(self._buffer, self._stack, base)
        ggml_backend.ggml_backend_tensor_set(self._stack, data.ctypes.data, 0, data.nbytes)

    def seconds(self, backend: CpuBackend, n_tokens: int, first: int) -> float:
        """Seconds for one product of `n_tokens` with two experts each, from expert `first` on."""
        ctx = ggml.ggml_init(ggml.InitParams(1 << 16, None, True))
        rows = ggml.ggml_new_tensor_3d(ctx, GGMLQuantizationType.F32, _N_COLUMNS, 1, n_tokens)
        ids = ggml.ggml_new_tensor_2d(ctx, GGMLQuantizationType.I32, 2, n_tokens)
        ggml.ggml_set_input(rows)
        ggml.ggml_set_input(ids)
        graph = ggml.ggml_new_graph_custom(ctx, 16, False)
        ggml.ggml_build_forward_expand(graph, ggml.ggml_mul_mat_id(ctx, self._stack, rows, ids))
        allocator = ggml_backend.ggml_gallocr_new(ggml_backend.ggml_backend_cpu_buffer_type())
        ggml_backend.ggml_gallocr_alloc_graph(allocator, graph)
        ctypes.memset(ggml.ggml_get_data(rows), 0, ggml.ggml_nbytes(rows))
        span = 2 if n_tokens == 1 else _N_BATCH_STACK
        selected = (np.arange(2 * n_tokens, dtype=np.int32) % span) + first
        ctypes.memmove(ggml.ggml_get_data(ids), selected.ctypes.data, selected.nbytes)
        begin = time.perf_counter()
        backend.compute(graph)
        taken = time.perf_counter() - begin
        ggml_backend.ggml_gallocr_free(allocator)
        ggml.ggml_free(ctx)
        return taken

    def close(self) -> None:
        ggml_backend.ggml_backend_buffer_free(self._buffer)
        ggml.ggml_free(self._ctx)
