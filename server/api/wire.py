"""The JSON documents that generations are answered with, in the shapes of OpenAI's API."""

import itertools
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from slimoe.offload.text.generation import ExchangeNow, TierUse, Timings
from slimoe.server.messages import ScoredToken

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write."""


TiersInfo = dict[str, float | bool | list[ExchangeNow] | None]
"""`tiers`: counters by name, and as `exchange` how it stands with each device that has a part of its experts."""


class CachedTokens(msgspec.Struct, frozen=True):
    """`usage.prompt_tokens_details`."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """`usage`: tokens of prompts and answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TimingsInfo(msgspec.Struct, frozen=True):
    """Tokens computed and milliseconds taken, by phase; `cache_n` prompt tokens were known already.

    The first token of an answer comes from the prompt's last logits, so that `predicted_per_second` leaves it out.
    `expected_per_token_ms` is what the plan promises, beside `predicted_per_token_ms`, which is llama-server's name for
    what was measured; it is left out where this machine was not measured for the model. `draft_n` drafted tokens were
    verified, and `draft_n_accepted` took no step of their own; both are left out where there were none.
    """

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float
    expected_per_token_ms: float | UnsetType = UNSET
    draft_n: int | UnsetType = UNSET
    draft_n_accepted: int | UnsetType = UNSET


class ProgressInfo(msgspec.Struct, frozen=True):
    """`prompt_progress`: how many of a prompt's tokens are read, those in the KV cache before included."""

    total: int
    cache: int
    processed: int
    time_ms: float


class VerboseInfo(msgspec.Struct, frozen=True):
    """`__verbose`: what the model has read."""

    prompt: str


class TopLogprob(msgspec.Struct, frozen=True):
    """One candidate for a token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobInfo(msgspec.Struct, frozen=True):
    """One token of a chat answer, with the likeliest candidates at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """`choices[].logprobs` of a chat."""

    content: list[TokenLogprobInfo]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """`choices[].logprobs` of a plain completion; the first token of a prompt has null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CalledFunction(msgspec.Struct, frozen=True):
    """`function` of a call, or a piece of one: the name comes with the first."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCallInfo(msgspec.Struct, frozen=True):
    """One of `tool_calls`, or a piece of one, which has the call's `index`; the first has its id and type."""

    function: CalledFunction
    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True):
    """`delta`: what a chunk adds to the message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallInfo] | UnsetType = UNSET
    function_call: CalledFunction | UnsetType = UNSET


class ChatMessage(msgspec.Struct, frozen=True):
    """`message`: a whole chat answer; its content is null where only tools were called."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallInfo] | UnsetType = UNSET
    function_call: CalledFunction | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """`choices[]` of a chat chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """`choices[]` of a chat answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class CompletionChoice(msgspec.Struct, frozen=True):
    """`choices[]` of a plain completion and of its chunks."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Document(msgspec.Struct, frozen=True):
    """A whole answer or one chunk; the first five fields are the same in all chunks of one answer."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice] | list[ChatChunkChoice] | list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    timings: TimingsInfo | UnsetType = UNSET
    tiers: TiersInfo | UnsetType = UNSET
    memory: dict[str, int] | UnsetType = UNSET
    prompt_progress: ProgressInfo | UnsetType = UNSET
    verbose: VerboseInfo | UnsetType = msgspec.field(default=UNSET, name="__verbose")


class ChatDocument(Document, frozen=True):
    """A whole chat answer, as it is described."""

    choices: list[ChatChoice]


class CompletionDocument(Document, frozen=True):
    """A whole plain completion, as it is described."""

    choices: list[CompletionChoice]


def tiers_info(tiers: TierUse) -> TiersInfo:
    """The tier counters of an answer by name; empty when the whole model is in memory."""
    if not tiers.counts:
        return {}
    # Seconds, and nats of divergence, are no counts.
    counts = {
        name: value if name.endswith(("_seconds", "_kl")) else round(value) for name, value in tiers.counts.items()
    }
    exchange = {"exchange": list(tiers.exchange)} if tiers.exchange else {}
    return {**counts, "hit_share": tiers.hit_share, "is_shared": tiers.is_shared, **exchange}


def timings_info(timings: Timings) -> TimingsInfo:
    """The engine's timings as clients read them; a rate of nothing is 0."""
    n_decoded = max(0, timings.predicted_n - 1)
    return TimingsInfo(
        cache_n=timings.cached_n,
        prompt_n=timings.prompt_n,
        prompt_ms=timings.prompt_ms,
        prompt_per_token_ms=_share(timings.prompt_ms, timings.prompt_n),
        prompt_per_second=_share(timings.prompt_n * 1000, timings.prompt_ms),
        predicted_n=timings.predicted_n,
        predicted_ms=timings.predicted_ms,
        predicted_per_token_ms=_share(timings.predicted_ms, n_decoded),
        predicted_per_second=_share(n_decoded * 1000, timings.predicted_ms),
        expected_per_token_ms=UNSET if timings.expected_per_token_ms is None else timings.expected_per_token_ms,
        draft_n=timings.draft_n or UNSET,
        draft_n_accepted=timings.draft_n_accepted if timings.draft_n else UNSET,
    )


def _share(whole: float, parts: float) -> float:
    return whole / parts if parts > 0 else 0.0


def chat_logprobs(scores: list[ScoredToken]) -> ChatLogprobs:
    """The scores of an answer's tokens as a chat client reads them."""
    content = []
    for score in scores:
        top = [
            TopLogprob(_candidate(score, token, piece), finite(logprob), list(piece))
            for token, piece, logprob in score.top
        ]
        logprob = LOWEST_LOGPROB if score.logprob is None else finite(score.logprob)
        content.append(TokenLogprobInfo(_shown(score), logprob, list(score.piece), top))
    return ChatLogprobs(content)


def completion_logprobs(scores: list[ScoredToken], begin: int) -> CompletionLogprobs:
    """The scores in the older parallel-list shape; the text that the tokens make up begins at character `begin`."""
    tokens = [_shown(score) for score in scores]
    values = [None if score.logprob is None else finite(score.logprob) for score in scores]
    widths = [len(score.text or "") for score in scores]
    offsets = list(itertools.accumulate(widths, initial=begin))[:-1]
    return CompletionLogprobs(tokens, values, [_candidates(score) for score in scores], offsets)


def _candidates(score: ScoredToken) -> dict[str, float] | None:
    """The likeliest tokens and the chosen one; of two that read the same, the likelier stays."""
    if score.logprob is None:
        return None
    candidates: dict[str, float] = {}
    for token, piece, logprob in score.top:
        candidates.setdefault(_candidate(score, token, piece), finite(logprob))
    candidates.setdefault(_shown(score), finite(score.logprob))
    return candidates


def _candidate(score: ScoredToken, token: int, piece: bytes) -> str:
    """How one of the likeliest tokens reads in the place of `score`, which is the chosen one's."""
    return _shown(score) if token == score.token else _text(piece)


def _shown(score: ScoredToken) -> str:
    return _text(score.piece) if score.text is None else score.text


def finite(logprob: float) -> float:
    """`logprob`, or the lowest number that stands for minus infinity."""
    return max(logprob, LOWEST_LOGPROB)


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")
