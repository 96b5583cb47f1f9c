"""Error feedback: codes at their places, textbook GPTQ, and a smaller loss in every type."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.converter.quant import feedback
from slimoe.converter.quant.block_grid import grid_of, with_codes, without_codes
from slimoe.converter.quant.block_layout import BITS
from slimoe.converter.quant.block_scales import fitted_scales
from slimoe.converter.quant.feedback import BlockFit, Curvature, damped, quantize_with_feedback, upper_factor
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


def coded(blocks: NDArray[np.uint8], kind: Type, codes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Rows of blocks [n_rows, n_bytes] with other codes [n_rows, n_codes], in one array."""
    numbers = torch.from_numpy(np.ascontiguousarray(codes.T)).int()
    return with_codes(without_codes(blocks, kind), kind, numbers).reshape(-1)


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_codes_lie_where_the_layout_says(kind: Type) -> None:
    block = GGML_QUANT_SIZES[kind][0]
    blocks = random_blocks(kind, 3)
    codes = read_codes(blocks, kind)
    assert np.array_equal(coded(blocks, kind, codes), blocks.reshape(-1))
    before = dequantize_rows(blocks.reshape(-1), kind, block)
    for group in range(codes.shape[1]):
        other = codes.copy()
        other[:, group] ^= 3
        after = dequantize_rows(coded(blocks, kind, other), kind, block)
        changed = np.flatnonzero((after != before).any(0))
        assert changed.size
        assert set(changed // weights_per_code(kind)) == {group}


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_a_grid_tells_what_its_codes_decode_to(kind: Type) -> None:
    blocks = random_blocks(kind, 5)
    n_columns = GGML_QUANT_SIZES[kind][0]
    values = dequantize_rows(blocks.reshape(-1), kind, n_columns)
    target = torch.from_numpy(
        np.ascontiguousarray(values.T) * np.linspace(0.5, 1.5, n_columns, dtype=np.float32)[:, None]
    )
    grid = grid_of(blocks, kind)
    shift = grid.shift.repeat_interleave(n_columns // len(grid.shift), 0)
    target -= shift
    error, codes = torch.empty_like(target), torch.empty((n_columns // grid.width, 5))
    codes = codes if grid.width == 1 else codes.int()
    for group, part in enumerate(target.split(grid.width)):
        left = error[group * grid.width : (group + 1) * grid.width]
        grid.code(group, part, part, torch.eye(grid.width), codes[group], left)
    found = (target - error + shift).T.numpy()
    decoded = dequantize_rows(with_codes(without_codes(blocks, kind), kind, grid.stored(codes)), kind, n_columns)
    np.testing.assert_allclose(decoded, found, rtol=1e-4, atol=1e-5 * np.abs(values).max())
    # What it found is nearer than what was there before, and as near to itself as can be.
    old = np.abs(values - (target + shift).T.numpy())
    assert np.square(error.numpy()).sum() <= np.square(old).sum()


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
    blocks = quantize_rows(w, kind, hessian.diagonal().numpy().copy()).reshape(4, -1)
    n_levels = 1 << BITS[kind].shape[1]
    each = [dequantize_rows(coded(blocks, kind, np.full((4, 32), code)), kind, 32) for code in range(n_levels)]
    expected = textbook_gptq(w, hessian.double().numpy(), np.stack(each, -1))
    grid = grid_of(blocks, kind)
    fit = BlockFit(grid, torch.from_numpy(np.ascontiguousarray(w.T)))
    fit.feed_back(upper_factor(hessian))
    np.testing.assert_allclose(w - fit.error.T.numpy(), expected, atol=1e-5)


def test_a_curvature_solves_for_the_weights_of_given_products() -> None:
    """Over more columns than a block of the factor has, of inputs of any size."""
    x, products = 30 * inputs(544), weights(5, 544)
    hessian = x.T @ x
    damping = 0.03 * hessian.diagonal().mean() * np.eye(544)
    expected = np.linalg.solve(hessian.astype(np.float64) + damping, products.T.astype(np.float64)).T
    found = Curvature.of(hessian).solve(torch.from_numpy(products)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q4_K, Type.Q6_K], ids=names)
def test_the_loss_is_below_textbook_gptq_with_ggmls_scales(
    monkeypatch: pytest.MonkeyPatch, kind: Type, products: torch.dtype
) -> None:
    """Whatever this processor multiplies."""
    monkeypatch.setattr(feedback, "product_type", lambda _: products)
    x, w = inputs(256), weights(8, 256)
    hessian = damped(torch.from_numpy(x.T @ x), 0.01).double().numpy()
    blocks = quantize_rows(w, kind, hessian.diagonal().astype(np.float32)).reshape(8, -1)
    n_levels = 1 << BITS[kind].shape[1]
    each = [dequantize_rows(coded(blocks, kind, np.full((8, 256), n)), kind, 256) for n in range(n_levels)]
    reference = textbook_gptq(w, hessian, np.stack(each, -1)).astype(np.float32)
    _, values = quantize_with_feedback(w, Curvature.of(x.T @ x), kind)
    assert loss(w - values, x) < loss(w - reference, x)


@pytest.mark.parametrize("kind", TRIED, ids=names)
def test_the_loss_falls_and_the_blocks_hold_the_values(kind: Type) -> None:
    # Two blocks of columns in two of the types, as nothing between blocks depends on the type.
    n_columns = 512 if kind in (Type.Q2_K, Type.IQ2_XXS) else 256 if GGML_QUANT_SIZES[kind][0] == 256 else 160
    x, w = inputs(n_columns), weights(4, n_columns)
    hessian = x.T @ x
    plain = dequantize_rows(quantize_rows(w, kind, hessian.diagonal().copy()), kind, n_columns)
    blocks, values = quantize_with_feedback(w, Curvature.of(hessian), kind)
    np.testing.assert_allclose(dequantize_rows(blocks, kind, n_columns), values, atol=1e-5)
    assert loss(w - values, x) < 0.8 * loss(w - plain, x)


def weighted_loss(error: Matrix, importance: Matrix) -> float:
    return float((np.square(error.astype(np.float64)) * importance).sum())


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K], ids=names)
def test_scales_of_blocks_are_at_least_as_good_as_ggmls(kind: Type) -> None:
    w, importance = weights(64, 512), np.square(inputs(512)).sum(0)
    plain = dequantize_rows(quantize_rows(w, kind, importance), kind, 512)
    scales = fitted_scales(torch.from_numpy(np.ascontiguousarray(w.T)), torch.from_numpy(importance), kind)
    each = [
        dequantize_rows(coded(scales, kind, np.full((64, 512), n)), kind, 512) for n in range(1 << BITS[kind].shape[1])
    ]
    error = np.abs(np.stack(each) - w).min(0)
    assert weighted_loss(error, importance) < 1.01 * weighted_loss(plain - w, importance)


def test_scales_of_extreme_weights_are_finite() -> None:
    w = np.zeros((3, 256), np.float32)
    w[1], w[2, ::2] = 60000.0, -60000.0
    for kind in (Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K):
        blocks, values = quantize_with_feedback(w, Curvature.of(np.eye(256, dtype=np.float32)), kind)
        assert np.array_equal(values[0], w[0])
        np.testing.assert_allclose(values, w, atol=600)
        np.testing.assert_allclose(dequantize_rows(blocks, kind, 256), values, rtol=1e-4)


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.IQ2_XXS], ids=names)
def test_few_tokens_and_none_are_survived(kind: Type) -> None:
    x, w = inputs(512, n_tokens=9), weights(4, 512)
    x[:, 256:] = 0
    hessian = x.T @ x
    plain = dequantize_rows(quantize_rows(w, kind, hessian.diagonal().copy()), kind, 512)
    _, values = quantize_with_feedback(w, Curvature.of(hessian), kind)
    assert loss(w - values, x) < loss(w - plain, x)
    assert np.abs(w - values)[:, 256:].mean() < np.abs(w).mean() / 2
    _, blind = quantize_with_feedback(w, Curvature.of(np.zeros_like(hessian)), kind)
    uniform = dequantize_rows(quantize_rows(w, kind, np.ones(512, np.float32)), kind, 512)
    assert np.square(w - blind).sum() <= np.square(w - uniform).sum()


