"""Requests for generated text, with their sampling parameters, and the events that answer them, as plain values.

They are sent from process to process.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

BANNING_BIAS = -100.0
"""A `logit_bias` of this or less forbids a token, as in OpenAI's API."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The sampling parameters of one request, by the field's usual names; the defaults are llama.cpp's.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch the filter off. `repeat_penalty`
    divides positive logits of the last `repeat_last_n` tokens (-1: all of them); presence and frequency
    penalties subtract, as OpenAI defines them, over the same tokens. `seed` None draws a fresh one.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def forbids_all(self, n_vocab: int) -> bool:
        """Whether `logit_bias` leaves no token of the vocabulary to choose."""
        return len(self.logit_bias) >= n_vocab and max(self.logit_bias.values()) <= BANNING_BIAS


FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Constraint:
    """The form that an answer is held to: a JSON schema, a regular expression, or a grammar in Lark's or GBNF's words.

    `param` is the field that asked for it, which errors name. `before` and `instead` are grammars in Lark's words, of
    what comes before the form, such as reasoning, and of what may come in its place, such as calls of tools.
    `tools` are the schemas in them, each with its field and its tool's name, which errors name instead.
    """

    kind: Literal["json_schema", "regex", "lark", "gbnf"]
    text: str
    param: str = "response_format"
    before: str = ""
    instead: str = ""
    tools: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request to the engine.

    `max_tokens` None runs to the end of the context window, 0 only reads the prompt. `stop` are strings that end
    the answer and are not part of it. `n_logprobs` None reports none, N the chosen token's and the N likeliest.
    `prompt_logprobs` reports the same for every prompt token (the first has none). `strips_space` leaves out the space
    that begins the first word: a chat template puts it there itself when the answer is read again. `constraint` is the
    form that the answer is held to. With `shows_control` control tokens are part of the answer's text, by their names,
    except those that end it: readers of tool calls look for them.
    `id_slot` is the slot that it is remembered in. If it `is_read_whole`, nothing that was computed of the same prompt
    before is used.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    n_logprobs: int | None = None
    prompt_logprobs: bool = False
    strips_space: bool = False
    constraint: Constraint | None = None
    shows_control: bool = False
    id_slot: int | None = None
    is_read_whole: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a token before sampling filters, and the likeliest alternatives, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """How far the prompt is read: `n_done` of `n_total` tokens, `n_cached` of which were in the KV cache already."""

    n_done: int
    n_total: int
    n_cached: int


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of a prompt's tokens, one entry each; None for the first, which nothing predicts."""

    tokens: tuple[TokenLogprob | None, ...]


@dataclass(frozen=True, slots=True)
class TokenStep:
    """One generated token and the text it released: whole characters that can be no part of a stop string.

    `piece` are the bytes it stands for in the answer, `added` the characters that they complete, released or not.
    """

    token: int
    text: str
    logprob: TokenLogprob | None = None
    piece: bytes = b""
    added: str = ""


@dataclass(frozen=True, slots=True)
class Timings:
    """Tokens and milliseconds of reading the prompt and of generating; `cached_n` prompt tokens were not read again.

    The names are those of llama.cpp's server. `expected_per_token_ms` is what the plan predicts for a token of an
    answer, None where this machine was not measured for the model. Of `draft_n` drafted tokens that were verified
    `draft_n_accepted` took no step of their own.
    """

    prompt_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float
    cached_n: int = 0
    expected_per_token_ms: float | None = None
    draft_n: int = 0
    draft_n_accepted: int = 0


@dataclass(frozen=True, slots=True)
class ExchangeNow:
    """What becomes of experts that a device lacks, and why: the `mode` is static, swap or upload.

    It was chosen when `since_token` tokens of answers had been computed since the model was opened, and is the
    `n_changes`-th other choice. `expected_ms` are milliseconds of an expert as measured at opening, on the `host`, on
    the `device` and as a `copy` over the link; `measured_ms` the same as measured last, and those of tokens as compared
    last: `token_uploading` and `token_staying`.
    """

    device: str
    mode: str
    reason: str
    since_token: int
    n_changes: int
    expected_ms: Mapping[str, float]
    measured_ms: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TierUse:
    """What the memory tiers did during an answer: by how much each of the engine's counters rose, by name.

    `counts` are empty when the whole model is one graph. With `is_shared` they hold also what was done for other
    requests at the same time. `exchange` is how it stands at the answer's end with each device that has a part of its
    experts.
    """

    counts: dict[str, float] = field(default_factory=dict)
    is_shared: bool = False
    exchange: tuple[ExchangeNow, ...] = ()

    @property
    def hit_share(self) -> float | None:
        """The part of the selected experts that were in host memory or on a device; None if none was selected."""
        found = self.counts.get("hits", 0) + self.counts.get("device_hits", 0)
        selected = found + self.counts.get("pending", 0) + self.counts.get("misses", 0)
        return found / selected if selected else None


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request: why it ended, the text that was still held back, and the time and memory it took.

    `memory` are bytes by tier and the peak of the process, by name. `stop_text` is the stop string that ended it.
    """

    reason: FinishReason
    text: str
    timings: Timings
    memory: dict[str, int]
    tiers: TierUse = TierUse()
    stop_text: str = ""


Event = PromptProgress | PromptLogprobs | TokenStep | Finished


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that could not go on, and the error that stopped it."""

    error: Exception


class Outcome(NamedTuple):
    """An event of one of several requests, with the request's id."""

    id: int
    event: Event | Failed
