"""Fits the scales of blocks again to codes that are chosen, for many rows at once.

Given the codes, values are linear in a block's F16 number, and in each run's integer scale and minimum. One after the
other takes the step to where the loss is least, rounded to what it can be, so that the loss e^T M e never grows.
"""

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


def refitted(
    scales: NDArray[np.uint8], kind: Type, target: Tensor, error: Tensor, metric: Tensor
) -> tuple[NDArray[np.uint8], Tensor]:
    """Other scales for rows of one block each [n_rows, n_bytes], which have no codes, and the errors that they leave.

    `error` [n_columns, n_rows] is what codes leave of `target` with the scales as they are; what it costs is the sum of
    e^T `metric` e. For types that `can_refit`.
    """
    blocks = torch.from_numpy(np.ascontiguousarray(scales.T)).to(target.device)
    parts = _parts(blocks, kind, target - error)
    gradient = metric @ error
    for part in parts:
        # The block's number moves all of its runs.
        change, products = part.whole, metric @ part.whole
        step = _step((change * gradient).sum(0), (change * products).sum(0))
        half = (part.half + step).clamp_(-F16_MAX, F16_MAX).half().float()
        step = torch.where(half * part.half > 0, half, part.half) - part.half
        part.half += step
        gradient.addcmul_(products, step, value=-1)
    size = len(target) // len(parts[0].numbers)
    for run in range(len(parts[0].numbers)):
        begin, end = run * size, (run + 1) * size
        here, moved = gradient[begin:end], torch.zeros_like(gradient[begin:end])
        for part in parts:
            change = part.units[begin:end] * part.half
            products = metric[begin:end, begin:end] @ change
            least = _step((change * here).sum(0), (change * products).sum(0))
            step = part.nearest(part.numbers[run] + least) - part.numbers[run]
            part.numbers[run] += step
            here.addcmul_(products, step, value=-1)
            moved.addcmul_(change, step)
        gradient[end:].addmm_(metric[end:, begin:end], moved, alpha=-1)
    values = sum((part.whole * part.half for part in parts), torch.zeros_like(target))
    n_bytes = GGML_QUANT_SIZES[kind][1]
    for part, places, at in zip(parts, SCALES[kind], HALVES[kind], strict=True):
        stored = part.stored
        ones = packed(places, torch.full_like(stored[:, :1], -1), n_bytes)
        blocks = blocks & ~ones | packed(places, stored, n_bytes)
        blocks[at : at + 2] = part.half.half()[:, None].view(torch.uint8).T
    return np.ascontiguousarray(blocks.T.cpu().numpy()), target - values


@dataclass(slots=True)
class _Part:
    """Scales of some rows, or their minima: values are `half` [n_rows] times `numbers` [n_runs, n_rows] times `units`.

    `units` are [n_columns, n_rows]. `first`, `gain` and `n_bits` say what numbers can be.
    """

    half: Tensor
    numbers: Tensor
    units: Tensor
    first: float
    gain: float
    n_bits: int

    @property
    def whole(self) -> Tensor:
        """Values over the half."""
        return self.numbers.repeat_interleave(len(self.units) // len(self.numbers), 0) * self.units

    @property
    def stored(self) -> Tensor:
        """The numbers as blocks hold them."""
        return ((self.numbers - self.first) / self.gain).round().to(torch.int32)

    def nearest(self, numbers: Tensor) -> Tensor:
        """The nearest numbers that blocks can hold."""
        n = 1 << self.n_bits
        low, high = (-n // 2, n // 2 - 1) if self.n_bits == _BYTE else (0, n - 1)
        return ((numbers - self.first) / self.gain).round_().clamp_(low, high) * self.gain + self.first


def _parts(blocks: Tensor, kind: Type, values: Tensor) -> list[_Part]:
    """The scales of blocks [n_bytes, n_rows] with these `values`, and their minima."""
    parts = []
    for places, at in zip(SCALES[kind], HALVES[kind], strict=True):
        stored = unpacked(places, blocks)
        n_bits = places.shape[1]
        if n_bits == _BYTE:
            stored = stored.to(torch.int8)
        first, gain = MULTIPLES[kind]
        half = blocks[at : at + 2].T.clone(memory_format=torch.contiguous_format).view(-1).view(torch.float16).float()
        parts.append(_Part(half, stored * gain + first, -torch.ones_like(values), first, gain, n_bits))
    scales = parts[0]
    # What codes stand for is told from the values; of a run whose scale is 0 it is not known, and the scale stays.
    without = values - sum((part.whole * part.half for part in parts[1:]), torch.zeros_like(values))
    scales.units = torch.ones_like(values)
    scales.units = (without / (scales.whole * scales.half)).nan_to_num_(0, 0, 0)
    return parts


def _step(slope: Tensor, curvature: Tensor) -> Tensor:
    """Where a parabola is least, 0 where it is none."""
    return (slope / curvature).nan_to_num_(0, 0, 0)
