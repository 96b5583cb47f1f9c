"""The gain of ggml's quantisers: how far what comes out of blocks is larger than what went in, and errors without it.

The gain is g = sum(h w q) / sum(h w w) for weights w, their values q in blocks, and the importance h of columns: the
share of the matrix's own output that the quantised one answers with. ggml chooses scales by the squared error or by
rules of thumb, so that g is some percent off 1 (IQ2_XS 1.03, Q2_K 0.96). Squared errors hardly see it, but it goes the
same way in all rows and all layers, and adds up. Weights that are divided by g before they are quantised come out with
a gain of 1, since quantisers scale with what they are given.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.converter.quant.block_layout import BITS
from slimoe.converter.quant.quantize import F16_MAX, dequantize_rows, quantize_rows

_LEAST, _MOST = 0.8, 1.25
"""Gains beyond are those of a few weights, or of what was damaged; nothing is made up for further than this."""
_ROWS_AT_ONCE = 256
_N_RUNS, _SAMPLED_WEIGHTS = 8, 1 << 16
"""Of trained matrices such a sample has the gain of the whole with a standard deviation of 0.0002 to 0.003."""


def has_scales(kind: Type) -> bool:
    """Whether blocks of the type have a scale fine enough to take a gain out: not floats, nor powers of two."""
    return kind in BITS


def gain_of(values: NDArray[np.float32], quantised: NDArray[np.float32], importance: NDArray[np.float32]) -> float:
    """The gain of `quantised` over `values`, both [n_rows, n_per_row], at most 1.25 and at least 0.8; 1 if unknown.

    `importance` is of the columns [n_per_row], or of each weight [n_rows, n_per_row].
    """
    weighted = values.astype(np.float64) * importance
    return _bounded(float((weighted * quantised).sum()), float((weighted * values).sum()))


def _bounded(product: float, square: float) -> float:
    """The gain of sums of h w q and of h w w."""
    gain = product / square if square > 0 else 1.0
    return min(max(gain, _LEAST), _MOST) if np.isfinite(gain) else 1.0


def divided(values: NDArray[np.float32], gain: float) -> NDArray[np.float32]:
    """Weights to quantise in place of `values`; the same ones if the others could leave the range of halves."""
    if gain == 1 or (gain < 1 and float(np.abs(values).max()) > gain * F16_MAX):
        return values
    return values / np.float32(gain)


def sampled_runs(n_rows: int, n_per_row: int, step: int = 1) -> list[slice]:
    """Runs of rows from which a matrix's gain is known well enough: 8 of them, evenly spread, of 2^16 weights in all.

    They begin and end at multiples of `step`, which divides `n_rows`; small matrices are one run.
    """
    length = max(1, _SAMPLED_WEIGHTS // (_N_RUNS * n_per_row * step)) * step
    if _N_RUNS * length >= n_rows:
        return [slice(0, n_rows)]
    firsts = (run * ((n_rows - length) // step) // (_N_RUNS - 1) * step for run in range(_N_RUNS))
    return [slice(first, first + length) for first in firsts]


def type_error(
    values: NDArray[np.float32],
    kind: Type,
    rows: NDArray[np.float32],
    columns: NDArray[np.float32],
    n_threads: int = 1,
    fitted: NDArray[np.float32] | None = None,
) -> float:
    """What a type costs a matrix [n_rows, n_per_row]: sum over i, j of rows_i columns_j (error_ij)^2, without the gain.

    `columns` is the importance that blocks are `fitted` with as well, if that is no other; `rows` [n_rows] may be a
    sensitivity. Raises as `quantize_rows` does.
    """
    fitted = columns if fitted is None else fitted
    both = np.stack((columns, fitted), 1)

    def part(begin: int) -> NDArray[np.float32]:
        """The sums of c e e, c e w and c w w of each of some rows [3, n, 2], for errors e with the gain.

        c is first `columns`, then `fitted`.
        """
        some = values[begin : begin + _ROWS_AT_ONCE]
        error = dequantize_rows(quantize_rows(some, kind, fitted), kind, values.shape[1])
        error -= some
        return np.stack([(one * other) @ both for one, other in ((error, error), (error, some), (some, some))])

    with ThreadPoolExecutor(n_threads) as pool:
        parts = list(pool.map(part, range(0, len(values), _ROWS_AT_ONCE)))
    sums = np.concatenate(parts, 1).astype(np.float64)
    _, products, own = sums[..., 1]
    gain = _bounded(float((own + products).sum()), float(own.sum())) if has_scales(kind) else 1.0
    squares, products, own = sums[..., 0]
    # q / g - w = (e + (1 - g) w) / g
    without = squares + 2 * (1 - gain) * products + (1 - gain) ** 2 * own
    return float(rows.astype(np.float64) @ without) / gain**2
