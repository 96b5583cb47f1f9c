"""Rows that bitsandbytes quantised, decoded by its own CPU functions."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.gguf.bytes import read_bytes
from slimoe.converter.quant.quantize import to_f32
from slimoe.converter.source.checkpoint import CheckpointTensor
from slimoe.converter.source.model_source import Blocks
from slimoe.offload.errors import ModelFileError

FOUR_BIT = ("nf4", "fp4")
"""The 4-bit types that bitsandbytes has."""
_PRECISIONS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class FourBitState:
    """What bitsandbytes says about a matrix of 4 bits; `n_nested` is 0 where its scales are stored as they are."""

    shape: tuple[int, int]
    quant_type: str
    dtype: str
    n_block: int
    n_nested: int = 0
    nested_offset: float = 0.0

    @classmethod
    def read(cls, tensor: CheckpointTensor) -> "FourBitState":
        """Reads the JSON of a state tensor; raises ModelFileError."""
        try:
            fields = json.loads(read_bytes(tensor.path, tensor.offset, tensor.n_bytes).tobytes())
            n_rows, n_per_row = fields["shape"]
            state = cls(
                (int(n_rows), int(n_per_row)),
                fields["quant_type"],
                fields["dtype"],
                int(fields["blocksize"]),
                int(fields.get("nested_blocksize", 0)),
                float(fields.get("nested_offset", 0.0)),
            )
            if min(*state.shape, state.n_block) < 1 or state.n_block % 2 or state.n_nested < 0:
                raise ValueError(state)
            if state.quant_type not in FOUR_BIT or state.dtype not in _PRECISIONS:
                raise ValueError(state)
        except (KeyError, TypeError, ValueError):
            problem = f"tensor {tensor.name} is damaged."
            raise ModelFileError(tensor.path, problem, "Download the checkpoint again.") from None
        return state


@dataclass(frozen=True, slots=True)
class FourBitRows:
    """Rows of a matrix of nf4 or fp4; a block's scale may itself be one of 256 values times a scale (`nested`)."""

    packed: CheckpointTensor
    code: CheckpointTensor
    scales: CheckpointTensor
    nested: tuple[CheckpointTensor, ...]
    state: FourBitState
    step: int = 1
    blocks: Blocks | None = None

    @property
    def name(self) -> str:
        """The name of the tensor, for messages."""
        return self.packed.name

    @property
    def path(self) -> Path:
        """The file that the tensor lies in."""
        return self.packed.path

    @property
    def n_rows(self) -> int:
        """Rows of the matrix that was quantised."""
        return self.state.shape[0]

    @property
    def n_per_row(self) -> int:
        """The number of weights in a row."""
        return self.state.shape[1]

    def read(self, first: int, n_rows: int) -> NDArray[np.float32]:
        """Rows as bitsandbytes decodes them; whole blocks are decoded, then cut. Raises ModelFileError."""
        import torch
        from bitsandbytes import functional

        begin, end = first * self.n_per_row, (first + n_rows) * self.n_per_row
        first_block, end_block = begin // self.state.n_block, -(-end // self.state.n_block)
        first_weight = first_block * self.state.n_block
        n_weights = min(end_block * self.state.n_block, math.prod(self.state.shape)) - first_weight
        state = functional.QuantState(
            absmax=torch.from_numpy(self._scales(first_block, end_block)),
            shape=torch.Size((1, n_weights)),
            code=torch.from_numpy(_floats(self.code)),
            blocksize=self.state.n_block,
            quant_type=self.state.quant_type,
            dtype=getattr(torch, self.state.dtype),
        )
        packed = read_bytes(self.path, self.packed.offset + first_weight // 2, -(-n_weights // 2))
        values = functional.dequantize_4bit(torch.from_numpy(packed).view(-1, 1), state).float().flatten().numpy()
        rows: NDArray[np.float32] = values[begin - first_weight : end - first_weight]
        return rows.reshape(n_rows, self.n_per_row)

    def _scales(self, first: int, end: int) -> NDArray[np.float32]:
        """The scales of some blocks."""
        import torch
        from bitsandbytes import functional

        if not self.nested:
            return _floats(self.scales, first, end)
        n_nested = self.state.n_nested
        outer = first // n_nested
        absmax = _floats(self.nested[0], outer, -(-end // n_nested))
        begin = outer * n_nested
        packed = read_bytes(self.scales.path, self.scales.offset + begin, end - begin)
        state = functional.QuantState(
            absmax=torch.from_numpy(absmax),
            code=torch.from_numpy(_floats(self.nested[1])),
            blocksize=n_nested,
            dtype=torch.float32,
        )
        scales: NDArray[np.float32] = functional.dequantize_blockwise(torch.from_numpy(packed), state).numpy()
        return scales[first - begin :] + np.float32(self.state.nested_offset)


@dataclass(frozen=True, slots=True)
class EightBitRows:
    """Rows of 8-bit weights: signed bytes, and a scale for each row."""

    weight: CheckpointTensor
    scales: CheckpointTensor
    step: int = 1
    blocks: Blocks | None = None

    @property
    def name(self) -> str:
        """The name of the tensor, for messages."""
        return self.weight.name

    @property
    def path(self) -> Path:
        """The file that the tensor lies in."""
        return self.weight.path

    @property
    def n_rows(self) -> int:
        """The number of rows of the tensor."""
        return self.weight.shape[0]

    @property
    def n_per_row(self) -> int:
        """The number of weights in a row."""
        return self.weight.shape[1]

    def read(self, first: int, n_rows: int) -> NDArray[np.float32]:
        """Reads rows as bitsandbytes decodes them; raises ModelFileError."""
        import torch
        from bitsandbytes import functional

        packed = read_bytes(self.path, self.weight.offset + first * self.n_per_row, n_rows * self.n_per_row)
        rows = torch.from_numpy(packed.view(np.int8).reshape(n_rows, self.n_per_row))
        scales = torch.from_numpy(_floats(self.scales, first, first + n_rows))
        values: NDArray[np.float32] = functional.int8_vectorwise_dequant(rows, scales).numpy()
        return values


def _floats(tensor: CheckpointTensor, begin: int = 0, end: int | None = None) -> NDArray[np.float32]:
    """Elements of an F32 tensor."""
    n = (tensor.n_elements if end is None else end) - begin
    return to_f32(read_bytes(tensor.path, tensor.offset + 4 * begin, 4 * n), "F32")
