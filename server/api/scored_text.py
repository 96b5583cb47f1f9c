"""Scores that fit a text: the reported tokens, joined, are exactly the text that is sent."""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from slimoe.server.messages import ScoredToken


class ScoredPiece(NamedTuple):
    """A piece of an answer, and the scores of its tokens if there are any."""

    text: str
    scores: list[ScoredToken]


class ScoredText:
    """Joins the text that an engine releases with the scores of its tokens: each piece has the tokens of its text.

    The engine holds text back while it may begin a stop string; the score of a token waits until all of its text is
    released. Tokens that end in the middle of a character wait for the rest of it.
    """

    def __init__(self) -> None:
        self._text = ""
        self._tokens: list[ScoredToken] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_whole: list[bool] = []

    def add(self, text: str, token: ScoredToken | None) -> ScoredPiece:
        """Adds a step of the engine, with `token` if scores were asked for, and returns what can be sent now."""
        self._text += text
        if token is not None:
            self._tokens.append(token)
            self._decoder.decode(token.piece)
            self._is_whole.append(bool(token.text) and not self._decoder.getstate()[0])
        elif not self._tokens:
            return self._take(len(self._text), 0)
        n_tokens = n_chars = at = 0
        for n, candidate in enumerate(self._tokens, 1):
            at += len(candidate.text or "")
            if at > len(self._text):
                break
            if self._is_whole[n - 1]:
                n_tokens, n_chars = n, at
        return self._take(n_chars, n_tokens)

    def finish(self, text: str) -> ScoredPiece:
        """Adds the last `text` of the engine and returns the rest; a token is cut off where the text ends."""
        left = self._text = self._text + text
        scores: list[ScoredToken] = []
        for token in self._tokens:
            own = token.text or ""
            if len(own) > len(left):
                if left:
                    at = token.piece.rfind(own[len(left) :].encode("utf-8", "replace"))
                    piece = token.piece[:at] if at >= 0 else token.piece
                    scores.append(msgspec.structs.replace(token, text=own[: len(left)], piece=piece))
                left = ""
                break
            scores.append(token)
            left = left[len(own) :]
        if left and scores:
            # The mark that stands for a character of which the last tokens are only the beginning.
            scores[-1] = msgspec.structs.replace(scores[-1], text=(scores[-1].text or "") + left)
        return ScoredPiece(self._take(len(self._text), 0).text, scores)

    def _take(self, n_chars: int, n_tokens: int) -> ScoredPiece:
        piece = ScoredPiece(self._text[:n_chars], self._tokens[:n_tokens])
        self._text = self._text[n_chars:]
        del self._tokens[:n_tokens], self._is_whole[:n_tokens]
        return piece


class SaidTokens:
    """Keeps the tokens of what is said: not those of reasoning, of calls, and of the marks around them.

    A reader may hold text back, so tokens wait until some of it is said.
    """

    def __init__(self) -> None:
        self._waiting: list[ScoredToken] = []

    def take(self, scores: Sequence[ScoredToken], said: str) -> list[ScoredToken]:
        """Adds tokens, and returns those that make up the text `said`, which is the last of what they spell.

        A token that is said only in part is cut; what comes behind the text waits for more.
        """
        self._waiting += scores
        if not said and any(token.text for token in self._waiting):
            return []
        spelled = "".join(token.text or "" for token in self._waiting)
        places = _places(spelled, said)
        end = max(places, default=-1) + 1
        found: list[ScoredToken] = []
        waiting: list[ScoredToken] = []
        at = 0
        for token in self._waiting:
            own = range(at, at + len(token.text or ""))
            at = own.stop
            if not own or all(n in places for n in own):
                found.append(token)
                continue
            for kept, text in ((found, [n for n in own if n in places]), (waiting, [n for n in own if n >= end])):
                if text:
                    kept.append(_cut(token, "".join(spelled[n] for n in text)))
        self._waiting = waiting
        return found


def _places(spelled: str, said: str) -> set[int]:
    """Where in `spelled` the characters of `said` stand: at its end in one piece, or else as near to it as they can."""
    begin = spelled.rfind(said)
    if begin >= 0:
        return set(range(begin, begin + len(said)))
    found: set[int] = set()
    at = len(spelled)
    for character in reversed(said):
        at = spelled.rfind(character, 0, at)
        if at < 0:
            break
        found.add(at)
    return found


def _cut(token: ScoredToken, text: str) -> ScoredToken:
    whole = token.text == text
    return token if whole else msgspec.structs.replace(token, text=text, piece=text.encode("utf-8", "replace"))


def fitted(scores: Sequence[ScoredToken], text: str) -> list[ScoredToken]:
    """A prompt's tokens as they stand in its text: without the space that a tokenizer puts before it.

    A control token that the text does not show keeps its name, and has no `text`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    data, at, found = text.encode("utf-8", "replace"), 0, []
    for score in scores:
        forms = (score.piece, score.piece.removeprefix(b" "))
        piece = next((form for form in forms if data.startswith(form, at)), None)
        if piece is not None:
            at += len(piece)
            score = msgspec.structs.replace(score, piece=piece, text=decoder.decode(piece))
        found.append(score)
    return found
