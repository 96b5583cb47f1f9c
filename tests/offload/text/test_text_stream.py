import random
from collections.abc import Sequence

import pytest

from slimoe.offload.text.tokenizer import TextStream


def stream(pieces: Sequence[bytes], stop: Sequence[str] = ()) -> tuple[TextStream, list[str]]:
    """The stream after all pieces, and what each released."""
    text = TextStream(lambda token: pieces[token], stop)
    return text, [text.feed(token) for token in range(len(pieces))]


def test_plain_text_is_released_at_once() -> None:
    text, released = stream([b"Hello", b", ", b"world"])
    assert released == ["Hello", ", ", "world"]
    assert text.finish() == ""
    assert not text.stopped


def test_a_character_split_over_tokens_is_released_whole() -> None:
    pieces = [bytes([byte]) for byte in "a€😀".encode()]
    text, released = stream(pieces)
    assert released == ["a", "", "", "€", "", "", "", "😀"]
    assert text.finish() == ""


def test_a_broken_character_at_the_end_becomes_a_mark() -> None:
    text, released = stream([b"a", "€".encode()[:2]])
    assert released == ["a", ""]
    assert text.finish() == "�"


def test_broken_bytes_in_the_middle_do_not_swallow_what_follows() -> None:
    text, released = stream([b"\xe2\x82", b"ok", b"\xff", b"!"])
    assert "".join(released) + text.finish() == "�ok�!"


def test_a_stop_string_split_over_tokens() -> None:
    text, released = stream([b"one E", b"N", b"D two"], ["END"])
    assert released == ["one ", "", ""]
    assert text.stopped
    assert text.finish() == ""


def test_what_only_looked_like_a_stop_string_is_released() -> None:
    text, released = stream([b"one E", b"N", b"tity"], ["END"])
    assert released == ["one ", "", "ENtity"]
    assert not text.stopped


def test_what_is_held_at_the_end_is_released() -> None:
    text, released = stream([b"one EN"], ["END"])
    assert released == ["one "]
    assert text.finish() == "EN"


def test_a_stop_string_that_overlaps_itself() -> None:
    text, released = stream([b"a", b"a", b"a", b"b"], ["aab"])
    assert released == ["", "", "a", ""]
    assert text.stopped


def test_the_earliest_of_several_stop_strings_counts() -> None:
    text, released = stream([b"x fin. END"], ["END", "fin"])
    assert released == ["x "]
    assert text.stopped
    assert text.finish() == ""


def test_a_longer_stop_string_is_not_waited_for_once_a_shorter_one_is_there() -> None:
    text, released = stream([b"ab"], ["abc", "b"])
    assert released == ["a"]
    assert text.stopped


def test_empty_stop_strings_mean_nothing() -> None:
    text, released = stream([b"a", b"b"], ["", "z"])
    assert released == ["a", "b"]
    assert not text.stopped


def test_a_stop_string_of_split_characters() -> None:
    pieces = [bytes([byte]) for byte in "Grüße 😀 mehr".encode()]
    text, released = stream(pieces, ["😀"])
    assert "".join(released) == "Grüße "
    assert text.stopped


@pytest.mark.parametrize("seed", range(300))
def test_any_split_of_any_text(seed: int) -> None:
    """What is out is always a sound beginning; in the end it is all, up to the first stop string."""
    rng = random.Random(seed)
    alphabet = "aab€😀 "
    whole = "".join(rng.choices(alphabet, k=rng.randrange(40)))
    stop = ["".join(rng.choices(alphabet, k=rng.randrange(1, 5))) for _ in range(rng.randrange(4))]
    found = [(whole.find(s) + len(s), whole.find(s)) for s in stop if s in whole]
    data = whole.encode()
    cuts = sorted(rng.sample(range(len(data) + 1), min(len(data), rng.randrange(12))))
    pieces = [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    text = TextStream(lambda token: pieces[token], stop)
    out = ""
    for token in range(len(pieces)):
        out += text.feed(token)
        assert whole.startswith(out)
        assert not any(s in out for s in stop)
    out += text.finish()
    assert text.stopped == bool(found)
    if not found:
        assert out == whole
    else:
        assert any(whole.startswith(out + s) for s in stop)
        # Not behind the stop string that is complete first; a longer one may have begun before it.
        assert len(out) <= min(found)[1]


@pytest.mark.parametrize(
    ("stop", "found"), [(["END"], "END"), (["two", "END"], "END"), (["EN", "END"], "END"), (["nothing"], "")]
)
def test_which_stop_string_it_was(stop: list[str], found: str) -> None:
    text, _ = stream([b"one ", b"END two"], stop)
    text.finish()
    assert text.stop_text == found
