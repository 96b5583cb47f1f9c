"""Products, norms and views that attention, FFN and output have in common; tensors are addresses."""

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.graph.weights import Linear


def add_linear(ctx: int, linear: Linear, hidden: int) -> int:
    """Multiplies with a matrix, and adds its bias if it has one."""
    product: int = ggml.ggml_mul_mat(ctx, linear.weight, hidden)
    return int(ggml.ggml_add(ctx, product, linear.bias)) if linear.bias else product


def add_rms_norm(ctx: int, hidden: int, weight: int, eps: float) -> int:
    """Normalises along the first axis, and multiplies with `weight`."""
    return int(ggml.ggml_mul(ctx, ggml.ggml_rms_norm(ctx, hidden, eps), weight))


def last_rows(ctx: int, matrix: int, n_rows: int) -> int:
    """The last `n_rows` rows of a matrix."""
    tensor = ggml.tensor_at(matrix)
    n_skipped = tensor.ne[1] - n_rows
    if not n_skipped:
        return matrix
    offset = n_skipped * tensor.nb[1]
    return int(ggml.ggml_view_2d(ctx, matrix, tensor.ne[0], n_rows, tensor.nb[1], offset))
