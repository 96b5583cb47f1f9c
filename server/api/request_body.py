"""What the bodies of generating requests have in common: fields, types and ranges, and the request to the engine.

Fields that are neither listed in a body nor in `unsupported_fields` are ignored, for they do no harm.
"""

import asyncio
import re
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta

from slimoe.offload.resources.duration import parse_duration
from slimoe.offload.text.generation import GenerationRequest, SamplingParams
from slimoe.server.api.forms import NO_SCHEMA, ResponseFormat, Schema, StructuredOutputs, constraint_of
from slimoe.server.api_error import invalid
from slimoe.server.http.body_intake import INTAKE

MAX_STOPS, MAX_CHOICES, MAX_LOGPROBS, MAX_PROMPTS = 64, 16, 20, 2048
MAX_STOP_CHARS, MAX_BIASES = 1024, 4096
MAX_VALUES, MAX_CHAT_VALUES = 400_000, 100_000
"""Values in a body, of which Python makes objects before it can look at them; token ids cost least. In a chat, commas
and brackets in texts count too: a text with so many fits into few contexts.
"""
_WITH_MANY_VALUES = ("messages", "prompt", "tokens", "logit_bias", "stop", "chat_template_kwargs", "tools")
_SLICE = 1 << 20
_PATH = re.compile(r"^(?P<message>.*?) - at `\$\.?(?P<path>.*)`$", re.DOTALL)

Limit = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
NonNegative = Annotated[float, Meta(ge=0, le=1e6)]
Scale = Annotated[float, Meta(ge=0.01, le=1e6)]
LogprobCount = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
LastN = Annotated[int, Meta(ge=-1, le=2**31 - 1)]

Slot = Annotated[int, msgspec.Meta(ge=-1, lt=2**31)]
T = TypeVar("T")


class StreamOptions(msgspec.Struct):
    """`stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(msgspec.Struct, kw_only=True):
    """The fields that every dialect chooses tokens by, with the spellings that clients use, and forms of answers."""

    temperature: NonNegative | None = None
    top_k: TopK | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repeat_penalty: Scale | None = None
    repetition_penalty: Scale | None = None
    repeat_last_n: LastN | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b"null"))
    seed: Seed | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    grammar: str | None = None
    json_schema: Schema = msgspec.field(default_factory=lambda: NO_SCHEMA)
    guided_json: Schema = msgspec.field(default_factory=lambda: NO_SCHEMA)
    guided_json_object: bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    regex: str | None = None
    ebnf: str | None = None
    lark: str | None = None

    def sampling(self) -> SamplingParams:
        """How to choose tokens; what the client leaves open takes the defaults. Raises ApiError."""
        given = {
            "temperature": self.temperature,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repeat_penalty": self.repetition_penalty if self.repeat_penalty is None else self.repeat_penalty,
            "repeat_last_n": self.repeat_last_n,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": _logit_bias(bytes(self.logit_bias)),
            "seed": None if self.seed == -1 else self.seed,
        }
        return msgspec.convert({name: value for name, value in given.items() if value is not None}, SamplingParams)


@dataclass(frozen=True, slots=True)
class Extras:
    """What an answer tells besides its text, if asked to.

    `usage` is a last chunk with the usage, `running_usage` the usage in each chunk, `progress` chunks about the reading
    of the prompt, `timings` the times in each chunk, and `prompt` the text that the model reads.
    """

    usage: bool = False
    running_usage: bool = False
    progress: bool = False
    timings: bool = False
    prompt: bool = False


class GenerationBody(SamplingBody, kw_only=True):
    """The fields that chat and plain completions have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Choices | None = None
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    n_predict: Limit | None = None
    stop: str | list[str] | None = None
    return_progress: bool | None = None
    timings_per_token: bool | None = None
    keep_alive: float | str | None = None
    ttl: float | None = None
    verbose: bool | None = None
    id_slot: Slot | None = None

    @property
    def extras(self) -> Extras:
        """What the answer is to tell besides its text."""
        options = self.stream_options or StreamOptions()
        return Extras(
            usage=bool(options.include_usage),
            running_usage=bool(options.include_usage and options.continuous_usage_stats),
            progress=bool(self.return_progress),
            timings=bool(self.timings_per_token),
            prompt=bool(self.verbose),
        )

    @property
    def n_choices(self) -> int:
        """The number of answers to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def keep(self) -> float | None:
        """For how many seconds the model stays loaded afterwards, for ever below 0; raises ApiError."""
        return keep_seconds(self.keep_alive, self.ttl)

    def limit(self, default: int | None = None) -> int | None:
        """How many tokens an answer may have, in whichever spelling, None for as many as fit; -1 asks for that too."""
        spellings = (self.max_completion_tokens, self.max_tokens, self.n_predict, default)
        given = next((limit for limit in spellings if limit is not None), None)
        return None if given == -1 else given

    def request(self, max_tokens: int | None, n_logprobs: int | None, prompt_logprobs: bool) -> GenerationRequest:
        """The engine's request, still without its prompt; raises ApiError."""
        return GenerationRequest(
            prompt_ids=(),
            max_tokens=max_tokens,
            sampling=self.sampling(),
            stop=stop_strings(self.stop),
            ignore_eos=bool(self.ignore_eos),
            n_logprobs=n_logprobs,
            prompt_logprobs=prompt_logprobs,
            constraint=constraint_of(self),
            id_slot=None if self.id_slot == -1 else self.id_slot,
        )


