"""Fits the scales of a run of columns again to codes that are chosen, for many rows at once.

Given the codes, values are linear in a run's integer scale and minimum. Both take the step to where the loss is least,
rounded to what they can be, where the loss e^T M e falls by it. Before that the F16 number that a block's scales are
multiples of does; that of the minima stays.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.quant.block_layout import HALVES, MULTIPLES, SCALES
from slimoe.converter.quant.packing import packed, unpacked
from slimoe.converter.quant.quantize import F16_MAX

_BYTE = 8


def can_refit(kind: Type) -> bool:
    """Whether the type's blocks have integer scales that are known."""
    return kind in SCALES


class RunScales:
    """The scales of rows of one block each [n_rows, n_bytes], which have no codes; for types that `can_refit`."""

    def __init__(self, blocks: NDArray[np.uint8], kind: Type, device: str = "cpu") -> None:
        self._blocks, self._kind = torch.from_numpy(np.ascontiguousarray(blocks.T)).to(device), kind
        parts = [_part(self._blocks, kind, number) for number in range(len(SCALES[kind]))]
        self._scales, self._minima = parts[0], parts[1] if len(parts) > 1 else None
        self.size = GGML_QUANT_SIZES[kind][0] // len(self._scales.numbers)
        """Columns of a run."""

    def refit(self, run: int, target: Tensor, error: Tensor, slope: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
        """Other scales for the run of this number: it has its values so far times the first [n_rows], plus the second.

        `error` [size, n_rows] is what codes leave of `target` in the run; it is kept up to date. What it costs is
        e^T `metric` e, and, given the errors of other runs, half of its gradient is `slope` [size, n_rows].
        """
        scales, minima, values = self._scales, self._minima, target - error
        lowest = torch.zeros_like(values[0]) if minima is None else minima.half * minima.numbers[run]
        # What the scale stretches. Nothing is known of a run whose scale is 0, which stays.
        values += lowest
        products, before = metric @ values, scales.numbers[run]
        own, towards = (values * products).sum(0), (values * slope).sum(0)
        if minima is None:
            step = towards / own
        else:
            whole, both, down = metric.sum(), products.sum(0), slope.sum(0)
            step = (whole * towards - both * down) / (own * whole - both.square())
        number = scales.nearest(before * (1 + step))
        step = (number / before - 1).nan_to_num_(0, 0, 0)
        gain, lower = step * (2 * towards - step * own), lowest
        if minima is not None:
            lowest_number = minima.nearest(minima.numbers[run] + (step * both - down) / (whole * minima.half))
            lower = minima.half * lowest_number
            sink = lower - lowest
            gain += sink * (2 * step * both - 2 * down - sink * whole)
        is_better = gain > 0
        scales.numbers[run] = torch.where(is_better, number, before)
        factor = torch.where(is_better, 1 + step, 1)
        if minima is not None:
            minima.numbers[run] = torch.where(is_better, lowest_number, minima.numbers[run])
            lower = torch.where(is_better, lower, lowest)
        torch.addcmul(target, values, factor, value=-1, out=error).add_(lower)
        return factor, lowest * factor - lower

    def stretch(self, target: Tensor, error: Tensor, times: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Another F16 number for the scales of all runs: values are then multiplied by the first [n_rows].

        The second [n_runs, n_rows] is added. `error` [n_columns, n_rows] is what codes leave of `target`, and is kept
        up to date; `times` multiplies such values with the metric.
        """
        scales, minima, values = self._scales, self._minima, target - error
        lowest = torch.zeros_like(scales.numbers) if minima is None else minima.half * minima.numbers
        values += lowest.repeat_interleave(self.size, 0)
        step = (values * times(error)).sum(0) / (values * times(values)).sum(0)
        half = (scales.half * (1 + step.nan_to_num_(0, 0, 0))).clamp_(-F16_MAX, F16_MAX).half().float()
        half = torch.where(half * scales.half > 0, half, scales.half)
        change = (half / scales.half - 1).nan_to_num_(0, 0, 0)
        scales.half.copy_(half)
        error.addcmul_(values, change, value=-1)
        return 1 + change, lowest * change

    def blocks(self) -> NDArray[np.uint8]:
        """Rows of one block each [n_rows, n_bytes], without codes."""
        blocks, n_bytes = self._blocks, len(self._blocks)
        parts = (self._scales,) if self._minima is None else (self._scales, self._minima)
        for part, places in zip(parts, SCALES[self._kind], strict=True):
            stored = ((part.numbers - part.first) / part.gain).round().to(torch.int32)
            ones = packed(places, torch.full_like(stored[:, :1], -1), n_bytes)
            blocks = blocks & ~ones | packed(places, stored, n_bytes)
        at = HALVES[self._kind][0]
        blocks[at : at + 2] = self._scales.half.half()[:, None].view(torch.uint8).T
        return np.ascontiguousarray(blocks.T.cpu().numpy())


@dataclass(frozen=True, slots=True)
class _Part:
    """Scales, or minima, of runs: `half` [n_rows] times `numbers` [n_runs, n_rows], which are `first` and some `gain`.

    `range` is that of the integers in their place.
    """

    half: Tensor
    numbers: Tensor
    first: float
    gain: float
    range: tuple[int, int]

    def nearest(self, numbers: Tensor) -> Tensor:
        """The nearest numbers that blocks can hold."""
        return ((numbers - self.first) / self.gain).round_().clamp_(*self.range) * self.gain + self.first


def _part(blocks: Tensor, kind: Type, number: int) -> _Part:
    """The scales of blocks [n_bytes, n_rows], or the minima, which are number 1."""
    places, at = SCALES[kind][number], HALVES[kind][number]
    stored, n = unpacked(places, blocks), 1 << places.shape[1]
    is_signed = places.shape[1] == _BYTE
    first, gain = MULTIPLES[kind]
    half = blocks[at : at + 2].T.clone(memory_format=torch.contiguous_format).view(-1).view(torch.float16).float()
    numbers = (stored.to(torch.int8) if is_signed else stored) * gain + first
    return _Part(half, numbers, first, gain, (-n // 2, n // 2 - 1) if is_signed else (0, n - 1))
