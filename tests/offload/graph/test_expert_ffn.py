"""The sum over a token's experts, in the way that ggml's CPU does it fast."""

import numpy as np
import pytest

from slimoe.offload.graph.expert_ffn import add_expert_sum
from tests.offload.graph.small_graph import computed


@pytest.mark.parametrize(("n_rows", "n_used", "n_embd"), [(1, 8, 2048), (5, 4, 96), (33, 2, 7), (3, 40, 64)])
def test_the_cpu_sums_experts_in_their_order_to_the_last_bit(n_rows: int, n_used: int, n_embd: int) -> None:
    random = np.random.default_rng(0)
    shape = n_rows, n_used, n_embd
    outputs = (random.standard_normal(shape) * 10.0 ** random.integers(-4, 4, shape)).astype(np.float32)
    # A step may have room for more experts and rows.
    ones = np.ones((n_rows + 1, n_used + 2, 1), np.float32)
    names, fast = computed(add_expert_sum, outputs, ones)
    plain_names, plain = computed(lambda ctx, a: add_expert_sum(ctx, a, 0), outputs)
    assert names.count("ADD") == 0
    assert plain_names.count("ADD") == n_used - 1
    np.testing.assert_array_equal(fast, plain)
    total = outputs[:, 0].copy()
    for number in range(1, n_used):
        total += outputs[:, number]
    np.testing.assert_array_equal(fast.reshape(total.shape), total)
