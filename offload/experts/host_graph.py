"""Computes selected experts that lie in slots of host memory, all those of one class in one graph.

A bank of slots is a stack of matrices for `mul_mat_id`, whose ids are numbers of slots that are filled: nothing
negative or stale can reach it, and no token has an id twice. Its kernels, unlike those of `mul_mat`, are the ones the
uncut graph takes. A graph for any pairs is told before each run where its bank begins, so that it serves every layer;
one for a single token's experts is a layer's own. An expert whose matrices do not lie as the others' do is a bank of
its own; a single token's experts of that kind still have one graph together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.offload.cache.host_slots import Addresses, Bank
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
_N_NODES = 80
_MAPPING_BYTES = 8
"""What `mul_mat_id` sets aside for each slot and pair."""
_MOST_MAPPING = 8 << 20


_Numbers = NDArray[np.integer[Any]] | Sequence[int] | int
Form = tuple[tuple[int, int], ...]
"""The number of experts and the bytes of each in the stacks of their matrices' biases, then of their scales.

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
    n_expert_used + rank), all integers [n].

    `is_token` says that these are all pairs of a single token, in the order of their columns, and each with an expert
    of its own.
    """

    layer: int
    slot_class: SlotClass
    bank: Bank
    slots: NDArray[np.integer[Any]]
    experts: NDArray[np.int64]
    columns: NDArray[np.int64]
    is_token: bool = False

    def part(self, begin: int, end: int) -> "BankWork":
        """Some of the pairs."""
        own = slice(begin, end)
        return replace(
            self, slots=self.slots[own], experts=self.experts[own], columns=self.columns[own], is_token=False
        )


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The shape of a graph for any pairs, of whatever layer and bank."""

    slot_class: SlotClass
    form: Form
    n_pairs: int
    n_tokens: int


@dataclass(frozen=True, slots=True)
class _Apart:
    """The shape of a graph for a single token's experts of whatever layer, each of which is a bank of its own."""

    slot_class: SlotClass
    form: Form
    n_pairs: int


@dataclass(frozen=True, slots=True)
class TokenShape:
    """The shape of a graph for a single token's experts, all of one layer and in one bank."""

    layer: int
    slot_class: SlotClass
    bank: Bank


class _Prepared:
    """An allocated graph: the structures of its stacks' and vectors' tensors, and the inputs to fill."""

    __slots__ = ("_bank", "columns", "experts", "graph", "slots", "stacks", "tokens", "vectors")

    def __init__(self, graph: int, stacks: Sequence[int], vectors: Sequence[int], slots: int, experts: int) -> None:
        self.graph, self.stacks = graph, [ggml.tensor_at(stack) for stack in stacks]
        self._bank: Bank | None = None
        self.vectors = [ggml.tensor_at(vector) if vector else None for vector in vectors]
        self.slots = _vector(slots)
        self.experts = _vector(experts) if experts else None

    def gather(self, pairs: PairInputs) -> None:
        """Has the inputs of any pairs."""
        self.tokens, self.columns = _vector(pairs.tokens), _vector(pairs.columns)

    def write(self, slots: _Numbers, columns: _Numbers, tokens: _Numbers, experts: _Numbers) -> None:
        """Fills the inputs of any pairs."""
        self.slots[:], self.columns[:], self.tokens[:] = slots, columns, tokens
        if self.experts is not None:
            self.experts[:] = experts

    def point(self, bank: Bank, vectors: Sequence[int]) -> None:
        """Lets the stacks be those of a bank, and the vectors begin at these addresses."""
        if bank is self._bank and not vectors:
            return
        self._bank = bank
        for stack, address in zip(self.stacks, bank.addresses, strict=True):
            stack.data, stack.ne[2], stack.nb[2] = address, bank.n_slots, bank.stride
            stack.nb[3] = bank.stride * bank.n_slots
        if vectors:
            self._point_vectors(vectors)

    def point_apart(self, experts: Sequence[Addresses], vectors: Sequence[int]) -> None:
        """Lets the stacks be single matrices, gate, up and down of one expert after the other."""
        for stack, address in zip(self.stacks, chain.from_iterable(experts), strict=True):
            stack.data = address
        self._point_vectors(vectors)

    def _point_vectors(self, vectors: Sequence[int]) -> None:
        for vector, address in zip(self.vectors, vectors, strict=True):
            if vector is not None:
                vector.data = address


def _vector(tensor: int) -> NDArray[np.int32]:
    return ggml.array_at(ggml.ggml_get_data(tensor), np.int32, int(ggml.tensor_at(tensor).ne[0]))


