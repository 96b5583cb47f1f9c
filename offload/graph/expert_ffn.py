"""The feed-forward part of a block, dense or of experts: the only place that knows its mathematics.

The graph of a whole step, and the host's and the devices' graphs over slots all build it here, so that they add the
same operations in the same order, llama.cpp's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.graph.linear import add_factors, add_linear, in_parts
from slimoe.offload.graph.weights import LayerWeights, SharedWeights
from slimoe.offload.model.architecture import Activation, Architecture

_OAI_ALPHA, _OAI_LIMIT = 1.702, 7.0
"""The factor within the sigmoid of OpenAI's SwiGLU, and where its inputs are clamped."""
_DOWN = -1
"""The place of down among an expert's matrices."""
LEAST_AUX_SUM = 2.0**-14
"""What the weights of experts for which vectors stand are divided by at least, F16's least normal number."""


@dataclass(frozen=True, slots=True)
class ExpertExtras:
    """What the experts of a layer have beside their matrices: their activation, and tensor addresses of vectors.

    `biases` are those of each of an expert's matrices, F32 [n, n_stored], `scales` factors on their products, F32
    [1, n_stored]; either is () or has 0 for one that is missing. `ids` I32 [n_selected, n_rows] are the selected
    experts' places in both, which need not be their places in the stacks of matrices. Gate and up that have vectors are
    not joined.
    `is_down_wide` asks for kernels that take down's inputs as F32, or in a form of the same range; `on_cpu` says that
    the CPU computes them.
    """

    activation: Activation = "swiglu"
    biases: tuple[int, ...] = ()
    scales: tuple[int, ...] = ()
    ids: int = 0
    is_down_wide: bool = False
    on_cpu: bool = False

    @property
    def has_vectors(self) -> bool:
        """Whether there are biases or scales, which need the ids."""
        return bool(self.biases or self.scales)


NO_EXTRAS = ExpertExtras()


def add_dense_ffn(ctx: int, layer: LayerWeights, normed: int, activation: Activation) -> int:
    """The output of a dense FFN, [n_embd, n_rows]."""
    projected = [add_linear(ctx, part, normed) for part in layer.gate_up]
    return add_linear(ctx, layer.down, add_activation(ctx, projected, activation))


def add_shared_expert(ctx: int, shared: SharedWeights, normed: int, architecture: Architecture, *, on_cpu: bool) -> int:
    """The output of a shared expert, [n_embd, n_rows]."""
    projected = [add_linear(ctx, part, normed) for part in shared.gate_up]
    output = add_linear(ctx, shared.down, add_activation(ctx, projected, architecture.activation))
    if not shared.gate:
        return output
    gate = ggml.ggml_mul_mat(ctx, shared.gate, normed)
    if architecture.shared is not None and architecture.shared.gate == "sigmoid":
        factors = ggml.ggml_sigmoid(ctx, gate)
    else:
        factors = ggml.ggml_div(ctx, ggml.ggml_silu(ctx, gate), gate)
    return add_factors(ctx, output, int(factors), on_cpu=on_cpu)


def expert_input(ctx: int, layer: LayerWeights, normed: int) -> int:
    """What a layer's experts read, [n_embd_expert, n_rows]: the feed-forward part's input, or fewer values of it."""
    return add_linear(ctx, layer.expert_latent[0], normed) if layer.expert_latent else normed


def layer_extras(
    ctx: int, architecture: Architecture, layer: LayerWeights | None, ids: int = 0, *, on_cpu: bool = False
) -> ExpertExtras:
    """The extras of a layer whose selected experts are `ids`, where these are known; None has no vectors."""
    if layer is None:
        return ExpertExtras(architecture.activation, is_down_wide=architecture.is_down_wide, on_cpu=on_cpu)
    scales = tuple(
        int(ggml.ggml_reshape_2d(ctx, one, 1, ggml.tensor_at(one).ne[0])) if one else 0 for one in layer.expert_scales
    )
    return ExpertExtras(architecture.activation, layer.expert_biases, scales, ids, architecture.is_down_wide, on_cpu)


def add_expert_ffn(
    ctx: int, gate_up: Sequence[int], down: int, rows: int, ids: int, extras: ExpertExtras = NO_EXTRAS
) -> int:
    """The outputs of the selected experts, [n_embd_expert, n_selected, n_rows], not yet weighted.

    `gate_up` are two stacks of matrices, or a joined one, gate first, or that of up alone; `rows` are the inputs,
    [n_embd_expert, 1, n_rows], `ids` I32 [n_selected, n_rows] the places of the selected experts in the stacks.
    """
    projected = [_add_product(ctx, stack, rows, ids, extras, place) for place, stack in enumerate(gate_up)]
    return _add_product(ctx, down, add_activation(ctx, projected, extras.activation), ids, extras, _DOWN)


def _add_product(ctx: int, stack: int, rows: int, ids: int, extras: ExpertExtras, place: int) -> int:
    """The product of the selected experts' matrices, scaled and biased; `place` is that of their vectors."""
    product = int(ggml.ggml_mul_mat_id(ctx, stack, rows, ids))
    if extras.is_down_wide and place == _DOWN:
        ggml.ggml_prec_set_src(product, ggml.PREC_F32, 1)
    if extras.scales and extras.scales[place]:
        product = add_expert_scale(ctx, product, extras.scales[place], extras.ids, on_cpu=extras.on_cpu)
    if extras.biases and extras.biases[place]:
        bias, n_out = extras.biases[place], ggml.tensor_at(product).ne[0]
        tensor = ggml.tensor_at(bias)
        if tensor.ne[0] > n_out:  # Narrower experts use the first of each.
            bias = int(ggml.ggml_view_2d(ctx, bias, n_out, tensor.ne[1], tensor.nb[1], 0))
        product = int(ggml.ggml_add_id(ctx, product, bias, extras.ids))
    return product


