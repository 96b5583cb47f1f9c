"""The feed-forward part of a block, dense or of experts: the only place that knows its mathematics.

The graph of a whole step, the host's graphs of single experts and the devices' graphs over slots all build it here, so
that they add the same operations in the same order, llama.cpp's.
"""

from collections.abc import Sequence

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.graph.linear import add_linear
from slimoe.offload.graph.weights import LayerWeights, SharedWeights


def add_dense_ffn(ctx: int, layer: LayerWeights, normed: int) -> int:
    """The output of a dense FFN, [n_embd, n_rows]."""
    projected = [add_linear(ctx, part, normed) for part in layer.gate_up]
    return add_linear(ctx, layer.down, _activated(ctx, projected))


def add_shared_expert(ctx: int, shared: SharedWeights, normed: int) -> int:
    """The output of a shared expert, [n_embd, n_rows]."""
    projected = [add_linear(ctx, part, normed) for part in shared.gate_up]
    output = add_linear(ctx, shared.down, _activated(ctx, projected))
    if not shared.gate:
        return output
    gate = ggml.ggml_mul_mat(ctx, shared.gate, normed)
    # llama.cpp's sigmoid here, to the last bit.
    return int(ggml.ggml_mul(ctx, output, ggml.ggml_div(ctx, ggml.ggml_silu(ctx, gate), gate)))


def add_expert_ffn(ctx: int, gate_up: Sequence[int], down: int, rows: int, ids: int) -> int:
    """The outputs of the selected experts, [n_embd, n_selected, n_rows], not yet weighted.

    `gate_up` are two stacks of matrices or a joined one, gate first; `rows` [n_embd, 1, n_rows] are the inputs, `ids`
    I32 [n_selected, n_rows] the places of the selected experts in the stacks.
    """
    projected = [int(ggml.ggml_mul_mat_id(ctx, stack, rows, ids)) for stack in gate_up]
    return int(ggml.ggml_mul_mat_id(ctx, down, _activated(ctx, projected), ids))


def add_expert_sum(ctx: int, outputs: int) -> int:
    """Sums the weighted outputs [n_embd, n_expert_used, n_rows] over the experts."""
    tensor = ggml.tensor_at(outputs)
    n_embd, n_used, n_rows = tensor.ne[:3]
    total, *others = (
        ggml.ggml_view_2d(ctx, outputs, n_embd, n_rows, tensor.nb[2], index * tensor.nb[1]) for index in range(n_used)
    )
    for one in others:
        total = ggml.ggml_add(ctx, total, one)
    return int(total)


def _activated(ctx: int, projected: Sequence[int]) -> int:
    """SwiGLU of gate and up, which are two tensors or the halves of one."""
    if len(projected) == 2:
        return int(ggml.ggml_swiglu_split(ctx, *projected))
    return int(ggml.ggml_swiglu(ctx, projected[0]))