class ExpertGraphs:
    """Graphs by shape, in one buffer that is sized for the largest batch at the start; `n_layer` layers are cut."""

    def __init__(
        self,
        backend: CpuBackend,
        exchange: Exchange,
        classes: set[SlotClass],
        n_layer: int,
        vectors: HostVectors = NO_VECTORS,
    ) -> None:
        self._backend, self._exchange, self._vectors = backend, exchange, vectors
        self._graphs = GraphPool(backend.buft, self._build, _MAX_GRAPHS + n_layer)
        # Where a stack lies before its first run; never read, but the allocator must take it for allocated.
        self._nowhere = backend.allocate(256)
        n_tokens, n_used = exchange.shape.n_tokens, exchange.shape.n_used
        for slot_class, form in product(classes, vectors.forms or {()}):
            self._graphs.reserve(_Pairs(slot_class, form, n_tokens, n_tokens))
            self._graphs.reserve(_Pairs(slot_class, form, n_used, 1))

    @property
    def compute_bytes(self) -> int:
        """Size of the buffer that the graphs share."""
        return self._graphs.n_bytes

    def most_pairs(self, bank: Bank) -> int:
        """Pairs that one graph should do at most, for its memory to stay within what one expert's batch takes."""
        return min(self._exchange.shape.n_tokens, max(1, _MOST_MAPPING // (_MAPPING_BYTES * bank.n_slots)))

    def run(self, work: BankWork, n_tokens: int, is_cancelled: Callable[[], bool] | None = None) -> None:
        """Fills the columns of all pairs. Raises EngineAbortedError."""
        if work.is_token:
            self.run_token(TokenShape(work.layer, work.slot_class, work.bank), work.slots, work.experts)
            return
        form = self._vectors.form(work.layer)
        prepared = self._graphs.get(_Pairs(work.slot_class, form, len(work.columns), n_tokens))
        prepared.point(work.bank, self._vectors.addresses(work.layer))
        tokens = work.columns // self._exchange.shape.n_used if n_tokens > 1 else 0
        prepared.write(work.slots, work.columns, tokens, work.experts)
        if is_cancelled is None:
            self._backend.compute(prepared.graph)
        else:
            self._backend.compute_until(prepared.graph, is_cancelled)

    def run_apart(
        self, layer: int, slot_class: SlotClass, experts: Sequence[tuple[int, Addresses]], columns: Sequence[int]
    ) -> None:
        """Fills these columns of a single token; `experts` are the layer's numbers, and where their matrices begin."""
        form = self._vectors.form(layer)
        prepared = self._graphs.get(_Apart(slot_class, form, len(experts)))
        prepared.point_apart([addresses for _, addresses in experts], self._vectors.addresses(layer))
        prepared.write(0, columns, 0, [number for number, _ in experts])
        self._backend.compute(prepared.graph)

    def run_token(self, shape: TokenShape, slots: NDArray[np.integer[Any]], experts: NDArray[np.integer[Any]]) -> None:
        """Fills all columns of a single token, whose `experts` of a layer are in these slots, no two of them equal."""
        prepared = self._graphs.get(shape)
        prepared.slots[:] = slots
        if prepared.experts is not None:
            prepared.experts[:] = experts
        self._backend.compute(prepared.graph)

    def _build(self, shape: _Pairs | _Apart | TokenShape) -> BuiltGraph[_Prepared]:
        n_banks = shape.n_pairs if isinstance(shape, _Apart) else 1
        n_nodes = n_banks * _N_NODES
        n_bytes = 2 * n_nodes * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(n_nodes, False)
        ctx = ggml.ggml_init(ggml.InitParams(n_bytes, None, True))
        graph = ggml.ggml_new_graph_custom(ctx, n_nodes, False)
        matrices = [*shape.slot_class] * n_banks
        stacks = [int(ggml.ggml_new_tensor_3d(ctx, kind, ne[0], ne[1], 1)) for kind, ne in matrices]
        form = self._vectors.form(shape.layer) if isinstance(shape, TokenShape) else shape.form
        vectors = _add_vectors(ctx, shape.slot_class, form)
        for stack in (*stacks, *filter(None, vectors)):
            structure = ggml.tensor_at(stack)
            structure.buffer = self._nowhere
            structure.data = ggml_backend.ggml_backend_buffer_get_base(self._nowhere)
        n_biases, n_matrices = len(vectors) // 2, len(shape.slot_class.matrices)
        vectors_of_both = tuple(vectors[:n_biases]), tuple(vectors[n_biases:])
        extras = ExpertExtras(self._vectors.activation, *vectors_of_both, on_cpu=True)
        builder = PairBuilder(ctx, graph, self._exchange, shape.n_tokens if isinstance(shape, _Pairs) else 1)
        if isinstance(shape, TokenShape):
            slots = add_input(ctx, self._exchange.shape.n_used)
            experts = builder.add_token(stacks, slots, extras)
        else:
            pairs = PairInputs.apart(ctx, shape.n_pairs, extras)
            slots, experts = pairs.slots, pairs.experts
            if isinstance(shape, _Pairs):
                builder.add(stacks, pairs, extras)
            else:
                for number in range(shape.n_pairs):
                    own = stacks[n_matrices * number : n_matrices * (number + 1)]
                    builder.add(own, pairs.one(ctx, number), extras)

        def prepare() -> _Prepared:
            prepared = _Prepared(graph, stacks, vectors, slots, experts)
            if isinstance(shape, TokenShape):
                prepared.point(shape.bank, self._vectors.addresses(shape.layer))
            else:
                prepared.gather(pairs)
            return prepared

        return BuiltGraph(ctx, graph, prepare)

    def close(self) -> None:
        """Frees graphs and buffer."""
        self._graphs.close()
        if self._nowhere:
            ggml_backend.ggml_backend_buffer_free(self._nowhere)
            self._nowhere = 0


def _add_vectors(ctx: int, slot_class: SlotClass, form: Form) -> list[int]:
    """Tensors of the shapes of a layer's biases and scales, 0 for those that there are not."""
    if not form:
        return []
    vectors, n_biases = [], len(form) // 2
    for (n_stored, n_bytes), (_, ne) in zip(form[:n_biases], slot_class, strict=True):
        vectors.append(int(ggml.ggml_new_tensor_2d(ctx, Type.F32, ne[1], n_stored)) if n_stored else 0)
        if n_stored:  # Narrower experts use the first of each.
            tensor = ggml.tensor_at(vectors[-1])
            tensor.nb[1] = n_bytes
            tensor.nb[2] = tensor.nb[3] = n_bytes * n_stored
    scales = [int(ggml.ggml_new_tensor_2d(ctx, Type.F32, 1, n)) if n else 0 for n, _ in form[n_biases:]]
    return vectors + scales
