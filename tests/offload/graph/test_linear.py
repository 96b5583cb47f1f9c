"""Products of rows with single values, in the way that ggml's CPU does them fast."""

from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import CpuBackend
from slimoe.offload.graph.linear import add_factors, in_parts

Floats = NDArray[np.float32]


def _computed(build: Callable[..., int], *arrays: Floats) -> tuple[list[str], Floats]:
    """The operations of a graph of these inputs, whose shapes have their last axis first, and its result."""
    with closing(CpuBackend(2)) as backend:
        ctx = ggml.ggml_init(ggml.InitParams(1 << 16, None, True))
        graph = ggml.ggml_new_graph_custom(ctx, 16, False)
        tensors = [int(ggml.ggml_new_tensor_3d(ctx, Type.F32, *reversed(array.shape))) for array in arrays]
        for tensor in tensors:
            ggml.ggml_set_input(tensor)
        result = build(ctx, *tensors)
        ggml.ggml_build_forward_expand(graph, result)
        allocator = ggml_backend.ggml_gallocr_new(backend.buft)
        assert ggml_backend.ggml_gallocr_alloc_graph(allocator, graph)
        for tensor, array in zip(tensors, arrays, strict=True):
            backend.set(tensor, array)
        backend.compute(graph)
        values = np.empty(tuple(reversed(ggml.tensor_at(result).ne)), np.float32)
        backend.get(result, values)
        nodes = [ggml.ggml_graph_node(graph, index) for index in range(ggml.ggml_graph_n_nodes(graph))]
        names = [ggml.ggml_op_desc(node).decode() for node in nodes]
        ggml_backend.ggml_gallocr_free(allocator)
        ggml.ggml_free(ctx)
    return names, values


@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 8, 2816), (5, 4, 96), (33, 1, 7)])
@pytest.mark.parametrize("is_one_for_all", [False, True])
def test_the_cpu_multiplies_rows_by_their_factors_to_the_last_bit(
    shape: tuple[int, int, int], is_one_for_all: bool
) -> None:
    random = np.random.default_rng(0)
    rows = (random.standard_normal(shape) * 10.0 ** random.integers(-30, 30, shape)).astype(np.float32)
    factors = random.standard_normal((1, 1, 1) if is_one_for_all else (*shape[:2], 1), np.float32)
    names, fast = _computed(lambda ctx, a, b: add_factors(ctx, a, b, on_cpu=True), rows, factors)
    plain_names, plain = _computed(lambda ctx, a, b: add_factors(ctx, a, b, on_cpu=False), rows, factors)
    assert "OUT_PROD" in names
    assert plain_names == ["MUL"]
    np.testing.assert_array_equal(fast, plain)
    np.testing.assert_array_equal(fast.reshape(shape), rows * factors)


@pytest.mark.parametrize(
    ("n", "n_rows", "n_parts"), [(262144, 1, 64), (2112, 1, 64), (24, 1, 8), (7, 1, 1), (48, 3, 16)]
)
def test_a_single_row_is_shared_out_to_all_threads(n: int, n_rows: int, n_parts: int) -> None:
    rows = np.random.default_rng(0).standard_normal((1, n_rows, n), np.float32)
    _, parts = _computed(lambda ctx, a: int(ggml.ggml_tanh(ctx, in_parts(ctx, a))), rows)
    _, whole = _computed(lambda ctx, a: int(ggml.ggml_tanh(ctx, a)), rows)
    assert parts.shape == (1, 1, n_rows * n_parts, n // n_parts)
    np.testing.assert_array_equal(parts.ravel(), whole.ravel())
