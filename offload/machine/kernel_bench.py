"""Times products, attention and the smallest graphs on one backend, with weights that no cache still holds.

Noise on a machine only ever adds time, so that the figure is the lower quartile of several runs: not the mean, which
any other program on the cores moves, and not the minimum, which a lucky cache hit decides. Where the runs differ too
much, as when the threads wait for one that has lost its core, even that says little; the bench knows it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import Backend
from slimoe.offload.machine.speed import MatrixKernel, Overheads, SpeedCurve
from slimoe.offload.resources.memory import out_of_memory

Clock = Callable[[], float]
Nodes = Callable[[int], tuple[list[int], list[int]]]
"""Adds operations to a ggml context; returns their inputs, and the results that a graph must compute."""

EXPERT_ROWS = (1, 4, 12, 60, 252)
"""Kernels take rows in blocks, of 16 say, and nearly as long for a part of one; an expert seldom gets whole blocks."""
DENSE_ROWS = (1, 16, 256)
MIN_BYTES = 4 << 20
_ROUNDS, _FEW_ROUNDS = 9, 4
_LONG_SECONDS = 0.008
"""A run at least takes about so long where the memory allows it, so that starting it does not count."""
_MAX_FLOP = 1e9
_MAX_PRODUCTS = 64
_STEP = 64  # rows of matrices are measured in multiples of this, which keeps every matrix aligned
_PADDING = 1 << 16  # some backends want room behind a matrix
_SMALL = 4096
_FEW_VALUES = 64  # that are handed over and read back, so that they take no time on any link
_MANY_PAIRS = 65
_MANY_VIEWS = 256
_N_CELLS = 1024
_STEADY = 1.25
_TABLE_TYPES = ("IQ1", "IQ2", "IQ3")
"""Types with tables that ggml computes for up to half a minute before it quantises; any bytes are rows of them."""
_LEAST = 1e-15  # where starting the graph took as long as all of it


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One token's attention in one layer: query heads, key heads, values per head, and the KV cache's type.

    Values have `n_embd_head_v` per head, or with 0 as many as keys; with `is_view` they are the beginning of the keys.
    """

    n_head: int
    n_head_kv: int
    n_embd_head: int
    type: Type
    n_embd_head_v: int = 0
    is_view: bool = False

    @property
    def name(self) -> str:
        """The name under which its speed is kept."""
        lengths = f"{self.n_embd_head}{f'/{self.n_embd_head_v}' if self.n_embd_head_v else ''}"
        return f"attention {self.n_head}/{self.n_head_kv} x {lengths} {self.type.name}"


