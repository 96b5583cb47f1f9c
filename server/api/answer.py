"""One request's answers: what was ordered from the engine, what has come of it, and what a shape makes of that."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from slimoe.offload.text.generation import GenerationRequest, Timings
from slimoe.server import messages as frames
from slimoe.server.api import wire
from slimoe.server.api.scored_text import Piece, ScoredText


@dataclass(frozen=True, slots=True)
class Order:
    """One choice to generate; only the first choice of a prompt counts its tokens as used."""

    prompt: frames.PromptSource
    request: GenerationRequest
    is_first: bool = True


def orders_for(prompts: Sequence[frames.PromptSource], request: GenerationRequest, n_choices: int) -> list[Order]:
    """Every choice of every prompt, in the order of their index; equal seeds would give equal choices."""
    orders = []
    for prompt in prompts:
        for choice in range(n_choices):
            seed = request.sampling.seed
            sampling = request.sampling if seed is None else replace(request.sampling, seed=seed + choice)
            orders.append(Order(prompt, replace(request, sampling=sampling), choice == 0))
    return orders


@dataclass(slots=True)
class Draft:
    """One choice as far as it has come."""

    order: Order
    n_prompt: int = 0
    n_steps: int = 0
    parts: list[str] = field(default_factory=list)
    scores: list[frames.ScoredToken] = field(default_factory=list)
    prompt_scores: list[frames.ScoredToken] = field(default_factory=list)
    done: frames.Done | None = None
    _released: ScoredText = field(default_factory=ScoredText)

    def add(self, answer: frames.Answer) -> Piece:
        """Takes in the engine's next word; what it adds to the answer."""
        match answer:
            case frames.Accepted(n_prompt=n_prompt):
                self.n_prompt = n_prompt
            case frames.PromptScores(tokens=tokens):
                self.prompt_scores.extend(tokens)
            case frames.Step(text=text, scored=scored):
                self.n_steps += 1
                return self._tell(self._released.add(text, scored))
            case frames.Done(text=text):
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
        """What it took, once it is complete."""
        return None if self.done is None else self.done.timings


def usage_of(drafts: Sequence[Draft]) -> wire.Usage:
    """Tokens read and written so far for all choices."""
    n_prompt = sum(draft.n_prompt for draft in drafts if draft.order.is_first)
    n_cached = sum(draft.timings.cached_n for draft in drafts if draft.timings and draft.order.is_first)
    n_written = sum(draft.timings.predicted_n if draft.timings else draft.n_steps for draft in drafts)
    return wire.Usage(n_prompt, n_written, n_prompt + n_written, wire.CachedTokens(n_cached))


@dataclass(frozen=True, slots=True)
class Letterhead:
    """What all documents of one answer have in common."""

    id: str
    object: str
    created: int
    model: str
    fingerprint: str

    @classmethod
    def new(cls, prefix: str, kind: str, model: str, fingerprint: str) -> "Letterhead":
        """A letterhead with an id of its own, such as `chatcmpl-...`."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", kind, int(time.time()), model, fingerprint)

    def document(
        self,
        choices: list[wire.ChatChoice] | list[wire.ChatChunkChoice] | list[wire.CompletionChoice],
        usage: wire.Usage | UnsetType | None = UNSET,
        first: Draft | None = None,
    ) -> wire.Document:
        """A document under this head; `first`, the first choice of a whole answer, gives it its figures."""
        document = wire.Document(self.id, self.object, self.created, self.model, self.fingerprint, choices, usage)
        return document if first is None or first.done is None else with_figures(document, first.done)


def with_figures(document: wire.Document, done: frames.Done) -> wire.Document:
    """The document with what the answer took, the memory held and, where not all is in it, what the tiers did."""
    tiers = wire.tiers_info(done.tiers) or UNSET
    timings = wire.timings_info(done.timings)
    return msgspec.structs.replace(document, timings=timings, tiers=tiers, memory=done.memory)


class Shape(Protocol):
    """How one endpoint writes its answers; `index` is the choice's number."""

    prompt_param: str
    head: Letterhead

    def opening(self, index: int) -> list[wire.Document]:
        """The chunks a streamed choice begins with."""

    def prompt_scores(self, index: int, scores: list[frames.ScoredToken]) -> list[wire.Document]:
        """The chunks for a prompt that is given back with its scores."""

    def piece(self, index: int, text: str, scores: list[frames.ScoredToken]) -> wire.Document:
        """The chunk for a piece of text."""

    def closing(self, index: int, reason: str, scores: list[frames.ScoredToken]) -> wire.Document:
        """The chunk a streamed choice ends with."""

    def whole(self, drafts: Sequence[Draft]) -> wire.Document:
        """The answer that is not streamed."""
