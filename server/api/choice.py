"""The choices of one API request: what the engine is asked for, and what it has generated so far."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from slimoe.offload.text.generation import GenerationRequest, Timings
from slimoe.server import messages
from slimoe.server.api.scored_text import SaidTokens, ScoredPiece, ScoredText
from slimoe.server.formats.answer_reader import AnswerReader, CallDelta, Parts, PlainReader, joined
from slimoe.server.formats.families import reader_of


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice to generate; only the first choice of a prompt counts its tokens as used.

    With `shows_prompt` the answer tells the whole text that the model reads.
    """

    prompt: messages.PromptSource
    request: GenerationRequest
    is_first: bool = True
    shows_prompt: bool = False


def choices_of(
    prompts: Sequence[messages.PromptSource],
    request: GenerationRequest,
    n_choices: int,
    *,
    shows_prompt: bool = False,
) -> list[Choice]:
    """Every choice of every prompt, in the order of their index; equal seeds would give equal choices."""
    choices = []
    for prompt in prompts:
        for number in range(n_choices):
            seed = request.sampling.seed
            sampling = request.sampling if seed is None else replace(request.sampling, seed=seed + number)
            choices.append(Choice(prompt, replace(request, sampling=sampling), number == 0, shows_prompt))
    return choices


class Piece(NamedTuple):
    """What an answer of the engine adds to a choice: text with its tokens' scores, reasoning, and calls of tools."""

    text: str
    scores: list[messages.ScoredToken]
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()


@dataclass(slots=True)
class ChoiceState:
    """What the engine has generated of one choice so far."""

    choice: Choice
    slot: int = 0
    n_prompt: int = 0
    n_reasoning: int = 0
    prompt: str = ""
    tokens: list[int] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    scores: list[messages.ScoredToken] = field(default_factory=list)
    prompt_scores: list[messages.ScoredToken] = field(default_factory=list)
    done: messages.Done | None = None
    reasoning_parts: list[str] = field(default_factory=list)
    calls: list[messages.Call] = field(default_factory=list)
    progress: messages.Progress | None = None
    begun_at: float = 0.0
    """When reading the prompt began."""
    first_at: float = 0.0
    """When the first token came."""
    _released: ScoredText = field(default_factory=ScoredText)
    _said: SaidTokens = field(default_factory=SaidTokens)
    _reader: AnswerReader = field(default_factory=PlainReader)

    def add(self, answer: messages.Answer) -> Piece:
        """Takes in an answer of the engine and returns what it adds to the choice's text."""
        scored, read = ScoredPiece("", []), Parts()
        match answer:
            case messages.Accepted(n_prompt=n_prompt, reading=reading, prompt=prompt):
                self.n_prompt, self.prompt = n_prompt, prompt
                self._reader = reader_of(reading)
            case messages.Progress():
                self.progress = answer
                self.begun_at = self.begun_at or time.monotonic()
            case messages.PromptScores(tokens=tokens):
                self.prompt_scores.extend(tokens)
            case messages.Step(text=text, scored=score, token=token):
                self.first_at = self.first_at or time.monotonic()
                self.tokens.append(token)
                scored = self._released.add(text, score)
                read = self._reader.feed(scored.text)
            case messages.Done(text=text):
                self.done = answer
                scored = self._released.finish(text)
                read = joined(self._reader.feed(scored.text), self._reader.finish())
        self.parts.append(read.text)
        self.reasoning_parts.append(read.reasoning)
        self.n_reasoning += read.reasoning != ""
        scores = self._said.take(scored.scores, read.text)
        self.scores += scores
        for delta in read.calls:
            self._add_call(delta)
        return Piece(read.text, scores, read.reasoning, read.calls)

    def _add_call(self, delta: CallDelta) -> None:
        """Appends the piece to its call, which it may begin."""
        if delta.number == len(self.calls):
            self.calls.append(messages.Call(delta.name, "", delta.id))
        call = self.calls[delta.number]
        self.calls[delta.number] = messages.Call(call.name, call.arguments + delta.arguments, call.id)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.parts)

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(self.reasoning_parts)

    @property
    def timings(self) -> Timings | None:
        """The times that the choice took, once it is complete."""
        return None if self.done is None else self.done.timings

    @property
    def timings_so_far(self) -> Timings:
        """The times that the choice has taken, as they are seen from here until it is complete."""
        if self.done is not None:
            return self.done.timings
        now = time.monotonic()
        begun_at, first_at = self.begun_at or now, self.first_at or now
        n_done, n_cached = (0, 0) if self.progress is None else (self.progress.n_done, self.progress.n_cached)
        prompt_ms = 1000 * (first_at - begun_at) if n_done > n_cached else 0.0
        return Timings(n_done - n_cached, prompt_ms, len(self.tokens), 1000 * (now - first_at), n_cached)
