"""A recorded trace as what it asks of a cache of experts, step by step."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.router_trace import Trace, TraceLayer, TraceStep


@dataclass(frozen=True, slots=True, eq=False)
class Visit:
    """What a step wants of a layer: `keys`, distinct, in the engine's order, and whose they are.

    `picks` int32 [n_rows, n_used], `is_answer` bool [n_rows]. `predicted` are the experts
    that the engine then expected of later layers.
    """

    layer: int
    keys: tuple[Key, ...]
    picks: NDArray[np.int32]
    is_answer: NDArray[np.bool_]
    predicted: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """One step. It counts as an answer's if it holds nothing of a prompt."""

    visits: tuple[Visit, ...]
    n_tokens: int
    is_answer: bool
    has_answer: bool


def demands(trace: Trace) -> list[Demand]:
    """All steps of a trace."""
    return [_demand(step) for step in trace.steps]


def _demand(step: TraceStep) -> Demand:
    n_tokens = sum(run.n_tokens for run in step.runs)
    is_answer = step.is_answer(n_tokens)
    visits = tuple(_visit(part, is_answer[n_tokens - len(part.picks) :]) for part in step.layers)
    return Demand(visits, n_tokens, bool(is_answer.all()), bool(is_answer.any()))


def _visit(part: TraceLayer, is_answer: NDArray[np.bool_]) -> Visit:
    """One token's experts in the router's order, a batch's in the order of their numbers."""
    chosen = part.picks[part.picks >= 0].tolist()
    distinct = dict.fromkeys(chosen) if len(part.picks) == 1 else sorted(set(chosen))
    keys = tuple((part.layer, expert) for expert in distinct)
    return Visit(part.layer, keys, part.picks, is_answer, part.predicted)
