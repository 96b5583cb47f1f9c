"""Measures, on this machine, which arrangement of weights multiplies faster, and remembers the answer.

Nothing about it can be assumed: with AVX-512, repacked Q4_K is 1.4 times as fast as plain Q4_K for one token and
2.5 times as slow for a batch; elsewhere it is another number.
"""

import contextlib
import ctypes
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from platformdirs import user_cache_dir

from offload import ggml, ggml_backend
from offload.backend import CpuBackend, allocate, can_repack, repack_buffer_type

# More than a last-level cache holds, so that the single token finds its weights in memory, as in a real model.
_N_COLUMNS, _N_ROWS, _N_STACK = 2048, 7168, 16
_N_BATCH, _N_BATCH_STACK = 256, 4
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class KernelSpeed:
    """Seconds for a fixed amount of work with each arrangement, for one token and for a batch of them."""

    single_plain: float
    single_repacked: float
    batch_plain: float
    batch_repacked: float


def measured_speeds(kinds: Iterable[GGMLQuantizationType], backend: CpuBackend) -> dict[str, KernelSpeed]:
    """Speeds by type name, of those of `kinds` that can be repacked here; measures what is not known, a second each."""
    path = Path(os.environ.get("SLIMOE_CACHE") or user_cache_dir("slimoe")) / "kernel-speeds.json"
    known = _read(path)
    machine = known.setdefault(_machine(backend.n_threads), {})
    missing = [k for k in kinds if k.name not in machine and can_repack(k, _N_COLUMNS, _N_ROWS)]
    for kind in missing:
        machine[kind.name] = asdict(_measure(kind, backend))
    if missing:
        _write(path, known)
    return {name: KernelSpeed(**speeds) for name, speeds in machine.items()}


def _machine(n_threads: int) -> str:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return f"{cpu}, {n_threads} threads, ggml {ggml.ggml_version().decode()}"


def _read(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    try:
        known = json.loads(path.read_text())
        for machine in known.values():
            for speeds in machine.values():
                KernelSpeed(**speeds)
        return dict(known)
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # no cache yet, or one of another version: measure again


def _write(path: Path, known: dict[str, dict[str, dict[str, float]]]) -> None:
    # A cache that cannot be written costs a second at the next start and nothing else.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(known, file, indent=1)
        os.replace(file.name, path)


def _measure(kind: GGMLQuantizationType, backend: CpuBackend) -> KernelSpeed:
    data = _random_stack(kind)
    benches = [_Bench(kind, buft, data) for buft in (ggml_backend.ggml_backend_cpu_buffer_type(), repack_buffer_type())]
    single: list[list[float]] = [[], []]
    batch: list[list[float]] = [[], []]
    for _ in range(_ROUNDS):
        # In turn, so that each finds the caches full of the other's weights, as one layer finds another's.
        for first in range(0, _N_STACK, 2):
            for index, bench in enumerate(benches):
                single[index].append(bench.seconds(backend, 1, first))
        for index, bench in enumerate(benches):
            batch[index].append(bench.seconds(backend, _N_BATCH, 0))
    for bench in benches:
        bench.close()
    medians = [float(np.median(seconds[len(seconds) // _ROUNDS :])) for seconds in (*single, *batch)]
    return KernelSpeed(*medians)


def _random_stack(kind: GGMLQuantizationType) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Bytes of a stack of matrices: 64 random rows quantised, and repeated."""
    n_rows = 64
    rows = np.random.default_rng(0).standard_normal((n_rows, _N_COLUMNS), np.float32)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    quantised = np.empty(rows.size // block * block_bytes, np.uint8)
    ggml.ggml_quantize_chunk(kind, rows.ctypes.data, quantised.ctypes.data, 0, n_rows, _N_COLUMNS, None)
    return np.tile(quantised, _N_STACK * _N_ROWS // n_rows)


class _Bench:
    """A stack of expert matrices in one kind of buffer, and products with it."""

    def __init__(self, kind: int, buft: int | None, data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        self._ctx = ggml.ggml_init(ggml.InitParams(1 << 20, None, True))
        self._stack = ggml.ggml_new_tensor_3d(self._ctx, kind, _N_COLUMNS, _N_ROWS, _N_STACK)
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
        chosen = (np.arange(2 * n_tokens, dtype=np.int32) % span) + first
        ctypes.memmove(ggml.ggml_get_data(ids), chosen.ctypes.data, chosen.nbytes)
        begin = time.perf_counter()
        backend.compute(graph)
        taken = time.perf_counter() - begin
        ggml_backend.ggml_gallocr_free(allocator)
        ggml.ggml_free(ctx)
        return taken

    def close(self) -> None:
        ggml_backend.ggml_backend_buffer_free(self._buffer)
        ggml.ggml_free(self._ctx)