class KernelBench:
    """One buffer of `n_bytes` in the backend's memory, filled with weights, and graphs that read from it in turns.

    Their results take a quarter as much again, at most, and their inputs 256 rows of floats. `is_steady` says whether
    the runs for the last figure agreed with each other.
    """

    def __init__(self, backend: Backend, n_bytes: int, clock: Clock = time.perf_counter) -> None:
        """Raises DoesNotFitError."""
        self._backend, self._clock = backend, clock
        self._n_bytes = max(n_bytes, MIN_BYTES)
        self._buffer = backend.allocate(self._n_bytes + _PADDING)
        self._base = int(ggml_backend.ggml_backend_buffer_get_base(self._buffer))
        self._allocator = ggml_backend.ggml_gallocr_new(backend.buft)
        self._filled: tuple[Type, int] | None = None
        self._at = 0
        self.is_steady = True
        graph_seconds, op_seconds = self._small_graphs()
        self._empty_seconds = max(0.0, graph_seconds - 2 * op_seconds)

    def close(self) -> None:
        """Frees the memory."""
        if self._buffer:
            ggml_backend.ggml_gallocr_free(self._allocator)
            ggml_backend.ggml_backend_buffer_free(self._buffer)
            self._buffer = 0

    # --- what is measured ----------------------------------------------------------------------------------

    def curve(self, kernel: MatrixKernel, n_matrix_rows: int) -> SpeedCurve:
        """The speed of products with matrices of `n_matrix_rows`; never less for more rows of activations."""
        self.is_steady = True
        self._fill(kernel.type, kernel.n_columns)
        points = EXPERT_ROWS if kernel.is_expert else DENSE_ROWS
        speeds = np.maximum.accumulate([self._product(kernel, n_matrix_rows, n_rows) for n_rows in points])
        return SpeedCurve(points, tuple(float(speed) for speed in speeds))

    def attention(self, shape: AttentionShape, n_queries: int = 1) -> float:
        """Seconds for one token's attention to one cell, in one layer, when so many tokens attend at once."""
        self.is_steady = True
        self._fill(shape.type, shape.n_embd_head)
        cell_bytes = shape.n_head_kv * _row_bytes(shape.type, shape.n_embd_head)
        n_cells = _N_CELLS if 2 * _N_CELLS * cell_bytes <= self._n_bytes else _STEP
        n_bytes = n_cells * cell_bytes
        assert 2 * n_bytes <= self._n_bytes

        def nodes(ctx: int) -> tuple[list[int], list[int]]:
            query = _input(ctx, Type.F32, shape.n_embd_head, n_queries, shape.n_head)
            mask = _input(ctx, Type.F16, n_cells, n_queries)
            key = self._weight(ctx, shape.type, (shape.n_embd_head, n_cells, shape.n_head_kv), n_bytes)
            ne = (shape.n_embd_head_v or shape.n_embd_head, n_cells, shape.n_head_kv)
            if shape.is_view:
                strides = ggml.tensor_at(key).nb
                value = int(ggml.ggml_view_3d(ctx, key, *ne, strides[1], strides[2], 0))
            else:
                value = self._weight(ctx, shape.type, ne, n_bytes)
            attended = ggml.ggml_flash_attn_ext(ctx, query, key, value, mask, 1.0, 0.0, 0.0)
            ggml.ggml_prec_set_acc(attended, ggml.PREC_F32)
            return [query, mask], [attended]

        return self._more(self._seconds(nodes, _ROUNDS) - self._empty_seconds) / (n_cells * n_queries)

    def overheads(self) -> Overheads:
        """What the smallest graph costs, and each operation and each view more."""
        graph_seconds, op_seconds = self._small_graphs()

        def views(n: int) -> Nodes:
            def nodes(ctx: int) -> tuple[list[int], list[int]]:
                first = tensor = _input(ctx, Type.F32, _SMALL)
                for _ in range(n):
                    tensor = int(ggml.ggml_view_1d(ctx, tensor, _SMALL, 0))
                return [first], [ggml.ggml_add(ctx, tensor, first)]

            return nodes

        few, many = (min(self._runs(views(n), 4 * _ROUNDS)) for n in (1, _MANY_VIEWS))
        return Overheads(graph_seconds, op_seconds, self._more(many - few) / (_MANY_VIEWS - 1))

    def _more(self, seconds: float) -> float:
        """Seconds beyond those of a graph's start. Where there are none, something disturbed one of the two."""
        self.is_steady &= seconds > _LEAST
        return max(seconds, _LEAST)

    def _small_graphs(self) -> tuple[float, float]:
        """Seconds of a graph of two operations, and of each further one."""
        values = np.ones(_FEW_VALUES, np.float32)

        def chain(n_pairs: int) -> Nodes:
            def nodes(ctx: int) -> tuple[list[int], list[int]]:
                first = tensor = _input(ctx, Type.F32, _SMALL)
                for _ in range(n_pairs):
                    tensor = ggml.ggml_add(ctx, ggml.ggml_rms_norm(ctx, tensor, 1e-6), first)
                return [first], [tensor]

            return nodes

        # No cache can make these look better than they are, so here the minimum is the least noisy.
        runs = [self._runs(chain(n), 4 * _ROUNDS, values) for n in (1, _MANY_PAIRS)]
        one, many = (min(seconds) for seconds in runs)
        self.is_steady = all(float(np.median(seconds)) <= 2 * min(seconds) for seconds in runs)
        return self._more(one), self._more(many - one) / (2 * _MANY_PAIRS - 2)

    def _product(self, kernel: MatrixKernel, n_matrix_rows: int, n_rows: int) -> float:
        """Seconds per byte. Few rows of activations: whole matrices, as many as take some time; many: a part of one."""
        most = int(_MAX_FLOP / (2 * kernel.n_columns * n_rows))
        row_bytes = _row_bytes(kernel.type, kernel.n_columns)
        fitting = self._n_bytes // row_bytes // _STEP * _STEP
        assert fitting, "a matrix row is larger than expected"
        height = min(-(-min(n_matrix_rows, max(most, _STEP)) // _STEP) * _STEP, fitting)
        once = self._seconds(self._products(kernel, height, n_rows, 1), 1) - self._empty_seconds
        results = max(1, self._n_bytes // 4 // (4 * height * n_rows))
        n_products = int(min(_LONG_SECONDS / max(once, 1e-6) + 1, _MAX_PRODUCTS, fitting // height, results))
        rounds = _ROUNDS if n_rows == 1 else _FEW_ROUNDS
        seconds = self._seconds(self._products(kernel, height, n_rows, n_products), rounds) - self._empty_seconds
        return self._more(seconds) / (n_products * height * row_bytes)

    def _products(self, kernel: MatrixKernel, height: int, n_rows: int, n_products: int) -> Nodes:
        """Products that are independent of each other, each with another part of the buffer."""
        n_bytes = height * _row_bytes(kernel.type, kernel.n_columns)

        def nodes(ctx: int) -> tuple[list[int], list[int]]:
            ne = (kernel.n_columns, height, 1)
            weights = [self._weight(ctx, kernel.type, ne, n_bytes) for _ in range(n_products)]
            if not kernel.is_expert:
                rows = _input(ctx, Type.F32, kernel.n_columns, n_rows)
                return [rows], [ggml.ggml_mul_mat(ctx, weight, rows) for weight in weights]
            rows = _input(ctx, Type.F32, kernel.n_columns, 1, n_rows)
            ids = _input(ctx, Type.I32, 1, n_rows)
            return [rows, ids], [ggml.ggml_mul_mat_id(ctx, weight, rows, ids) for weight in weights]

        return nodes

    # --- weights -------------------------------------------------------------------------------------------

    def _fill(self, kind: Type, n_columns: int) -> None:
        """Fills the buffer with rows of a type: whatever begins at a whole row is then a matrix."""
        if self._filled == (kind, n_columns):
            return
        rows = random_rows(kind, n_columns, _STEP)
        rows = np.tile(rows, max(1, MIN_BYTES // rows.nbytes))
        with _context(1 << 12) as ctx:
            whole = ggml.ggml_new_tensor_1d(ctx, Type.I8, self._n_bytes)
            ggml_backend.ggml_backend_tensor_alloc(self._buffer, whole, self._base)
            for begin in range(0, self._n_bytes, rows.nbytes):
                self._backend.set(whole, rows[: self._n_bytes - begin], begin)
        self._filled, self._at = (kind, n_columns), 0

    def _weight(self, ctx: int, kind: Type, ne: tuple[int, int, int], n_bytes: int) -> int:
        """A tensor over the next part of the buffer; from the beginning again when it ends."""
        if self._at + n_bytes > self._n_bytes:
            self._at = 0
        tensor: int = ggml.ggml_new_tensor_3d(ctx, kind, *ne)
        ggml_backend.ggml_backend_tensor_alloc(self._buffer, tensor, self._base + self._at)
        self._at += n_bytes
        return tensor

    # --- runs ----------------------------------------------------------------------------------------------

    def _seconds(self, nodes: Nodes, rounds: int) -> float:
        """The lower quartile of the seconds that the graph takes."""
        seconds = self._runs(nodes, rounds)
        low = lower_quartile(seconds)
        self.is_steady &= float(np.median(seconds)) <= _STEADY * low
        return low

    def _runs(self, nodes: Nodes, rounds: int, values: NDArray[Any] | None = None) -> list[float]:
        """Seconds of each run; with `values`, the first input is set before and a result of as many read after."""
        n_nodes = 8 * _MANY_PAIRS
        n_bytes = n_nodes * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(n_nodes, False)
        seconds = []
        for _ in range(1 + rounds):
            with _context(n_bytes) as ctx:
                graph = ggml.ggml_new_graph_custom(ctx, n_nodes, False)
                inputs, results = nodes(ctx)
                for node in results:
                    ggml.ggml_build_forward_expand(graph, node)
                if not ggml_backend.ggml_gallocr_alloc_graph(self._allocator, graph):
                    raise out_of_memory(self._n_bytes)
                for tensor in inputs:
                    self._backend.set(tensor, np.zeros(ggml.ggml_nbytes(tensor), np.uint8))
                # A device may answer before it has everything; a read waits for it.
                out = np.empty(_FEW_VALUES, np.float32)
                self._backend.get(inputs[0], out[:1])
                begin = self._clock()
                if values is not None:
                    self._backend.set(inputs[0], values)
                self._backend.compute(graph)
                self._backend.get(results[-1], out if values is not None else out[:1])
                seconds.append(self._clock() - begin)
        return seconds[1:]


def lower_quartile(seconds: Sequence[float]) -> float:
    """The value that a quarter of the runs stayed below."""
    return sorted(seconds)[len(seconds) // 4]


def _row_bytes(kind: Type, n_columns: int) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return int(n_columns // block * block_bytes)


def random_rows(kind: Type, n_columns: int, n_rows: int) -> NDArray[np.uint8]:
    """Bytes of random rows of a type."""
    random = np.random.default_rng(0)
    if kind.name.startswith(_TABLE_TYPES):
        return random.integers(0, 256, n_rows * _row_bytes(kind, n_columns), np.uint8)
    rows = random.standard_normal((n_rows, n_columns), np.float32)
    quantised = np.empty(n_rows * _row_bytes(kind, n_columns), np.uint8)
    ggml.ggml_quantize_chunk(kind, rows.ctypes.data, quantised.ctypes.data, 0, n_rows, n_columns, None)
    return quantised


@contextmanager
def _context(n_bytes: int) -> Iterator[int]:
    ctx = ggml.ggml_init(ggml.InitParams(n_bytes, None, True))
    try:
        yield ctx
    finally:
        ggml.ggml_free(ctx)


def _input(ctx: int, kind: Type, *ne: int) -> int:
    make = (ggml.ggml_new_tensor_1d, ggml.ggml_new_tensor_2d, ggml.ggml_new_tensor_3d)[len(ne) - 1]
    tensor: int = make(ctx, kind, *ne)
    ggml.ggml_set_input(tensor)
    return tensor
