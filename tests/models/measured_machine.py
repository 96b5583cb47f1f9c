"""A machine whose every speed is known: a clock that only moves when told, and a backend that moves it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import CpuBackend
from slimoe.offload.ggml.library import I32, Ptr, c_function, open_library
from slimoe.offload.machine.speed import LinkSpeed, MachineSpeed, MatrixKernel, Overheads, ProcessorSpeed, SpeedCurve
from slimoe.offload.machine.workload import expert_matrices, layer_matrices
from slimoe.offload.plan.engine_plan import EnginePlan

GRAPH_SECONDS, OP_SECONDS, CELL_SECONDS, BATCH_CELL_SECONDS = 2e-3, 1e-4, 1e-6, 1e-7
BYTE_SECONDS, ROW_SECONDS = 1e-9, 1e-11
_BASE = open_library("ggml-base")


@c_function(_BASE)
def ggml_graph_n_nodes(graph: Ptr) -> I32:
    """Number of operations."""
    return 0


@c_function(_BASE)
def ggml_graph_node(graph: Ptr, index: I32) -> Ptr:
    """One operation's result."""
    return 0


class Clock:
    """Seconds since it was made, as far as it was told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class KnownBackend(CpuBackend):
    """Computes nothing but takes its time: by graph, operation, byte and row of matrices, cell of attention."""

    def __init__(
        self, clock: Clock, noise: Callable[[int], float] = lambda n: 1.0, row_seconds: float = ROW_SECONDS
    ) -> None:
        super().__init__(1)
        self.clock, self.noise, self.row_seconds, self.n_computed = clock, noise, row_seconds, 0
        self.addresses: list[int] = []

    def compute(self, graph: int) -> None:
        seconds = GRAPH_SECONDS
        for index in range(ggml_graph_n_nodes(graph)):
            tensor = ggml.tensor_at(ggml_graph_node(graph, index))
            matrix = ggml.tensor_at(tensor.src[0])
            other = ggml.tensor_at(tensor.src[1]) if tensor.src[1] else matrix
            if other.type == Type.F16:
                n_queries = matrix.ne[1]
                seconds += other.ne[1] * n_queries * (CELL_SECONDS if n_queries < 64 else BATCH_CELL_SECONDS)
            elif matrix.type != Type.F32:
                n_rows = ggml.ggml_nbytes(tensor.src[1]) // (4 * matrix.ne[0])
                seconds += ggml.ggml_nbytes(tensor.src[0]) * (BYTE_SECONDS + n_rows * self.row_seconds)
                self.addresses.append(int(matrix.data or 0))
            else:
                seconds += OP_SECONDS
        self.n_computed += 1
        self.clock.now += seconds * self.noise(self.n_computed)


class FarBackend(KnownBackend):
    """The same with a link of 2 GB/s to it and 1 GB/s back, 5 microseconds each way."""

    def set(self, tensor: int, values: NDArray[Any], offset: int = 0) -> None:
        self.clock.now += 5e-6 + values.nbytes / 2e9

    def get(self, tensor: int, values: NDArray[Any], offset: int = 0) -> None:
        self.clock.now += 5e-6 + values.nbytes / 1e9


def processor(bytes_per_second: float, kernels: list[MatrixKernel]) -> ProcessorSpeed:
    """A processor that multiplies one row at that speed, each further one 100 times as fast, without overheads."""
    curve = SpeedCurve((1, 101), (1 / bytes_per_second, 2 / bytes_per_second))
    return ProcessorSpeed({kernel.name: curve for kernel in kernels}, Overheads(1e-12, 1e-12), 1e-15, 1e-15)


def machine(cpu: ProcessorSpeed, disk: float | None = None, device: ProcessorSpeed | None = None) -> MachineSpeed:
    """A machine of that, its one device GPU0 behind a link of 10 GB/s."""
    if device is None:
        return MachineSpeed(cpu, disk=disk)
    return MachineSpeed(cpu, {"GPU0": device}, {"GPU0": LinkSpeed(1e10, 1e10)}, disk)


def machine_for(plan: EnginePlan, *devices: str, disk: float | None = None) -> MachineSpeed:
    """A machine whose CPU reads 1 GB/s and whose devices 10 GB/s."""
    dense = [*layer_matrices(plan.sources), plan.sources.output.weight]
    kernels = [MatrixKernel(source.type, source.ne[0], False) for source in dense]
    kernels += [MatrixKernel(source.type, source.ne[0], True) for source in expert_matrices(plan.layers)]
    one = machine(processor(1e9, kernels), disk, processor(1e10, kernels))
    return replace(
        one, devices=dict.fromkeys(devices, one.devices["GPU0"]), links=dict.fromkeys(devices, one.links["GPU0"])
    )
