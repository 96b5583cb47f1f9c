"""`POST /v1/completions`: raw text or token ids continued, and scored for evaluation harnesses."""

from collections.abc import Sequence
from typing import Any

from aiohttp import web

from slimoe.server.api import wire
from slimoe.server.api.backends import Backend
from slimoe.server.api.choice import ChoiceState, choices_of
from slimoe.server.api.endpoint import Endpoint
from slimoe.server.api.generation_api import GenerationApi
from slimoe.server.api.request_body import MAX_PROMPTS, Extras, GenerationBody, LogprobCount, read_body
from slimoe.server.api.scored_text import fitted
from slimoe.server.api.shape import Envelope, OpenAIShape
from slimoe.server.api.unsupported_fields import COMPLETION, extended
from slimoe.server.api_error import invalid, unsupported
from slimoe.server.messages import Decode, PromptSource, ScoredToken, Text, TextPrompt, TokenPrompt

DEFAULT_MAX_TOKENS = 16
"""Most tokens to generate when a request does not say, as with OpenAI."""


class CompletionBody(GenerationBody, kw_only=True):
    """`POST /v1/completions`; `prompt` is a text, texts, token ids, or lists of token ids."""

    prompt: str | list[Any]
    echo: bool | None = None
    logprobs: LogprobCount | None = None
    suffix: str | None = None
    best_of: int | None = None


CompletionRequest = extended(CompletionBody, COMPLETION)


class CompletionApi:
    """The endpoint's handler."""

    def __init__(self, generation: GenerationApi) -> None:
        self._generation = generation

    def endpoints(self) -> list[Endpoint]:
        """The endpoint."""
        answer = wire.CompletionDocument
        return [Endpoint("POST", "/v1/completions", self.handle, CompletionRequest, answer, streams=True)]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Continues one or many prompts; raises ApiError."""
        body = await read_body(request, CompletionRequest)
        self._generation.unsupported.refuse(body, COMPLETION)
        if body.suffix:
            raise unsupported("This server does not fill in the middle.", "suffix")
        if body.best_of is not None and body.best_of != body.n_choices:
            raise unsupported("This server returns every choice it generates: best_of must be n.", "best_of")
        backend = self._generation.backends.named(body.model, body.keep)
        prompts = prompt_sources(body.prompt)
        if len(prompts) * body.n_choices > MAX_PROMPTS:
            raise invalid(f"n times the number of prompts may be at most {MAX_PROMPTS:,}.", "n")
        is_scored = body.logprobs is not None
        wanted = body.request(body.limit(DEFAULT_MAX_TOKENS), body.logprobs, bool(body.echo) and is_scored)
        choices = choices_of(prompts, wanted, body.n_choices, shows_prompt=body.extras.prompt)
        echoes = [await self._echo(backend, choice.prompt) if body.echo else "" for choice in choices]
        envelope = Envelope.new("cmpl", "text_completion", backend.model.id, backend.model.fingerprint)
        shape = CompletionShape(envelope, body.extras, echoes, is_scored=is_scored)
        return await self._generation.answer(request, backend, choices, shape, stream=body.stream)

    async def _echo(self, backend: Backend, prompt: PromptSource) -> str:
        if isinstance(prompt, TextPrompt):
            return prompt.text
        assert isinstance(prompt, TokenPrompt)
        ids = prompt.ids
        answer = await backend.ask(lambda id: Decode(id, ids), "prompt")
        assert isinstance(answer, Text)
        return answer.text


class CompletionShape(OpenAIShape):
    """Writes plain completions as OpenAI's documents; `echoes` are the prompt texts to return, one for each choice."""

    prompt_param = "prompt"

    def __init__(self, envelope: Envelope, extras: Extras, echoes: Sequence[str], *, is_scored: bool) -> None:
        super().__init__(envelope, extras)
        self._echoes = echoes
        self._is_scored = is_scored
        self._written = [0] * len(echoes)

    def opening(self, index: int) -> list[wire.Document]:
        """The first chunk: the prompt's text, if it is returned without scores."""
        echo = self._echoes[index]
        return [self.chunk(index, echo, [])] if echo and not self._is_scored else []

    def prompt_scores(self, index: int, scores: list[ScoredToken]) -> list[wire.Document]:
        """The prompt's text and its tokens' scores."""
        echo = self._echoes[index]
        return [self.chunk(index, echo, fitted(scores, echo))]

    def document(self, states: Sequence[ChoiceState], usage: wire.Usage) -> wire.Document:
        """The document of all continuations."""
        choices = []
        for index, state in enumerate(states):
            assert state.done is not None
            echo = self._echoes[index]
            text = echo + state.text
            scores = [*fitted(state.prompt_scores, echo), *state.scores]
            logprobs = wire.completion_logprobs(scores, 0) if self._is_scored else None
            choices.append(wire.CompletionChoice(index, text, logprobs, state.done.reason))
        return self.envelope.document(choices, usage)

    def chunk(self, index: int, text: str, scores: list[ScoredToken], reason: str | None = None) -> wire.Document:
        """The chunk for a piece of the continuation, or the last one, which says why it ended."""
        is_scored = self._is_scored and scores
        logprobs = wire.completion_logprobs(scores, self._written[index]) if is_scored else None
        self._written[index] += len(text)
        return self.envelope.document([wire.CompletionChoice(index, text, logprobs, reason)])


def prompt_sources(prompt: str | list[Any]) -> list[PromptSource]:
    """The prompts of a request, in whichever of the four forms; raises ApiError."""
    if isinstance(prompt, str):
        return [TextPrompt(prompt)]
    if not prompt:
        raise invalid("The prompt is empty. Give a text or token ids.", "prompt")
    if _are_ids(prompt):
        return [_ids(prompt)]
    if len(prompt) > MAX_PROMPTS:
        raise invalid(f"{len(prompt)} prompts are too many: {MAX_PROMPTS} are allowed.", "prompt")
    sources: list[PromptSource] = []
    for n, element in enumerate(prompt):
        if isinstance(element, str):
            sources.append(TextPrompt(element))
        elif isinstance(element, list) and _are_ids(element):
            sources.append(_ids(element))
        else:
            raise invalid("A prompt is a text, texts, token ids, or lists of token ids.", f"prompt[{n}]")
    return sources


def _are_ids(elements: list[Any]) -> bool:
    return all(type(element) is int for element in elements)


def _ids(ids: list[int]) -> TokenPrompt:
    wrong = next((token for token in ids if not 0 <= token < 2**31), None)
    if wrong is not None:
        raise invalid(f"{wrong} is no token id.", "prompt")
    return TokenPrompt(tuple(ids))
