"""What one layer of a compressed model stores: its matrices, which of them lie together, what a format cannot hold."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.converter.layout.plan import CompressPlan, ExpertPlan, LayerPlan, Types
from slimoe.converter.quant.mixes import fitting_type, layer_and_role
from slimoe.converter.source.model_source import (
    MatrixKey,
    ModelSource,
    block_key,
    expert_key,
    expert_width,
    vectors_key,
)
from slimoe.offload.errors import UnsupportedModelError
from slimoe.offload.model.expert_spec import LayerShape, dense_layer_keys
from slimoe.offload.model.native_format import constants_name, stack_name
from slimoe.offload.model.native_layout import LayerHints, NativeLayer
from slimoe.offload.model.tensor_list import AUX_GAIN, AUX_SHIFT, RECURRENT_FLOATS, ModelTensor

QKV = ("attn_q", "attn_k", "attn_v")
ROUTER, CHOICE_BIAS = "ffn_gate_inp", "exp_probs_b"
"""The roles of what has a row for each expert, and loses it with the expert."""
FLOATS = (ROUTER, *RECURRENT_FLOATS)
"""The roles of what has two axes and is always F32."""


def is_attention(role: str) -> bool:
    """Whether a tensor is part of a block's attention, or of the recurrence in its place, by its role."""
    return role.startswith(("attn_", "ssm_", "shortconv."))


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of the result [n_rows, n_per_row], or a vector (n_rows 1), and what it is made of.

    `key` names it in the result, by stock names whatever the format, and a stored expert there; `copy` 1 is an expert's
    second copy. `tensor` of the file holds it as number `slot`. It is the source's `origin`, of which only `rows`, or
    elements of a vector, if given, or what `expert` says of members of the source's layer `block`, or has `values`.
    With an `n_stack` it is so many matrices below each other, one for each head, a stack in the file.
    Vectors of all experts are the `origin` as a whole, or made of it for other `experts`.
    """

    key: MatrixKey
    tensor: str
    slot: int
    shape: tuple[int, int]
    type: Type
    is_vector: bool = False
    n_stack: int = 0
    copy: int = 0
    block: int = -1
    origin: MatrixKey | None = None
    rows: tuple[int, ...] | None = None
    expert: ExpertPlan | None = None
    values: NDArray[np.float32] | None = None
    experts: tuple[ExpertPlan, ...] = ()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the tensor, or of an expert's part of it, in numpy's order."""
        n_rows, n_per_row = self.shape
        if self.is_vector:
            return (n_per_row,)
        return (self.n_stack, n_rows // self.n_stack, n_per_row) if self.n_stack else self.shape

    @property
    def projection(self) -> str:
        """gate, up or down of an expert."""
        return self.key.name.split("_")[1]

    @property
    def is_constant(self) -> bool:
        """Whether it is no matrix to multiply with: norms, biases, taps, and vectors that stand for experts."""
        stands_for_experts = any(f".{role}." in self.tensor for role in ("ffn_novice", AUX_GAIN, AUX_SHIFT))
        is_float = layer_and_role(self.tensor)[1] in RECURRENT_FLOATS
        return self.is_vector or stands_for_experts or is_float or not self.tensor.endswith(".weight")


def source_matrix(source: ModelSource, key: MatrixKey, name: str, kind: Type, block: int = -1) -> Matrix:
    """All of a matrix of the source, as the tensor `name` of the result; vectors are always F32."""
    shape = source.shapes[key]
    if len(shape) == 1:
        return Matrix(MatrixKey(name), name, 0, (1, shape[0]), Type.F32, is_vector=True, block=block, origin=key)
    *stack, n_rows, n_per_row = shape
    flat = math.prod(stack) * n_rows, n_per_row
    return Matrix(MatrixKey(name), name, 0, flat, kind, n_stack=stack[0] if stack else 0, block=block, origin=key)


def matrix_width(source: ModelSource, block: int, expert: ExpertPlan) -> int:
    """The number of an expert's neurons."""
    if expert.kept is not None:
        return len(expert.kept)
    return expert_width(source, block, expert.members[0])


def fitted_types(source: ModelSource, block: int, expert: ExpertPlan, types: Types) -> Types:
    """The types of an expert's matrices where `types` are asked for: others stand in for what does not fit the rows."""
    rows = row_lengths(source, block, expert)
    return tuple(fitting_type(kind, n_per_row) for kind, n_per_row in zip(types, rows, strict=True))


def row_lengths(source: ModelSource, block: int, expert: ExpertPlan) -> tuple[int, ...]:
    """The length of the rows of each of an expert's matrices."""
    n_inner = len(source.spec.architecture.projections) - 1
    return (*[source.spec.n_embd_expert] * n_inner, matrix_width(source, block, expert))


def layer_shape(source: ModelSource, layer: LayerPlan) -> LayerShape:
    """Router rows and width of the widest expert; of width 1 where there are constant experts only."""
    if "ffn_up" in layer.types and not layer.rows:
        return LayerShape(0, source.shapes[block_key(layer.block, "ffn_up")][0], layer.has_attention)
    widths = [matrix_width(source, layer.block, expert) for expert in layer.experts]
    n_ff = max(widths, default=1) if layer.rows else 0
    return LayerShape(len(layer.rows), n_ff, layer.has_attention)


def native_layer(source: ModelSource, layer: LayerPlan) -> NativeLayer:
    """The native file's buckets, numbered as they are met: those of best copies first."""
    copies = [[(e.types, matrix_width(source, layer.block, e)) for e in layer.experts]]
    copies.append([(e.low_types, width) for e, (_, width) in zip(layer.experts, copies[0], strict=True) if e.low_types])
    numbers: dict[tuple[Types, int], int] = {}
    for kind in (one for part in copies for one in part):
        numbers.setdefault(kind, len(numbers))
    buckets = tuple(
        tuple(numbers[types, matrix_width(source, layer.block, e)] for types in (e.types, e.low_types) if types)
        for e in layer.experts
    )
    hints: dict[str, Any] = dict(layer.hints)
    return NativeLayer(layer.target, buckets, LayerHints(**hints))


class LayerMatrices:
    """Lists a layer's matrices in the file's order, which is that of use."""

    def __init__(self, source: ModelSource, index: int, plan: LayerPlan, *, native: bool) -> None:
        self.source, self.index, self.plan, self.native = source, index, plan, native

    def all(self, tensors: Iterable[ModelTensor]) -> Iterator[Matrix]:
        """Those of the layer's `tensors` and their biases, then the experts and the constants."""
        joins_qkv = self.source.spec.architecture.joins_qkv and not self.native
        for role in dict.fromkeys(tensor.role for tensor in tensors if not tensor.role.endswith("_exps")):
            for suffix in ("bias", "weight", "scale", ""):
                key = block_key(self.plan.block, role, suffix)
                if key not in self.source.shapes:
                    continue
                name, kind = block_key(self.index, role, suffix).name, self.plan.types.get(role, Type.F32)
                matrix = source_matrix(self.source, key, name, kind, self.plan.block)
                if role in QKV and joins_qkv and not matrix.is_vector:
                    matrix = self._joined(matrix, role)
                is_by_expert = role in (ROUTER, CHOICE_BIAS) and suffix != "scale"
                yield self._by_expert(matrix) if is_by_expert else matrix
        if not self.plan.rows:
            return
        layout = native_layer(self.source, self.plan)
        for bucket in range(layout.n_bucket):
            for projection in range(len(self.source.spec.architecture.projections)):
                for expert, copy, its_bucket, slot in layout.slots():
                    if its_bucket == bucket:
                        yield self._expert(expert, copy, projection, bucket, slot)
        yield from self._vectors()
        if self.plan.aux is not None:
            yield self._given(block_key(self.index, AUX_GAIN).name, self.plan.aux.gain)
            yield self._given(block_key(self.index, AUX_SHIFT).name, self.plan.aux.shift)
        if self.native and self.plan.constants is not None:
            yield self._given(constants_name(self.index), self.plan.constants)

    def _vectors(self) -> Iterator[Matrix]:
        """The biases and scales of the experts' products."""
        plan = self.plan
        for projection, kind in product(self.source.spec.architecture.projections, ("bias", "scale")):
            key, name = vectors_key(plan.block, projection, kind), vectors_key(self.index, projection, kind).name
            if key not in self.source.shapes:
                continue
            matrix = source_matrix(self.source, key, name, Type.F32, plan.block)
            n = len(plan.experts)
            kept = [(one.members, one.kept is None) for one in plan.experts]
            is_same = kept == [((number,), True) for number in range(self.source.shapes[key][0])]
            shape = (1, n) if matrix.is_vector else (n, self._n_out(projection))
            yield matrix if is_same else replace(matrix, shape=shape, experts=plan.experts)

    def _n_out(self, projection: str) -> int:
        """What the products of the layer's widest expert have of elements."""
        return self.source.spec.n_embd_expert if projection == "down" else layer_shape(self.source, self.plan).n_ff

    def _joined(self, matrix: Matrix, role: str) -> Matrix:
        """A part of attention's joined input, all in the type of that part for which the most bits are wanted."""
        kinds = (self.plan.types[one] for one in QKV)
        kind = max(kinds, key=lambda one: GGML_QUANT_SIZES[one][1] / GGML_QUANT_SIZES[one][0])
        return replace(matrix, tensor=block_key(self.index, "attn_qkv").name, slot=QKV.index(role), type=kind)

    def _given(self, name: str, values: NDArray[np.float32]) -> Matrix:
        assert values.ndim == 2
        shape = (values.shape[0], values.shape[1])
        return Matrix(MatrixKey(name), name, 0, shape, Type.F32, block=self.plan.block, values=values)

    def _by_expert(self, matrix: Matrix) -> Matrix:
        """The router, or its biases, of the rows that are left."""
        n_left, rows = len(self.plan.rows), self.plan.rows
        shape = (1, n_left) if matrix.is_vector else (n_left, matrix.shape[1])
        given = self.plan.router_biases.get(matrix.tensor.split(".")[2]) if matrix.is_vector else self.plan.router
        if given is not None:
            assert given.size == math.prod(shape)
            return replace(matrix, type=Type.F32, shape=shape, origin=None, values=given)
        n_rows = matrix.shape[matrix.is_vector]
        return replace(matrix, shape=shape, rows=None if rows == tuple(range(n_rows)) else rows)

    def _expert(self, number: int, copy: int, projection: int, bucket: int, slot: int) -> Matrix:
        expert, name = self.plan.experts[number], self.source.spec.architecture.projections[projection]
        types = expert.low_types if copy else expert.types
        assert types
        key = expert_key(self.index, name, number)
        width, n_embd = matrix_width(self.source, self.plan.block, expert), self.source.spec.n_embd_expert
        return Matrix(
            key=key,
            tensor=stack_name(self.index, name, bucket) if self.native else key.name,
            slot=slot,
            shape=(n_embd, width) if name == "down" else (width, n_embd),
            type=types[projection],
            copy=copy,
            block=self.plan.block,
            expert=expert,
        )


def check_uncompressed(source: ModelSource) -> None:
    """Raises UnsupportedModelError for a model with compressed experts, of which nothing else can be made."""
    if source.spec.n_expert_aux:
        found = "the model has compressed experts, fitted to the weights that it has."
        raise UnsupportedModelError(source.path, found, "Convert the model that it was made of.")


def check_plan(source: ModelSource, plan: CompressPlan) -> None:
    """Raises UnsupportedModelError, which names the source's layer, for what the plan's format cannot hold.

    Of the stock format this is what llama.cpp refuses or misreads; of the native one, what leaves too little.
    """
    is_whole, architecture = plan.file_type is not None, source.spec.architecture
    check_uncompressed(source)
    if not is_whole:
        if not source.spec.n_expert:
            raise UnsupportedModelError(source.path, "the model has no experts to compress.", "Convert it with --type.")
        if not any(layer.rows for layer in plan.layers):
            raise UnsupportedModelError(source.path, "no layer would keep an expert.", "Keep one layer's, at least.")
        if not any(layer.has_attention and not source.spec.is_recurrent(layer.block) for layer in plan.layers):
            raise UnsupportedModelError(
                source.path, "no layer would keep its attention.", "Keep one layer's, at least."
            )
    if plan.format == "stock":
        _check_widths(source, plan)
    first = next((layer for layer in plan.layers if layer.rows), plan.layers[0])
    for layer in plan.layers:
        problem = next(_stock_problems(source, first, layer), None) if plan.format == "stock" else None
        if problem is not None:
            hint = "Convert the model that it was made of." if is_whole else "Write the native format, which can."
            problem = f"layer {layer.block} {problem}, which the stock format cannot hold."
            raise UnsupportedModelError(source.path, problem, hint)
        if not is_whole:
            _check_layer(source, layer)
        _check_groups(source, layer)
        assert len(layer.target) == len(layer.rows)
        assert all(-len(_constants(layer)) <= target < len(layer.experts) for target in layer.target)
        assert set(layer.target) >= set(range(len(layer.experts))), "an expert that no row means"
    windowed = source.spec.windowed
    n_kinds = len({windowed[layer.block] for layer in plan.layers}) if windowed else 0
    if plan.format == "stock" and n_kinds < len(set(windowed)):
        problem = "all layers with a sliding window would be left out, or all without one."
        raise UnsupportedModelError(source.path, problem, "Keep one of each, or write the native format.")
    recurrent = source.spec.recurrent_layers
    if plan.format == "stock" and recurrent and not any(layer.block in recurrent for layer in plan.layers):
        problem = "no layer would keep its recurrence, without which llama.cpp runs no such model."
        raise UnsupportedModelError(source.path, problem, "Keep one layer's, or write the native format.")
    shapes, has_key_of_each = [layer_shape(source, layer) for layer in plan.layers], architecture.has_single_parts
    if plan.format == "stock" and not has_key_of_each and dense_layer_keys(shapes) is None:
        problem = "dense layers would lie among those with experts in a way that the stock format cannot say."
        raise UnsupportedModelError(source.path, problem, "Drop no blocks, or write the native format.")


def _check_widths(source: ModelSource, plan: CompressPlan) -> None:
    """In stock files all experts are as wide: the narrowest one says how wide they may be."""
    widths = dict[int, int]()
    for layer in plan.layers:
        for expert in layer.experts:
            widths.setdefault(matrix_width(source, layer.block, expert), layer.block)
    if len(widths) > 1:
        least, most = min(widths), max(widths)
        other = "others" if widths[least] == widths[most] else f"those of layer {widths[most]}"
        problem = f"layer {widths[least]} would have experts of {least} neurons, and {other} have {most}"
        hint = f"Make all as narrow with --width {least} (and --stats), or write the native format, which can."
        raise UnsupportedModelError(source.path, f"{problem}, which the stock format cannot hold.", hint)


def _check_layer(source: ModelSource, layer: LayerPlan) -> None:
    """What both formats ask of a layer from which something was removed."""
    n_used, n_kept = source.spec.n_expert_used, len(set(layer.target))
    if layer.rows and n_kept < n_used:
        problem = f"layer {layer.block} would keep {n_kept} experts, but {n_used} are used per token."
        raise UnsupportedModelError(source.path, problem, "Keep as many.")
    for number, expert in enumerate(layer.experts):
        if expert.low_types and type_bits(expert.low_types) >= type_bits(expert.types):
            problem = f"would have a second copy of expert {number} that is not smaller than the first"
            raise UnsupportedModelError(source.path, f"layer {layer.block} {problem}.", "Choose a smaller type for it.")


def _check_groups(source: ModelSource, layer: LayerPlan) -> None:
    """A router that selects groups of experts first takes them for equally large, and looks at two of each."""
    experts = source.spec.experts
    if experts.n_group < 2 or not layer.rows:
        return
    size = len(source.layers[layer.block].target) // experts.n_group
    groups_of_rows = [row // size for row in layer.rows]
    if groups_of_rows != sorted(groups_of_rows):
        problem = f"layer {layer.block} would have rows of its router among those of another group."
        raise UnsupportedModelError(source.path, problem, "Merge experts of the model that it was made of.")
    kept = Counter(groups_of_rows)
    sizes = {kept[group] for group in range(experts.n_group)}
    if len(sizes) > 1 or min(sizes) < 2 or min(sizes) * experts.n_group_used < experts.n_expert_used:
        groups = f"{min(sizes)} to {max(sizes)} experts of each of the {experts.n_group} groups"
        problem = f"layer {layer.block} would keep {groups} that its router selects from."
        hint = "Keep as many of each, two at least, or put constants in the others' place."
        raise UnsupportedModelError(source.path, problem, hint)


def type_bits(types: Types) -> float:
    """Bits per weight of an expert's matrices, added up over all of them, which have as many weights each."""
    return float(sum(8 * n_bytes / n for n, n_bytes in (GGML_QUANT_SIZES[kind] for kind in types)))


def _constants(layer: LayerPlan) -> range:
    return range(0 if layer.constants is None else len(layer.constants))


def _stock_problems(source: ModelSource, first: LayerPlan, layer: LayerPlan) -> Iterator[str]:
    """Why llama.cpp would refuse or misread the layer: all are alike in everything but their types."""
    has_single_parts = source.spec.architecture.has_single_parts
    if has_single_parts and layer.has_attention and not layer.has_ffn:
        return
    if not layer.has_attention and not (has_single_parts and layer.experts):
        yield "would be without attention"
    if layer_shape(source, layer).n_ff and not layer.rows:
        return
    if not layer.experts:
        yield "would be without experts"
    if _constants(layer):
        yield "would have constant vectors in place of experts"
    if layer.aux is not None:
        yield "would have compressed experts"
    if any(expert.low_types for expert in layer.experts):
        yield "would have second copies of experts"
    if len({expert.types for expert in layer.experts}) > 1:
        yield "would have experts of different types"
    if layer.target != tuple(range(len(layer.experts))):
        yield "would have a router whose rows mean other experts than their own"
    if len(layer.experts) != len(first.experts):
        yield f"would have {len(layer.experts)} experts and layer {first.block} {len(first.experts)}"
    width = matrix_width(source, first.block, first.experts[0])
    shared, n_shared = source.spec.architecture.shared, source.spec.experts.n_ff_shared
    if shared is not None and shared.width == "counted" and n_shared % width:
        yield f"would have experts of width {width}, of which its shared expert's, {n_shared}, is no multiple"
