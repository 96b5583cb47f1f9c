"""Experts of any types and widths in one graph of a single token: the router's selection looks their matrices up.

`mul_mat_id` takes one stack, of one type. Here each selected expert has products of its own, whose matrices are not
known before the router has run: for every row of a router a table has the `ggml_tensor` structures of its expert's
matrices, and `get_rows` copies those of the selected rows over the structures that the products read. So no product is
computed in vain, however many types a layer has, and no step stops at a router to ask Python. Of narrower experts the
lengths of the products are looked up as well; those of constant experts are 0, and ggml skips empty results.

This is for the CPU alone, whose backend reads a tensor's structure when it comes to the operation. The memory that
operations need is planned before: `ExpertLookup.begin` adds one that needs as much as any expert can.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import CpuBackend
from slimoe.offload.graph.expert_ffn import add_activation
from slimoe.offload.model.architecture import Activation
from slimoe.offload.model.experts import ExpertLayer, MatrixClass

NODES_PER_EXPERT, NODES_PER_LAYER = 4, 8
"""Tensors that a layer takes in a graph, for each selected expert and beside these."""

_STRUCTURE = ctypes.sizeof(ggml.Tensor)
_DATA, _NE = ggml.Tensor.data.offset, ggml.Tensor.ne.offset
_ALIGNMENT = 256

_Products = tuple[int, ...]
"""All tensors of one selected expert in the order of the computation, of which down is the last."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerTable:
    """What the rows of one layer's router mean.

    `target` I64 [n_row] are the stored experts, negative for constant ones; `matrices` U8 [n_row, n_matrices, n] the
    structures of their matrices, down last; `widths` I64 [n_row] the experts' widths, 0 for constant experts;
    `constants` F32 [n_row, n_embd] the outputs of these, None without any.
    """

    matrices: NDArray[np.uint8]
    widths: NDArray[np.int64]
    target: NDArray[np.int64]
    constants: NDArray[np.float32] | None

    @classmethod
    def of(cls, layer: ExpertLayer, constants: NDArray[np.float32] | None) -> "LayerTable":
        """The table of a layer with the constant experts F32 [n, n_embd], before anything is `written` of matrices."""
        target = np.array(layer.target, np.int64)
        widths = np.array([copies[0].n_ff for copies in layer.experts] + [0], np.int64)
        outputs = None
        if constants is not None:
            outputs = np.where((target < 0)[:, None], constants[np.maximum(-1 - target, 0)], np.float32(0))
        matrices = np.zeros((len(target), _n_matrices(layer), _STRUCTURE), np.uint8)
        return cls(matrices, widths[np.maximum(target, -1)], target, outputs)

    @staticmethod
    def n_bytes_of(layer: ExpertLayer, n_embd: int) -> int:
        """Memory of a layer's table."""
        return len(layer.target) * (_n_matrices(layer) * _STRUCTURE + (4 * n_embd if layer.constants else 0))

    @property
    def n_bytes(self) -> int:
        """Memory of the table."""
        return self.matrices.nbytes + (0 if self.constants is None else self.constants.nbytes)

    @property
    def is_even(self) -> bool:
        """Whether all rows mean experts of one width."""
        return bool(self.widths.min() == self.widths.max())

    def write(self, expert: int, place: int, structure: NDArray[np.uint8], address: int) -> None:
        """Writes what the matrix number `place` of a stored expert is, and where it lies.

        Rows of constant experts get one as well, which may be looked at, but is never multiplied with.
        """
        rows = (self.target == expert) | (self.target < 0)
        self.matrices[rows, place] = structure
        self.matrices[rows, place, _DATA : _DATA + 8] = np.array([address], np.int64).view(np.uint8)


def _n_matrices(layer: ExpertLayer) -> int:
    """The number of an expert's matrices, 0 where all experts are constant."""
    return len(layer.experts[0][0].matrices) if layer.experts else 0


