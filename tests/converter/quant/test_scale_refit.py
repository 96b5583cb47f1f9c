"""Scales fitted again: integers where the layout says and what it says, a loss that never grows, and true errors."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.converter.quant.block_grid import grid_of, with_codes, without_codes
from slimoe.converter.quant.block_layout import HALVES, MULTIPLES, SCALES
from slimoe.converter.quant.packing import packed, unpacked
from slimoe.converter.quant.quantize import dequantize_rows, quantize_rows
from slimoe.converter.quant.scale_refit import RunScales
from tests.converter.quant.test_feedback import Matrix, inputs, names, read_codes, weights
from tests.converter.quant.test_quantize import random_blocks

KINDS = list(SCALES)


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_scales_lie_where_the_layout_says_and_mean_what_it_says(kind: Type) -> None:
    blocks = random_blocks(kind, 4)
    places, n_bytes = SCALES[kind][0], blocks.shape[1]
    # The block's number becomes 1, and the minima's 0.
    for at, half in zip(HALVES[kind], (1.0, 0.0), strict=False):
        blocks[:, at : at + 2] = np.full(1, half, np.float16).view(np.uint8)
    first, gain = MULTIPLES[kind]
    columns, n_bits = torch.from_numpy(blocks.T.copy()), places.shape[1]
    mask = packed(places, torch.full((len(places), 4), -1, dtype=torch.int32), n_bytes)
    decoded = []
    for integer in (1, 2, (1 << n_bits) - 1):
        whole = torch.full((len(places), 4), integer, dtype=torch.int32)
        other = (columns & ~mask | packed(places, whole, n_bytes)).T.contiguous()
        assert torch.equal(unpacked(places, other.T.contiguous()), whole)
        decoded.append(dequantize_rows(other.numpy().reshape(-1), kind, 256))
    numbers = [first + gain * integer for integer in (1, 2, -1 if n_bits == 8 else (1 << n_bits) - 1)]
    assert np.abs(decoded[0]).max() > 0
    for values, number in zip(decoded[1:], numbers[1:], strict=True):
        np.testing.assert_allclose(values * numbers[0], decoded[0] * number, rtol=1e-5, atol=1e-5)


def refitted(blocks: NDArray[np.uint8], kind: Type, w: Matrix, metric: torch.Tensor) -> tuple[RunScales, torch.Tensor]:
    """Scales fitted again to the codes of rows of one block each, and the errors that they then leave of `w`."""
    n_rows = len(blocks)
    target = torch.from_numpy(w.T.copy())
    error = target - torch.from_numpy(dequantize_rows(blocks.reshape(-1), kind, 256).T.copy())
    scales, grid = RunScales(without_codes(blocks, kind), kind), grid_of(blocks, kind)
    for run in range(256 // scales.size):
        some = slice(run * scales.size, (run + 1) * scales.size)
        slope = metric[some] @ error
        change = scales.refit(run, target[some], error[some], slope, metric[some, some])
        grid.rescale(some, *change)
    moved = grid_of(scales.blocks(), kind)
    torch.testing.assert_close(grid.shift, moved.shift, rtol=1e-4, atol=1e-4 * float(target.abs().max()))
    assert scales.blocks().shape == (n_rows, GGML_QUANT_SIZES[kind][1])
    return scales, error


@pytest.mark.parametrize(("kind", "n_rows"), [*((kind, 16) for kind in KINDS), (Type.Q4_K, 1)], ids=str)
def test_the_loss_falls_and_errors_are_those_of_the_blocks(kind: Type, n_rows: int) -> None:
    w, x = weights(n_rows, 256), inputs(256)
    metric = torch.from_numpy(x.T @ x / 600)
    # Blocks fitted to other weights leave scales much to gain.
    blocks = quantize_rows(1.3 * w + 0.2, kind, np.ones(256, np.float32)).reshape(n_rows, -1)
    error = torch.from_numpy((w - dequantize_rows(blocks.reshape(-1), kind, 256)).T.copy())
    codes = torch.from_numpy(read_codes(blocks, kind).T.copy()).int()
    scales, left = refitted(blocks, kind, w, metric)
    before, after = ((one * (metric @ one)).sum(0) for one in (error, left))
    assert bool((after <= before * 1.0001).all())
    assert after.sum() < 0.8 * before.sum()
    decoded = dequantize_rows(with_codes(scales.blocks(), kind, codes).reshape(-1), kind, 256)
    np.testing.assert_allclose(w - decoded, left.T.numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q6_K, Type.IQ3_S], ids=names)
def test_zeros_and_extremes_stay_finite(kind: Type) -> None:
    w = np.zeros((3, 256), np.float32)
    w[1], w[2, ::2] = 60000.0, -60000.0
    blocks = quantize_rows(w, kind, np.ones(256, np.float32)).reshape(3, -1)
    scales, left = refitted(blocks, kind, w, torch.eye(256))
    assert bool(left.isfinite().all())
    assert not left[:, 0].any()
    assert bool(torch.isfinite(grid_of(scales.blocks(), kind).shift).all())
