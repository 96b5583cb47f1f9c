"""Error feedback: codes at their places, textbook GPTQ, and a smaller loss in every type."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from converter.block_grid import coded, grid_of
from converter.block_layout import BITS, read_codes, weights_per_code, write_codes
from converter.feedback import Effort, damped, feed_back, quantize_with_feedback, upper_factor
from converter.quantize import dequantize_rows, quantize_rows

Matrix = NDArray[np.float32]
KINDS = list(BITS)


def names(kind: Type) -> str:
    return str(kind.name)


def inputs(n_columns: int, n_tokens: int = 600) -> Matrix:
    """Correlated inputs [n_tokens, n_columns] with a few loud columns."""
    rng = np.random.default_rng(7)
    mixing = rng.standard_normal((n_columns // 4, n_columns))
    x = rng.standard_normal((n_tokens, n_columns // 4)) @ mixing + rng.standard_normal((n_tokens, n_columns))
    x[:, :: n_columns // 5] *= 6
    return x.astype(np.float32)


def weights(n_rows: int, n_columns: int) -> Matrix:
    values: Matrix = np.random.default_rng(8).standard_normal((n_rows, n_columns), np.float32)
    return values


def loss(error: Matrix, x: Matrix) -> float:
    return float(np.square(x.astype(np.float64) @ error.T.astype(np.float64)).sum())


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_codes_lie_where_the_layout_says(kind: Type) -> None:
    block, n_bytes = GGML_QUANT_SIZES[kind]
    blocks = quantize_rows(weights(3, 256), kind, np.ones(256, np.float32)).reshape(-1, n_bytes)
    codes = read_codes(blocks, kind)
    assert np.array_equal(write_codes(blocks, kind, codes), blocks)
    before = dequantize_rows(blocks.reshape(-1), kind, block)
    for group in range(codes.shape[1]):
        other = codes.copy()
        other[:, group] ^= 3
        after = dequantize_rows(write_codes(blocks, kind, other).reshape(-1), kind, block)
        changed = np.flatnonzero((after != before).any(0))
        assert changed.size
        assert set(changed // weights_per_code(kind)) == {group}


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_a_grid_tells_what_its_codes_decode_to(kind: Type) -> None:
    w = weights(5, 256)
    blocks = quantize_rows(w, kind, np.ones(256, np.float32))
    grid = grid_of(blocks, kind, len(w))
    target = torch.from_numpy(w) * 1.5
    found = [
        grid.nearest(n, target[:, n * grid.width : (n + 1) * grid.width], torch.eye(grid.width))
        for n in range(256 // grid.width)
    ]
    codes = torch.stack([code for code, _ in found], 1).numpy()
    values = torch.cat([value for _, value in found], 1).numpy()
    decoded = dequantize_rows(coded(blocks, kind, codes), kind, 256)
    np.testing.assert_allclose(decoded, values, rtol=1e-5, atol=1e-6)
    already, _ = grid.nearest(0, torch.from_numpy(decoded[:, : grid.width]), torch.eye(grid.width))
    codes[:, 0] = already.numpy()
    np.testing.assert_allclose(dequantize_rows(coded(blocks, kind, codes), kind, 256), decoded, rtol=1e-5, atol=1e-6)


def textbook_gptq(weight: Matrix, hessian: NDArray[np.float64], levels: Matrix) -> NDArray[np.float64]:
    """Column after column, inverting what is left each time; `levels` [n_rows, n_columns, n_levels]."""
    w: NDArray[np.float64] = weight.astype(np.float64)
    quantised = np.zeros_like(w)
    for column in range(w.shape[1]):
        inverse = np.linalg.inv(hessian[column:, column:])
        for row in range(len(w)):
            nearest = levels[row, column][np.abs(levels[row, column] - w[row, column]).argmin()]
            quantised[row, column] = nearest
            error = (w[row, column] - nearest) / inverse[0, 0]
            w[row, column:] -= error * inverse[0]
    return quantised


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.IQ4_NL, Type.Q5_1], ids=names)
def test_feedback_is_textbook_gptq(kind: Type) -> None:
    x, w = inputs(32), weights(4, 32)
    hessian = damped(torch.from_numpy(x.T @ x), 0.01)
    blocks = quantize_rows(w, kind, hessian.diagonal().numpy().copy())
    n_levels = 1 << BITS[kind].shape[1]
    each = [dequantize_rows(coded(blocks, kind, np.full((4, 32), code)), kind, 32) for code in range(n_levels)]
    expected = textbook_gptq(w, hessian.double().numpy(), np.stack(each, -1))
    found = feed_back(grid_of(blocks, kind, 4), torch.from_numpy(w), upper_factor(hessian))[1]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_the_loss_falls_and_the_blocks_hold_the_values(kind: Type) -> None:
    x, w = inputs(512), weights(6, 512)
    hessian = x.T @ x
    plain = dequantize_rows(quantize_rows(w, kind, hessian.diagonal().copy()), kind, 512)
    blocks, values = quantize_with_feedback(w, hessian, kind)
    np.testing.assert_allclose(dequantize_rows(blocks, kind, 512), values, atol=1e-5)
    assert loss(w - values, x) < 0.8 * loss(w - plain, x)


def test_more_passes_lower_the_loss() -> None:
    x, w = inputs(512), weights(6, 512)
    once, twice = (quantize_with_feedback(w, x.T @ x, Type.Q3_K, Effort(passes=n))[1] for n in (0, 2))
    assert loss(w - twice, x) < 0.97 * loss(w - once, x)


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.IQ2_XXS], ids=names)
def test_few_tokens_and_none_are_survived(kind: Type) -> None:
    x, w = inputs(512, n_tokens=9), weights(6, 512)
    x[:, 256:] = 0
    hessian = x.T @ x
    plain = dequantize_rows(quantize_rows(w, kind, hessian.diagonal().copy()), kind, 512)
    _, values = quantize_with_feedback(w, hessian, kind)
    assert loss(w - values, x) < loss(w - plain, x)
    assert np.abs(w - values)[:, 256:].mean() < np.abs(w).mean() / 2
    _, blind = quantize_with_feedback(w, np.zeros_like(hessian), kind)
    uniform = dequantize_rows(quantize_rows(w, kind, np.ones(512, np.float32)), kind, 512)
    assert np.square(w - blind).sum() <= np.square(w - uniform).sum()


@pytest.mark.parametrize(("kind", "n_columns"), [(Type.Q4_0, 96), (Type.Q8_0, 288), (Type.IQ4_NL, 352)])
def test_widths_of_whole_blocks_suffice(kind: Type, n_columns: int) -> None:
    x, w = inputs(n_columns), weights(6, n_columns)
    blocks, values = quantize_with_feedback(w, x.T @ x, kind)
    np.testing.assert_allclose(dequantize_rows(blocks, kind, n_columns), values, atol=1e-5)
    plain = dequantize_rows(quantize_rows(w, kind, np.square(x).sum(0)), kind, n_columns)
    assert loss(w - values, x) < loss(w - plain, x)
