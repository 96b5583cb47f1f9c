"""Measures, on this machine, whether plain or repacked weights multiply faster, and remembers the answer.

Nothing about it can be assumed. With AVX-512 repacked Q4_K is 1.5 times as fast as plain Q4_K for one token; experts of
which each meets many tokens are 2.5 times as slow, since ggml's kernel for them takes one token at a time, and matrices
that meet all tokens are not. So both kinds of products are measured, at several numbers of rows.
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

ROWS = (1, 2, 4, 7, 8, 16, 32, 128)
"""Rows of activations for each matrix. ggml's kernels change at 4, repacked and dense, and at 8, plain."""
_FEW_ROWS = 8
# More than a last-level cache holds, so that the single token finds its weights in memory, as in a real model.
_N_COLUMNS, _N_ROWS, _N_STACK = 2048, 7168, 16
_N_PRODUCTS = 2
_ROUNDS, _FEW_ROUNDS = 5, 3
_MOST_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class FormSpeed:
    """Seconds for a product with so many rows of activations, ascending, with plain and with repacked weights."""

    n_rows: tuple[int, ...]
    plain: tuple[Positive, ...]
    repacked: tuple[Positive, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.n_rows) == len(self.plain) == len(self.repacked):
            raise ValueError("each number of rows needs a speed of both forms")

    def seconds(self, n_rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Seconds with plain and with repacked weights; in proportion to the rows beyond the last that was measured."""
        beyond = np.maximum(1.0, n_rows / self.n_rows[-1])
        plain, repacked = (beyond * np.interp(n_rows, self.n_rows, values) for values in (self.plain, self.repacked))
        return plain, repacked


@dataclass(frozen=True, slots=True)
class KernelSpeed:
    """The speeds of both forms of one type: of experts, by the tokens that select one, and of `dense` matrices."""

    expert: FormSpeed
    dense: FormSpeed


def measured_speeds(
    kinds: Iterable[GGMLQuantizationType],
    backend: CpuBackend,
    max_bytes: int = _MOST_BYTES,
    cache: MeasurementCache | None = None,
) -> dict[str, KernelSpeed]:
    """Speeds by type name, of those of `kinds` that can be repacked here.

    Measures what is not known, some seconds each, in `max_bytes` of memory but not less than three stacks of two
    matrices. Raises DoesNotFitError.
    """
    cache = cache or MeasurementCache()
    speeds = {}
    for kind in kinds:
        if not can_repack(kind, _N_COLUMNS, _N_ROWS):
            continue
        measure = partial(_measure, kind, backend, max_bytes)
        speeds[kind.name] = cache.measured(measurement_name(kind, backend.n_threads), KernelSpeed, measure)
    return speeds


def measurement_name(kind: GGMLQuantizationType, n_threads: int) -> str:
    """The name under which the speeds of a type are remembered."""
    return f"CPU, {n_threads} threads: {kind.name} plain and repacked by rows"


def _measure(kind: GGMLQuantizationType, backend: CpuBackend, max_bytes: int) -> KernelSpeed:
    # 64 random rows quantised, and repeated: [n_stack, bytes of a matrix]. Two buffers will hold as much.
    n_rows = 64
    matrix = np.tile(random_rows(kind, _N_COLUMNS, n_rows), _N_ROWS // n_rows)
    data = np.tile(matrix, (min(_N_STACK, max(_N_PRODUCTS, max_bytes // (3 * matrix.nbytes))), 1))
    benches = [_Bench(kind, buft, data) for buft in (ggml_backend.ggml_backend_cpu_buffer_type(), repack_buffer_type())]
    speeds = [
        FormSpeed(ROWS, *zip(*(_medians(benches, backend, n, len(data), is_expert=one) for n in ROWS), strict=True))
        for one in (True, False)
    ]
    for bench in benches:
        bench.close()
    return KernelSpeed(*speeds)


def _medians(
    benches: "list[_Bench]", backend: CpuBackend, n_rows: int, n_stack: int, *, is_expert: bool
) -> list[float]:
    """Seconds of a product with each bench's weights."""
    seconds: list[list[float]] = [[] for _ in benches]
    firsts = range(0, n_stack - 1, _N_PRODUCTS) if n_rows <= _FEW_ROWS else (0,)
    rounds = _ROUNDS if n_rows <= _FEW_ROWS else _FEW_ROUNDS
    for _ in range(rounds):
        # In turn, so that each finds the caches full of the other's weights, as one layer finds another's.
        for first in firsts:
            for own, bench in zip(seconds, benches, strict=True):
                own.append(bench.seconds(backend, n_rows, first, is_expert=is_expert))
    return [float(np.median(own[len(own) // rounds :])) / _N_PRODUCTS for own in seconds]


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
        # The same memory again, matrix by matrix.
        self._matrices = [ggml.ggml_new_tensor_2d(self._ctx, kind, _N_COLUMNS, _N_ROWS) for _ in data]
        for number, tensor in enumerate(self._matrices):
            ggml_backend.ggml_backend_tensor_alloc(self._buffer, tensor, base + number * data[0].nbytes)

    def seconds(self, backend: CpuBackend, n_rows: int, first: int, *, is_expert: bool) -> float:
        """Seconds for the products of so many rows with two matrices, from number `first` on."""
        ctx = ggml.ggml_init(ggml.InitParams(1 << 16, None, True))
        graph = ggml.ggml_new_graph_custom(ctx, 16, False)
        ids = 0
        if is_expert:
            rows = ggml.ggml_new_tensor_3d(ctx, GGMLQuantizationType.F32, _N_COLUMNS, 1, n_rows)
            ids = ggml.ggml_new_tensor_2d(ctx, GGMLQuantizationType.I32, _N_PRODUCTS, n_rows)
            ggml.ggml_set_input(ids)
            products = [ggml.ggml_mul_mat_id(ctx, self._stack, rows, ids)]
        else:
            rows = ggml.ggml_new_tensor_2d(ctx, GGMLQuantizationType.F32, _N_COLUMNS, n_rows)
            products = [ggml.ggml_mul_mat(ctx, one, rows) for one in self._matrices[first : first + _N_PRODUCTS]]
        ggml.ggml_set_input(rows)
        for product in products:
            ggml.ggml_build_forward_expand(graph, product)
        allocator = ggml_backend.ggml_gallocr_new(ggml_backend.ggml_backend_cpu_buffer_type())
        ggml_backend.ggml_gallocr_alloc_graph(allocator, graph)
        ctypes.memset(ggml.ggml_get_data(rows), 0, ggml.ggml_nbytes(rows))
        if ids:
            selected = np.tile(np.arange(first, first + _N_PRODUCTS, dtype=np.int32), n_rows)
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
