"""Cells: who holds what is checked against a list that remembers every token's history."""

import random
from itertools import pairwise

import numpy as np
import pytest

from slimoe.offload.memory.cells import NO_TOKENS, Cells, Sequence, common_prefix


class Ledger:
    """What every cell holds, as the engine would have written it: a token and all tokens before it."""

    def __init__(self, n_cells: int) -> None:
        self.cells = Cells(n_cells)
        self.live: list[Sequence] = []
        self.ended: list[Sequence] = []
        self.content: list[tuple[int, ...] | None] = [None] * n_cells

    def begin(self) -> Sequence:
        self.live.append(self.cells.begin())
        return self.live[-1]

    def append(self, sequence: Sequence, tokens: list[int]) -> None:
        n_before = len(sequence)
        self.cells.append(sequence, tokens)
        history = tuple(sequence.tokens.tolist())
        for position, cell in enumerate(sequence.cells.tolist()):
            if position >= n_before:
                self.content[cell] = history[: position + 1]

    def end(self, sequence: Sequence, remember: bool) -> None:
        if not remember:
            self.cells.truncate(sequence, 0)
        self.cells.remember(sequence)
        self.live.remove(sequence)
        self.ended.append(sequence)

    @property
    def known(self) -> list[Sequence]:
        """Sequences that hold cells: those in use, and those that are remembered."""
        return [*self.live, *(sequence for sequence in self.ended if len(sequence))]

    def check(self) -> None:
        """Every sequence finds its own tokens in its cells, and the counts are those of the sequences."""
        cells = self.cells
        n_users = np.zeros(cells.n_cells, int)
        for sequence in self.known:
            tokens = tuple(sequence.tokens.tolist())
            assert len(set(sequence.cells.tolist())) == len(sequence) == len(tokens)
            for position, cell in enumerate(sequence.cells.tolist()):
                assert self.content[cell] == tokens[: position + 1]
            n_users[sequence.cells] += 1
        np.testing.assert_array_equal(cells.n_users, n_users)
        held = set().union(*(sequence.cells.tolist() for sequence in self.live))
        assert cells.n_unused == cells.n_cells - len(held)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_every_sequence_keeps_its_tokens(seed: int) -> None:
    draw = random.Random(seed)
    ledger = Ledger(n_cells=draw.choice([20, 60, 200]))

    def some_tokens(most: int) -> list[int]:
        return [draw.randrange(2) for _ in range(draw.randint(0, most))]

    for _ in range(600):
        action = draw.choice(["begin", "append", "append", "truncate", "remember", "remember", "release", "adopt"])
        sequence = draw.choice(ledger.live) if ledger.live else ledger.begin()
        match action:
            case "begin" if len(ledger.live) < 6:
                ledger.begin()
            case "append":
                ledger.append(sequence, some_tokens(min(20, ledger.cells.n_unused)))
            case "truncate":
                ledger.cells.truncate(sequence, draw.randint(0, len(sequence)))
            case "remember" | "release":
                ledger.end(sequence, remember=action == "remember")
            case "adopt":
                wanted = [*sequence.tokens.tolist(), *some_tokens(10)]
                longest = max(common_prefix(np.array(wanted), other.tokens) for other in ledger.known)
                ledger.cells.adopt(sequence, wanted)
                assert sequence.tokens.tolist() == wanted[:longest]
        ledger.check()
    for sequence in list(ledger.live):
        ledger.end(sequence, remember=True)
    ledger.check()
    everything = ledger.begin()
    ledger.append(everything, [0] * ledger.cells.n_cells)
    assert everything.cells.tolist() == list(range(ledger.cells.n_cells))
    assert ledger.known == [everything]


def test_a_sequence_alone_lies_in_the_first_cells() -> None:
    cells = Cells(1000)
    sequence = cells.begin()
    for n_tokens in (3, 300, 1, 1, 400):
        cells.append(sequence, range(n_tokens))
    cells.truncate(sequence, 10)
    cells.append(sequence, range(900))
    np.testing.assert_array_equal(sequence.cells, np.arange(910))