@pytest.mark.parametrize(("kind", "n_columns"), [(Type.Q4_0, 96), (Type.Q8_0, 288), (Type.IQ4_NL, 352)])
def test_widths_of_whole_blocks_suffice(kind: Type, n_columns: int) -> None:
    x, w = inputs(n_columns), weights(6, n_columns)
    blocks, values = quantize_with_feedback(w, Curvature.of(x.T @ x), kind)
    np.testing.assert_allclose(dequantize_rows(blocks, kind, n_columns), values, atol=1e-5)
    plain = dequantize_rows(quantize_rows(w, kind, np.square(x).sum(0)), kind, n_columns)
    assert loss(w - values, x) < loss(w - plain, x)


def test_threads_share_rows_out_in_their_order() -> None:
    x, w = inputs(32), weights(3 * 1024, 32)
    hessian = x.T @ x
    alone, shared = (quantize_with_feedback(w, Curvature.of(hessian), Type.Q4_0, n_threads=n) for n in (1, 3))
    np.testing.assert_allclose(dequantize_rows(shared[0], Type.Q4_0, 32), shared[1], atol=1e-5)
    # Sums of products of other sizes are rounded otherwise, which turns a choice now and then.
    assert np.mean(alone[0] == shared[0]) > 0.98
    assert loss(w - shared[1], x) == pytest.approx(loss(w - alone[1], x), rel=1e-2)
