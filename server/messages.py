"""Messages between the HTTP server and the engine's process: msgspec structs in length-prefixed msgpack.

The server gives each request an id and the engine repeats it in every answer. Either process may end at any time, so
the server drops answers to ids that it no longer knows.
"""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from slimoe.offload.ggml.device_calls import DeviceWait
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.requests.snapshot import Snapshot
from slimoe.offload.text.generation import FinishReason, GenerationRequest, TierUse, Timings
from slimoe.offload.text.infill import InfillTokens
from slimoe.server.conversation import Call as Call
from slimoe.server.conversation import Tool as Tool
from slimoe.server.conversation import ToolChoice as ToolChoice
from slimoe.server.conversation import Turn as Turn

HEADER_BYTES = 4
BEAT_SECONDS = 1.0


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages; the class name is the tag on the wire."""


class Open(Message, frozen=True):
    """To the engine, first: the model to open, and how; `chat_template` stands for the model's, empty for none.

    `thinks` says whether answers begin with reasoning where a request does not, None for as the template has it.
    """

    config: EngineConfig
    chat_template: str | None = None
    thinks: bool | None = None


class TextPrompt(Message, frozen=True):
    """A prompt of plain text, in which spelled-out control tokens such as `</s>` become control tokens."""

    text: str


class TokenPrompt(Message, frozen=True):
    """A prompt of token ids."""

    ids: tuple[int, ...]


class ChatPrompt(Message, frozen=True):
    """A conversation for the model's template and further values for it; a trailing assistant message is continued.

    With `keeps_reasoning` the answer's reasoning stays in its text.
    """

    messages: tuple[Turn, ...]
    values: dict[str, Any] = {}
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    keeps_reasoning: bool = False

    @property
    def usable_tools(self) -> tuple[Tool, ...]:
        """The tools that may be called in the answer."""
        return () if self.tool_choice.mode == "none" else self.tools


PromptSource = TextPrompt | TokenPrompt | ChatPrompt


class Submit(Message, frozen=True):
    """To the engine: starts a generation. `request.prompt_ids` is empty and filled in by the engine's process.

    With `shows_prompt` the answer tells the whole text that the model reads.
    """

    id: int
    prompt: PromptSource
    request: GenerationRequest
    shows_prompt: bool = False


class Cancel(Message, frozen=True):
    """To the engine: ends a generation that no client waits for any more."""

    id: int


class Encode(Message, frozen=True):
    """To the engine: asks for the token ids of a text, with the bytes of each token if `with_pieces`."""

    id: int
    text: str
    add_special: bool
    parse_special: bool
    with_pieces: bool = False


class Decode(Message, frozen=True):
    """To the engine: asks for the text of token ids, with control tokens by name if `shows_control`."""

    id: int
    ids: tuple[int, ...]
    shows_control: bool = False


class Render(Message, frozen=True):
    """To the engine: asks for the text that the chat template makes of a conversation."""

    id: int
    prompt: ChatPrompt
    add_generation_prompt: bool = True


class Count(Message, frozen=True):
    """To the engine: asks how many tokens a conversation is, with the beginning of its answer."""

    id: int
    prompt: ChatPrompt


class Observe(Message, frozen=True):
    """To the engine: asks what it holds and does at this moment."""

    id: int


class Rebudget(Message, frozen=True):
    """To the engine: asks for other limits of memory, in the words of --ram and --vram; None leaves one as it is.

    The server's other processes hold `held_bytes` now.
    """

    id: int
    ram: str | None
    vram: tuple[str, ...] | None
    held_bytes: int = 0


class ChangeSlot(Message, frozen=True):
    """To the engine: asks to save a slot's keys and values to the file `path`, to restore or to erase them."""

    id: int
    action: Literal["save", "restore", "erase"]
    slot: int
    path: str = ""


class ModelInfo(msgspec.Struct, frozen=True):
    """The facts that the server tells clients about an open model; `counters` are running totals of its tiers.

    `eog` are the tokens that end an answer, `infill` those for filling in the middle.
    """

    n_ctx: int
    n_ctx_train: int
    n_vocab: int
    n_params: int
    n_bytes: int
    bos: str
    eos: str
    chat_template: str | None
    memory: dict[str, int]
    notes: tuple[str, ...] = ()
    counters: dict[str, float] = {}
    architecture: str = ""
    quantization: str = ""
    eog: tuple[int, ...] = ()
    infill: InfillTokens | None = None


class Loading(Message, frozen=True):
    """From the engine: `done_bytes` of the model's `total_bytes` are loaded."""

    done_bytes: int
    total_bytes: int


class Beat(Message, frozen=True):
    """From the engine, every `BEAT_SECONDS`: its work last made progress `stuck_seconds` ago, and what it waits for."""

    stuck_seconds: float
    awaited: DeviceWait | None = None


class Ready(Message, frozen=True):
    """From the engine: the model is open and requests can be sent."""

    info: ModelInfo


class Failure(Message, frozen=True):
    """From the engine: a request failed, or with id 0 opening the model did. `kind` decides the HTTP status.

    Token counts are set for the kind context_overflow, byte counts for does_not_fit.
    """

    id: int
    kind: str
    message: str
    param: str | None = None
    exit_code: int = 1
    n_prompt: int = 0
    is_at_least: bool = False
    n_completion: int = 0
    n_ctx: int = 0
    required_bytes: int = 0
    available_bytes: int = 0


