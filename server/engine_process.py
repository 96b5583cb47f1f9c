"""The engine's own process: opens one model and generates for the HTTP side, one request at a time.

Two threads. The main thread sits in the engine. The other reads messages, so that a cancellation is seen in the
middle of a prefill, prompts are checked while another answer is being written, and a closed pipe ends the
process whatever it is doing. Run as `python -m server.engine_process PARENT_PID`.
"""

import ctypes
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from offload.errors import ContextOverflowError, DoesNotFitError, SlimoeError, UsageError
from offload.generation import (
    Event,
    Finished,
    GenerationRequest,
    PromptLogprobs,
    PromptProgress,
    TokenLogprob,
    TokenStep,
)
from offload.gguf_file import GGUFFile
from offload.model_spec import ModelSpec
from offload.tokenizer import Tokenizer
from server import frames
from server.pipe import Pipe, leave
from server.prompts import Prompts, RequestError, conversation
from server.template import ChatTemplateError

PR_SET_PDEATHSIG = 1
OOM_SCORE = 500
PROGRESS_SECONDS = 0.1


class ServedEngine(Protocol):
    """What this process uses of an engine; `offload.engine.Engine` is one."""

    n_ctx: int
    spec: ModelSpec
    gguf: GGUFFile
    tokenizer: Tokenizer | None

    def memory(self) -> dict[str, int]:
        """Bytes held per tier."""

    def generate(self, request: GenerationRequest, is_cancelled: Callable[[], bool]) -> Iterator[Event]:
        """Runs one request to its end."""


OpenEngine = Callable[[frames.Open, Callable[[int, int], None]], ServedEngine]


class _Job:
    """One accepted generation."""

    def __init__(self, id: int, request: GenerationRequest) -> None:
        self.id = id
        self.request = request
        self.cancelled = threading.Event()


