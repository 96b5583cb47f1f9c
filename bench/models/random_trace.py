"""Router traces as trained models leave them, made up instead of recorded. Apart: the tests of replays use it too.

Experts are liked unevenly, and some are kept from the token before.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.router_trace import ANSWER, PROMPT, TraceHeader, TraceRun, TraceWriter

REPEATS = 0.25
"""Share of the experts that are kept from the token before."""
SKEW = 0.3
"""Standard deviation of the experts' log-likings; each layer has its own."""


def write_random_trace(path: Path, header: TraceHeader, n_prompt: int, n_answer: int, n_turns: int, seed: int) -> None:
    """Writes turns of one sequence: in each a prompt in one batch, then an answer token by token."""
    rng = np.random.default_rng(seed)
    likings = [rng.normal(0, SKEW, len(experts)) for experts in header.expert_bytes]
    writer = TraceWriter(path, header)
    position = 0
    for _ in range(n_turns):
        routed = [_route(rng, liking, n_prompt + n_answer, header.n_expert_used) for liking in likings]
        _write_step(writer, TraceRun(PROMPT, 0, position, n_prompt), routed, 0)
        for token in range(n_prompt, n_prompt + n_answer):
            _write_step(writer, TraceRun(ANSWER, 0, position + token, 1), routed, token)
        position += n_prompt + n_answer
    writer.close()


def _write_step(writer: TraceWriter, run: TraceRun, routed: list[NDArray[np.int64]], begin: int) -> None:
    writer.step([run])
    for layer, selected in enumerate(routed):
        if selected.size:
            rows = selected[begin : begin + run.n_tokens]
            writer.layer(layer, rows, np.full(rows.shape, 1 / rows.shape[1]))


def _route(rng: np.random.Generator, liking: NDArray[np.float64], n_tokens: int, n_used: int) -> NDArray[np.int64]:
    """The experts that tokens select, [n_tokens, n_used], no expert twice; empty for a layer without experts."""
    if not liking.size:
        return np.empty((0, n_used), np.int64)
    scores = liking + rng.gumbel(size=(n_tokens, liking.size))
    selected = np.argsort(-scores, axis=1)[:, :n_used]
    for token in range(1, n_tokens):
        kept = [expert for expert in selected[token - 1] if rng.random() < REPEATS]
        fresh = [expert for expert in selected[token] if expert not in kept]
        selected[token] = (*kept, *fresh)[:n_used]
    return selected
