"""The blocks of a random tensor: quantised values from a pool, or embeddings that have topics."""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from bench.models.topics import topical_rows
from slimoe.offload.ggml.struct import ggml_quantize_chunk

CHUNK = 256  # weights drawn from the pool at once: the longest block of any ggml type
POOL_CHUNKS = 4096
WRITE_CHUNKS = 1 << 14


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """One tensor to write: `ne` in ggml's order, normal values of `mean` and deviation `std`.

    Its rows are `topical_rows` where `topical` is not 0.
    """

    name: str
    ne: tuple[int, ...]
    type: GGMLQuantizationType
    std: float
    mean: float = 0.0
    topical: float = 0.0

    @property
    def n_chunks(self) -> int:
        """How many chunks of the pool fill the tensor, the last one perhaps in part."""
        return math.ceil(math.prod(self.ne) / CHUNK)

    @property
    def n_bytes(self) -> int:
        """The tensor's bytes in the file."""
        return type_bytes(self.type, math.prod(self.ne))


def type_bytes(kind: GGMLQuantizationType, n_weights: int) -> int:
    """The bytes of whole blocks of weights of a type."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return n_weights // int(block) * int(block_bytes)


def block_pool(kind: GGMLQuantizationType, std: float, mean: float, seed: int) -> np.ndarray:
    """Quantised random chunks, uint8 of shape (POOL_CHUNKS, bytes of a chunk)."""
    rng = np.random.default_rng([seed, kind.value])
    values = rng.standard_normal((POOL_CHUNKS, CHUNK), np.float32) * np.float32(std) + np.float32(mean)
    pool = np.empty((POOL_CHUNKS, type_bytes(kind, CHUNK)), np.uint8)
    ggml_quantize_chunk(kind, values.ctypes.data, pool.ctypes.data, 0, POOL_CHUNKS, CHUNK, None)
    return pool


def random_pieces(tensor: RandomTensor, pool: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """The tensor's bytes, a few megabytes at a time; the same for the same seed and name."""
    rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    n_left = tensor.n_bytes
    for begin in range(0, tensor.n_chunks, WRITE_CHUNKS):
        n_chunks = min(WRITE_CHUNKS, tensor.n_chunks - begin)
        piece = pool.take(rng.integers(0, POOL_CHUNKS, n_chunks, np.uint16), axis=0).ravel()[:n_left]
        n_left -= piece.size
        yield piece


def topical_pieces(tensor: RandomTensor, seed: int) -> Iterator[np.ndarray]:
    """The bytes of embeddings that have topics, a few megabytes at a time."""
    n_embd, n_rows = tensor.ne
    for rows in topical_rows(n_rows, n_embd, tensor.topical, seed, WRITE_CHUNKS * CHUNK // n_embd):
        if tensor.std != 1.0:
            rows *= np.float32(tensor.std)
        piece = np.empty((len(rows), type_bytes(tensor.type, n_embd)), np.uint8)
        ggml_quantize_chunk(tensor.type, rows.ctypes.data, piece.ctypes.data, 0, len(rows), n_embd, None)
        yield piece
