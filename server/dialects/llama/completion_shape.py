"""How llama-server writes completions: whole, and piece by piece."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from slimoe.server import messages
from slimoe.server.api import wire
from slimoe.server.api.choice import ChoiceState, Piece
from slimoe.server.api.request_body import Extras
from slimoe.server.api.shape import progress_steps
from slimoe.server.api_error import ApiError
from slimoe.server.dialects.llama.settings import GenerationSettings, settings_of
from slimoe.server.http.event_stream import UNCLOSED_EVENTS

_encode = msgspec.json.Encoder().encode


class TopToken(msgspec.Struct, frozen=True):
    """One candidate for a token."""

    id: int
    token: str
    bytes: list[int]
    logprob: float


class TokenProbability(msgspec.Struct, frozen=True):
    """One token of an answer, with the likeliest candidates at its place."""

    id: int
    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[TopToken]


class LlamaChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of an answer."""

    index: int
    content: str
    tokens: list[int]
    stop: bool = False
    id_slot: int
    tokens_predicted: int
    tokens_evaluated: int
    timings: wire.TimingsInfo | UnsetType = UNSET
    prompt_progress: wire.ProgressInfo | UnsetType = UNSET
    completion_probabilities: list[TokenProbability] | UnsetType = UNSET


class LlamaCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, or the end of one in pieces, whose `content` is empty."""

    index: int
    content: str
    tokens: list[int]
    id_slot: int
    stop: bool = True
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    generation_settings: GenerationSettings
    prompt: str
    has_new_line: bool
    truncated: bool
    stop_type: str
    stopping_word: str
    tokens_cached: int
    timings: wire.TimingsInfo
    completion_probabilities: list[TokenProbability] | UnsetType = UNSET
    tiers: wire.TiersInfo | UnsetType = UNSET
    memory: dict[str, int]


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """What an answer is to hold; `eog` are the tokens that end one."""

    model: str
    eog: tuple[int, ...]
    extras: Extras
    stream: bool
    with_tokens: bool
    fields: tuple[str, ...]


class LlamaShape:
    """Writes answers as llama-server does."""

    prompt_param = "prompt"
    framing = UNCLOSED_EVENTS

    def __init__(self, options: LlamaOptions, n_choices: int) -> None:
        self._options = options
        self._n_told = [0] * n_choices
        """Tokens that the pieces of each choice have told."""
        self._has_progress: set[int] = set()

    def chunks(
        self, states: Sequence[ChoiceState], index: int, answer: messages.Answer, piece: Piece
    ) -> Sequence[bytes]:
        """The chunk for a piece of text or the prompt's progress, and the last one, which tells everything."""
        state = states[index]
        if isinstance(answer, messages.Progress):
            return self._progress(state, index)
        found = []
        if piece.text:
            chunk, scores = self._chunk(state, index, piece.text), _probabilities(piece.scores)
            if scores:
                chunk = msgspec.structs.replace(chunk, completion_probabilities=scores)
            found.append(_encode(chunk))
        if state.done is not None:
            found.append(self._encoded(self._completion(state, index, state.done, "")))
        return found

    def ending(self, states: Sequence[ChoiceState]) -> Sequence[bytes]:
        """Nothing: each choice has its own end."""
        return []

    def failure(self, states: Sequence[ChoiceState], error: ApiError) -> Sequence[bytes]:
        """The error as its own document."""
        return [error.body()]

    def whole(self, states: Sequence[ChoiceState]) -> bytes:
        """The document of one answer, or the list of several."""
        documents = []
        for index, state in enumerate(states):
            assert state.done is not None
            documents.append(self._encoded(self._completion(state, index, state.done, state.text)))
        return documents[0] if len(documents) == 1 else b"[" + b",".join(documents) + b"]"

    def _progress(self, state: ChoiceState, index: int) -> list[bytes]:
        if not self._options.extras.progress:
            return []
        steps = progress_steps(state, is_first=index not in self._has_progress)
        self._has_progress.update([index] if steps else [])
        chunk = self._chunk(state, index, "")
        with_timings = self._options.extras.timings
        return [
            _encode(msgspec.structs.replace(chunk, prompt_progress=told, timings=timings if with_timings else UNSET))
            for told, timings in steps
        ]

    def _chunk(self, state: ChoiceState, index: int, content: str) -> LlamaChunk:
        return LlamaChunk(
            index=index,
            content=content,
            tokens=self._new_tokens(state, index),
            id_slot=state.slot,
            tokens_predicted=len(state.tokens),
            tokens_evaluated=state.n_prompt,
            timings=wire.timings_info(state.timings_so_far) if self._options.extras.timings else UNSET,
        )

    def _new_tokens(self, state: ChoiceState, index: int) -> list[int]:
        """The tokens that no piece has told yet."""
        n_told, self._n_told[index] = self._n_told[index], len(state.tokens)
        return state.tokens[n_told:]

    def _completion(self, state: ChoiceState, index: int, done: messages.Done, content: str) -> LlamaCompletion:
        options, request = self._options, state.choice.request
        n_written = done.timings.predicted_n
        is_full = done.reason == "length" and (request.max_tokens is None or n_written < request.max_tokens)
        tokens = state.tokens if options.with_tokens else []
        scores = UNSET if options.stream else _probabilities(state.scores) or UNSET
        stop_types = {"length": "limit", "cancelled": "none"}
        return LlamaCompletion(
            index=index,
            content=content,
            tokens=self._new_tokens(state, index) if options.stream else tokens,
            id_slot=state.slot,
            model=options.model,
            tokens_predicted=n_written,
            tokens_evaluated=state.n_prompt,
            generation_settings=settings_of(
                request, eog=options.eog, stream=options.stream, timings=options.extras.timings
            ),
            prompt=state.prompt,
            has_new_line="\n" in state.text,
            truncated=is_full,
            stop_type="word" if done.stop_text else stop_types.get(done.reason, "eos"),
            stopping_word=done.stop_text,
            tokens_cached=state.n_prompt + max(0, n_written - 1),
            timings=wire.timings_info(done.timings),
            completion_probabilities=scores,
            tiers=wire.tiers_info(done.tiers) or UNSET,
            memory=done.memory,
        )

    def _encoded(self, document: LlamaCompletion) -> bytes:
        """The document, or only the fields that were asked for; `a/b` is the field `b` of `a`."""
        if not self._options.fields:
            return _encode(document)
        whole = msgspec.to_builtins(document)
        return _encode({path: value for path in self._options.fields if (value := _at(whole, path)) is not UNSET})


def _at(value: Any, path: str) -> Any:
    for name in path.split("/"):
        if not isinstance(value, dict) or name not in value:
            return UNSET
        value = value[name]
    return value


def _probabilities(scores: list[messages.ScoredToken]) -> list[TokenProbability]:
    found = []
    for score, told in zip(scores, wire.chat_logprobs(scores).content, strict=True):
        top = [
            TopToken(token, candidate.token, candidate.bytes, candidate.logprob)
            for (token, *_), candidate in zip(score.top, told.top_logprobs, strict=True)
        ]
        found.append(TokenProbability(score.token, told.token, told.bytes, told.logprob, top))
    return found
