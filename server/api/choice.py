"""The choices of one API request: what the engine is asked for, and what it has generated so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from slimoe.offload.text.generation import GenerationRequest, Timings
from slimoe.server import messages
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
        piece = Piece("", [])
        match answer:
            case messages.Accepted(n_prompt=n_prompt):
                self.n_prompt = n_prompt
            case messages.PromptScores(tokens=tokens):
                self.prompt_scores.extend(tokens)
            case messages.Step(text=text, scored=scored):
                self.n_steps += 1
                piece = self._released.add(text, scored)
            case messages.Done(text=text):
                self.done = answer
                piece = self._released.finish(text)
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
