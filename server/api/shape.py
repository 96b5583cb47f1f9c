"""How answers are written: a `Shape` for each dialect of the API, and what OpenAI's two have in common."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from slimoe.offload.text.generation import Timings
from slimoe.server import messages
from slimoe.server.api import wire
from slimoe.server.api.choice import ChoiceState, Piece
from slimoe.server.api.request_body import Extras
from slimoe.server.api_error import ApiError
from slimoe.server.http.event_stream import EVENTS, Framing

_encode = msgspec.json.Encoder().encode


class Shape(Protocol):
    """Writes the answer to one request as a dialect has it. `states` are its choices, in the order of their index."""

    prompt_param: str
    """The field of the body that holds the prompt, which errors name."""
    framing: Framing
    """What stands around the documents of a stream."""

    def chunks(
        self, states: Sequence[ChoiceState], index: int, answer: messages.Answer, piece: Piece
    ) -> Sequence[bytes]:
        """The stream's documents for an engine's `answer` about choice `index`, to whose text it has added `piece`."""

    def ending(self, states: Sequence[ChoiceState]) -> Sequence[bytes]:
        """The stream's documents after the last choice is complete."""

    def failure(self, states: Sequence[ChoiceState], error: ApiError) -> Sequence[bytes]:
        """The stream's last documents when it ends with an error."""

    def whole(self, states: Sequence[ChoiceState]) -> bytes:
        """The document of an answer that is not streamed."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """The fields that all JSON documents of one API response share."""

    id: str
    object: str
    created: int
    model: str
    fingerprint: str

    @classmethod
    def new(cls, prefix: str, kind: str, model: str, fingerprint: str) -> "Envelope":
        """An envelope with an id of its own, such as `chatcmpl-...`."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", kind, int(time.time()), model, fingerprint)

    def document(
        self,
        choices: list[wire.ChatChoice] | list[wire.ChatChunkChoice] | list[wire.CompletionChoice],
        usage: wire.Usage | UnsetType | None = UNSET,
    ) -> wire.Document:
        """Wraps choices into a document."""
        return wire.Document(self.id, self.object, self.created, self.model, self.fingerprint, choices, usage)


