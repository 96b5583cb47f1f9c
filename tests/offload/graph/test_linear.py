"""Products of rows with single values, in the way that ggml's CPU does them fast."""

import numpy as np
import pytest

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.graph.linear import add_factors, in_parts
from tests.offload.graph.small_graph import computed


@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 8, 2816), (5, 4, 96), (33, 1, 7)])
@pytest.mark.parametrize("is_one_for_all", [False, True])
def test_the_cpu_multiplies_rows_by_their_factors_to_the_last_bit(
    shape: tuple[int, int, int], is_one_for_all: bool
) -> None:
    random = np.random.default_rng(0)
    rows = (random.standard_normal(shape) * 10.0 ** random.integers(-30, 30, shape)).astype(np.float32)
    factors = random.standard_normal((1, 1, 1) if is_one_for_all else (*shape[:2], 1), np.float32)
    names, fast = computed(lambda ctx, a, b: add_factors(ctx, a, b, on_cpu=True), rows, factors)
    plain_names, plain = computed(lambda ctx, a, b: add_factors(ctx, a, b, on_cpu=False), rows, factors)
    assert "OUT_PROD" in names
    assert plain_names == ["MUL"]
    np.testing.assert_array_equal(fast, plain)
    np.testing.assert_array_equal(fast.reshape(shape), rows * factors)


@pytest.mark.parametrize(
    ("n", "n_rows", "n_parts"), [(262144, 1, 64), (2112, 1, 64), (24, 1, 8), (7, 1, 1), (48, 3, 16)]
)
def test_a_single_row_is_shared_out_to_all_threads(n: int, n_rows: int, n_parts: int) -> None:
    rows = np.random.default_rng(0).standard_normal((1, n_rows, n), np.float32)
    _, parts = computed(lambda ctx, a: int(ggml.ggml_tanh(ctx, in_parts(ctx, a))), rows)
    _, whole = computed(lambda ctx, a: int(ggml.ggml_tanh(ctx, a)), rows)
    assert parts.shape == (1, 1, n_rows * n_parts, n // n_parts)
    np.testing.assert_array_equal(parts.ravel(), whole.ravel())