def matrix_structure(kind: MatrixClass, buffer: int) -> NDArray[np.uint8]:
    """The structure U8 [n] of a matrix of a type and shape in a buffer, which does not say where."""
    ctx = ggml.ggml_init(ggml.InitParams(2 * ggml.ggml_tensor_overhead(), None, True))
    tensor = int(ggml.ggml_new_tensor_2d(ctx, kind[0], *kind[1]))
    ggml.tensor_at(tensor).buffer = buffer
    found: NDArray[np.uint8] = ggml.array_at(tensor, np.uint8, _STRUCTURE).copy()
    ggml.ggml_free(ctx)
    return found


def stacked_structure(stack: int, slot: int) -> tuple[NDArray[np.uint8], int]:
    """The structure U8 [n] of matrix `slot` of a stack that is in memory, in whatever form, and where it lies."""
    found: NDArray[np.uint8] = ggml.array_at(stack, np.uint8, _STRUCTURE).copy()
    tensor = ggml.tensor_at(found.ctypes.data)
    tensor.ne[2], tensor.nb[3] = 1, tensor.nb[2]
    return found, int(tensor.data) + slot * int(tensor.nb[2])


class ExpertLookup:
    """Adds experts to graphs of a single token, in the layers that have a table; `n_used` of them are selected.

    The tables may be written to between two steps. All graphs share the structures that are copied to.
    """

    def __init__(
        self, backend: CpuBackend, n_embd: int, n_used: int, activation: Activation, tables: Mapping[int, LayerTable]
    ) -> None:
        self._tables, self._n_embd, self._n_used, self._activation = tables, n_embd, n_used, activation
        widths = {layer: table.widths for layer, table in tables.items() if not table.is_even}
        # Those of the tensors before down, three with a gate or without, and those of down.
        self._lengths = {layer: np.stack([one, one, one, n_embd * (one > 0)]) for layer, one in widths.items()}
        self._n_most = max(n_embd, max(int(table.widths.max()) for table in tables.values()))
        # One behind the other: structures, outputs, and what the operation multiplies that sets memory aside.
        n_matrices = max(table.matrices.shape[1] for table in tables.values())
        ends = np.cumsum(
            [
                -(-n // _ALIGNMENT) * _ALIGNMENT
                for n in (n_used * n_matrices * _STRUCTURE, 4 * n_embd * n_used, 2 * self._n_most, 4 * self._n_most)
            ]
        ).tolist()
        self.buffer = backend.allocate(ends[-1] + _ALIGNMENT)
        ggml_backend.ggml_backend_buffer_clear(self.buffer, 0)
        base = -(-ggml_backend.ggml_backend_buffer_get_base(self.buffer) // _ALIGNMENT) * _ALIGNMENT
        self._structures, self._outputs, self._row, self._column = (base + begin for begin in (0, *ends[:-1]))
        self.n_bytes = ends[-1] + sum(table.n_bytes for table in tables.values())
        """Memory of the tables and of what graphs share."""

    def __contains__(self, layer: int) -> bool:
        """Whether the experts of a layer are looked up."""
        return layer in self._tables

    def begin(self, ctx: int, graph: int) -> None:
        """Adds what makes ggml set aside as much working memory as a product with any expert can need.

        No type's activations take more than F16's.
        """
        row = self._at(ggml.ggml_new_tensor_2d(ctx, Type.F16, self._n_most, 1), self._row)
        column = self._at(ggml.ggml_new_tensor_2d(ctx, Type.F32, self._n_most, 1), self._column)
        ggml.ggml_build_forward_expand(graph, ggml.ggml_mul_mat(ctx, row, column))

    def add(self, ctx: int, graph: int, layer: int, normed: int, ids: int) -> int:
        """The outputs F32 [n_embd, n_used, 1] of the selected experts, not yet weighted, valid until the next layer.

        `normed` [n_embd, 1] is their input, `ids` I32 [n_used, 1] are the selected rows of the router.
        """
        table, n_row = self._tables[layer], len(self._tables[layer].widths)
        before, products = list[int](), list[_Products]()
        if table.widths.any():
            width = table.matrices.shape[1] * _STRUCTURE // 4
            matrices = self._at(ggml.ggml_new_tensor_2d(ctx, Type.I32, width, n_row), table.matrices.ctypes.data)
            before.append(self._copy(ctx, matrices, ids, self._structures))
            products = [self._add_products(ctx, table, normed, number) for number in range(self._n_used)]
        if products and not table.is_even:
            before.append(self._copy_lengths(ctx, layer, ids, products))
        if table.constants is not None:
            stack = ggml.ggml_new_tensor_2d(ctx, Type.F32, self._n_embd, n_row)
            constants = self._at(stack, table.constants.ctypes.data)
            before.append(self._copy(ctx, constants, ids, self._outputs))
        for tensor in (*before, *(output for *_, output in products)):
            ggml.ggml_build_forward_expand(graph, tensor)
        return self._at(ggml.ggml_new_tensor_3d(ctx, Type.F32, self._n_embd, self._n_used, 1), self._outputs)

    def _add_products(self, ctx: int, table: LayerTable, normed: int, number: int) -> _Products:
        """The tensors of the expert that is selected as number `number`, as wide as the widest."""
        n_bytes = table.matrices.shape[1] * _STRUCTURE
        begin = self._structures + number * n_bytes
        addresses = range(begin, begin + n_bytes, _STRUCTURE)
        widest = table.matrices[int(table.widths.argmax())]
        for address, structure in zip(addresses, widest, strict=True):
            ggml.array_at(address, np.uint8, _STRUCTURE)[:] = structure
        *gate_up, down = addresses
        projected = [int(ggml.ggml_mul_mat(ctx, matrix, normed)) for matrix in gate_up]
        activated = add_activation(ctx, projected, self._activation)
        # Of up alone ReLU is a tensor too, before its square.
        between = [int(ggml.tensor_at(activated).src[0])] if len(projected) == 1 else []
        output = int(ggml.ggml_mul_mat(ctx, down, activated))
        self._at(output, self._outputs + 4 * self._n_embd * number)
        return (*projected, *between, activated, output)

    def _copy_lengths(self, ctx: int, layer: int, ids: int, products: Sequence[_Products]) -> int:
        """Looks up the lengths of all products and activations, which lie at equal distances in a graph's memory."""
        lengths, first = self._lengths[layer], products[0]
        table = ggml.ggml_new_tensor_3d(ctx, Type.I32, 2, lengths.shape[1], len(first))
        # The same rows of each of the tables.
        again = int(ggml.ggml_view_1d(ctx, ids, self._n_used, 0))
        ggml.tensor_at(again).ne[1], ggml.tensor_at(again).nb[1] = len(first), 0
        copied = self._copy(ctx, self._at(table, lengths.ctypes.data), again, first[0] + _NE)
        found, apart = ggml.tensor_at(copied), first[1] - first[0]
        found.nb[1], found.nb[2] = len(first) * apart, apart
        expected = range(first[0], first[0] + apart * len(first) * self._n_used, apart)
        assert [tensor for one in products for tensor in one] == list(expected)
        return copied

    def _copy(self, ctx: int, table: int, ids: int, target: int) -> int:
        """Copies the selected rows of a table to an address."""
        return self._at(int(ggml.ggml_get_rows(ctx, table, ids)), target)

    def _at(self, tensor: int, address: int) -> int:
        """Lets a tensor lie at an address that no allocator may give to others."""
        structure = ggml.tensor_at(tensor)
        structure.buffer, structure.data = self.buffer, address
        return tensor

    def close(self) -> None:
        """Frees the memory that graphs share."""
        if self.buffer:
            ggml_backend.ggml_backend_buffer_free(self.buffer)
            self.buffer = 0
