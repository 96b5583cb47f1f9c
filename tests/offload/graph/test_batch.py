"""Batches: which cells their tokens see."""

import numpy as np
import pytest

from slimoe.offload.graph.batch import Batch, fill_mask, fill_window_mask, make_batch
from slimoe.offload.memory.kv_cache import CELL_STEP


def mask_of(batch: Batch) -> np.ndarray:
    mask = np.full((batch.n_tokens, batch.n_kv), 7, np.float16)
    fill_mask(mask, batch)
    return mask


def cells(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize(("n_past", "n_tokens"), [(0, 1), (0, 5), (255, 1), (255, 2), (300, 212), (256, 256)])
def test_one_sequence_is_causal(n_past: int, n_tokens: int) -> None:
    batch = make_batch([(range(10, 10 + n_tokens), np.arange(n_past + n_tokens))], 1)
    n_kv = -(-(n_past + n_tokens) // CELL_STEP) * CELL_STEP
    positions = np.arange(n_past, n_past + n_tokens)
    assert batch.tokens.tolist() == list(range(10, 10 + n_tokens))
    assert (batch.n_kv, batch.n_out, batch.n_tokens) == (n_kv, 1, n_tokens)
    np.testing.assert_array_equal(batch.positions, positions)
    np.testing.assert_array_equal(batch.cells, positions)
    np.testing.assert_array_equal(mask_of(batch), np.where(np.arange(n_kv) <= positions[:, None], 0, -np.inf))


def test_sequences_see_their_own_cells_only() -> None:
    shared = (4, 0)
    parts = [((11, 12, 13), cells(*shared, 9, 3, 260)), ((21,), cells(*shared, 1)), ((31, 32), cells(6, 7))]
    batch = make_batch(parts, 3)
    assert batch.positions.tolist() == [2, 3, 4, 2, 0, 1]
    assert batch.cells.tolist() == [9, 3, 260, 1, 6, 7]
    assert (batch.n_kv, batch.n_out) == (2 * CELL_STEP, 3)
    seen = [{4, 0, 9}, {4, 0, 9, 3}, {4, 0, 9, 3, 260}, {4, 0, 1}, {6}, {6, 7}]
    mask = mask_of(batch)
    assert [set(np.flatnonzero(row == 0)) for row in mask] == seen
    assert np.isneginf(mask[mask != 0]).all()


def test_windows_are_of_positions_and_not_of_cells() -> None:
    parts = [((11, 12, 13), cells(4, 0, 9, 3, 260)), ((21,), cells(4, 0, 1)), ((31, 32), cells(6, 7))]
    batch = make_batch(parts, 3)
    mask = np.full((batch.n_tokens, batch.n_kv), 7, np.float16)
    fill_window_mask(mask, batch, 2)
    seen = [{0, 9}, {9, 3}, {3, 260}, {0, 1}, {6}, {6, 7}]
    assert [set(np.flatnonzero(row == 0)) for row in mask] == seen
    assert np.isneginf(mask[mask != 0]).all()
    whole = np.empty_like(mask)
    fill_window_mask(whole, batch, 5)
    np.testing.assert_array_equal(whole, mask_of(batch))


def test_any_order_of_cells() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        order = rng.permutation(600)[:200].astype(np.int64)
        n_tokens = int(rng.integers(1, 200))
        batch = make_batch([(range(n_tokens), order)], n_tokens)
        for index, row in enumerate(mask_of(batch)):
            assert set(np.flatnonzero(row == 0)) == set(order[: len(order) - n_tokens + index + 1])
