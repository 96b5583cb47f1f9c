"""What the HTTP side and the engine's process say to each other: typed messages in length-prefixed msgpack.

Neither side trusts the other to be alive, so every request carries an id of the HTTP side's choosing and every
answer repeats it; answers to ids that are no longer known are dropped.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from slimoe.offload.text.generation import FinishReason, GenerationRequest, TierUse, Timings

HEADER_BYTES = 4
BEAT_SECONDS = 1.0


class Frame(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages; the class name is the tag on the wire."""


class Open(Frame, frozen=True):
    """Front to engine, first: which model to open and how. None leaves the choice to the engine.

    The fields are those of `EngineConfig`.
    """

    model: str
    n_ctx: int | None = None
    n_batch: int | None = None
    n_parallel: int | None = None
    n_threads: int | None = None
    kv_type: str | None = None
    weights: str | None = None
    ram: str | None = None
    vram: tuple[str, ...] = ()
    device: str | None = None
    rpc: tuple[str, ...] = ()
    trace: str | None = None
    policy: str | None = None
    max_kl: float | None = None
    lossy: str | None = None
    direct_io: bool = True
    reserve_bytes: int = 0
    held_bytes: int = 0


class TextPrompt(Frame, frozen=True):
    """Raw text; control tokens written out in it count as such."""

    text: str


class TokenPrompt(Frame, frozen=True):
    """Token ids, read as they are."""

    ids: tuple[int, ...]


class ChatPrompt(Frame, frozen=True):
    """Turns of (role, content) for the model's template, and further values it may read."""

    messages: tuple[tuple[str, str], ...]
    values: dict[str, Any] = {}


PromptSource = TextPrompt | TokenPrompt | ChatPrompt


class Submit(Frame, frozen=True):
    """Front to engine: one generation. `request.prompt_ids` is empty, the engine's process fills it in."""

    id: int
    prompt: PromptSource
    request: GenerationRequest


class Cancel(Frame, frozen=True):
    """Front to engine: nobody waits for this generation any more."""

    id: int


class Encode(Frame, frozen=True):
    """Front to engine: the ids of a text, and the bytes of each if they are asked for."""

    id: int
    text: str
    add_special: bool
    parse_special: bool
    with_pieces: bool = False


class Decode(Frame, frozen=True):
    """Front to engine: the text of ids, with the names of control tokens among them if they are to be seen."""

    id: int
    ids: tuple[int, ...]
    shows_control: bool = False


class Render(Frame, frozen=True):
    """Front to engine: the text of a conversation."""

    id: int
    prompt: ChatPrompt
    add_generation_prompt: bool = True


class ModelInfo(msgspec.Struct, frozen=True):
    """What the HTTP side tells about an open model; `counters` are running totals of its tiers."""

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


class Loading(Frame, frozen=True):
    """Engine to front: so many bytes of the model are read."""

    done_bytes: int
    total_bytes: int


class Beat(Frame, frozen=True):
    """Engine to front, every `BEAT_SECONDS`: the process runs, and what its engine does moved on so long ago."""

    stuck_seconds: float


class Ready(Frame, frozen=True):
    """Engine to front: the model is open."""

    info: ModelInfo


class Failure(Frame, frozen=True):
    """Engine to front: a request, or with id 0 the opening, failed. `kind` decides the HTTP answer.

    The counts are set for the kinds they belong to: tokens for context_overflow, bytes for does_not_fit.
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


class Accepted(Frame, frozen=True):
    """Engine to front: the prompt is sound and waits for its turn."""

    id: int
    n_prompt: int


class Progress(Frame, frozen=True):
    """Engine to front: so much of the prompt is read."""

    id: int
    n_done: int
    n_total: int
    n_cached: int


class ScoredToken(msgspec.Struct, frozen=True, array_like=True):
    """A token's bytes and natural-log probability, and the likeliest alternatives at its place, best first.

    `text` is what it adds to the text that it stands in, None for a token that is not shown there.
    """

    token: int
    piece: bytes
    logprob: float | None
    top: tuple[tuple[int, bytes, float], ...] = ()
    text: str | None = None


class PromptScores(Frame, frozen=True):
    """Engine to front: one entry per prompt token; the first has no probability."""

    id: int
    tokens: tuple[ScoredToken, ...]


class Step(Frame, frozen=True):
    """Engine to front: one generated token, the text it released and, if asked for, its score."""

    id: int
    text: str
    scored: ScoredToken | None = None


class Done(Frame, frozen=True):
    """Engine to front: the last of a generation, with the text that was held back.

    `tiers` are this generation's, `counters` the engine's totals.
    """

    id: int
    reason: FinishReason
    text: str
    timings: Timings
    memory: dict[str, int]
    tiers: TierUse = TierUse()
    counters: dict[str, float] = {}


class Encoded(Frame, frozen=True):
    """Engine to front: the ids of a text, and the bytes of each if they were asked for."""

    id: int
    ids: tuple[int, ...]
    pieces: tuple[bytes, ...]


class Text(Frame, frozen=True):
    """Engine to front: the text that Decode or Render asked for."""

    id: int
    text: str


def with_notes(info: ModelInfo, notes: Sequence[str]) -> ModelInfo:
    """`info` with further sentences for a person."""
    return msgspec.structs.replace(info, notes=(*info.notes, *notes))


def with_figures(info: ModelInfo, done: Done) -> ModelInfo:
    """`info` with newer figures of the memory held and of the tiers."""
    return msgspec.structs.replace(info, memory=done.memory, counters=done.counters)


ToEngine = Open | Submit | Cancel | Encode | Decode | Render
Answer = Failure | Accepted | Progress | PromptScores | Step | Done | Encoded | Text
FromEngine = Loading | Beat | Ready | Answer

_encoder = msgspec.msgpack.Encoder()
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def pack(frame: Frame) -> bytes:
    """The bytes of `frame` on the pipe: a big-endian length and the message."""
    body = _encoder.encode(frame)
    return len(body).to_bytes(HEADER_BYTES, "big") + body


class FrameBuffer:
    """Cuts a stream of bytes back into messages, whatever pieces it arrives in."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies that are complete once `data` has arrived."""
        self._data += data
        at = 0
        while len(self._data) - at >= HEADER_BYTES:
            begin = at + HEADER_BYTES
            end = begin + int.from_bytes(self._data[at:begin], "big")
            if len(self._data) < end:
                break
            yield bytes(self._data[begin:end])
            at = end
        del self._data[:at]
