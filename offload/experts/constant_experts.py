"""Constant experts: vectors that stand for experts. They cost a read at the start, and an addition per selecting token.

Source: MoNE (arXiv 2507.00390), where an expert is replaced by its mean output, the "novice".
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.errors import ModelFileError
from slimoe.offload.gguf.header import GGUFFile
from slimoe.offload.graph.exchange import Exchange
from slimoe.offload.lossy.decision import SKIPPED
from slimoe.offload.model.experts import ExpertLayer

ConstantExperts = Mapping[int, NDArray[np.float32]]
"""The vectors [n_constant, n_embd_expert] of each layer that has any."""


def read_constant_experts(gguf: GGUFFile, layers: Sequence[ExpertLayer | None]) -> ConstantExperts:
    """Reads the constant experts of all layers; raises ModelFileError for a file that is shorter now or unreadable."""
    constants = {}
    for index, layer in enumerate(layers):
        if layer is None or layer.constants is None:
            continue
        (span,) = layer.constants.spans
        n_embd, n_constant = layer.constants.ne
        path = gguf.paths[span.shard]
        try:
            values = np.fromfile(path, "<f4", n_embd * n_constant, offset=span.offset)
        except OSError as error:
            raise ModelFileError(path, f"reading failed ({error.strerror}).") from None
        if values.size != n_embd * n_constant:
            raise ModelFileError(path, "the file has become shorter while it was read.")
        constants[index] = values.astype(np.float32, copy=False).reshape(n_constant, n_embd)
    return constants


def write_constant_experts(
    exchange: Exchange, constants: NDArray[np.float32] | None, selected: NDArray[np.int64]
) -> None:
    """Fills the outputs of selected experts that are constant, times their expert weights.

    `selected` [n_rows, n_used] means constant expert n by -1 - n; the outputs of those that are `SKIPPED` become zero.
    """
    flat = selected.ravel()
    columns = np.flatnonzero(flat < 0)
    if not columns.size:
        return
    weights = exchange.read("expert_weights", *selected.shape).reshape(-1)
    values = np.zeros((columns.size, exchange.shape.n_embd_expert), np.float32)
    is_constant = flat[columns] != SKIPPED
    if is_constant.any():
        assert constants is not None, "the layer has no constant experts"
        named = columns[is_constant]
        values[is_constant] = constants[-1 - flat[named]] * weights[named, None]
    exchange.write_rows("outputs", columns, values)
