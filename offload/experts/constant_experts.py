"""Novices: constant vectors that stand for experts. They cost a read at the start and an addition per pick.

Source: MoNE (arXiv 2507.00390), where an expert is replaced by its mean output.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.errors import ModelFileError
from slimoe.offload.gguf.header import GGUFFile
from slimoe.offload.graph.exchange import Exchange
from slimoe.offload.lossy.decision import SKIPPED
from slimoe.offload.model.experts import ExpertLayer
from slimoe.offload.model.tensors import WeightSource

Novices = Mapping[int, NDArray[np.float32]]
"""The vectors [n_novice, n_embd] of each layer that has any."""


def read_novices(gguf: GGUFFile, layers: Sequence[ExpertLayer | None]) -> Novices:
    """Reads all layers' novices; raises ModelFileError when the file has become shorter or cannot be read."""
    sources = {index: layer.constants for index, layer in enumerate(layers) if layer is not None}
    return {index: _read(gguf, source) for index, source in sources.items() if source is not None}


def _read(gguf: GGUFFile, source: WeightSource) -> NDArray[np.float32]:
    (span,) = source.spans
    n_embd, n_novice = source.ne
    path = gguf.paths[span.shard]
    try:
        values = np.fromfile(path, "<f4", n_embd * n_novice, offset=span.offset)
    except OSError as error:
        raise ModelFileError(path, f"reading failed ({error.strerror}).") from None
    if values.size != n_embd * n_novice:
        raise ModelFileError(path, "the file has become shorter while it was read.")
    return values.astype(np.float32, copy=False).reshape(n_novice, n_embd)


def write_novices(exchange: Exchange, novices: NDArray[np.float32] | None, stored: NDArray[np.int64]) -> None:
    """Fills the outputs of the picks `stored` [n_rows, n_used] that mean a novice (-1 - n), times their shares.

    Those of picks that are `SKIPPED` become zero.
    """
    flat = stored.ravel()
    columns = np.flatnonzero(flat < 0)
    if not columns.size:
        return
    shares = exchange.read("shares", flat.size)
    values = np.zeros((columns.size, exchange.shape.n_embd), np.float32)
    is_novice = flat[columns] != SKIPPED
    if is_novice.any():
        assert novices is not None, "the layer has no novices"
        named = columns[is_novice]
        values[is_novice] = novices[-1 - flat[named]] * shares[named, None]
    exchange.write_rows("outputs", columns, values)
