"""`POST /v1/chat/completions`."""

from collections.abc import Sequence

from aiohttp import web

from server import wire
from server.answer import Draft, Letterhead, orders_for, usage_of
from server.api_error import invalid, unsupported
from server.frames import ChatPrompt, ScoredToken
from server.generation_api import GenerationApi
from server.request_body import ChatBody, Message, StreamOptions, read_body, refuse_unsupported
from server.served_model import ServedModel

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_DEPTH = 32
_OLD_NAMES = {"function": "tool"}


class ChatApi:
    """The endpoint's handler."""

    def __init__(self, model: ServedModel, generation: GenerationApi) -> None:
        self._model = model
        self._generation = generation

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answers one conversation; raises ApiError."""
        body = await read_body(request, ChatBody)
        refuse_unsupported(body)
        prompt = chat_prompt(body)
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        n_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        orders = orders_for([prompt], body.request(max_tokens, n_logprobs, False), body.n_choices)
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        shape = ChatShape(Letterhead.new("chatcmpl", kind, self._model.id, self._model.fingerprint), n_logprobs)
        if body.stream:
            return await self._generation.stream(request, orders, shape, body.stream_options or StreamOptions())
        return await self._generation.whole(orders, shape)


class ChatShape:
    """Writes chat answers."""

    prompt_param = "messages"

    def __init__(self, head: Letterhead, n_logprobs: int | None) -> None:
        self.head = head
        self._is_scored = n_logprobs is not None

    def opening(self, index: int) -> list[wire.Document]:
        """The role, alone."""
        return [self._chunk(index, wire.Delta(role="assistant", content=""), [], None)]

    def prompt_scores(self, index: int, scores: list[ScoredToken]) -> list[wire.Document]:
        """Nothing: a chat does not give its prompt back."""
        return []

    def piece(self, index: int, text: str, scores: list[ScoredToken]) -> wire.Document:
        """A piece of the message."""
        return self._chunk(index, wire.Delta(content=text), scores, None)

    def closing(self, index: int, reason: str, scores: list[ScoredToken]) -> wire.Document:
        """Why it ended."""
        return self._chunk(index, wire.Delta(), scores, reason)

    def whole(self, drafts: Sequence[Draft]) -> wire.Document:
        """All messages."""
        choices = []
        for index, draft in enumerate(drafts):
            assert draft.done is not None
            logprobs = wire.chat_logprobs(draft.scores) if self._is_scored else None
            choices.append(wire.ChatChoice(index, wire.ChatMessage(draft.text), logprobs, draft.done.reason))
        return self.head.document(choices, usage_of(drafts), drafts[0])

    def _chunk(self, index: int, delta: wire.Delta, scores: list[ScoredToken], reason: str | None) -> wire.Document:
        logprobs = wire.chat_logprobs(scores) if self._is_scored and scores else None
        return self.head.document([wire.ChatChunkChoice(index, delta, logprobs, reason)])


def chat_prompt(body: ChatBody) -> ChatPrompt:
    """The conversation as the engine's side takes it; raises ApiError for one that cannot be answered."""
    if not body.messages:
        raise invalid("There are no messages. Send at least one.", "messages")
    turns = tuple(_turn(n, message) for n, message in enumerate(body.messages))
    if len(turns) > 1 and turns[-1][0] == turns[-2][0] == "assistant":
        raise invalid(
            "The last two messages are both the assistant's. Join them to have the last continued.", "messages"
        )
    values = dict(body.chat_template_kwargs or {})
    _check_values(values, MAX_DEPTH)
    if body.reasoning_effort is not None:
        values.setdefault("reasoning_effort", body.reasoning_effort)
    return ChatPrompt(turns, values)


def _check_values(value: object, depth: int) -> None:
    """Raises ApiError for a value that cannot be passed on to the template."""
    if depth == 0:
        raise invalid("It is nested too deeply.", "chat_template_kwargs")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise invalid(f"{value} is too large a number.", "chat_template_kwargs")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for element in inner:
        _check_values(element, depth - 1)


def _turn(n: int, message: Message) -> tuple[str, str]:
    if message.role not in ROLES:
        raise invalid(f"The role {message.role!r} is not one of {', '.join(ROLES)}.", f"messages[{n}].role")
    return _OLD_NAMES.get(message.role, message.role), _text(n, message)


def _text(n: int, message: Message) -> str:
    if message.content is None:
        if message.role != "assistant":
            raise invalid("A message needs content.", f"messages[{n}].content")
        return ""
    if isinstance(message.content, str):
        return message.content
    texts = []
    for m, part in enumerate(message.content):
        where = f"messages[{n}].content[{m}]"
        if part.type not in ("text", "input_text"):
            raise unsupported(f"This model reads text only, not a part of type {part.type!r}.", where)
        if part.text is None:
            raise invalid("A text part needs a text.", where)
        texts.append(part.text)
    return "\n".join(texts)