def stop_strings(given: str | list[str] | None, param: str = "stop") -> tuple[str, ...]:
    """The stop strings of the field `param`; raises ApiError when there are too many."""
    stops = (given,) if isinstance(given, str) else tuple(given or ())
    if len(stops) > MAX_STOPS:
        raise invalid(f"{len(stops)} stop strings are too many: {MAX_STOPS} are allowed.", param)
    if any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise invalid(f"A stop string may have at most {MAX_STOP_CHARS:,} characters.", param)
    return tuple(stop for stop in stops if stop)


def keep_seconds(keep_alive: float | str | None, ttl: float | None = None) -> float | None:
    """How long a model stays loaded, as Ollama's clients say or LM Studio's; None if they do not. Raises ApiError."""
    if not isinstance(keep_alive, str):
        return ttl if keep_alive is None else keep_alive
    seconds = parse_duration(keep_alive)
    if seconds is None:
        raise invalid(f"keep_alive is {keep_alive!r}, which is no time such as 90s, 10m or -1.", "keep_alive")
    return seconds


@dataclass(frozen=True, slots=True)
class Defaults:
    """How to answer where a request does not say; `max_tokens` None leaves that to the endpoint."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None

    def fill(self, body: SamplingBody) -> None:
        """Sets the fields that the client has left open."""
        for name in (one.name for one in fields(SamplingParams)):
            is_open = name != "logit_bias" and getattr(body, name) is None
            if is_open and (name != "repeat_penalty" or body.repetition_penalty is None):
                setattr(body, name, getattr(self.sampling, name))
        if isinstance(body, GenerationBody) and body.n_predict is None:
            body.n_predict = self.max_tokens


DEFAULTS = web.AppKey("defaults", Defaults)


async def read_body(request: web.Request, kind: type[T], max_values: int = MAX_VALUES) -> T:
    """The request's body as `kind`, with the server's defaults; raises ApiError that names the field at fault."""
    data = await request.app[INTAKE].read(request)
    # The values are counted without making them.
    n_values = 1
    for begin in range(0, len(data), _SLICE):
        piece = data[begin : begin + _SLICE]
        # Each value follows a comma or a bracket, or is the whole.
        n_values += sum(piece.count(mark) for mark in (b",", b"{", b"["))
        if n_values > max_values:
            last = max(_WITH_MANY_VALUES, key=lambda name: data.rfind(f'"{name}"'.encode(), 0, begin + _SLICE))
            raise invalid(f"{last} holds too many values: a body may have {max_values:,} in all.", last)
        await asyncio.sleep(0)
    body: T = decoded(data, kind)
    if isinstance(body, SamplingBody):
        request.app[DEFAULTS].fill(body)
    return body


def decoded(data: bytes | bytearray, kind: Any, where: str = "") -> Any:
    """The value of the field `where`, or of the whole body; raises ApiError that names the field at fault."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        match = _PATH.match(str(error))
        if match is None:
            raise invalid(f"{error}{where and f' at {where}'}.", where or None) from None
        inner = match["path"]
        path = f"{where}.{inner}" if where and not inner.startswith("[") else f"{where}{inner}"
        raise invalid(f"{match['message']} at {path}.", path or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"The body is not valid JSON: {error}.") from None
    except RecursionError:
        raise invalid("The body is nested too deeply.", where or None) from None


def _logit_bias(data: bytes) -> dict[int, float]:
    if data.count(b":") > MAX_BIASES:
        raise invalid(f"logit_bias may name at most {MAX_BIASES:,} tokens.", "logit_bias")
    given: dict[str, float | bool] | None = decoded(data, dict[str, float | bool] | None, "logit_bias")
    biases = {}
    for name, value in (given or {}).items():
        if not name.isascii() or not name.isdigit() or len(name) > 9:
            raise invalid(f"logit_bias maps token ids to numbers, but {name!r} is no token id.", "logit_bias")
        if value is True:
            raise invalid("A logit_bias is a number, or false to forbid the token.", f"logit_bias.{name}")
        biases[int(name)] = float("-inf") if value is False else float(value)
    return biases
