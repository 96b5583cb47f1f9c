"""Turns the engine's events and errors, and the facts of its model, into messages to the server."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec
from gguf import LlamaFileType

from slimoe.offload.errors import (
    ContextOverflowError,
    DeviceError,
    DeviceFullError,
    DoesNotFitError,
    SlimoeError,
    UsageError,
)
from slimoe.offload.gguf.header import GGUFFile
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.text.generation import (
    Event,
    Finished,
    GenerationRequest,
    PromptLogprobs,
    PromptProgress,
    TokenLogprob,
    TokenStep,
)
from slimoe.offload.text.grammars import ConstraintError, Grammars
from slimoe.offload.text.infill import infill_tokens
from slimoe.offload.text.tokenizer import Tokenizer
from slimoe.server import messages
from slimoe.server.chat.prompts import BusyError, RequestError
from slimoe.server.chat.template_error import ChatTemplateError
from slimoe.server.log_format import log_text


class OpenModel(Protocol):
    """The part of an engine's interface that describes an open model."""

    n_ctx: int
    spec: ModelSpec
    gguf: GGUFFile
    tokenizer: Tokenizer | None
    grammars: Grammars | None

    def memory(self) -> dict[str, int]:
        """Bytes held per tier."""

    def counters(self) -> dict[str, float]:
        """Running totals of the memory tiers."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user about how the model was opened."""


@dataclass(frozen=True, slots=True)
class Replies:
    """Makes the messages about one generation; `piece` gives a token's bytes, `counters` the engine's totals."""

    id: int
    request: GenerationRequest
    piece: Callable[[int], bytes]
    counters: Callable[[], dict[str, float]] = dict

    def event(self, event: Event) -> messages.Message:
        """Returns the message for an event."""
        match event:
            case TokenStep(token, text, logprob, piece, added):
                scored = None if logprob is None else self._in_answer(logprob, piece, added)
                return messages.Step(self.id, text, scored, token)
            case PromptProgress(n_done, n_total, n_cached):
                return messages.Progress(self.id, n_done, n_total, n_cached)
            case PromptLogprobs(tokens):
                ids = self.request.prompt_ids
                scores = (
                    messages.ScoredToken(token, self.piece(token), None) if score is None else self._scored(score)
                    for token, score in zip(ids, tokens, strict=True)
                )
                return messages.PromptScores(self.id, tuple(scores))
            case Finished(reason, text, timings, memory, tiers, stop_text):
                return messages.Done(self.id, reason, text, timings, memory, tiers, self.counters(), stop_text)

    def failure(self, error: Exception) -> messages.Failure:
        """Returns the message for the error that ended the generation."""
        return failure_of(self.id, error, self.request.max_tokens)

    def _in_answer(self, score: TokenLogprob, piece: bytes, text: str) -> messages.ScoredToken:
        """The score of a token as it stands in the answer, where control tokens and a first space are not seen."""
        scored = self._scored(score)
        strips_space = scored.piece == b" " + piece
        top = tuple(
            (token, piece if token == score.token else name.removeprefix(b" ") if strips_space else name, logprob)
            for token, name, logprob in scored.top
        )
        return msgspec.structs.replace(scored, piece=piece, top=top, text=text)

    def _scored(self, score: TokenLogprob) -> messages.ScoredToken:
        top = tuple((token, self.piece(token), logprob) for token, logprob in score.top)
        return messages.ScoredToken(score.token, self.piece(score.token), score.logprob, top)


def failure_of(id: int, error: Exception, max_tokens: int | None = None) -> messages.Failure:
    """Returns the message for `error`; an unexpected one also leaves its traceback in the log."""
    match error:
        case ContextOverflowError():
            n_completion = max_tokens or 0
            return messages.Failure(
                id,
                "context_overflow",
                str(error),
                n_prompt=error.n_prompt,
                is_at_least=error.at_least,
                n_completion=n_completion,
                n_ctx=error.n_ctx,
            )
        case DoesNotFitError():
            return messages.Failure(
                id,
                "device" if isinstance(error, DeviceFullError) else "does_not_fit",
                str(error),
                exit_code=error.exit_code,
                required_bytes=error.required_bytes,
                available_bytes=error.available_bytes,
            )
        case RequestError() | ConstraintError():
            return messages.Failure(id, "invalid_request", str(error), error.param, error.exit_code)
        case ChatTemplateError():
            return messages.Failure(id, "template", str(error), "messages", error.exit_code)
        case BusyError():
            return messages.Failure(id, "busy", str(error), exit_code=error.exit_code)
        case UsageError():
            return messages.Failure(id, "invalid_request", str(error), exit_code=error.exit_code)
        case DeviceError():
            return messages.Failure(id, "device", str(error), exit_code=error.exit_code)
        case SlimoeError():
            return messages.Failure(id, "model", str(error), exit_code=error.exit_code)
    print(log_text("The engine failed.", error), file=sys.stderr)
    return messages.Failure(id, "internal", f"The engine failed ({type(error).__name__}). The log says more.")


def describe(engine: OpenModel) -> messages.ModelInfo:
    """Collects the facts that the server tells clients about the open model."""
    tokenizer, spec = engine.tokenizer, engine.spec
    names = [None, None] if tokenizer is None else [tokenizer.bos, tokenizer.eos]
    texts = ["" if tokenizer is None or token is None else tokenizer.token_text(token) for token in names]
    return messages.ModelInfo(
        n_ctx=engine.n_ctx,
        n_ctx_train=spec.n_ctx_train,
        n_vocab=spec.n_vocab,
        n_params=sum(tensor.n_elements for tensor in engine.gguf.tensors.values()),
        n_bytes=engine.gguf.n_bytes,
        bos=texts[0],
        eos=texts[1],
        chat_template=None if tokenizer is None else tokenizer.chat_template,
        memory=engine.memory(),
        notes=engine.notes,
        counters=engine.counters(),
        architecture=spec.architecture.name,
        quantization=_quantization(engine.gguf.metadata.get("general.file_type")),
        eog=() if tokenizer is None else tuple(sorted(tokenizer.eog)),
        infill=None
        if tokenizer is None
        else infill_tokens(engine.gguf.metadata, tokenizer.special_tokens, tokenizer.n_vocab),
    )


def _quantization(file_type: object) -> str:
    """The usual name of a file's mix of types, such as Q4_K_M; empty for one without a name."""
    known = {one.value: one.name for one in LlamaFileType}
    return known.get(file_type, "").removeprefix("MOSTLY_").removeprefix("ALL_") if isinstance(file_type, int) else ""
