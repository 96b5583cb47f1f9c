"""Cells of layers with a window: what every token sees is checked against a list of what each cell holds."""

import random

import numpy as np
import pytest

from slimoe.offload.memory.cells import Cells, Sequence
from slimoe.offload.memory.sequence import NO_CELL
from slimoe.offload.memory.window_cells import WindowCells

N_WINDOW, N_PARALLEL, N_BATCH = 7, 3, 12


class Ledger:
    """What every cell of the windows holds, as the engine would have written it: a token and all tokens before it."""

    def __init__(self, n_more: int = 0) -> None:
        self.windows = WindowCells(N_WINDOW, (N_PARALLEL + 1) * N_WINDOW + N_BATCH, n_more)
        self.cells = Cells(4000, 0, self.windows)
        self.content: dict[int, tuple[int, ...]] = {}
        self.live: list[Sequence] = []
        self.ended: list[Sequence] = []

    def step(self, parts: list[tuple[Sequence, list[int]]]) -> None:
        """Reads tokens, all of whose windows must be there."""
        self.cells.begin_step()
        for sequence, tokens in parts:
            self.cells.append(sequence, tokens)
        for sequence, tokens in parts:
            history = tuple(sequence.tokens.tolist())
            seen = self.cells.window(sequence, len(tokens))
            assert seen is not None
            assert len(seen) == min(len(history), len(tokens) + N_WINDOW - 1)
            first = len(history) - len(seen)
            for index, cell in enumerate(seen.tolist()):
                if first + index >= len(history) - len(tokens):
                    self.content[cell] = history[: first + index + 1]
            expected = [history[:n] for n in range(first + 1, len(history) + 1)]
            assert [self.content[cell] for cell in seen.tolist()] == expected
        self.check()

    def check(self) -> None:
        """Every sequence in use holds the window before its end, and as many hold each cell as there are."""
        for sequence in self.live:
            assert sequence.has_windows(max(0, len(sequence) - N_WINDOW + 1), len(sequence))
            for place in sequence.places:
                assert sequence.has_windows(max(0, place - N_WINDOW + 1), place)
        n_users = np.zeros_like(self.windows.n_users)
        for sequence in (*self.live, *self.ended):
            n_users[sequence.window_cells[sequence.window_cells != NO_CELL]] += 1
        np.testing.assert_array_equal(self.windows.n_users, n_users)

    def end(self) -> None:
        """Ends the use of the sequence that began last."""
        self.ended.append(self.live.pop())
        self.cells.remember(self.ended[-1])
        self.check()


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_every_token_sees_its_window(seed: int) -> None:
    draw = random.Random(seed)
    ledger = Ledger(n_more=seed % 2 * 3)
    for _ in range(500):
        action = draw.choice(["begin", "step", "step", "step", "reject", "undo", "end", "adopt"])
        match action:
            case "begin" if len(ledger.live) < N_PARALLEL:
                ledger.live.append(ledger.cells.begin())
            case "adopt" if ledger.live:
                sequence = draw.choice(ledger.live)
                wanted = [*sequence.tokens.tolist(), *(draw.randrange(2) for _ in range(draw.randint(1, 40)))]
                ledger.cells.adopt(sequence, wanted)
                ledger.check()
            case "step" | "reject" | "undo" if ledger.live:
                together = draw.sample(ledger.live, draw.randint(1, len(ledger.live)))
                n_left = N_BATCH - len(together)
                parts = []
                for sequence in together:
                    n = 1 + draw.randint(0, n_left)
                    n_left -= n - 1
                    parts.append((sequence, [draw.randrange(2) for _ in range(n)]))
                before = [len(sequence) for sequence in together]
                ledger.step(parts)
                for (sequence, tokens), n_before in zip(parts, before, strict=True):
                    n_kept = n_before + (0 if action == "undo" else draw.randint(1, len(tokens)))
                    if action != "step":
                        ledger.cells.truncate(sequence, n_kept)
                        assert len(sequence) == n_kept, "a step that fails, or whose drafts are wrong, loses no more"
                    elif draw.random() < 0.5:
                        ledger.cells.keep(sequence)
                        ledger.cells.keep_window(sequence, max(0, len(sequence) - 3))
                ledger.check()
            case "end" if ledger.live:
                draw.shuffle(ledger.live)
                ledger.end()
    while ledger.live:
        ledger.end()
    ledger.live.append(ledger.cells.begin())
    for _ in range(300):
        ledger.step([(ledger.live[0], [1] * N_BATCH)])


def test_a_place_is_whole_where_all_before_it_are_held() -> None:
    windows = WindowCells(5, 40)
    cells = Cells(100, 0, windows)
    sequence = cells.begin()
    cells.append(sequence, range(20))
    cells.begin_step()
    assert [windows.usable(sequence, n) for n in (0, 3, 20)] == [0, 3, 20]
    windows.drop_passed(sequence, [10], is_live=True)
    assert np.flatnonzero(sequence.window_cells != NO_CELL).tolist() == [6, 7, 8, 9, 16, 17, 18, 19]
    assert [windows.usable(sequence, n) for n in (20, 19, 15, 10, 9, 4)] == [20, 10, 10, 10, 0, 0]
    windows.drop(sequence, 8)
    assert windows.n_free == 40 - 2


def test_what_is_loaded_has_the_last_window_only() -> None:
    cells = Cells(4000, 0, WindowCells(5, 12))
    sequence = cells.begin()
    cells.append(sequence, range(1000), is_loaded=True)
    assert np.flatnonzero(sequence.window_cells != NO_CELL).tolist() == [996, 997, 998, 999]
    cells.keep(sequence)
    cells.begin_step()
    cells.append(sequence, [7] * 8)
    window = cells.window(sequence, 8)
    assert window is not None
    assert len(set(window.tolist())) == 12
