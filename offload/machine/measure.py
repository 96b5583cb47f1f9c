"""Measures this machine as far as one model uses it, in seconds, and remembers the speeds for later starts."""

import functools
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import TypeVar

from gguf import GGMLQuantizationType as Type

from slimoe.offload.cache.disk_reader import PAGE
from slimoe.offload.ggml.cpu_backend import Backend, CpuBackend
from slimoe.offload.ggml.ops import BATCH_QUERIES
from slimoe.offload.gguf.header import GGUFFile
from slimoe.offload.machine.kernel_bench import MIN_BYTES, AttentionShape, Clock, KernelBench
from slimoe.offload.machine.measurement_cache import MeasurementCache
from slimoe.offload.machine.speed import (
    LinkSpeed,
    MachineSpeed,
    MatrixKernel,
    Overheads,
    Positive,
    ProcessorSpeed,
    SpeedCurve,
)
from slimoe.offload.machine.transfer_bench import MAX_PIECE, N_UNDER_WAY, disk_bytes_per_second, link_speed
from slimoe.offload.machine.workload import expert_matrices, layer_matrices
from slimoe.offload.model.attention_spec import AttentionSpec
from slimoe.offload.model.experts import ExpertLayer
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import ModelSources

T = TypeVar("T")

MOST_BYTES = 256 << 20
"""More than last-level caches hold: with more memory the figures would be the same."""
_LINK_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class KernelNeeds:
    """The kernels that a model uses, with the rows of their largest matrix, its attentions, with the number of layers
    that have them, and sizes in bytes.

    The largest matrix of an expert has `matrix_bytes`, and all matrices together have `n_bytes`.
    """

    kernels: Mapping[MatrixKernel, int]
    attentions: Mapping[AttentionShape, int]
    matrix_bytes: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What measuring may use: bytes of host memory and of each device's memory, direct reads or not, and the clock."""

    ram: int = 2 * MOST_BYTES
    vram: int = 2 * MOST_BYTES
    direct_io: bool = True
    clock: Clock = field(default=time.perf_counter)


def kernel_needs(
    spec: ModelSpec, sources: ModelSources, layers: Sequence[ExpertLayer | None], kv_type: Type = Type.F16
) -> KernelNeeds:
    """The kernels that a model's matrices need, and their sizes."""
    kernels: dict[MatrixKernel, int] = {}
    n_bytes = 0
    dense = (*layer_matrices(sources), sources.output.weight)
    for source, is_expert in (*((s, False) for s in dense), *((s, True) for s in expert_matrices(layers))):
        kernel = MatrixKernel(source.type, source.ne[0], is_expert)
        kernels[kernel] = max(kernels.get(kernel, 0), source.ne[1])
        n_bytes += source.n_bytes
    largest = max((matrix.n_bytes for matrix in expert_matrices(layers)), default=0)
    # A model without attention has that of its keys measured, which nothing then takes.
    attentions = Counter(_attention_shape(spec.attention_of(layer), kv_type) for layer in spec.attention_layers)
    attentions = attentions or Counter([_attention_shape(spec.attention, kv_type)])
    return KernelNeeds(kernels, attentions, largest, n_bytes)


def _attention_shape(of: AttentionSpec, kv_type: Type) -> AttentionShape:
    n_value = of.value_length if of.value_length != of.key_length else 0
    return AttentionShape(of.n_head, of.n_head_kv, of.key_length, kv_type, n_value, not of.has_values)


