"""The documents of OpenAI's Responses: the answer and its items, which stand in events as well."""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from slimoe.server.api.wire import TiersInfo, TimingsInfo, TokenLogprobInfo
from slimoe.server.dialects.responses_body import ReasoningConfig, ResponsesTool, ResponsesToolChoice, TextConfig

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct, frozen=True, tag="output_text", tag_field="type"):
    """What is said."""

    text: str
    logprobs: list[TokenLogprobInfo] = []
    annotations: list[str] = []


class ReasoningText(msgspec.Struct, frozen=True, tag="reasoning_text", tag_field="type"):
    """What is thought."""

    text: str


class OutputMessage(msgspec.Struct, frozen=True, tag="message", tag_field="type"):
    """An item that says something."""

    id: str
    content: list[OutputText]
    status: ItemStatus
    role: Literal["assistant"] = "assistant"


class ReasoningItem(msgspec.Struct, frozen=True, tag="reasoning", tag_field="type"):
    """An item of reasoning, in full and without a summary."""

    id: str
    content: list[ReasoningText]
    status: ItemStatus
    summary: list[str] = []


class FunctionCallItem(msgspec.Struct, frozen=True, tag="function_call", tag_field="type"):
    """An item that calls a function."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus
    namespace: str | UnsetType = UNSET


OutputItem = OutputMessage | ReasoningItem | FunctionCallItem


class InputDetails(msgspec.Struct, frozen=True):
    """`usage.input_tokens_details`."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct, frozen=True):
    """`usage.output_tokens_details`."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True):
    """`usage`."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseError(msgspec.Struct, frozen=True):
    """`error` of an answer that failed."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why an answer is not complete."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """The answer as far as it has come, with what it was asked for by; at its end with the engine's figures."""

    id: str
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    output: list[OutputItem] = []
    usage: ResponseUsage | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    parallel_tool_calls: bool
    reasoning: ReasoningConfig
    temperature: float
    text: TextConfig
    tool_choice: str | ResponsesToolChoice
    tools: list[ResponsesTool]
    top_logprobs: int
    top_p: float
    user: str | None
    timings: TimingsInfo | UnsetType = UNSET
    tiers: TiersInfo | UnsetType = UNSET
    memory: dict[str, int] | UnsetType = UNSET
    object: Literal["response"] = "response"
    background: bool = False
    previous_response_id: None = None
    service_tier: Literal["default"] = "default"
    store: bool = False
    truncation: Literal["disabled"] = "disabled"


class ResponseInputTokens(msgspec.Struct, frozen=True):
    """The answer of `/v1/responses/input_tokens`."""

    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"
