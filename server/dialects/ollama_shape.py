"""Writes answers as Ollama does: lines of JSON, the last of which holds the figures, or all in one document."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from slimoe.server import messages
from slimoe.server.api.choice import ChoiceState, Piece
from slimoe.server.api.wire import TokenLogprobInfo, chat_logprobs
from slimoe.server.api_error import ApiError
from slimoe.server.dialects.conversation import json_object, told
from slimoe.server.http.event_stream import LINES


class CalledFunction(msgspec.Struct, frozen=True):
    """What is called, and with which arguments."""

    name: str
    arguments: dict[str, Any]
    index: int


class AnsweredCall(msgspec.Struct, frozen=True):
    """A call of a tool."""

    id: str
    function: CalledFunction


class AnsweredMessage(msgspec.Struct, frozen=True):
    """What the assistant says."""

    content: str
    thinking: str | UnsetType = UNSET
    tool_calls: list[AnsweredCall] | UnsetType = UNSET
    role: Literal["assistant"] = "assistant"


class OllamaAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of an answer, or with `done` its end; durations are in nanoseconds."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load", "unload"] | UnsetType = UNSET
    logprobs: list[TokenLogprobInfo] | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET


class ChatAnswer(OllamaAnswer, frozen=True, kw_only=True):
    """An answer of `/api/chat`."""

    message: AnsweredMessage


class GenerateAnswer(OllamaAnswer, frozen=True, kw_only=True):
    """An answer of `/api/generate`."""

    response: str
    thinking: str | UnsetType = UNSET


class OllamaShape:
    """Writes the answer of a model; `is_chat` if it is one to messages, `is_scored` if tokens have their scores."""

    framing = LINES

    def __init__(self, model: str, *, is_chat: bool, is_scored: bool = False) -> None:
        self.prompt_param = "messages" if is_chat else "prompt"
        self._model = model
        self._is_chat, self._is_scored = is_chat, is_scored
        self._begin = time.perf_counter()

    def chunks(
        self, states: Sequence[ChoiceState], index: int, answer: messages.Answer, piece: Piece
    ) -> Sequence[bytes]:
        """The lines for an engine's `answer`; calls are told of once they are complete."""
        state, lines = states[index], list[OllamaAnswer]()
        if piece.text or piece.reasoning:
            lines.append(self._answer(piece.text, piece.reasoning, scores=piece.scores))
        if isinstance(answer, messages.Done):
            if state.calls:
                lines.append(self._answer("", "", state.calls))
            lines.append(self._ended(self._answer("", ""), state))
        return [msgspec.json.encode(line) for line in lines]

    def ending(self, states: Sequence[ChoiceState]) -> Sequence[bytes]:
        """Nothing: the last line has been written."""
        return []

    def failure(self, states: Sequence[ChoiceState], error: ApiError) -> Sequence[bytes]:
        """The error as a line."""
        return [error_body(error)]

    def whole(self, states: Sequence[ChoiceState]) -> bytes:
        """The document."""
        (state,) = states
        answer = self._answer(state.text, state.reasoning, state.calls, state.scores)
        return msgspec.json.encode(self._ended(answer, state))

    def without_answer(self, reason: Literal["load", "unload"]) -> bytes:
        """The document for a request that asks for the model to be there or not, and nothing of it."""
        return msgspec.json.encode(msgspec.structs.replace(self._answer("", ""), done=True, done_reason=reason))

    def _answer(
        self,
        text: str,
        reasoning: str,
        calls: Sequence[messages.Call] = (),
        scores: list[messages.ScoredToken] | None = None,
    ) -> OllamaAnswer:
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        logprobs = chat_logprobs(scores).content if scores and self._is_scored else UNSET
        if not self._is_chat:
            thinking = reasoning or UNSET
            return GenerateAnswer(
                model=self._model, created_at=now, done=False, logprobs=logprobs, response=text, thinking=thinking
            )
        called = [
            AnsweredCall(call.id, CalledFunction(call.name, json_object(call.arguments), number))
            for number, call in enumerate(calls)
        ]
        message = AnsweredMessage(text, reasoning or UNSET, called or UNSET)
        return ChatAnswer(model=self._model, created_at=now, done=False, logprobs=logprobs, message=message)

    def _ended(self, answer: OllamaAnswer, state: ChoiceState) -> OllamaAnswer:
        """The answer as the last one, with its figures; what was neither reading nor writing was waiting."""
        assert state.done is not None
        timings = state.done.timings
        total = round((time.perf_counter() - self._begin) * 1e9)
        prompt, predicted = round(timings.prompt_ms * 1e6), round(timings.predicted_ms * 1e6)
        return msgspec.structs.replace(
            answer,
            done=True,
            done_reason="length" if state.done.reason == "length" else "stop",
            total_duration=total,
            load_duration=max(0, total - prompt - predicted),
            prompt_eval_count=state.n_prompt,
            prompt_eval_duration=prompt,
            eval_count=timings.predicted_n,
            eval_duration=predicted,
        )


class OllamaError(msgspec.Struct, frozen=True):
    """An error as Ollama writes it."""

    error: str


def error_body(error: ApiError) -> bytes:
    """An error as Ollama writes it."""
    return msgspec.json.encode(OllamaError(told(error)))
