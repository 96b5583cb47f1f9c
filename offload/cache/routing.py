"""What a layer's router chose, sorted by expert: the work of one stop between two segments."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.residency import Key
from slimoe.offload.model.experts import ExpertCopy, ExpertLayer

_ONE_TOKEN = np.zeros(1, np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Picks:
    """All picks of one copy of an expert in a step: rows of the batch I32 [n], and columns of the outputs I64 [n].

    `copy_index` counts an expert's copies from the best on. A column is row * n_expert_used + rank.
    """

    key: Key
    copy: ExpertCopy
    copy_index: int
    tokens: NDArray[np.int32]
    columns: NDArray[np.int64]


def group_picks(
    index: int, layer: ExpertLayer, stored: NDArray[np.int64], copies: NDArray[np.int64] | None = None
) -> list[Picks]:
    """Picks by expert and copy, from `stored` [n_rows, n_used]: stored experts, or negative for what is none.

    `copies` [n_rows, n_used] says which copy each pick uses; the best without it. A single row's keep the router's
    order, a batch's are in the experts' order.
    """
    flat = stored.ravel()
    chosen = np.zeros(flat.size, np.int64) if copies is None else copies.ravel()
    if len(stored) == 1:
        return [
            _picks(index, layer, expert, copy, _ONE_TOKEN, np.array([column], np.int64))
            for column, (expert, copy) in enumerate(zip(flat.tolist(), chosen.tolist(), strict=True))
            if expert >= 0
        ]
    n_used, n_copies = stored.shape[1], int(chosen.max(initial=0)) + 1
    groups = np.where(flat < 0, -1, flat * n_copies + chosen)
    order = np.argsort(groups, kind="stable")
    names, begins = np.unique(groups[order], return_index=True)
    return [
        _picks(index, layer, name // n_copies, name % n_copies, (columns // n_used).astype(np.int32), columns)
        for name, columns in zip(names.tolist(), np.split(order.astype(np.int64), begins[1:]), strict=True)
        if name >= 0
    ]


def _picks(
    index: int, layer: ExpertLayer, expert: int, copy: int, tokens: NDArray[np.int32], columns: NDArray[np.int64]
) -> Picks:
    return Picks((index, expert), layer.experts[expert][copy], copy, tokens, columns)