class OpenAIShape(ABC):
    """What chat and plain completions have in common: chunks, the figures, and the usage that clients ask for."""

    framing = EVENTS

    def __init__(self, envelope: Envelope, extras: Extras) -> None:
        self.envelope = envelope
        self._extras = extras
        self._told: set[int] = set()
        """Choices whose prompt's progress was told of."""

    @abstractmethod
    def opening(self, index: int) -> list[wire.Document]:
        """The chunks that a streamed choice begins with."""

    @abstractmethod
    def prompt_scores(self, index: int, scores: list[messages.ScoredToken]) -> list[wire.Document]:
        """The chunks for a prompt that is given back with its scores."""

    @abstractmethod
    def chunk(
        self, index: int, text: str, scores: list[messages.ScoredToken], reason: str | None = None
    ) -> wire.Document:
        """The chunk for a piece of text, or with the `reason` why the choice ends its last one, without text."""

    def pieces(self, index: int, piece: Piece) -> list[wire.Document]:
        """The chunks for what an answer of the engine has added."""
        return [self.chunk(index, piece.text, piece.scores)] if piece.text else []

    def reason(self, state: ChoiceState, reason: str) -> str:
        """Why a choice ended, in the dialect's word; the engine has ended it for `reason`."""
        return reason

    @abstractmethod
    def document(self, states: Sequence[ChoiceState], usage: wire.Usage) -> wire.Document:
        """The document of all complete choices."""

    def chunks(
        self, states: Sequence[ChoiceState], index: int, answer: messages.Answer, piece: Piece
    ) -> Sequence[bytes]:
        """The chunks for an engine's `answer` about choice `index`, to whose text it has added `piece`."""
        documents = self.pieces(index, piece)
        match answer:
            case messages.Accepted():
                documents = self.opening(index)
            case messages.Progress() if self._extras.progress:
                documents = self._progress(states[index], index)
            case messages.PromptScores(tokens=tokens):
                documents = self.prompt_scores(index, list(tokens))
            case messages.Done(reason=reason):
                closing = self.chunk(index, "", [] if documents else piece.scores, self.reason(states[index], reason))
                documents.append(_with_figures(closing, answer))
        if self._extras.timings and not isinstance(answer, (messages.Accepted, messages.Progress)):
            timings = wire.timings_info(states[index].timings_so_far)
            documents = [msgspec.structs.replace(document, timings=timings) for document in documents]
        if self._extras.usage:
            usage = usage_of(states) if self._extras.running_usage else None
            documents = [msgspec.structs.replace(document, usage=usage) for document in documents]
        return [_encode(document) for document in documents]

    def _progress(self, state: ChoiceState, index: int) -> list[wire.Document]:
        """The chunks about how far a prompt is read; the first one tells what was in the KV cache."""
        steps = progress_steps(state, is_first=index not in self._told)
        self._told.update([index] if steps else [])
        return [
            msgspec.structs.replace(
                self.envelope.document([]), prompt_progress=told, timings=timings if self._extras.timings else UNSET
            )
            for told, timings in steps
        ]

    def ending(self, states: Sequence[ChoiceState]) -> Sequence[bytes]:
        """The chunk with the usage of all choices, if the client asks for it."""
        if not self._extras.usage:
            return []
        timings = wire.timings_info(states[0].timings_so_far)
        return [_encode(msgspec.structs.replace(self.envelope.document([], usage_of(states)), timings=timings))]

    def failure(self, states: Sequence[ChoiceState], error: ApiError) -> Sequence[bytes]:
        """The error as its own document."""
        return [error.body()]

    def whole(self, states: Sequence[ChoiceState]) -> bytes:
        """The document of a whole answer, with the figures of its first choice."""
        document, done = self.document(states, usage_of(states)), states[0].done
        assert done is not None
        if self._extras.prompt:
            document = msgspec.structs.replace(document, verbose=wire.VerboseInfo(states[0].prompt))
        return _encode(_with_figures(document, done))


def usage_of(states: Sequence[ChoiceState]) -> wire.Usage:
    """Tokens read and written so far for all choices."""
    n_prompt = sum(state.n_prompt for state in states if state.choice.is_first)
    n_cached = sum(state.timings.cached_n for state in states if state.timings and state.choice.is_first)
    n_written = sum(state.timings.predicted_n if state.timings else len(state.tokens) for state in states)
    return wire.Usage(n_prompt, n_written, n_prompt + n_written, wire.CachedTokens(n_cached))


def progress_info(state: ChoiceState, n_done: int) -> wire.ProgressInfo:
    """Tells that `n_done` tokens of a choice's prompt are read."""
    progress, timings = state.progress, state.timings_so_far
    assert progress is not None
    return wire.ProgressInfo(
        progress.n_total, progress.n_cached, n_done, timings.prompt_ms if n_done > progress.n_cached else 0.0
    )


def progress_steps(state: ChoiceState, *, is_first: bool) -> list[tuple[wire.ProgressInfo, wire.TimingsInfo]]:
    """What to tell of a choice's prompt now, with the times so far; none before anything is read.

    The first time what was in the KV cache comes before it: no time has gone into that.
    """
    progress = state.progress
    if progress is None or not progress.n_done:
        return []
    unread = (
        progress_info(state, progress.n_cached),
        wire.timings_info(Timings(0, 0.0, 0, 0.0, progress.n_cached)),
    )
    read = progress_info(state, progress.n_done), wire.timings_info(state.timings_so_far)
    return [unread, read] if is_first else [read]


def _with_figures(document: wire.Document, done: messages.Done) -> wire.Document:
    """Adds the answer's times, the memory held and, where not all experts are in memory, the tiers' counters."""
    tiers = wire.tiers_info(done.tiers) or UNSET
    timings = wire.timings_info(done.timings)
    return msgspec.structs.replace(document, timings=timings, tiers=tiers, memory=done.memory)
