"""Ollama's requests as they are sent, and as turns: options, messages, tools, and what is refused."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from slimoe.offload.text.generation import GenerationRequest
from slimoe.server.api.forms import FORM_FIELDS, NO_SCHEMA, Schema, constraint_of, object_constraint, schema_constraint
from slimoe.server.api.request_body import Defaults, LogprobCount, SamplingBody, decoded, keep_seconds, stop_strings
from slimoe.server.api.unsupported_fields import COMMON, Unsupported, UnsupportedFields, extended
from slimoe.server.api_error import invalid
from slimoe.server.dialects.conversation import check_tools, json_text, not_text, reasoning_values, tool_of
from slimoe.server.messages import Call, ChatPrompt, TextPrompt, Turn

ROLES = ("system", "user", "assistant", "tool")
_OPTION = Unsupported("It is given in options, the limit of an answer as num_predict.")
_ONE = Unsupported("There is one answer to a request.", (None, 1))
_BESIDES: Mapping[str, Unsupported] = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "n_predict", "num_predict", "stop"), _OPTION),
    "n": _ONE,
    **dict.fromkeys(FORM_FIELDS, Unsupported("The form of an answer is given in format.")),
    "tool_choice": Unsupported("Ollama's API has none: the model decides.", (None, "auto")),
}
_OWN = ("format", "options", "system")
CHAT: Mapping[str, Unsupported] = {
    **{name: field for name, field in COMMON.items() if name not in ("format", "options")},
    **_BESIDES,
    **dict.fromkeys(("prompt", "suffix", "raw"), Unsupported("/api/generate takes it.")),
}
GENERATE: Mapping[str, Unsupported] = {
    **{name: field for name, field in COMMON.items() if name not in _OWN},
    **_BESIDES,
    **dict.fromkeys(("messages", "tools"), Unsupported("/api/chat takes them.")),
    "suffix": Unsupported("This server does not fill in the middle here."),
    "context": Unsupported("This server keeps no context. Send the conversation to /api/chat."),
}
OPTIONS: Mapping[str, Unsupported] = {
    **{name: field for name, field in COMMON.items() if name != "num_predict"},
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "n_predict"), _OPTION),
    "n": _ONE,
}


class OllamaOptions(SamplingBody, kw_only=True):
    """`options`; those of loading, such as num_ctx, were settled when the server was started."""

    num_predict: Annotated[int, Meta(ge=-2, le=2**31 - 1)] | None = None
    stop: str | list[str] | None = None


_Options = extended(OllamaOptions, OPTIONS)


class OllamaFunction(msgspec.Struct):
    """A call's function."""

    name: str
    arguments: dict[str, Any] | None = None


class OllamaCall(msgspec.Struct):
    """A call of a tool."""

    function: OllamaFunction
    id: str | None = None


class OllamaMessage(msgspec.Struct):
    """A message of a chat."""

    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaToolFunction(msgspec.Struct):
    """What a tool is."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class OllamaTool(msgspec.Struct):
    """A tool of the client's own."""

    function: OllamaToolFunction
    type: str | None = None


class OllamaBody(msgspec.Struct, kw_only=True):
    """What `/api/chat` and `/api/generate` have in common; an answer is streamed unless `stream` is false."""

    model: str | None = None
    options: dict[str, Any] | None = None
    format: Schema = msgspec.field(default_factory=lambda: NO_SCHEMA)
    stream: bool | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    keep_alive: float | str | None = None
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None

    @property
    def n_logprobs(self) -> int | None:
        """How many likeliest tokens to tell of; None for no scores at all."""
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def keep(self) -> float | None:
        """For how many seconds the model stays loaded afterwards, for ever below 0; raises ApiError."""
        return keep_seconds(self.keep_alive)

    def request(self, fields: UnsupportedFields, defaults: Defaults) -> GenerationRequest:
        """The engine's request, still without its prompt; raises ApiError."""
        options = decoded(msgspec.json.encode(self.options or {}), _Options, "options")
        fields.refuse(options, OPTIONS)
        defaults.fill(options)
        is_any = bytes(self.format) == b'"json"'
        own = object_constraint("format") if is_any else schema_constraint(self.format, "format")
        limit = defaults.max_tokens if options.num_predict is None else options.num_predict
        return GenerationRequest(
            prompt_ids=(),
            max_tokens=None if limit is None or limit < 0 else limit,
            sampling=options.sampling(),
            stop=stop_strings(options.stop, "options.stop"),
            ignore_eos=bool(options.ignore_eos),
            n_logprobs=self.n_logprobs,
            constraint=constraint_of(options, own),
        )

    def values(self) -> dict[str, Any]:
        """What the chat template is told of thinking."""
        if isinstance(self.think, str):
            return reasoning_values(self.think, True)
        return reasoning_values(None, self.think)


class OllamaChatBody(OllamaBody, kw_only=True):
    """`POST /api/chat`; without messages it only loads the model."""

    messages: list[OllamaMessage] | None = None
    tools: list[OllamaTool] | None = None

    def source(self) -> ChatPrompt | None:
        """The conversation, None for none; raises ApiError."""
        if not self.messages:
            return None
        tools = tuple(
            tool_of(one.name, one.description, one.parameters, False, f"tools[{n}].function.parameters")
            for n, one in enumerate(tool.function for tool in self.tools or ())
        )
        check_tools(tools)
        return ChatPrompt(_turns(self.messages), self.values(), tools)


class OllamaGenerateBody(OllamaBody, kw_only=True):
    """`POST /api/generate`; without a prompt it only loads the model."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None

    def source(self) -> ChatPrompt | TextPrompt | None:
        """The prompt in the model's template, or as it is with `raw`; None for none. Raises ApiError."""
        if not self.prompt:
            return None
        if self.raw and self.system:
            raise invalid("A raw prompt has no system message beside it. Leave out raw or system.", "system")
        if self.raw:
            return TextPrompt(self.prompt)
        system = (Turn("system", self.system),) if self.system else ()
        return ChatPrompt((*system, Turn("user", self.prompt)), self.values())


def _turns(messages: Sequence[OllamaMessage]) -> tuple[Turn, ...]:
    """The conversation as turns. Calls need no id in Ollama: a result without one answers the next call of its tool."""
    turns, waiting = list[Turn](), list[Call]()
    for n, message in enumerate(messages):
        where = f"messages[{n}]"
        if message.role not in ROLES:
            raise invalid(f"The role {message.role!r} is not one of {', '.join(ROLES)}.", f"{where}.role")
        if message.images:
            raise not_text("images", f"{where}.images")
        if message.tool_calls and message.role != "assistant":
            raise invalid("Only the assistant calls tools.", f"{where}.tool_calls")
        if message.content is None and not message.tool_calls:
            raise invalid("A message needs content.", f"{where}.content")
        calls = tuple(
            Call(
                call.function.name,
                json_text(call.function.arguments or {}, f"{where}.tool_calls[{number}].function.arguments"),
                call.id or f"call_{n}_{number}",
            )
            for number, call in enumerate(message.tool_calls or ())
        )
        waiting += calls
        id, name = "", ""
        if message.role == "tool":
            fitting = [
                call
                for call in waiting
                if message.tool_call_id in (None, call.id) and message.tool_name in (None, call.name)
            ]
            answered = fitting[0] if fitting else Call(message.tool_name or "", "", message.tool_call_id or "")
            waiting = [call for call in waiting if call is not answered]
            id, name = answered.id, answered.name
        turns.append(Turn(message.role, message.content or "", calls, id, name, message.thinking or ""))
    return tuple(turns)
