"""Computes selected experts that lie in slots of host memory, all those of one class in one graph.

A bank of slots is a stack of matrices for `mul_mat_id`, whose ids are numbers of slots that are filled: nothing
negative or stale can reach it, and no token has an id twice. Its kernels, unlike those of `mul_mat`, are the ones the
uncut graph takes. Where a bank begins is set before each run, so that a graph serves the experts of every layer. An
expert that is not at hand yet, or whose matrices do not lie as the others' do, is a bank of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.offload.cache.host_slots import Bank
from slimoe.offload.experts.pair_graph import PairBuilder, PairInputs, add_input
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import CpuBackend
from slimoe.offload.graph.exchange import Exchange
from slimoe.offload.graph.expert_ffn import ExpertExtras
from slimoe.offload.graph.graph_pool import BuiltGraph, GraphPool
from slimoe.offload.model.architecture import Activation
from slimoe.offload.model.experts import SlotClass

_MAX_GRAPHS = 48
_N_NODES = 72
_MAPPING_BYTES = 8
"""What `mul_mat_id` sets aside for each slot and pair."""
_MOST_MAPPING = 8 << 20


Form = tuple[tuple[int, int], ...]
"""The number of experts and the bytes of each in the stacks of gate's, up's and down's biases, then of their scales.

(0, 0) is for one that is missing, and () for none at all.
"""


class HostVectors:
    """The biases and scales of the experts of all cut layers, in host memory.

    `stacks` are by layer the tensors with those of all its stored experts, in the order of `Form`, 0 without.
    """

    def __init__(self, activation: Activation = "swiglu", stacks: Mapping[int, Sequence[int]] = MappingProxyType({})):
        self.activation: Activation = activation
        with_any = {layer: tensors for layer, tensors in stacks.items() if any(tensors)}
        self._forms = {layer: tuple(map(_stack_form, tensors)) for layer, tensors in with_any.items()}
        self._addresses = {
            layer: [int(ggml.ggml_get_data(one)) if one else 0 for one in tensors]
            for layer, tensors in with_any.items()
        }

    @property
    def forms(self) -> set[Form]:
        """Every form that a layer has; that of layers without vectors is none."""
        return set(self._forms.values())

    def form(self, layer: int) -> Form:
        """What the experts of a layer have."""
        return self._forms.get(layer, ())

    def addresses(self, layer: int) -> list[int]:
        """Where the stacks of a layer begin."""
        return self._addresses.get(layer, [])


def _stack_form(stack: int) -> tuple[int, int]:
    if not stack:
        return 0, 0
    tensor = ggml.tensor_at(stack)
    is_bias = ggml.ggml_n_dims(stack) > 1
    return (tensor.ne[1], tensor.nb[1]) if is_bias else (tensor.ne[0], tensor.nb[0])


NO_VECTORS = HostVectors()


@dataclass(frozen=True, slots=True, eq=False)
class BankWork:
    """Pairs of one class and `layer`: `slots` in a bank, `experts` (numbers within the layer) and `columns` (token *
    n_expert_used + rank), all I64 [n].

    `is_one_row` says that all are pairs of one token, each with an expert of its own.
    """

    layer: int
    slot_class: SlotClass
    bank: Bank
    slots: NDArray[np.int64]
    experts: NDArray[np.int64]
    columns: NDArray[np.int64]
    is_one_row: bool = False

    def part(self, begin: int, end: int) -> "BankWork":
        """Some of the pairs, each of which gathers its row."""
        own = slice(begin, end)
        return replace(
            self, slots=self.slots[own], experts=self.experts[own], columns=self.columns[own], is_one_row=False
        )


@dataclass(frozen=True, slots=True)
class _Shape:
    slot_class: SlotClass
    n_pairs: int
    n_tokens: int
    is_one_row: bool
    form: Form


class _Prepared:
    """An allocated graph: the structures of its stacks' tensors, and the inputs to fill."""

    __slots__ = ("columns", "experts", "graph", "slots", "stacks", "tokens", "vectors", "weight_rows")

    def __init__(
        self, graph: int, stacks: Sequence[int], vectors: Sequence[int], slots: int, pairs: PairInputs, n_pairs: int
    ) -> None:
        self.graph, self.stacks = graph, [ggml.tensor_at(stack) for stack in stacks]
        self.vectors = [ggml.tensor_at(vector) if vector else None for vector in vectors]
        self.experts: NDArray[Any] | None = None
        if pairs.experts:
            self.experts = ggml.array_at(ggml.ggml_get_data(pairs.experts), np.int32, n_pairs)
        self.slots = ggml.array_at(ggml.ggml_get_data(slots), np.int32, n_pairs)
        self.tokens: NDArray[Any] | None = None
        if pairs.tokens:
            self.tokens = ggml.array_at(ggml.ggml_get_data(pairs.tokens), np.int32, n_pairs)
        self.columns = ggml.array_at(ggml.ggml_get_data(pairs.columns), np.int64, n_pairs)
        self.weight_rows = ggml.array_at(ggml.ggml_get_data(pairs.weight_rows), np.int32, n_pairs)


