"""Which experts tokens select: made up after the figures that are known of trained models, or recorded.

In what is made up each layer likes its experts unevenly, each text a little otherwise than the last one, and a part of
a token's experts is the last token's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.router_trace import Trace

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Habits:
    """Standard deviations of log-likings, of a layer's for good and of what each text changes of them.

    `repeats` is the share of the experts that are kept from the token before, and `text_tokens` the length of a text.
    """

    skew: float
    text_skew: float
    repeats: float
    text_tokens: int = 256


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """The `selected` experts of tokens, [n_tokens, n_layer, n_used], and the `likings` [n_layer, n_expert].

    The likings are what a calibration on much other text finds: how often each expert is selected, up to a factor.
    """

    selected: Ids
    likings: Floats


def routed(n_layer: int, n_expert: int, n_used: int, habits: Habits, n_tokens: int, seed: int) -> Routed:
    """The experts of `n_tokens` tokens of texts, one after the other."""
    rng = np.random.default_rng(seed)
    logs = rng.normal(0, habits.skew, (n_layer, n_expert))
    selected = np.empty((n_tokens, n_layer, n_used), np.int64)
    for token in range(n_tokens):
        if token % habits.text_tokens == 0:
            of_text = logs + rng.normal(0, habits.text_skew, logs.shape)
        scores = of_text + rng.gumbel(size=logs.shape)
        if token:
            layers, ranks = np.nonzero(rng.random((n_layer, n_used)) < habits.repeats)
            scores[layers, selected[token - 1, layers, ranks]] = np.inf
        selected[token] = np.argpartition(-scores, n_used - 1, axis=1)[:, :n_used]
    return Routed(selected, np.exp(logs))


def recorded(texts: Sequence[Trace], others: Trace) -> Routed:
    """The tokens of traces, one after the other, as if each were a step; `others` is what a calibration read.

    The last layer is left out, because it computes no more than a prompt's last token.
    """
    layers = [layer for layer, experts in enumerate(others.header.expert_bytes) if experts][:-1]
    rows = list[Ids]()
    for step in (step for trace in texts for step in trace.steps):
        parts = {part.layer: part.selected for part in step.layers}
        rows.append(np.stack([parts[layer] for layer in layers], axis=1).astype(np.int64))
    return Routed(np.concatenate(rows), others.rates()[layers])


def repeated(selected: Ids) -> float:
    """The share of the selected experts that the token before selected too."""
    same = selected[1:, :, :, None] == selected[:-1, :, None, :]
    return float(same.any(axis=3).mean())


def in_lru(selected: Ids, share: float, n_expert: int) -> float:
    """The share of the selected experts that a cache of the last used ones holds, `share` of each layer's."""
    n_tokens, n_layer, n_used = selected.shape
    n_slots, n_found = round(share * n_expert), 0
    for layer in range(n_layer):
        held: dict[int, None] = {}
        for token in selected[:, layer].tolist():
            for expert in token:
                n_found += expert in held
                held.pop(expert, None)
                held[expert] = None
                if len(held) > n_slots:
                    del held[next(iter(held))]
    return float(n_found / (n_tokens * n_layer * n_used))
