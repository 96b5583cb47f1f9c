"""Error feedback: codes at their places, textbook GPTQ, and a smaller loss in every type."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.converter.quant.block_grid import coded, grid_of
from slimoe.converter.quant.block_layout import BITS, write_codes
from slimoe.converter.quant.feedback import Effort, damped, feed_back, quantize_with_feedback, upper_factor
from slimoe.converter.quant.quantize import dequantize_rows, quantize_rows
from tests.converter.quant.test_quantize import random_blocks

Matrix = NDArray[np.float32]
KINDS = list(BITS)
TRIED = [Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q4_K, Type.Q6_K]
TRIED += [Type.IQ4_XS, Type.IQ2_XXS, Type.IQ3_XXS, Type.IQ3_S]


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


def read_codes(blocks: NDArray[np.uint8], kind: Type) -> NDArray[np.int64]:
    """The codes [n_blocks, n_codes] of blocks [n_blocks, bytes]."""
    places = BITS[kind]
    bits = np.unpackbits(blocks, axis=1, bitorder="little")
    codes = np.zeros((len(blocks), len(places)), np.int64)
    for bit, place in enumerate(places.T):
        codes |= bits[:, place].astype(np.int64) << bit
    return codes


def weights_per_code(kind: Type) -> int:
    """1, or 8 in the types of codebooks."""
    return int(GGML_QUANT_SIZES[kind][0]) // len(BITS[kind])


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_codes_lie_where_the_layout_says(kind: Type) -> None:
    block = GGML_QUANT_SIZES[kind][0]
    blocks = random_blocks(kind, 3)
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
    blocks = random_blocks(kind, 5)
    n_columns = GGML_QUANT_SIZES[kind][0]
    values = dequantize_rows(blocks.reshape(-1), kind, n_columns)
    target = torch.from_numpy(values * np.linspace(0.5, 1.5, n_columns, dtype=np.float32))
    grid = grid_of(blocks.reshape(-1), kind, 5)
    found = [grid.nearest(n, part, torch.eye(grid.width)) for n, part in enumerate(target.split(grid.width, 1))]
    codes = torch.stack([code for code, _ in found], 1).numpy()
    found_values = torch.cat([value for _, value in found], 1)
    values = found_values.numpy()
    decoded = dequantize_rows(coded(blocks, kind, codes), kind, n_columns)
    np.testing.assert_allclose(decoded, values, rtol=1e-4, atol=1e-5 * np.abs(values).max())
    again = [
        grid.nearest(n, part, torch.eye(grid.width))[1] for n, part in enumerate(found_values.split(grid.width, 1))
    ]
    np.testing.assert_allclose(torch.cat(again, 1).numpy(), values, rtol=1e-4, atol=1e-5 * np.abs(values).max())


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


@pytest.mark.parametrize("kind", TRIED, ids=names)
def test_the_loss_falls_and_the_blocks_hold_the_values(kind: Type) -> None:
    # Two blocks of columns in two of the types, as nothing between blocks depends on the type.
    n_columns = 512 if kind in (Type.Q2_K, Type.IQ2_XXS) else 256 if GGML_QUANT_SIZES[kind][0] == 256 else 160
    x, w = inputs(n_columns), weights(4, n_columns)
    hessian = x.T @ x
    plain = dequantize_rows(quantize_rows(w, kind, hessian.diagonal().copy()), kind, n_columns)
    blocks, values = quantize_with_feedback(w, hessian, kind)
    np.testing.assert_allclose(dequantize_rows(blocks, kind, n_columns), values, atol=1e-5)
    assert loss(w - values, x) < 0.8 * loss(w - plain, x)


def test_more_passes_lower_the_loss() -> None:
    x, w = inputs(512), weights(4, 512)
    hessian = x.T @ x
    plain = dequantize_rows(quantize_rows(w, Type.Q3_K, hessian.diagonal().copy()), Type.Q3_K, 512)
    once, twice = (quantize_with_feedback(w, hessian, Type.Q3_K, Effort(passes=n))[1] for n in (0, 1))
    assert loss(w - once, x) < 0.8 * loss(w - plain, x)
    assert loss(w - twice, x) < 0.99 * loss(w - once, x)


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.IQ2_XXS], ids=names)
def test_few_tokens_and_none_are_survived(kind: Type) -> None:
    x, w = inputs(512, n_tokens=9), weights(4, 512)
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


def test_threads_share_rows_out_in_their_order() -> None:
    x, w = inputs(128), weights(192, 128)
    hessian = x.T @ x
    alone, shared = (quantize_with_feedback(w, hessian, Type.Q4_0, n_threads=n) for n in (1, 3))
    np.testing.assert_allclose(dequantize_rows(shared[0], Type.Q4_0, 128), shared[1], atol=1e-5)
    # Sums of products of other sizes are rounded otherwise, which turns a choice now and then.
    assert np.mean(alone[0] == shared[0]) > 0.98
    assert loss(w - shared[1], x) == pytest.approx(loss(w - alone[1], x), rel=1e-2)
