"""Speeds of a machine's processors, links and disk, as far as running a model asks: values that `measure` finds."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
from gguf import GGMLQuantizationType

from slimoe.offload.ggml.ops import BATCH_QUERIES

Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e18)]
NotNegative = Annotated[float, msgspec.Meta(ge=0, lt=1e18)]


@dataclass(frozen=True, slots=True)
class MatrixKernel:
    """Products with matrices of one type and row length; `is_expert` for `mul_mat_id`, whose kernels are others."""

    type: GGMLQuantizationType
    n_columns: int
    is_expert: bool

    @property
    def name(self) -> str:
        """The name under which its speed is kept."""
        return f"{self.type.name} {self.n_columns} {'expert' if self.is_expert else 'dense'}"


@dataclass(frozen=True, slots=True)
class SpeedCurve:
    """Seconds per byte of a matrix for its product with each number of rows of activations in `n_rows`, ascending.

    The seconds are those of all rows together: reading the matrix costs once, multiplying costs for each row.
    """

    n_rows: tuple[int, ...]
    seconds_per_byte: tuple[Positive, ...]

    def __post_init__(self) -> None:
        if (
            not self.n_rows
            or len(self.n_rows) != len(self.seconds_per_byte)
            or list(self.n_rows) != sorted(set(self.n_rows))
        ):
            raise ValueError("a curve needs as many speeds as ascending row counts")

    def seconds(self, n_bytes: float, n_rows: float) -> float:
        """Seconds for a matrix of `n_bytes` and `n_rows` rows of activations; linear between the measured points.

        Below the first point and above the last one it is in proportion to the rows: fewer rows than one are a share
        of the steps, and where a product is bound by arithmetic each further row costs the same.
        """
        points, speeds = self.n_rows, self.seconds_per_byte
        if n_rows <= points[0]:
            return n_bytes * speeds[0] * n_rows / points[0]
        if n_rows >= points[-1]:
            return n_bytes * speeds[-1] * n_rows / points[-1]
        right = bisect_right(points, n_rows)
        share = (n_rows - points[right - 1]) / (points[right] - points[right - 1])
        return n_bytes * (speeds[right - 1] + share * (speeds[right] - speeds[right - 1]))


@dataclass(frozen=True, slots=True)
class Overheads:
    """Time that is spent however little is computed.

    `graph_seconds` go to handing a small input over, computing a graph of two operations and reading the result, Python
    included; `op_seconds` to each further operation of a graph, on a vector of some thousand values; `view_seconds` to
    each tensor that nothing is computed for, such as a view: an RPC server is told of every tensor each time.
    """

    graph_seconds: Positive
    op_seconds: Positive
    view_seconds: NotNegative = 0.0


@dataclass(frozen=True, slots=True)
class ProcessorSpeed:
    """The speed of one backend: the CPU with its threads, or a device.

    `kernels` are by the kernel's name. `attention_seconds` are for one token's attention to one cell of the KV cache in
    one layer, `batch_attention_seconds` for the same in a batch of `BATCH_QUERIES` tokens or more. `output_kernels` are
    those of the matrix that gives the logits, where it has others.
    """

    kernels: Mapping[str, SpeedCurve]
    overheads: Overheads
    attention_seconds: Positive
    batch_attention_seconds: Positive
    output_kernels: Mapping[str, SpeedCurve] = field(default_factory=dict)

    def pair_seconds(self, n_tokens: int) -> float:
        """Seconds for one token's attention to one cell in one layer, in a batch of so many tokens."""
        return self.batch_attention_seconds if n_tokens >= BATCH_QUERIES else self.attention_seconds

    def seconds(self, kernel: MatrixKernel, n_bytes: float, n_rows: float) -> float:
        """Seconds for matrices of `n_bytes` in all, each multiplied with `n_rows` rows."""
        return self.kernels[kernel.name].seconds(n_bytes, n_rows)

    def output_seconds(self, matrices: Mapping[MatrixKernel, float], n_rows: float) -> float:
        """Seconds for the bytes, by kernel, of what gives the logits of `n_rows` tokens."""
        kernels = {**self.kernels, **self.output_kernels}
        return sum(kernels[kernel.name].seconds(n_bytes, n_rows) for kernel, n_bytes in matrices.items())

    def matrix_seconds(self, matrices: Mapping[MatrixKernel, float], n_rows: float) -> float:
        """Seconds for the bytes of matrices by kernel, each multiplied with `n_rows` rows."""
        return sum(self.seconds(kernel, n_bytes, n_rows) for kernel, n_bytes in matrices.items())


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """Bytes per second between host memory and a device, and the seconds that reading a single number takes.

    `is_apart` says that the device computes while it is copied to.
    """

    to_device: Positive
    from_device: Positive
    round_trip: NotNegative = 0.0
    is_apart: bool = False


@dataclass(frozen=True, slots=True)
class MachineSpeed:
    """The speed of a machine: its CPU, its devices by name, the links to them, and the disk that the model lies on.

    `disk` is bytes per second of whole experts read around the page cache; None where the file is not read while the
    model runs.
    """

    cpu: ProcessorSpeed
    devices: Mapping[str, ProcessorSpeed] = field(default_factory=dict)
    links: Mapping[str, LinkSpeed] = field(default_factory=dict)
    disk: Positive | None = None
