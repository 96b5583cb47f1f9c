"""Answers one request: reads the prompt, then draws and reads tokens until something ends it."""

import time
from collections.abc import Callable, Iterator
from collections.abc import Generator as Steps
from typing import TYPE_CHECKING

from offload.backend import EngineAbortedError
from offload.errors import ContextOverflowError, UsageError
from offload.generation import (
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    PromptLogprobs,
    PromptProgress,
    Timings,
    TokenLogprob,
    TokenStep,
)
from offload.runner import Logits
from offload.sampler import Sampler, check_params, token_logprob
from offload.text_stream import TextStream

if TYPE_CHECKING:
    from offload.engine import Engine

_LOGPROB_BATCH = 64
"""Logits of a whole batch are n_batch * n_vocab floats: with all of them wanted, batches are smaller."""


class Generator:
    """The state of one request on an engine."""

    def __init__(self, engine: "Engine", request: GenerationRequest, is_cancelled: Callable[[], bool]) -> None:
        self._engine, self._request, self._is_cancelled = engine, request, is_cancelled
        self._check()
        tokenizer = engine.tokenizer
        piece = tokenizer.piece if tokenizer else lambda token: b""
        self._eog = tokenizer.eog if tokenizer and not request.ignore_eos else frozenset[int]()
        self._text = TextStream(piece, request.stop, request.strips_space)
        self._sampler = Sampler(request.sampling, request.prompt_ids)
        self._n_cached = 0
        self._n_predicted = 0
        self._prompt_seconds = 0.0
        self._begin = time.perf_counter()

    def _check(self) -> None:
        prompt, n_vocab = self._request.prompt_ids, self._engine.spec.n_vocab
        if not prompt:
            raise UsageError("The prompt is empty: at least one token is needed.")
        if min(prompt) < 0 or max(prompt) >= n_vocab:
            wrong = next(token for token in prompt if not 0 <= token < n_vocab)
            raise UsageError(f"The prompt holds token {wrong}, but the vocabulary has {n_vocab} tokens.")
        if self._request.max_tokens is not None and self._request.max_tokens < 0:
            raise UsageError(f"max_tokens is {self._request.max_tokens}, but must be 0 or more.")
        check_params(self._request.sampling, n_vocab)
        room = self._engine.n_ctx - (0 if self._request.max_tokens == 0 else 1)
        if len(prompt) > room:
            raise ContextOverflowError(len(prompt), self._engine.n_ctx)

    @property
    def _max_tokens(self) -> int:
        # The last token drawn is not read any more, so it needs no cell.
        room = self._engine.n_ctx - len(self._request.prompt_ids) + 1
        return room if self._request.max_tokens is None else min(room, self._request.max_tokens)

    def events(self) -> Iterator[Event]:
        """All events of the request; see `Engine.generate`."""
        try:
            logits = yield from self._read_prompt()
            self._prompt_seconds = time.perf_counter() - self._begin
            reason = yield from self._predict(logits)
        except EngineAbortedError:
            reason = "cancelled"
        yield self._finished(reason)

    def _read_prompt(self) -> Steps[Event, None, Logits]:
        engine, request = self._engine, self._request
        prompt = request.prompt_ids
        n_done = 0 if request.prompt_logprobs else min(engine.common_prefix(prompt), len(prompt) - 1)
        engine.truncate(n_done)
        self._n_cached = n_done
        logprobs: list[TokenLogprob | None] = [None]
        n_batch = min(engine.plan.n_batch, _LOGPROB_BATCH) if request.prompt_logprobs else engine.plan.n_batch
        while n_done < len(prompt):
            batch = prompt[n_done : n_done + n_batch]
            n_out = len(batch) if request.prompt_logprobs else 1
            logits = engine.read(batch, n_out, self._is_cancelled)
            n_done += len(batch)
            if request.prompt_logprobs:
                logprobs += self._prompt_logprobs(logits, prompt[n_done - len(batch) + 1 : n_done + 1])
            yield PromptProgress(n_done, len(prompt), self._n_cached)
        if request.prompt_logprobs:
            yield PromptLogprobs(tuple(logprobs))
        last: Logits = logits[-1]
        return last

    def _prompt_logprobs(self, logits: Logits, following: tuple[int, ...]) -> list[TokenLogprob | None]:
        n_top = self._request.n_logprobs or 0
        return [token_logprob(row, token, n_top) for row, token in zip(logits, following, strict=False)]

    def _predict(self, logits: Logits) -> Steps[Event, None, FinishReason]:
        n_top = self._request.n_logprobs
        while self._n_predicted < self._max_tokens:
            if self._is_cancelled():
                return "cancelled"
            token = self._sampler.sample(logits)
            self._n_predicted += 1
            if token in self._eog:
                return "stop"
            logprob = None if n_top is None else token_logprob(logits, token, n_top)
            yield TokenStep(token, self._text.feed(token), logprob)
            if self._text.stopped:
                return "stop"
            if self._n_predicted < self._max_tokens:
                logits = self._engine.decode(token)
        return "length"

    def _finished(self, reason: FinishReason) -> Finished:
        total = time.perf_counter() - self._begin
        prompt_seconds = self._prompt_seconds or total
        timings = Timings(
            prompt_n=len(self._request.prompt_ids) - self._n_cached,
            prompt_ms=prompt_seconds * 1000,
            predicted_n=self._n_predicted,
            predicted_ms=(total - prompt_seconds) * 1000,
            cached_n=self._n_cached,
        )
        return Finished(reason, self._text.finish(), timings, self._engine.memory())
