"""Products, norms and views that attention, FFN and output have in common; tensors are addresses."""

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.graph.weights import Linear


def add_linear(ctx: int, linear: Linear, hidden: int) -> int:
    """Multiplies with a matrix, and adds its bias if it has one."""
    product: int = ggml.ggml_mul_mat(ctx, linear.weight, hidden)
    return int(ggml.ggml_add(ctx, product, linear.bias)) if linear.bias else product


def add_norm(ctx: int, hidden: int, norm: Linear, eps: float) -> int:
    """Normalises along the first axis, multiplies with a vector, and adds its bias if it has one."""
    return add_scaled(ctx, int(ggml.ggml_rms_norm(ctx, hidden, eps)), norm)


def add_scaled(ctx: int, normed: int, norm: Linear) -> int:
    """The second half of a norm: its vector, and its bias if it has one."""
    scaled = ggml.ggml_mul(ctx, normed, norm.weight)
    return int(ggml.ggml_add(ctx, scaled, norm.bias)) if norm.bias else int(scaled)


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