def test_a_shared_beginning_takes_no_cells() -> None:
    cells = Cells(100)
    first = cells.begin()
    cells.append(first, range(40))
    others = [cells.begin() for _ in range(5)]
    for other in others:
        cells.adopt(other, range(30))
        cells.append(other, [99])
    assert cells.n_unused == 100 - 40 - 5
    assert len({int(other.cells[-1]) for other in others}) == 5
    cells.truncate(first, 0)
    assert cells.n_unused == 100 - 30 - 5
    for other in others:
        assert other.tokens.tolist() == [*range(30), 99]


def test_the_oldest_is_forgotten_first_and_from_its_end() -> None:
    cells = Cells(30)
    for start in (100, 200, 300):
        sequence = cells.begin()
        cells.append(sequence, range(start, start + 10))
        cells.remember(sequence)
    known = cells.begin()
    cells.adopt(known, range(100, 105))
    cells.remember(known)
    new = cells.begin()
    cells.append(new, range(14))

    def n_known(start: int) -> int:
        probe = cells.begin()
        cells.adopt(probe, range(start, start + 10))
        n = len(probe)
        cells.truncate(probe, 0)
        cells.remember(probe)
        return n

    assert (n_known(200), n_known(300), n_known(100)) == (0, 6, 10)


def test_what_is_known_twice_is_kept_once() -> None:
    cells = Cells(30)
    for _ in range(3):
        for n_tokens in (5, 8, 3):
            sequence = cells.begin()
            cells.append(sequence, range(n_tokens))
            cells.remember(sequence)
    assert np.count_nonzero(cells.n_users == 0) == 30 - 8


def test_few_are_remembered() -> None:
    cells = Cells(2000)
    sequences = [cells.begin() for _ in range(1000)]
    for token, sequence in enumerate(sequences):
        cells.append(sequence, [token])
        cells.remember(sequence)
    assert [len(sequence) for sequence in sequences] == [0] * (1000 - 256) + [1] * 256
    assert np.count_nonzero(cells.n_users == 0) == 2000 - 256


def test_a_longer_beginning_takes_the_place_of_an_own_one() -> None:
    cells = Cells(20)
    slow, fast = cells.begin(), cells.begin()
    cells.append(slow, range(4))
    cells.append(fast, range(9))
    cells.adopt(slow, range(7))
    assert slow.cells.tolist() == fast.cells.tolist()[:7]
    assert cells.n_unused == 11
    cells.adopt(slow, [*range(7), 50])
    assert len(slow) == 7


def test_more_than_there_is() -> None:
    cells = Cells(4)
    sequence = cells.begin()
    with pytest.raises(AssertionError, match="promised"):
        cells.append(sequence, range(5))


def test_common_prefix() -> None:
    tokens = [np.array(values, np.int32) for values in ([], [1], [1, 2], [1, 3, 3], [1, 3, 4])]
    assert [common_prefix(a, b) for a, b in pairwise(tokens)] == [0, 1, 1, 2]
    assert common_prefix(tokens[4], tokens[4]) == 3


def test_a_step_reads_the_state_that_each_of_its_sequences_had() -> None:
    """However full of kept states: those before and after a step are nobody else's until the next one."""
    draw, n_parallel = random.Random(7), 3
    for _ in range(30):
        cells = Cells(4000, 1 + 3 * n_parallel + 3)
        live: list[Sequence] = []
        for _ in range(80):
            if len(live) < n_parallel and draw.random() < 0.5:
                live.append(cells.begin())
                cells.adopt(live[-1], [0] * draw.randrange(60))
            elif live and draw.random() < 0.2:
                cells.remember(live.pop(draw.randrange(len(live))))
            together = draw.sample(live, draw.randint(0, len(live)))
            before = [sequence.moves[0][1] if sequence.moves else NO_TOKENS for sequence in together]
            n_tokens = draw.choice([1, 8])
            for sequence in together:
                cells.append(sequence, [0] * n_tokens)
            assert [sequence.moves[0][0] for sequence in together] == before
            after = [sequence.moves[0][1] for sequence in together]
            assert len({*after}) == len(after)
            assert not {*after} & {*before, NO_TOKENS}
            for sequence in together:
                if draw.random() < 0.7:
                    cells.keep(sequence)
