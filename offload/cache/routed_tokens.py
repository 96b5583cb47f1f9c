"""What a layer's router selected, grouped by expert: the work of one MoE step."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.residency import Key
from slimoe.offload.model.experts import ExpertCopy, ExpertLayer

_ONE_TOKEN = np.zeros(1, np.int32)
"""The rows of a batch of one token."""


@dataclass(frozen=True, slots=True, eq=False)
class RoutedTokens:
    """The tokens of a step that selected one expert and use one copy of it.

    `tokens` I32 [n] are rows of the batch, `columns` I64 [n] places in the outputs: row * n_expert_used + rank.
    `copy_index` counts an expert's copies from the best on.
    """

    key: Key
    copy: ExpertCopy
    copy_index: int
    tokens: NDArray[np.int32]
    columns: NDArray[np.int64]


def group_by_expert(
    index: int, layer: ExpertLayer, selected: NDArray[np.int64], copies: NDArray[np.int64] | None = None
) -> list[RoutedTokens]:
    """Groups the tokens of layer `index` by `selected` expert and copy.

    `selected` [n_rows, n_used] are stored experts, or negative where none is to be computed; `copies` [n_rows, n_used]
    says which copy of each to use, the best one by default. A single row's experts keep the router's order, a batch's
    are in the experts' order.
    """
    flat = selected.ravel()
    wanted = np.zeros(flat.size, np.int64) if copies is None else copies.ravel()
    experts = layer.experts
    if len(selected) == 1:
        return [
            RoutedTokens((index, expert), experts[expert][copy], copy, _ONE_TOKEN, np.array([column], np.int64))
            for column, (expert, copy) in enumerate(zip(flat.tolist(), wanted.tolist(), strict=True))
            if expert >= 0
        ]
    n_used, n_copies = selected.shape[1], int(wanted.max(initial=0)) + 1
    groups = np.where(flat < 0, -1, flat * n_copies + wanted)
    order = np.argsort(groups, kind="stable")
    names, begins = np.unique(groups[order], return_index=True)
    routed = []
    for name, columns in zip(names.tolist(), np.split(order.astype(np.int64), begins[1:]), strict=True):
        if name >= 0:
            expert, copy = divmod(name, n_copies)
            tokens = (columns // n_used).astype(np.int32)
            routed.append(RoutedTokens((index, expert), experts[expert][copy], copy, tokens, columns))
    return routed
