"""The choices of one API request: what the engine is asked for, what it generated, and how an endpoint writes it."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from slimoe.offload.text.generation import GenerationRequest, Timings
from slimoe.server import messages
from slimoe.server.api import wire
from slimoe.server.api.scored_text import Piece, ScoredText


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice to generate; only the first choice of a prompt counts its tokens as used."""

    prompt: messages.PromptSource
    request: GenerationRequest
    is_first: bool = True


def choices_of(prompts: Sequence[messages.PromptSource], request: GenerationRequest, n_choices: int) -> list[Choice]:
    """Every choice of every prompt, in the order of their index; equal seeds would give equal choices."""
    choices = []
    for prompt in prompts:
        for number in range(n_choices):
            seed = request.sampling.seed
            sampling = request.sampling if seed is None else replace(request.sampling, seed=seed + number)
            choices.append(Choice(prompt, replace(request, sampling=sampling), number == 0))
    return choices


@dataclass(slots=True)
class ChoiceState:
    """What the engine has generated of one choice so far."""

    choice: Choice
    n_prompt: int = 0
    n_steps: int = 0
    parts: list[str] = field(default_factory=list)
    scores: list[messages.ScoredToken] = field(default_factory=list)
    prompt_scores: list[messages.ScoredToken] = field(default_factory=list)
    done: messages.Done | None = None
    _released: ScoredText = field(default_factory=ScoredText)

    def add(self, answer: messages.Answer) -> Piece:
        """Takes in an answer of the engine and returns what it adds to the choice's text."""
        match answer:
            case messages.Accepted(n_prompt=n_prompt):
                self.n_prompt = n_prompt
            case messages.PromptScores(tokens=tokens):
                self.prompt_scores.extend(tokens)
            case messages.Step(text=text, scored=scored):
                self.n_steps += 1
                return self._tell(self._released.add(text, scored))
            case messages.Done(text=text):
                self.done = answer
                return self._tell(self._released.finish(text))
        return Piece("", [])

    def _tell(self, piece: Piece) -> Piece:
        self.parts.append(piece.text)
        self.scores += piece.scores
        return piece

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.parts)

    @property
    def timings(self) -> Timings | None:
        """The times that the choice took, once it is complete."""
        return None if self.done is None else self.done.timings


def usage_of(states: Sequence[ChoiceState]) -> wire.Usage:
    """Tokens read and written so far for all choices."""
    n_prompt = sum(state.n_prompt for state in states if state.choice.is_first)
    n_cached = sum(state.timings.cached_n for state in states if state.timings and state.choice.is_first)
    n_written = sum(state.timings.predicted_n if state.timings else state.n_steps for state in states)
    return wire.Usage(n_prompt, n_written, n_prompt + n_written, wire.CachedTokens(n_cached))


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
        first: ChoiceState | None = None,
    ) -> wire.Document:
        """Wraps choices into a document; `first`, the first choice of a whole answer, adds its figures."""
        document = wire.Document(self.id, self.object, self.created, self.model, self.fingerprint, choices, usage)
        return document if first is None or first.done is None else with_figures(document, first.done)


def with_figures(document: wire.Document, done: messages.Done) -> wire.Document:
    """Adds the answer's times, the memory held and, where not all experts are in memory, the tiers' counters."""
    tiers = wire.tiers_info(done.tiers) or UNSET
    timings = wire.timings_info(done.timings)
    return msgspec.structs.replace(document, timings=timings, tiers=tiers, memory=done.memory)


class Shape(Protocol):
    """The way in which one endpoint writes its answers; `index` is the number of a choice."""

    prompt_param: str
    envelope: Envelope

    def opening(self, index: int) -> list[wire.Document]:
        """The chunks a streamed choice begins with."""

    def prompt_scores(self, index: int, scores: list[messages.ScoredToken]) -> list[wire.Document]:
        """The chunks for a prompt that is given back with its scores."""

    def piece(self, index: int, text: str, scores: list[messages.ScoredToken]) -> wire.Document:
        """The chunk for a piece of text."""

    def closing(self, index: int, reason: str, scores: list[messages.ScoredToken]) -> wire.Document:
        """The chunk a streamed choice ends with."""

    def whole(self, states: Sequence[ChoiceState]) -> wire.Document:
        """The answer that is not streamed."""