class Calibration:
    """Speeds of a machine as far as a model uses it, from the cache or measured; `n_measured` counts the latter.

    `on_measure` is told what is about to be measured, and may raise to prevent it.
    """

    def __init__(
        self,
        needs: KernelNeeds,
        limits: Limits | None = None,
        cache: MeasurementCache | None = None,
        on_measure: Callable[[str], None] | None = None,
    ) -> None:
        self.n_measured = 0
        self._needs = needs
        self._limits = limits or Limits()
        self._cache = cache or MeasurementCache()
        self._on_measure = on_measure or (lambda name: None)

    def machine(self, gguf: GGUFFile | None, cpu: CpuBackend, devices: Mapping[str, Backend]) -> MachineSpeed:
        """The speed of the whole machine; `gguf` is the file that experts are read from, None when none are.

        `devices` are by the names under which the cache keeps them; each must be able to compute every kernel. Raises
        DoesNotFitError, and what reading the file raises.
        """
        return MachineSpeed(
            cpu=self.cpu(cpu),
            devices={name: self.processor(name, device, self._limits.vram) for name, device in devices.items()},
            links={name: self.link(name, device) for name, device in devices.items()},
            disk=self.disk(gguf) if gguf else None,
        )

    def cpu(self, cpu: CpuBackend) -> ProcessorSpeed:
        """The speed of the CPU."""
        return self.processor(f"CPU, {cpu.n_threads} threads", cpu, self._limits.ram)

    def processor(self, name: str, backend: Backend, n_bytes: int) -> ProcessorSpeed:
        """The speed of a backend, measured within `n_bytes` of its memory; `name` is its name in the cache."""
        needs = self._needs
        # With less memory, or for a smaller model, caches hold more of what is read: figures of their own.
        weights = max(MIN_BYTES, _power_of_two(min(MOST_BYTES, n_bytes * 3 // 5, needs.n_bytes)))
        group = f"{name}, {weights >> 20} MiB"
        with ExitStack() as opened:

            @functools.cache
            def bench() -> KernelBench:
                return opened.enter_context(closing(KernelBench(backend, weights, self._limits.clock)))

            def known(part: str, kind: type[T], measure: Callable[[KernelBench], T]) -> T:
                return self._known(part, kind, lambda: measure(bench()), lambda: bench().is_steady)

            def curve(kernel: MatrixKernel, n_rows: int) -> SpeedCurve:
                return known(f"{group}: {kernel.name} x {n_rows}", SpeedCurve, lambda b: b.curve(kernel, n_rows))

            overheads = known(f"{name}: overheads", Overheads, lambda b: b.overheads())

            def attention(shape: AttentionShape, n_queries: int) -> float:
                name = f"{group}: {shape.name}{f' x {n_queries}' if n_queries > 1 else ''}"
                return known(name, _Number, lambda b: _Number(b.attention(shape, n_queries))).value

            one, batch = (
                sum(n * attention(shape, n_queries) for shape, n in needs.attentions.items())
                / sum(needs.attentions.values())
                for n_queries in (1, BATCH_QUERIES)
            )
            kernels = {kernel.name: curve(kernel, n_rows) for kernel, n_rows in needs.kernels.items()}
        return ProcessorSpeed(kernels, overheads, one, batch)

    def link(self, name: str, backend: Backend) -> LinkSpeed:
        """The speed of the link to a device."""
        n_bytes = min(_LINK_BYTES, self._limits.ram // 2, self._limits.vram)
        return self._known(f"{name}: link", LinkSpeed, lambda: link_speed(backend, n_bytes, self._limits.clock))

    def disk(self, gguf: GGUFFile) -> float:
        """Bytes per second that experts are read with from the disk that the file lies on."""
        limits = self._limits
        nearest = 1 << round(math.log2(max(PAGE, min(self._needs.matrix_bytes, MAX_PIECE))))
        piece = max(PAGE, min(nearest, _power_of_two(limits.ram // (N_UNDER_WAY + 1))))
        how = "direct" if limits.direct_io else "buffered"
        name = f"disk {os.stat(gguf.path).st_dev}, {piece >> 10} KiB to huge pages, {how}"
        direct, clock = limits.direct_io, limits.clock
        return self._known(name, _Number, lambda: _Number(disk_bytes_per_second(gguf, piece, direct, clock))).value

    def _known(
        self, name: str, kind: type[T], measure: Callable[[], T], is_steady: Callable[[], bool] = lambda: True
    ) -> T:
        def counted() -> T:
            self._on_measure(name)
            value = measure()
            self.n_measured += 1
            return value

        return self._cache.measured(name, kind, counted, is_steady)


@dataclass(frozen=True, slots=True)
class _Number:
    value: Positive


def _power_of_two(n: int) -> int:
    """The largest power of two that is not above `n`, at least 1."""
    return 1 << (max(n, 1).bit_length() - 1)