def add_expert_scale(ctx: int, product: int, scale: int, ids: int, *, on_cpu: bool = False) -> int:
    """The product [n, n_selected, n_rows] of the selected experts, times their entries of `scale` F32 [1, n_stored]."""
    repeated = ggml.ggml_repeat_4d(ctx, scale, 1, ggml.tensor_at(scale).ne[1], ggml.tensor_at(ids).ne[1], 1)
    return add_factors(ctx, product, int(ggml.ggml_get_rows(ctx, repeated, ids)), on_cpu=on_cpu)


def add_expert_sum(ctx: int, outputs: int, ones: int) -> int:
    """Sums the weighted outputs [n_embd, n_expert_used, n_rows] over the experts, from the first to the last.

    Where the CPU computes it, it is one operation, an outer product with `ones` [1, n, n_rows], of which there are
    enough; elsewhere, with 0, an operation for each further expert. The values are the same to the last bit.
    """
    tensor = ggml.tensor_at(outputs)
    n_embd, n_used, n_rows = tensor.ne[:3]
    if ones and n_used > 1:
        each = ggml.ggml_view_3d(ctx, ones, 1, n_used, n_rows, *ggml.tensor_at(ones).nb[1:3], 0)
        return int(ggml.ggml_reshape_2d(ctx, ggml.ggml_out_prod(ctx, outputs, each), n_embd, n_rows))
    total, *others = (
        ggml.ggml_view_2d(ctx, outputs, n_embd, n_rows, tensor.nb[2], index * tensor.nb[1]) for index in range(n_used)
    )
    for one in others:
        total = ggml.ggml_add(ctx, total, one)
    return int(total)


def add_aux_experts(ctx: int, layer: LayerWeights, total: int, ids: int, weights: int, ones: int) -> int:
    """The sum `total` [n_embd, n_rows] of the computed experts, with what stands for those that are selected only.

    These are `ids` I32 [n_aux, n_rows], with the `weights` F32 [n_aux, n_rows]; `ones` as for `add_expert_sum`.
    """
    n_embd = ggml.tensor_at(total).ne[0]
    n_aux, n_rows = ggml.tensor_at(ids).ne[:2]
    flat = ggml.ggml_view_1d(ctx, ggml.ggml_cont(ctx, ids), n_aux * n_rows, 0)
    whole = ggml.ggml_clamp(ctx, ggml.ggml_sum_rows(ctx, weights), LEAST_AUX_SUM, math.inf)

    def mixed(vectors: int, factors: int) -> int:
        found = ggml.ggml_reshape_3d(ctx, ggml.ggml_get_rows(ctx, vectors, flat), n_embd, n_aux, n_rows)
        each = int(ggml.ggml_reshape_3d(ctx, factors, 1, n_aux, n_rows))
        return add_expert_sum(ctx, add_factors(ctx, int(found), each, on_cpu=bool(ones)), ones)

    gains, shifts = layer.aux
    gain = mixed(gains, ggml.ggml_div(ctx, weights, whole))
    gained = ggml.ggml_add(ctx, total, ggml.ggml_mul(ctx, total, gain))
    return int(ggml.ggml_add(ctx, gained, mixed(shifts, weights)))


def add_activation(ctx: int, projected: Sequence[int], activation: Activation = "swiglu") -> int:
    """The activation of gate and up, two tensors or, but for OpenAI's, the halves of one; or of up alone.

    It is one operation, or of up alone two.
    """
    if activation == "relu2":
        (up,) = projected
        return int(ggml.ggml_sqr(ctx, ggml.ggml_relu(ctx, up)))
    if activation == "swiglu_oai":
        gate, up = projected
        return int(ggml.ggml_swiglu_oai(ctx, gate, up, _OAI_ALPHA, _OAI_LIMIT))
    if activation == "geglu":
        gate, up = projected if len(projected) == 2 else _halves(ctx, projected[0])
        ne = ggml.tensor_at(gate).ne[:3]
        if ne[1] == ne[2] == 1:
            gate, up = in_parts(ctx, gate), in_parts(ctx, up)
        return int(ggml.ggml_reshape_3d(ctx, ggml.ggml_geglu_split(ctx, gate, up), *ne))
    if len(projected) == 2:
        return int(ggml.ggml_swiglu_split(ctx, *projected))
    return int(ggml.ggml_swiglu(ctx, projected[0]))


def _halves(ctx: int, joined: int) -> tuple[int, int]:
    """The first half of each row of a tensor of up to three axes, and the second."""
    tensor = ggml.tensor_at(joined)
    n = tensor.ne[0] // 2
    first, second = (
        int(ggml.ggml_view_3d(ctx, joined, n, tensor.ne[1], tensor.ne[2], tensor.nb[1], tensor.nb[2], begin))
        for begin in (0, n * tensor.nb[0])
    )
    return first, second
