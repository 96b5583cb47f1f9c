"""Cloze probes: which words are asked for, which count as known, and what became of them, by hand."""

from dataclasses import astuple

import numpy as np
import pytest

from slimoe.converter.forward.stream import Sequences
from slimoe.converter.forward.windows import Windows
from slimoe.converter.report.cloze import cloze, content_tokens
from slimoe.converter.report.quality import Comparison, TokenScores


def test_content_words_are_those_that_begin_with_a_space_and_have_letters() -> None:
    pieces = ["<s>", "▁the", "▁of", "ing", "▁(x)", "▁river", "Ġhouse", "1234", "▁日", "語", "<0x0A>", "▁a-b-c"]
    expected = ["▁the", "▁river", "Ġhouse", "▁日", "語", "▁a-b-c"]
    found = content_tokens({"tokenizer.ggml.tokens": pieces})
    assert [piece for piece, is_content in zip(pieces, found, strict=True) if is_content] == expected


def scores(probabilities: list[float], ranks: list[int]) -> TokenScores:
    n = len(ranks)
    return TokenScores(np.log(np.array(probabilities, np.float32)), np.array(ranks, np.int32), np.zeros(n, np.int32))


def compared(targets: list[int], reference: TokenScores, model: TokenScores) -> Comparison:
    n = len(targets)
    rows = np.arange(n)
    windows = Windows(Sequences((tuple(targets),)), ("a",), rows, np.array(targets), np.zeros(n, np.int64))
    return Comparison(windows, reference, model, np.zeros(n, np.float32), (), (), 8)


def test_words_are_counted_by_frequency() -> None:
    """Token 0 is no word; 1 is rare, 2 is middling, 3 is frequent."""
    counts = np.array([1000, 2, 20, 200, 0])
    targets = [0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    reference = scores([0.9, 0.5, 0.4, 0.3, 0.5, 0.001, 0.5, 0.3, 0.9, 0.9], [0, 0, 9, 10, 0, 30, 1, 2, 0, 0])
    model = scores([0.1, 0.25, 0.1, 0.3, 0.5, 0.9, 0.25, 0.3, 0.45, 0.9], [5, 0, 10, 10, 0, 0, 3, 2, 11, 0])
    found = cloze(compared(targets, reference, model), np.array([False, True, True, True, True]), counts)
    assert astuple(found["rare"]) == pytest.approx((3, 2, 1 / 3, 1 / 3, 2, 0.5, 1.5 * np.log(2)))
    # The one of probability 0.001 and rank 30 is none that the reference knew.
    assert astuple(found["middling"]) == pytest.approx((3, 20, 1 / 3, 2 / 3, 2, 1.0, np.log(2) / 2))
    # A frequent word must be far likelier than it is anywhere, 0.16.
    assert (found["frequent"].n_words, found["frequent"].n_known) == (3, 0)
    assert found["frequent"].kept is None
    assert found["frequent"].log_probability_loss is None


def test_without_words_there_is_nothing_to_ask() -> None:
    one = scores([0.5], [0])
    assert cloze(compared([0], one, one), np.array([False]), np.array([3])) == {}


def test_words_of_one_frequency_are_one_bucket() -> None:
    one = scores([0.5, 0.5], [0, 0])
    assert list(cloze(compared([0, 1], one, one), np.array([True, True]), np.array([3, 3]))) == ["rare"]
