"""What a layer's router selected, grouped by expert: the work of one MoE step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.residency import Key
from slimoe.offload.model.experts import ExpertCopy, ExpertLayer


@dataclass(frozen=True, slots=True, eq=False)
class RoutedTokens:
    """The tokens of a step that selected one expert and use one copy of it.

    `columns` I64 [n] are places in the outputs: row of the batch * n_expert_used + rank. `copy_index` counts an
    expert's copies from the best on.
    """

    key: Key
    copy: ExpertCopy
    copy_index: int
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
            RoutedTokens((index, expert), experts[expert][copy], copy, np.array([column], np.int64))
            for column, (expert, copy) in enumerate(zip(flat.tolist(), wanted.tolist(), strict=True))
            if expert >= 0
        ]
    n_copies = int(wanted.max(initial=0)) + 1
    groups = np.where(flat < 0, -1, flat * n_copies + wanted)
    order = np.argsort(groups, kind="stable")
    names, begins = np.unique(groups[order], return_index=True)
    routed = []
    for name, columns in zip(names.tolist(), np.split(order.astype(np.int64), begins[1:]), strict=True):
        if name >= 0:
            expert, copy = divmod(name, n_copies)
            routed.append(RoutedTokens((index, expert), experts[expert][copy], copy, columns))
    return routed


def pairs_of(
    routed: Sequence[RoutedTokens], slots: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Slots, experts and columns of all pairs of experts of one layer, each of which is in one of the `slots`."""
    n_pairs = [len(one.columns) for one in routed]
    experts, places = np.array([one.key[1] for one in routed], np.int64), np.array(slots, np.int64)
    columns = np.concatenate([one.columns for one in routed])
    if len(columns) == len(routed):
        return places, experts, columns
    return np.repeat(places, n_pairs), np.repeat(experts, n_pairs), columns
