"""What one step reads: tokens of one or more sequences, and the cells of the KV cache that each of them sees."""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.memory.kv_cache import CELL_STEP

Cells = NDArray[np.int64]
Mask = NDArray[np.float16]

_MASKED = np.float16(-np.inf)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Consecutive tokens of one sequence.

    `visible` I64 are the cells of the sequence, all different, in the order of positions, this run's own last: token i
    of the run sees `visible[: len(visible) - n_tokens + i + 1]`. A run that is no answer's reads a prompt. `window` are
    the cells in layers with a window, in the same order, at least of all that the run's tokens see there.
    """

    n_tokens: int
    visible: Cells
    is_answer: bool
    window: Cells


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The input of a step; valid until one of its sequences changes.

    tokens I32 [n_tokens], positions I32 [n_tokens] (each in its own sequence), cells I64 [n_tokens] (where its key and
    value go, every cell at most once), `runs` in the order of the tokens, `n_kv` cells to look at (a multiple of
    CELL_STEP), `n_out` tokens, counted from the last, whose logits are wanted. Where layers are recurrent, `states` has
    for each run, all as long as each other, the number of the state that its sequence had, and of that which it gets.
    `window_cells` and `n_window_kv` are what `cells` and `n_kv` are, in layers with a window.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    cells: Cells
    window_cells: Cells
    runs: tuple[Run, ...]
    n_kv: int
    n_window_kv: int
    n_out: int
    states: tuple[tuple[int, int], ...] = ()

    @property
    def n_tokens(self) -> int:
        """Tokens read."""
        return len(self.tokens)

    def state_inputs(self, n_parts: int) -> dict[str, NDArray[np.int32] | NDArray[np.int64]]:
        """What a step's inputs say of states, by their names.

        These are the rows [n_runs * n_parts] of the states that sequences had, and of those that they get, of `n_parts`
        each, and the numbers [n_runs] of those that they had.
        """
        states = np.array(self.states)
        before, after = states.T[:, :, None] * n_parts + np.arange(n_parts)
        numbers = states[:, 0].astype(np.int32)
        return {
            "states_from": before.reshape(-1).astype(np.int32),
            "states_to": after.reshape(-1),
            "states_read": numbers,
        }


def make_batch(
    parts: Sequence[tuple[Sequence[int], Cells]],
    n_out: int,
    states: Sequence[tuple[int, int]] = (),
    answers: Collection[int] = (),
    windows: Sequence[Cells | None] = (),
) -> Batch:
    """Makes a batch of parts: the new tokens of a sequence, and all of its cells, those of the new tokens last.

    `states` are those of recurrent layers, before and after, for each part; `answers` are the numbers of parts that
    continue answers, as all of one token are thought to do. `windows` are the cells of each part in layers with a
    window, at least of all that its new tokens see there; None, or nothing, where these are the same cells.
    """
    own = [window if window is not None else part[1] for part, window in itertools.zip_longest(parts, windows)]
    runs = tuple(
        Run(len(tokens), visible, len(tokens) == 1 or index in answers, own[index])
        for index, (tokens, visible) in enumerate(parts)
    )
    assert 0 < n_out <= sum(run.n_tokens for run in runs)
    assert all(0 < run.n_tokens <= len(run.visible) for run in runs)
    assert not states or (len(states) == len(runs) and len({run.n_tokens for run in runs}) == 1)
    return Batch(
        tokens=_joined([np.array(tokens, np.int32) for tokens, _ in parts]),
        positions=_joined(
            [np.arange(len(run.visible) - run.n_tokens, len(run.visible), dtype=np.int32) for run in runs]
        ),
        cells=_joined([run.visible[-run.n_tokens :] for run in runs]),
        window_cells=_joined([run.window[-run.n_tokens :] for run in runs]),
        runs=runs,
        n_kv=_looked_at([run.visible for run in runs]),
        n_window_kv=_looked_at([run.window for run in runs]),
        n_out=n_out,
        states=tuple(states),
    )


def _looked_at(cells: list[Cells]) -> int:
    """How many cells must be looked at to see all of these."""
    return -(-(1 + max(int(each.max()) for each in cells)) // CELL_STEP) * CELL_STEP


def _joined(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def fill_window_mask(mask: Mask, batch: Batch, n_window: int) -> None:
    """Fills the mask F16 [n_tokens, n_window_kv] of layers in which tokens see themselves and `n_window` - 1 before."""
    assert mask.shape == (batch.n_tokens, batch.n_window_kv)
    mask[:] = _MASKED
    row = 0
    for run in batch.runs:
        for end in range(len(run.window) - run.n_tokens + 1, len(run.window) + 1):
            mask[row, run.window[max(0, end - n_window) : end]] = 0
            row += 1


def fill_mask(mask: Mask, batch: Batch) -> None:
    """Fills the attention mask F16 [n_tokens, n_kv] of a batch: 0 where a token sees a cell, -inf elsewhere."""
    assert mask.shape == (batch.n_tokens, batch.n_kv)
    row = 0
    for run in batch.runs:
        _fill_run(mask[row : row + run.n_tokens], run)
        row += run.n_tokens


def _fill_run(rows: Mask, run: Run) -> None:
    n_before = len(run.visible) - run.n_tokens
    before, own = run.visible[:n_before], run.visible[n_before:]
    rows[0] = _MASKED
    if n_before and before.max() == n_before - 1:
        rows[0, :n_before] = 0
    else:
        rows[0, before] = 0
    if run.n_tokens == 1:
        rows[0, own[0]] = 0
        return
    rows[1:] = rows[0]
    first = int(own[0])
    is_one_stretch = own[-1] - first == run.n_tokens - 1 and (own[1:] > own[:-1]).all()
    for index in range(run.n_tokens):
        if is_one_stretch:
            rows[index, first : first + index + 1] = 0
        else:
            rows[index, own[: index + 1]] = 0