class EngineProcess:
    """Carries out the messages of one pipe with one engine."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._prompts: Prompts | None = None
        self._opening: queue.SimpleQueue[frames.Open] = queue.SimpleQueue()
        self._waiting: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._jobs: dict[int, _Job] = {}
        self._handlers: Mapping[type[frames.ToEngine], Callable[[Any], None]] = {
            frames.Open: self._opening.put,
            frames.Submit: self._submit,
            frames.Cancel: self._cancel,
            frames.Encode: self._encode,
            frames.Decode: self._decode,
            frames.Render: self._render,
        }

    def run(self, open_engine: OpenEngine) -> None:
        """Opens the model that the first message names, then generates until the pipe closes."""
        threading.Thread(target=self._read, name="messages", daemon=True).start()
        try:
            engine = open_engine(self._opening.get(), self._progress())
            self._prompts = Prompts(engine.tokenizer, engine.spec.n_vocab, engine.n_ctx)
            info = _describe(engine)
        except SlimoeError as error:
            self._pipe.send(failure_of(0, error))
            return
        self._pipe.send(frames.Ready(info))
        while True:
            job = self._waiting.get()
            self._generate(engine, job)
            self._jobs.pop(job.id, None)

    def _read(self) -> None:
        try:
            for frame in self._pipe.frames():
                self._handlers[type(frame)](frame)
        finally:
            leave()

    def _progress(self) -> Callable[[int, int], None]:
        last = [0.0]

        def report(done_bytes: int, total_bytes: int) -> None:
            now = time.monotonic()
            if now - last[0] >= PROGRESS_SECONDS or done_bytes >= total_bytes:
                last[0] = now
                self._pipe.send(frames.Loading(done_bytes, total_bytes))

        return report

    def _submit(self, frame: frames.Submit) -> None:
        assert self._prompts is not None, "a request came before the model was ready"
        try:
            request = self._prompts.complete(frame.request, frame.prompt)
        except Exception as error:
            self._pipe.send(failure_of(frame.id, error, frame.request.max_tokens))
            return
        job = self._jobs[frame.id] = _Job(frame.id, request)
        self._pipe.send(frames.Accepted(frame.id, len(request.prompt_ids)))
        self._waiting.put(job)

    def _cancel(self, frame: frames.Cancel) -> None:
        job = self._jobs.get(frame.id)
        if job is not None:
            job.cancelled.set()

    def _encode(self, frame: frames.Encode) -> None:
        assert self._prompts is not None
        try:
            tokenizer = self._prompts.tokenizer
            ids = tokenizer.encode(frame.text, parse_special=frame.parse_special)
            if frame.add_special and tokenizer.add_bos and tokenizer.bos is not None:
                ids.insert(0, tokenizer.bos)
            pieces = tuple(self._prompts.piece(token) for token in ids)
            self._pipe.send(frames.Encoded(frame.id, tuple(ids), pieces))
        except Exception as error:
            self._pipe.send(failure_of(frame.id, error))

    def _decode(self, frame: frames.Decode) -> None:
        assert self._prompts is not None
        try:
            ids = self._prompts.prompt(frames.TokenPrompt(frame.ids)).ids if frame.ids else ()
            self._pipe.send(frames.Text(frame.id, self._prompts.tokenizer.decode(ids)))
        except Exception as error:
            self._pipe.send(failure_of(frame.id, error))

    def _render(self, frame: frames.Render) -> None:
        assert self._prompts is not None
        try:
            text = self._prompts.chat.render(conversation(frame.prompt, frame.add_generation_prompt))
            self._pipe.send(frames.Text(frame.id, text))
        except Exception as error:
            self._pipe.send(failure_of(frame.id, error))

    def _generate(self, engine: ServedEngine, job: _Job) -> None:
        if job.cancelled.is_set():
            return
        try:
            for event in engine.generate(job.request, job.cancelled.is_set):
                frame = self._frame(job, event)
                if frame is not None:
                    self._pipe.send(frame)
        except Exception as error:
            self._pipe.send(failure_of(job.id, error, job.request.max_tokens))

    def _frame(self, job: _Job, event: Event) -> frames.Frame | None:
        match event:
            case TokenStep(_, text, logprob):
                scored = None if logprob is None else self._scored(logprob)
                return frames.Step(job.id, text, scored) if text or scored else None
            case PromptProgress(n_done, n_total, n_cached):
                return frames.Progress(job.id, n_done, n_total, n_cached)
            case PromptLogprobs(tokens):
                return frames.PromptScores(job.id, self._prompt_scores(job.request.prompt_ids, tokens))
            case Finished(reason, text, timings, memory):
                return frames.Done(job.id, reason, text, timings, memory)

    def _prompt_scores(
        self, ids: tuple[int, ...], scores: tuple[TokenLogprob | None, ...]
    ) -> tuple[frames.ScoredToken, ...]:
        assert self._prompts is not None
        piece = self._prompts.piece
        return tuple(
            frames.ScoredToken(token, piece(token), None) if score is None else self._scored(score)
            for token, score in zip(ids, scores, strict=True)
        )

    def _scored(self, score: TokenLogprob) -> frames.ScoredToken:
        assert self._prompts is not None
        piece = self._prompts.piece
        top = tuple((token, piece(token), logprob) for token, logprob in score.top)
        return frames.ScoredToken(score.token, piece(score.token), score.logprob, top)


def failure_of(id: int, error: Exception, max_tokens: int | None = None) -> frames.Failure:
    """The message that tells the other side of `error`; a bug of ours also leaves its traceback in the log."""
    match error:
        case ContextOverflowError():
            n_completion = max_tokens or 0
            return frames.Failure(
                id,
                "context_overflow",
                str(error),
                n_prompt=error.n_prompt,
                n_completion=n_completion,
                n_ctx=error.n_ctx,
            )
        case DoesNotFitError():
            return frames.Failure(
                id,
                "does_not_fit",
                str(error),
                exit_code=error.exit_code,
                required_bytes=error.required_bytes,
                available_bytes=error.available_bytes,
            )
        case RequestError():
            return frames.Failure(id, "invalid_request", str(error), error.param, error.exit_code)
        case ChatTemplateError():
            return frames.Failure(id, "template", str(error), "messages", error.exit_code)
        case UsageError():
            return frames.Failure(id, "invalid_request", str(error), exit_code=error.exit_code)
        case SlimoeError():
            return frames.Failure(id, "model", str(error), exit_code=error.exit_code)
    traceback.print_exception(error)
    return frames.Failure(id, "internal", f"The engine failed ({type(error).__name__}). The log says more.")


def _describe(engine: ServedEngine) -> frames.ModelInfo:
    tokenizer, spec = engine.tokenizer, engine.spec
    names = [None, None] if tokenizer is None else [tokenizer.bos, tokenizer.eos]
    texts = ["" if tokenizer is None or token is None else tokenizer.token_text(token) for token in names]
    return frames.ModelInfo(
        n_ctx=engine.n_ctx,
        n_ctx_train=spec.n_ctx_train,
        n_vocab=spec.n_vocab,
        n_params=sum(tensor.n_elements for tensor in engine.gguf.tensors.values()),
        n_bytes=engine.gguf.n_bytes,
        bos=texts[0],
        eos=texts[1],
        chat_template=None if tokenizer is None else tokenizer.chat_template,
        memory=engine.memory(),
    )


def open_engine(request: frames.Open, on_progress: Callable[[int, int], None]) -> ServedEngine:
    """Opens the real engine; what `request` leaves open takes the engine's defaults."""
    from offload.engine import Engine
    from offload.engine_plan import EngineConfig

    given = {name: value for name, value in msgspec.structs.asdict(request).items() if value is not None}
    config: EngineConfig = msgspec.convert(given, EngineConfig, dec_hook=lambda kind, value: kind(value))
    return Engine.open(config, on_progress)


def settle_in(parent_pid: int) -> None:
    """Makes this process a good child: dies with its parent, leaves Ctrl-C to it, is the first to go without memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            leave()
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    if sys.platform != "win32":
        import resource

        # An abort must not write the model's gigabytes to disk before the engine can start again.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def main(open_engine: OpenEngine = open_engine) -> None:
    """The process's whole life."""
    settle_in(int(sys.argv[1]))
    EngineProcess(Pipe.over_stdio()).run(open_engine)
    leave()


if __name__ == "__main__":
    main()
