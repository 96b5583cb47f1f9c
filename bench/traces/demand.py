"""A recorded trace as what it asks of a cache of experts, step by step."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.router_trace import Trace


@dataclass(frozen=True, slots=True, eq=False)
class Visit:
    """What a step needs of a layer: the `keys` of distinct experts, in the order in which the engine asks for them.

    `selected` int32 [n_rows, n_used] are the experts of each token, -1 for none, `is_answer` bool [n_rows] says which
    tokens belong to answers. `predicted` are the experts that the engine then expected of later layers.
    """

    layer: int
    keys: tuple[Key, ...]
    selected: NDArray[np.int32]
    is_answer: NDArray[np.bool_]
    predicted: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """What one step needs of all layers. It counts as an answer's if it holds nothing of a prompt."""

    visits: tuple[Visit, ...]
    n_tokens: int
    is_answer: bool
    has_answer: bool


def demands(trace: Trace) -> list[Demand]:
    """What each step of a trace asks of a cache."""
    result = []
    for step in trace.steps:
        n_tokens = sum(run.n_tokens for run in step.runs)
        is_answer = step.is_answer(n_tokens)
        visits = []
        for part in step.layers:
            selected = part.selected[part.selected >= 0].tolist()
            # One token's experts come in the router's order, a batch's in the order of their numbers.
            distinct = dict.fromkeys(selected) if len(part.selected) == 1 else sorted(set(selected))
            keys = tuple((part.layer, expert) for expert in distinct)
            rows = is_answer[n_tokens - len(part.selected) :]
            visits.append(Visit(part.layer, keys, part.selected, rows, part.predicted))
        result.append(Demand(tuple(visits), n_tokens, bool(is_answer.all()), bool(is_answer.any())))
    return result
