"""Matrices in MXFP4 as OpenAI's checkpoints have them, and the same values in ggml's blocks: codes and scales are kept.

A block of 32 values has a code of 4 bits for each, and a power of two as its scale, of 8 bits. In a checkpoint X_blocks
[.., n_block, 16] has two neighbours in a byte, the first in its low bits, and X_scales [.., n_block] has the scales. In
ggml's blocks the scale comes first, and the values of a byte are half a block apart (ggml-common.h, block_mxfp4).
"""

from dataclasses import dataclass, replace

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from slimoe.converter.gguf.bytes import read_bytes
from slimoe.converter.source.checkpoint import CheckpointTensor
from slimoe.converter.source.model_source import Blocks
from slimoe.offload.errors import ModelFileError

_TYPE = GGMLQuantizationType.MXFP4
_N_CODES = 16
"""Bytes of a block's codes."""


@dataclass(frozen=True, slots=True)
class Mxfp4Blocks(Blocks):
    """Blocks that become ggml's when they are read: rows of `n_block` each, of which every `stride`-th counts.

    `offset` is where the first row's codes lie, `scales` and `scale_offset` where its scales do.
    """

    scales: CheckpointTensor
    scale_offset: int
    n_block: int
    stride: int = 1

    @classmethod
    def of(cls, codes: CheckpointTensor, scales: CheckpointTensor) -> "Mxfp4Blocks":
        """All blocks of a matrix, or of a stack of them; raises ModelFileError where both do not belong together."""
        *shape, n_codes = codes.shape
        if n_codes != _N_CODES or scales.shape != tuple(shape) or (codes.dtype, scales.dtype) != ("U8", "U8"):
            problem = f"tensors {codes.name} {list(codes.shape)} and {scales.name} {list(scales.shape)}"
            raise ModelFileError(codes.path, f"{problem} do not belong together.", "Download the checkpoint again.")
        n_bytes = scales.n_elements * GGML_QUANT_SIZES[_TYPE][1]
        return cls(_TYPE, codes.path, codes.offset, n_bytes, scales, scales.offset, scales.shape[-1])

    def read(self, begin: int, n_bytes: int) -> NDArray[np.uint8]:
        """Bytes of ggml's blocks from byte `begin` of them on; raises ModelFileError."""
        row_bytes = self.n_block * GGML_QUANT_SIZES[_TYPE][1]
        first, end = begin // row_bytes, -(-(begin + n_bytes) // row_bytes)
        n_rows = (end - first - 1) * self.stride + 1
        start, n = first * self.stride * self.n_block, n_rows * self.n_block
        codes = read_bytes(self.path, self.offset + start * _N_CODES, n * _N_CODES)
        scales = read_bytes(self.scales.path, self.scale_offset + start, n)
        codes, scales = codes.reshape(n_rows, -1, _N_CODES)[:: self.stride], scales.reshape(n_rows, -1)[:: self.stride]
        values = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*codes.shape[:2], 2 * _N_CODES)
        halves = values[..., :_N_CODES] | values[..., _N_CODES:] << 4
        blocks = np.concatenate((scales[..., None], halves), axis=-1).reshape(-1)
        return np.ascontiguousarray(blocks[begin - first * row_bytes :][:n_bytes])

    def part(self, first: int, n_rows: int, stride: int) -> "Mxfp4Blocks":
        """The blocks of `n_rows` rows, every `stride`-th from row `first` on."""
        start = first * self.stride * self.n_block
        return replace(
            self,
            offset=self.offset + start * _N_CODES,
            n_bytes=n_rows * self.n_block * GGML_QUANT_SIZES[_TYPE][1],
            scale_offset=self.scale_offset + start,
            stride=self.stride * stride,
        )
