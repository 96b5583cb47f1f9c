"""What a device computes of a model's steps beside its experts, asked of its driver before anything is planned.

One layer of each kind is built as it will be computed, on tensors without memory, and each operation is asked for:
attention with the model's heads and KV cache, its rotation, the router, products with every type of matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from gguf import GGMLQuantizationType

from slimoe.offload.ggml import device as ggml_device
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.devices import Device
from slimoe.offload.graph.attention import StepInputs, StepShape
from slimoe.offload.graph.expert_ffn import add_expert_scale, expert_input, layer_extras
from slimoe.offload.graph.linear import add_scaled, last_rows
from slimoe.offload.graph.router import add_router, router_input, select_experts
from slimoe.offload.graph.step import BlockBuilder, new_graph
from slimoe.offload.graph.weights import Form, WeightSubset, load_weights
from slimoe.offload.memory.kv_cache import KVSize, hadamard_lengths
from slimoe.offload.model.regrouped import join_layers, without_experts
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import LayerSources, ModelSources, WeightSource
from slimoe.offload.plan.device_support import has_room
from slimoe.offload.resources.memory import human

_ATTENTION = "FLASH_ATTN_EXT"


@dataclass(frozen=True, slots=True)
class StepNeeds:
    """The largest step of a model: the size of the KV cache, its tokens and its rows of logits."""

    kv: KVSize
    n_batch: int
    n_rows: int


def not_computed(
    device: Device, spec: ModelSpec, sources: ModelSources, step: StepNeeds, matrices: Sequence[WeightSource] = ()
) -> str:
    """What the device lacks for a model's steps beside its experts, for a person; empty if it lacks nothing.

    The steps multiply with some `matrices` beside the model's.
    """
    sources = join_layers(without_experts(sources))
    kinds: dict[tuple[object, ...], int] = {}
    for index, layer in enumerate(sources.layers):
        kinds.setdefault((_shapes(layer), spec.window(index), spec.layer_shape(index)), index)
    with _Shapes(spec, sources, tuple(kinds.values()), step, matrices) as shapes:
        n_runs = 1 if spec.recurrent else 0
        for n_tokens, n_rows in ((step.n_batch, step.n_rows), (1, 1)):
            n_kv = step.kv.n_cells, step.kv.n_window_cells or step.kv.n_cells
            shape = StepShape(n_tokens, *n_kv, n_rows, n_runs)
            if lack := shapes.lacking(device, shape):
                return f"{device.name} ({device.description}) {lack}"
    return ""


def _shapes(layer: LayerSources) -> tuple[object, ...]:
    """What makes one layer's operations differ from another's."""
    linears = (*layer.matrices, *layer.gate_up, *((layer.down,) if layer.down else ()))
    weights = (*(one for linear in linears for one in linear.parts), *layer.vectors)
    has = layer.attn_norm is not None, layer.ffn_norm is not None, layer.router is not None, layer.latent is not None
    return (*has, *((weight.type, weight.ne) for weight in weights))


class _Shapes:
    """The tensors of some `layers` of a model, and of its KV cache there, in no memory."""

    def __init__(
        self,
        spec: ModelSpec,
        sources: ModelSources,
        layers: Sequence[int],
        step: StepNeeds,
        matrices: Sequence[WeightSource],
    ) -> None:
        self._spec, self._sources, self._layers, self._step, self._matrices = spec, sources, layers, step, matrices
        n_tensors = 64 + 144 * len(layers)
        self._ctx = ggml.ggml_init(ggml.InitParams(n_tensors * ggml.ggml_tensor_overhead(), None, True))
        self._made: dict[str, int] = {}
        own = {layer: spec.attention_of(layer) for layer in layers if layer in spec.attention_layers}
        self.keys, self.values = dict[int, int](), dict[int, int]()
        for layer, of in own.items():
            cells = (step.kv.cells_of(spec, layer), of.n_head_kv)
            self.keys[layer] = self._new(step.kv.kind, of.key_length, *cells)
            if of.has_values:
                self.values[layer] = self._new(step.kv.kind, of.value_length, *cells)
        lengths = {n for of in own.values() for n in hadamard_lengths(of, step.kv.kind) if n}
        self.hadamards = {n: self._new(GGMLQuantizationType.F32, n, n) for n in sorted(lengths)}
        for n, tensor in self.hadamards.items():
            ggml.ggml_set_name(tensor, f"a Hadamard matrix of {n} rows".encode())
        self.convs, self.matrices = dict[int, int](), dict[int, int]()
        if recurrent := spec.recurrent:
            kept = [layer for layer in layers if layer in spec.recurrent_layers]
            for held, n_kept in ((self.convs, recurrent.n_conv_kept), (self.matrices, recurrent.n_matrix_kept)):
                ne = n_kept // recurrent.n_parts, recurrent.n_parts * step.kv.n_states
                held |= {layer: self._new(GGMLQuantizationType.F32, *ne) for layer in kept if n_kept}

    def __enter__(self) -> "_Shapes":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        ggml.ggml_free(self._ctx)

    def weight(self, source: WeightSource, form: Form) -> int:
        """A tensor of the weight's shape."""
        if source.name not in self._made:
            self._made[source.name] = self._new(source.type, *source.ne)
            ggml.ggml_set_name(self._made[source.name], source.name.encode()[:63])
        return self._made[source.name]

    def lacking(self, device: Device, shape: StepShape) -> str:
        """The first thing that the device lacks for a step of this shape."""
        ctx, graph = new_graph(self._spec, len(self._layers))
        try:
            self._add_step(ctx, graph, shape)
            for index in range(ggml.ggml_graph_n_nodes(graph)):
                node = ggml.ggml_graph_node(graph, index)
                if not ggml_device.ggml_backend_dev_supports_op(device.handle, node):
                    return _told(node)
        finally:
            ggml.ggml_free(ctx)
        large = (tensor for tensor in self._made.values() if not has_room(device, tensor))
        return next((f"does not hold {_named(tensor)} in one piece." for tensor in large), "")

    def _add_step(self, ctx: int, graph: int, shape: StepShape) -> None:
        """Adds one layer of each kind, whose experts have given their outputs, and the logits."""
        spec, n = self._spec, shape.n_tokens
        weights = load_weights(self, self._sources, lambda _: "copied", 0, WeightSubset(self._layers))
        kinds = GGMLQuantizationType
        tokens, positions = (self._new(kinds.I32, n) for _ in range(2))
        temperatures = self._new(kinds.F32, n) if spec.attention.temperature else 0
        mask, window_mask = (self._new(kinds.F16, n_kv, n) for n_kv in (shape.n_kv, shape.n_window_kv))
        cells, window_cells = (self._new(kinds.I64, n) for _ in range(2))
        n_parts = spec.recurrent.n_parts if spec.recurrent else 0
        states = [self._new(kinds.I32, n_parts), self._new(kinds.I64, n_parts), self._new(kinds.I32, 1)]
        states = states if n_parts else [0, 0, 0]
        inputs = StepInputs(tokens, positions, cells, mask, window_cells, window_mask, temperatures, *states)
        blocks = BlockBuilder(ctx, graph, spec, weights, self, shape, inputs)
        for index in self._layers:
            hidden, layer = blocks.add_attention(index, self._new(kinds.F32, spec.n_embd, n)), weights.layers[index]
            if layer.router is None or layer.ffn_norm is None:
                hidden = blocks.add_feed_forward(index, hidden)
            else:
                n_rows = blocks.n_rows(index)
                plain = int(ggml.ggml_rms_norm(ctx, hidden, spec.rms_eps))
                normed = add_scaled(ctx, plain, layer.ffn_norm)
                selection = add_router(ctx, spec, layer, router_input(ctx, spec, layer, plain, normed))
                ggml.ggml_build_forward_expand(graph, expert_input(ctx, layer, normed))
                outputs = self._new(kinds.F32, spec.n_embd_expert, spec.n_expert_used, n_rows)
                ids = select_experts(ctx, spec, selection.ranked)
                for bias in layer.expert_biases:
                    rows = self._new(kinds.F32, ggml.tensor_at(bias).ne[0], spec.n_expert_used, n_rows)
                    ggml.ggml_build_forward_expand(graph, ggml.ggml_add_id(ctx, rows, bias, ids))
                extras = layer_extras(ctx, spec.architecture, layer, ids)
                for scale in filter(None, extras.scales):
                    ggml.ggml_build_forward_expand(graph, add_expert_scale(ctx, outputs, scale, ids))
                weighted = ggml.ggml_mul(ctx, outputs, selection.weights)
                hidden = blocks.add_experts(index, weighted, normed, hidden, selection)
            ggml.ggml_build_forward_expand(graph, hidden)
        for matrix in self._matrices:
            product = ggml.ggml_mul_mat(ctx, self.weight(matrix, "copied"), self._new(kinds.F32, matrix.ne[0], n))
            ggml.ggml_build_forward_expand(graph, product)
        blocks.add_logits(blocks.add_output_norm(last_rows(ctx, self._new(kinds.F32, spec.n_embd, n), shape.n_out)))

    def _new(self, kind: int, *ne: int) -> int:
        new = {1: ggml.ggml_new_tensor_1d, 2: ggml.ggml_new_tensor_2d, 3: ggml.ggml_new_tensor_3d}[len(ne)]
        return int(new(self._ctx, kind, *ne))


def _told(node: int) -> str:
    """What is lacking for an operation, the end of a sentence whose subject is the device."""
    name, tensor = ggml.ggml_op_desc(node).decode(), ggml.tensor_at(node)
    first = tensor.src[0] or node
    if name == _ATTENTION:
        kind = GGMLQuantizationType(ggml.tensor_at(tensor.src[1]).type).name
        return f"does not attend with heads of {ggml.tensor_at(first).ne[0]} over a KV cache of {kind}."
    if name == "MUL_MAT":
        return f"does not multiply with {_named(first)}: it lacks the type, or binds no tensor of that size."
    kind, ne = (
        GGMLQuantizationType(ggml.tensor_at(first).type).name,
        ggml.tensor_at(first).ne[: ggml.ggml_n_dims(first)],
    )
    return f"does not compute {name} of {kind} ({' x '.join(map(str, ne))})."


def _named(tensor: int) -> str:
    one = ggml.tensor_at(tensor)
    kind = GGMLQuantizationType(one.type).name
    return f"{one.name.decode('utf-8', 'replace')} ({kind}, {human(ggml.ggml_nbytes(tensor))})"
