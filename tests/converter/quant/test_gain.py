"""Gains by their definition, what gguf's own reader says of blocks that were freed of theirs, and what types cost."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.converter.quant.block_layout import SCALES
from slimoe.converter.quant.gain import divided, gain_of, has_scales, sampled_runs, type_error
from slimoe.converter.quant.quantize import dequantize_rows, quantize_rows

Matrix = NDArray[np.float32]
N_ROWS, N_PER_ROW = 24, 512
SLOW = (Type.IQ1_S, Type.IQ1_M, Type.IQ2_S)
"""ggml takes seconds to prepare their codebooks."""


@pytest.fixture
def values() -> Matrix:
    return np.random.default_rng(1).standard_normal((N_ROWS, N_PER_ROW), np.float32) * np.float32(1 / 16)


@pytest.fixture
def importance() -> Matrix:
    squares: Matrix = np.square(np.random.default_rng(2).standard_normal(N_PER_ROW, np.float32))
    return squares + np.float32(1e-3)


def double_loop(values: Matrix, quantised: Matrix, importance: Matrix) -> float:
    pairs = [(i, j) for i in range(len(values)) for j in range(values.shape[1])]
    product = sum(float(importance[j]) * float(values[i, j]) * float(quantised[i, j]) for i, j in pairs)
    return product / sum(float(importance[j]) * float(values[i, j]) ** 2 for i, j in pairs)


def test_the_gain_is_the_double_loops(values: Matrix, importance: Matrix) -> None:
    other = values + np.random.default_rng(3).standard_normal(values.shape, np.float32) / np.float32(10)
    expected = double_loop(values, other, importance)
    assert gain_of(values, other, importance) == pytest.approx(expected, rel=1e-9)
    each = np.broadcast_to(importance, values.shape)
    assert gain_of(values, other, each) == pytest.approx(expected, rel=1e-9)


def test_gains_are_bounded_and_known_of_nothing(values: Matrix, importance: Matrix) -> None:
    assert gain_of(values, 3 * values, importance) == 1.25
    assert gain_of(values, -values, importance) == 0.8
    assert gain_of(values, values * np.float32(np.inf), importance) == 1
    assert gain_of(0 * values, values, importance) == gain_of(values, 2 * values, 0 * importance) == 1


@pytest.mark.parametrize("kind", [kind for kind in SCALES if kind not in SLOW], ids=lambda kind: kind.name)
def test_blocks_of_divided_weights_have_no_gain(values: Matrix, importance: Matrix, kind: Type) -> None:
    gain = gain_of(values, read_back(quantize_rows(values, kind, importance), kind), importance)
    free = read_back(quantize_rows(divided(values, gain), kind, importance), kind)
    assert double_loop(values, free, importance) == pytest.approx(1, abs=0.003)


def read_back(blocks: NDArray[np.uint8], kind: Type) -> Matrix:
    found: Matrix = gguf.dequantize(blocks.reshape(N_ROWS, -1), kind)
    return found


def test_types_of_few_bits_do_have_a_gain(values: Matrix, importance: Matrix) -> None:
    kinds = (Type.IQ2_XS, Type.IQ3_S, Type.Q2_K)
    for kind in kinds:
        found = read_back(quantize_rows(values, kind, importance), kind)
        assert abs(double_loop(values, found, importance) - 1) > 0.008, kind.name


def test_types_without_fine_scales_keep_theirs() -> None:
    assert not any(has_scales(kind) for kind in (Type.F32, Type.F16, Type.BF16, Type.MXFP4))


def test_nothing_is_divided_beyond_the_range_of_halves(values: Matrix) -> None:
    values[0, 0] = 60_000
    assert np.array_equal(divided(values, 0.8), values)
    assert np.array_equal(divided(values, 1.25), values / np.float32(1.25))


@pytest.mark.parametrize(
    ("n_rows", "n_per_row", "step"),
    [(512, 256, 1), (256, 256, 1), (4096, 4096, 1), (14336, 4096, 128), (128, 1 << 20, 64), (1, 8, 1)],
)
def test_samples_are_spread_evenly(n_rows: int, n_per_row: int, step: int) -> None:
    runs = sampled_runs(n_rows, n_per_row, step)
    taken = [row for run in runs for row in range(run.start, run.stop)]
    assert taken == sorted(set(taken))
    assert (taken[0], taken[-1]) == (0, n_rows - 1)
    assert all(run.start % step == run.stop % step == 0 for run in runs)
    assert len(taken) == n_rows or len(taken) * n_per_row == max(1 << 16, 8 * step * n_per_row)
    middles = [(run.start + run.stop) / 2 for run in runs]
    assert len(runs) == 1 or np.ptp(np.diff(middles)) <= 2 * step


# --- what types cost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Type.Q3_K, Type.IQ2_XS, Type.MXFP4], ids=lambda kind: kind.name)
def test_the_cost_of_a_type_is_the_double_loops(importance: Matrix, kind: Type) -> None:
    values = np.random.default_rng(4).standard_normal((600, N_PER_ROW), np.float32)
    rows = np.random.default_rng(5).random(600, np.float32)
    found = dequantize_rows(quantize_rows(values, kind, importance), kind, N_PER_ROW)
    gain = gain_of(values, found, importance) if kind is not Type.MXFP4 else 1
    error = found.astype(np.float64) / gain - values
    expected = sum(float(rows[i]) * float(np.square(error[i]) @ importance.astype(np.float64)) for i in range(600))
    assert type_error(values, kind, rows, importance, n_threads=2) == pytest.approx(expected, rel=1e-5)


def test_more_bits_cost_less(values: Matrix, importance: Matrix) -> None:
    kinds = (Type.Q6_K, Type.Q4_K, Type.IQ3_S, Type.IQ2_XS, Type.IQ2_XXS)
    costs = [type_error(values, kind, np.ones(N_ROWS, np.float32), importance) for kind in kinds]
    assert costs == sorted(costs)
    assert type_error(values, Type.Q3_K, np.ones(N_ROWS, np.float32), 0 * importance) == 0
