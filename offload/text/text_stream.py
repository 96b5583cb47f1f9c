"""Turns tokens into text that may be shown: whole characters, and nothing that a stop string may still claim."""

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """Feeds on token ids and releases text.

    `piece` gives a token's bytes. After a stop string has appeared `stopped` is true, and neither it nor anything
    behind it is released. With `strips_space` one space at the very beginning is left out. `piece` are the bytes that
    the last token fed stands for here, `added` the characters that they complete.
    """

    def __init__(self, piece: Callable[[int], bytes], stop: Sequence[str], strips_space: bool = False) -> None:
        self._piece_of = piece
        self._strips_space = strips_space
        self._stop = [text for text in stop if text]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.piece, self.added = b"", ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that `token` releases; may be empty, and may contain what earlier tokens held back."""
        if self.stopped:
            return ""
        self.piece = self._piece_of(token)
        if self._strips_space and self.piece:
            self.piece = self.piece.removeprefix(b" ")
            self._strips_space = False
        self.added = self._decoder.decode(self.piece)
        self._held += self.added
        return self._release(keep=_possible_stop(self._held, self._stop))

    def finish(self) -> str:
        """The rest, once nothing more comes."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(b"", True)
        return self._release(keep=0)

    def _release(self, keep: int) -> str:
        ends = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if ends:
            self.stopped = True
            released, self._held = self._held[: min(ends)], ""
            return released
        split = len(self._held) - keep
        released, self._held = self._held[:split], self._held[split:]
        return released


def _possible_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = max((len(s) for s in stop), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-length:]) for s in stop):
            return length
    return 0
