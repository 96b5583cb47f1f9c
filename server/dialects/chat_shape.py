"""Writes chat answers as OpenAI's documents: text, reasoning and calls, whole and as chunks."""

from collections.abc import Sequence

from msgspec import UNSET

from slimoe.server.api import wire
from slimoe.server.api.choice import ChoiceState, Piece
from slimoe.server.api.request_body import Extras
from slimoe.server.api.shape import Envelope, OpenAIShape
from slimoe.server.formats.answer_reader import CallDelta
from slimoe.server.messages import Call, ScoredToken


class ChatShape(OpenAIShape):
    """Writes chat answers; with `is_older` the client calls tools functions and knows no ids."""

    prompt_param = "messages"

    def __init__(self, envelope: Envelope, extras: Extras, *, is_scored: bool, is_older: bool = False) -> None:
        super().__init__(envelope, extras)
        self._is_scored, self._is_older = is_scored, is_older

    def opening(self, index: int) -> list[wire.Document]:
        """The first chunk, which holds the role and no text."""
        return [self._document(index, wire.Delta(role="assistant", content=None), [])]

    def prompt_scores(self, index: int, scores: list[ScoredToken]) -> list[wire.Document]:
        """No chunks: a chat does not return its prompt."""
        return []

    def pieces(self, index: int, piece: Piece) -> list[wire.Document]:
        """A chunk for each kind of what was added: reasoning, text, and pieces of calls."""
        deltas = [wire.Delta(reasoning_content=piece.reasoning)] if piece.reasoning else []
        deltas += [wire.Delta(content=piece.text)] if piece.text else []
        deltas += [self._call_delta(delta) for delta in piece.calls]
        return [self._document(index, delta, [] if n else piece.scores) for n, delta in enumerate(deltas)]

    def chunk(self, index: int, text: str, scores: list[ScoredToken], reason: str | None = None) -> wire.Document:
        """The last chunk, which says why the answer ended."""
        return self._document(index, wire.Delta(), scores, reason)

    def reason(self, state: ChoiceState, reason: str) -> str:
        """Calls of tools are the reason of an answer that ended by itself."""
        if not state.calls or reason != "stop":
            return reason
        return "function_call" if self._is_older else "tool_calls"

    def document(self, states: Sequence[ChoiceState], usage: wire.Usage) -> wire.Document:
        """The document of all answers."""
        choices = []
        for index, state in enumerate(states):
            assert state.done is not None
            logprobs = wire.chat_logprobs(state.scores) if self._is_scored else None
            reason = self.reason(state, state.done.reason)
            choices.append(wire.ChatChoice(index, self._message(state), logprobs, reason))
        return self.envelope.document(choices, usage)

    def _message(self, state: ChoiceState) -> wire.ChatMessage:
        calls = [] if self._is_older else [_call_info(call) for call in state.calls]
        older = [wire.CalledFunction(call.arguments, call.name) for call in state.calls[:1]] if self._is_older else []
        return wire.ChatMessage(
            None if state.calls and not state.text else state.text,
            reasoning_content=state.reasoning or UNSET,
            tool_calls=calls or UNSET,
            function_call=older[0] if older else UNSET,
        )

    def _call_delta(self, delta: CallDelta) -> wire.Delta:
        function = wire.CalledFunction(delta.arguments, delta.name or UNSET)
        if self._is_older:
            return wire.Delta() if delta.number else wire.Delta(function_call=function)
        begins = bool(delta.name)
        call = wire.ToolCallInfo(function, delta.number, delta.id if begins else UNSET, "function" if begins else UNSET)
        return wire.Delta(tool_calls=[call])

    def _document(
        self, index: int, delta: wire.Delta, scores: list[ScoredToken], reason: str | None = None
    ) -> wire.Document:
        logprobs = wire.chat_logprobs(scores) if self._is_scored and scores else None
        return self.envelope.document([wire.ChatChunkChoice(index, delta, logprobs, reason)])


def _call_info(call: Call) -> wire.ToolCallInfo:
    return wire.ToolCallInfo(wire.CalledFunction(call.arguments, call.name), id=call.id, type="function")
