"""The index of n-grams finds what a search through the whole text finds."""

import random

import pytest

from slimoe.offload.requests.ngram_index import LONGEST, N_GRAM, NgramIndex


def searched(text: list[int], n_most: int) -> tuple[int, tuple[int, ...]]:
    """The longest match of the text's end, the latest of equals, and what followed, found by comparing all places."""
    end, best, longest = len(text), -1, N_GRAM - 1
    for place in range(end - 2, -1, -1):
        length = 0
        while length < min(LONGEST, place + 1) and text[place - length] == text[end - 1 - length]:
            length += 1
        if length > longest:
            longest, best = length, place
    if best < 0:
        return 0, ()
    followed = list(text)
    for offset in range(n_most):
        followed.append(followed[best + 1 + offset])
    return longest, tuple(followed[end:])


def repetitive(draw: random.Random, n_vocab: int, n_tokens: int) -> list[int]:
    """New tokens, and copies of what came before."""
    text = [draw.randrange(n_vocab) for _ in range(10)]
    while len(text) < n_tokens:
        begin = draw.randrange(len(text))
        text += text[begin : begin + draw.randrange(50)] if draw.random() < 0.04 else [draw.randrange(n_vocab)]
    return text


@pytest.mark.parametrize("piece", [1, 7, 33, 100])
def test_finds_the_longest_match(piece: int) -> None:
    """However many tokens are added at once."""
    draw, n_found = random.Random(3), 0
    for _ in range(5):
        text, index = repetitive(draw, 300, 300), NgramIndex()
        for begin in range(0, len(text), piece):
            index.extend(text[begin : begin + piece])
            found = index.find(9)
            assert found == searched(text[: begin + piece], 9)
            n_found += found[0] > 0
    assert n_found >= 10
    assert len(index) == len(text)


def test_of_very_many_matches_the_latest_are_compared() -> None:
    draw = random.Random(4)
    text, index = [draw.randrange(2) for _ in range(400)], NgramIndex()
    index.extend(text)
    length, drafted = index.find(5)
    assert N_GRAM <= length <= searched(text, 5)[0]
    ends = [end for end in range(length, 400) if text[end - length : end] == text[-length:]]
    assert drafted in {tuple((text[end:] * 5)[:5]) for end in ends}


def test_what_repeats_goes_on_repeating() -> None:
    index = NgramIndex()
    index.extend([9, 1, 2, 3, 1, 2, 3, 1])
    assert index.find(7) == (4, (2, 3, 1, 2, 3, 1, 2))
    index.extend([1, 1, 1, 1])
    assert index.find(4) == (4, (1, 1, 1, 1))


def test_nothing_is_found_in_what_is_new() -> None:
    index = NgramIndex()
    assert index.find(3) == (0, ())
    for token in range(5000):
        index.extend([token])
        assert index.find(3) == (0, ())
    index.extend([1, 2])
    assert index.find(3) == (0, ())
    index.extend([3])
    assert index.find(3) == (3, (4, 5, 6))
    assert index.find(0) == (0, ())


def test_ngrams_of_one_row_do_not_hide_each_other() -> None:
    """There are more of them than rows in the table."""
    index, n = NgramIndex(), 70_000
    index.extend(range(n))
    for begin in (0, 11, 123, 40_000, n - 10):
        index.extend([*range(begin, begin + 3)])
        length, drafted = index.find(1)
        assert length == 0 or (length >= N_GRAM and drafted == (begin + 3,))
        index.extend([n + begin])
    index.extend([n - 4, n - 3, n - 2])
    assert index.find(1) == (3, (n - 1,))