class ExpertGraphs:
    """Graphs by shape, in one buffer that is sized for the largest batch at the start."""

    def __init__(
        self,
        backend: CpuBackend,
        exchange: Exchange,
        classes: set[SlotClass],
        vectors: HostVectors = NO_VECTORS,
    ) -> None:
        self._backend, self._exchange, self._vectors = backend, exchange, vectors
        self._graphs = GraphPool(backend.buft, self._build, _MAX_GRAPHS)
        # Where a stack lies before its first run; never read, but the allocator must take it for allocated.
        self._nowhere = backend.allocate(256)
        n_tokens, n_used = exchange.shape.n_tokens, exchange.shape.n_used
        for slot_class, form in product(classes, vectors.forms or {()}):
            self._graphs.reserve(_Shape(slot_class, n_tokens, n_tokens, False, form))
            self._graphs.reserve(_Shape(slot_class, n_used, 1, True, form))
            self._graphs.reserve(_Shape(slot_class, n_used, 1, False, form))

    @property
    def compute_bytes(self) -> int:
        """Size of the buffer that the graphs share."""
        return self._graphs.n_bytes

    def most_pairs(self, bank: Bank) -> int:
        """Pairs that one graph should do at most, for its memory to stay within what one expert's batch takes."""
        return min(self._exchange.shape.n_tokens, max(1, _MOST_MAPPING // (_MAPPING_BYTES * bank.n_slots)))

    def run(self, work: BankWork, n_tokens: int, is_cancelled: Callable[[], bool] | None = None) -> None:
        """Fills the columns of all pairs. Raises EngineAbortedError."""
        bank = work.bank
        form = self._vectors.form(work.layer)
        prepared = self._graphs.get(_Shape(work.slot_class, len(work.columns), n_tokens, work.is_one_row, form))
        for stack, address in zip(prepared.stacks, bank.addresses, strict=True):
            stack.data, stack.ne[2], stack.nb[2] = address, bank.n_slots, bank.stride
            stack.nb[3] = bank.stride * bank.n_slots
        if prepared.experts is not None:
            prepared.experts[:] = work.experts
            for vector, address in zip(prepared.vectors, self._vectors.addresses(work.layer), strict=True):
                if vector is not None:
                    vector.data = address
        prepared.slots[:] = work.slots
        prepared.columns[:] = work.columns
        prepared.weight_rows[:] = work.columns
        if prepared.tokens is not None:
            prepared.tokens[:] = work.columns // self._exchange.shape.n_used
        if is_cancelled is None:
            self._backend.compute(prepared.graph)
        else:
            self._backend.compute_until(prepared.graph, is_cancelled)

    def _build(self, shape: _Shape) -> BuiltGraph[_Prepared]:
        n_bytes = 2 * _N_NODES * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(_N_NODES, False)
        ctx = ggml.ggml_init(ggml.InitParams(n_bytes, None, True))
        graph = ggml.ggml_new_graph_custom(ctx, _N_NODES, False)
        stacks = [int(ggml.ggml_new_tensor_3d(ctx, kind, ne[0], ne[1], 1)) for kind, ne in shape.slot_class]
        vectors = _add_vectors(ctx, shape)
        for stack in (*stacks, *filter(None, vectors)):
            structure = ggml.tensor_at(stack)
            structure.buffer = self._nowhere
            structure.data = ggml_backend.ggml_backend_buffer_get_base(self._nowhere)
        slots = add_input(ctx, Type.I32, shape.n_pairs)
        builder = PairBuilder(ctx, graph, self._exchange, shape.n_tokens)
        extras = ExpertExtras(self._vectors.activation, tuple(vectors[:3]), tuple(vectors[3:]))
        pairs = builder.add(stacks, slots, shape.n_pairs, extras, gathers=not shape.is_one_row)
        return BuiltGraph(ctx, graph, lambda: _Prepared(graph, stacks, vectors, slots, pairs, shape.n_pairs))

    def close(self) -> None:
        """Frees graphs and buffer."""
        self._graphs.close()
        if self._nowhere:
            ggml_backend.ggml_backend_buffer_free(self._nowhere)
            self._nowhere = 0


def _add_vectors(ctx: int, shape: _Shape) -> list[int]:
    """Tensors of the shapes of a layer's biases and scales, 0 for those that there are not."""
    if not shape.form:
        return []
    vectors = []
    for (n_stored, n_bytes), (_, ne) in zip(shape.form[:3], shape.slot_class, strict=True):
        vectors.append(int(ggml.ggml_new_tensor_2d(ctx, Type.F32, ne[1], n_stored)) if n_stored else 0)
        if n_stored:  # Narrower experts use the first of each.
            tensor = ggml.tensor_at(vectors[-1])
            tensor.nb[1] = n_bytes
            tensor.nb[2] = tensor.nb[3] = n_bytes * n_stored
    scales = [int(ggml.ggml_new_tensor_2d(ctx, Type.F32, 1, n)) if n else 0 for n, _ in shape.form[3:]]
    return vectors + scales