class Reading(msgspec.Struct, frozen=True):
    """How to read an answer: the `family` whose marks it uses for reasoning and calls, none for plain text.

    Reasoning that stands between the marks `think` is told apart; with `begins_thinking` the prompt has opened it
    already, with `has_thought` closed it. With `has_tools` calls are looked for; `texts` are the parameters of each
    tool that are texts whatever they look like. The ids of calls have nine letters and digits with `has_short_ids`.
    With `must_call` a grammar holds the answer to calls: what looks like text is the beginning of one that was cut off.
    """

    family: str = ""
    think: tuple[str, str] | None = None
    begins_thinking: bool = False
    has_thought: bool = False
    has_tools: bool = False
    texts: dict[str, tuple[str, ...]] = {}
    has_short_ids: bool = False
    must_call: bool = False


PLAIN_READING = Reading()
"""All is said."""


class Accepted(Message, frozen=True):
    """From the engine: the prompt is valid and the request waits for its turn; `prompt` is its text if asked for."""

    id: int
    n_prompt: int
    reading: Reading = PLAIN_READING
    prompt: str = ""


class Progress(Message, frozen=True):
    """From the engine: `n_done` of the prompt's `n_total` tokens are read, `n_cached` of them from the KV cache."""

    id: int
    n_done: int
    n_total: int
    n_cached: int


class ScoredToken(msgspec.Struct, frozen=True, array_like=True):
    """A token's bytes and natural-log probability, and the likeliest alternatives in its place, best first.

    `text` is the text that the token adds to the prompt or answer, None if it is not shown there.
    """

    token: int
    piece: bytes
    logprob: float | None
    top: tuple[tuple[int, bytes, float], ...] = ()
    text: str | None = None


class PromptScores(Message, frozen=True):
    """From the engine: the scores of all prompt tokens; the first token has no probability."""

    id: int
    tokens: tuple[ScoredToken, ...]


class Step(Message, frozen=True):
    """From the engine: a generated token and the text that it releases, with its score if the request asked for it."""

    id: int
    text: str
    scored: ScoredToken | None = None
    token: int = -1


class Done(Message, frozen=True):
    """From the engine: the end of a generation, with the text that was held back until then.

    `tiers` counts this generation's experts by memory tier, `counters` are the engine's totals. `stop_text` is the stop
    string that ended it, if one did.
    """

    id: int
    reason: FinishReason
    text: str
    timings: Timings
    memory: dict[str, int]
    tiers: TierUse = TierUse()
    counters: dict[str, float] = {}
    stop_text: str = ""


class Encoded(Message, frozen=True):
    """From the engine: the token ids of a text, with the bytes of each token if they were asked for."""

    id: int
    ids: tuple[int, ...]
    pieces: tuple[bytes, ...]


class Counted(Message, frozen=True):
    """From the engine: the number of tokens that `Count` asked for."""

    id: int
    n_tokens: int


class Text(Message, frozen=True):
    """From the engine: the text that `Decode` or `Render` asked for."""

    id: int
    text: str


class Observed(Message, frozen=True):
    """From the engine: what it holds and does."""

    id: int
    snapshot: Snapshot


class Rebudgeted(Message, frozen=True):
    """From the engine: the limits that hold now, how long nothing was computed for them, and what it holds now.

    `loaded_bytes` were read for it; with `is_kept` the model stayed open. `notes` are for who set the limits.
    """

    id: int
    ram: str | None
    vram: tuple[str, ...]
    seconds: float
    loaded_bytes: int
    is_kept: bool
    notes: tuple[str, ...]
    memory: dict[str, int]
    counters: dict[str, float]
    snapshot: Snapshot


class SlotChanged(Message, frozen=True):
    """From the engine: how many tokens were saved, restored or erased, the file's bytes, and the time it took."""

    id: int
    n_tokens: int
    n_bytes: int
    seconds: float


def with_notes(info: ModelInfo, notes: Sequence[str]) -> ModelInfo:
    """Adds sentences for the user to the notes of a model."""
    return msgspec.structs.replace(info, notes=(*info.notes, *notes))


def with_figures(info: ModelInfo, done: Done | Rebudgeted) -> ModelInfo:
    """Brings the memory held and the tier counters up to date."""
    return msgspec.structs.replace(info, memory=done.memory, counters=done.counters)


Question = Encode | Decode | Render | Count
"""What is answered at once, without the engine."""
Order = Observe | Rebudget | ChangeSlot
"""What is asked of the engine itself."""
ToEngine = Open | Submit | Cancel | Question | Order
Answer = (
    Failure
    | Accepted
    | Progress
    | PromptScores
    | Step
    | Done
    | Encoded
    | Counted
    | Text
    | Observed
    | Rebudgeted
    | SlotChanged
)
FromEngine = Loading | Beat | Ready | Answer

_encoder = msgspec.msgpack.Encoder(enc_hook=str)  # of paths
decode_to_engine = msgspec.msgpack.Decoder(ToEngine, dec_hook=lambda kind, value: kind(value)).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def pack(message: Message) -> bytes:
    """Encodes a message for the pipe: its length in big-endian bytes, then its body."""
    body = _encoder.encode(message)
    return len(body).to_bytes(HEADER_BYTES, "big") + body
