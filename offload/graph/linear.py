"""Products, norms and views that attention, FFN and output have in common; tensors are addresses."""

import math

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.graph.weights import Linear

MOST_PARTS = 64
"""So many threads at most share one row."""


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


def add_factors(ctx: int, rows: int, factors: int, *, on_cpu: bool) -> int:
    """Rows [n, ...] that lie one behind the other, each times its own of the `factors` F32 [1, ...], or all times one.

    ggml's CPU multiplies rows by single values value by value. As outer products, sums of one term each, they are the
    same to the last bit and take a sixth to a fourteenth of the time; few devices have these.
    """
    if not on_cpu:
        return int(ggml.ggml_mul(ctx, rows, factors))
    n, *counts = ggml.tensor_at(rows).ne
    n_rows = math.prod(counts)
    if math.prod(ggml.tensor_at(factors).ne) == n_rows:
        each = ggml.ggml_reshape_3d(ctx, factors, 1, 1, n_rows)
    else:
        each = ggml.ggml_repeat_4d(ctx, factors, 1, 1, n_rows, 1)
    product = ggml.ggml_out_prod(ctx, ggml.ggml_reshape_3d(ctx, rows, n, 1, n_rows), each)
    return int(ggml.ggml_reshape_4d(ctx, product, n, *counts))


def in_parts(ctx: int, rows: int) -> int:
    """Rows that lie one behind the other, [n, n_rows], cut into parts: of a single row each thread then takes some."""
    n, n_rows = ggml.tensor_at(rows).ne[:2]
    n_parts = math.gcd(n, MOST_PARTS)
    return int(ggml.ggml_reshape_2d(ctx, rows, n // n_parts, n_rows * n_parts))


def last_rows(ctx: int, matrix: int, n_rows: int) -> int:
    """The last `n_rows` rows of a matrix."""
    tensor = ggml.tensor_at(matrix)
    n_skipped = tensor.ne[1] - n_rows
    if not n_skipped:
        return matrix
    offset = n_skipped * tensor.nb[1]
    return int(ggml.ggml_view_2d(ctx, matrix, tensor.ne[0], n_rows, tensor.nb[1], offset))
