"""One request: what it wants read next, and the events it makes of the logits."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from slimoe.offload.errors import ContextOverflowError, UsageError
from slimoe.offload.graph.runner import Logits
from slimoe.offload.requests.cells import Sequence
from slimoe.offload.text.generation import (
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    PromptLogprobs,
    PromptProgress,
    TierUse,
    Timings,
    TokenLogprob,
    TokenStep,
)
from slimoe.offload.text.sampler import Sampler, check_params, token_logprob
from slimoe.offload.text.tokenizer import TextStream, Tokenizer

_LOGPROB_BATCH = 64
"""Logits of a whole batch are n_batch * n_vocab floats: with all of them wanted, batches are smaller."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a request must know of the model; `memory` tells the bytes held per tier, `counters` running totals."""

    n_ctx: int
    n_vocab: int
    tokenizer: Tokenizer | None
    memory: Callable[[], dict[str, int]]
    counters: Callable[[], dict[str, float]] = dict


class Generator:
    """The state of one request. It computes nothing: a scheduler reads tokens for it and hands it their logits.

    `sequence` holds its tokens from the moment it is admitted. It is over once it has made its `Finished`. Whoever
    reads for others in the same time says so with `has_company`.
    Raises UsageError and ContextOverflowError.
    """

    def __init__(
        self, request: GenerationRequest, facts: ModelFacts, is_cancelled: Callable[[], bool], id: int = 0
    ) -> None:
        _check(request, facts)
        self.request, self.is_cancelled, self.id = request, is_cancelled, id
        self.sequence: Sequence | None = None
        self.is_over = self.has_company = False
        self._facts = facts
        tokenizer = facts.tokenizer
        piece = tokenizer.piece if tokenizer else lambda token: b""
        self._eog = tokenizer.eog if tokenizer and not request.ignore_eos else frozenset[int]()
        self._text = TextStream(piece, request.stop, request.strips_space)
        self._sampler = Sampler(request.sampling, request.prompt_ids)
        self._logprobs: list[TokenLogprob | None] = [None]
        self._n_done = 0
        self._n_cached = 0
        self._n_predicted = 0
        self._drawn = -1
        self._prompt_seconds = 0.0
        self._begin: float | None = None
        self._counted: dict[str, float] = {}

    @property
    def is_reading(self) -> bool:
        """Whether some of the prompt is still to be read."""
        return self._n_done < len(self.request.prompt_ids)

    @property
    def n_tokens_at_most(self) -> int:
        """Tokens that the sequence can ever hold; the last one drawn is not read any more."""
        return len(self.request.prompt_ids) + max(0, self._max_tokens - 1)

    @property
    def shareable(self) -> tuple[int, ...]:
        """The beginning of the prompt that need not be read if others have read it; logits of the rest are wanted."""
        return () if self.request.prompt_logprobs else self.request.prompt_ids[:-1]

    @property
    def _max_tokens(self) -> int:
        room = self._facts.n_ctx - len(self.request.prompt_ids) + 1
        return room if self.request.max_tokens is None else min(room, self.request.max_tokens)

    # --- what to read --------------------------------------------------------------------------------------

    def skip(self, n_known: int) -> None:
        """Notes that so many tokens of the prompt, from the first on, are in the sequence."""
        if self._begin is None:
            self._begin = time.perf_counter()
            self._counted = self._facts.counters()
        self._n_cached += n_known - self._n_done
        self._n_done = n_known

    def next_tokens(self, n_most: int) -> tuple[int, ...]:
        """What to read next: some of the prompt, or the token drawn last."""
        if not self.is_reading:
            return (self._drawn,)
        n_tokens = min(n_most, _LOGPROB_BATCH) if self.request.prompt_logprobs else n_most
        return self.request.prompt_ids[self._n_done : self._n_done + n_tokens]

    def n_rows(self, n_tokens: int) -> int:
        """Of how many of the next `n_tokens` tokens, counted from the last, the logits are wanted."""
        if self.is_reading and self.request.prompt_logprobs:
            return n_tokens
        return 1 if self._n_done + n_tokens >= len(self.request.prompt_ids) else 0

    # --- what comes of it ----------------------------------------------------------------------------------

    def take(self, n_tokens: int, logits: Logits) -> list[Event]:
        """What follows from having read `n_tokens` more; logits [n_rows, n_vocab]. Raises BadLogitsError."""
        events: list[Event] = []
        if self.is_reading:
            events += self._note_prompt(n_tokens, logits)
            if self.is_reading:
                return events
            assert self._begin is not None
            self._prompt_seconds = time.perf_counter() - self._begin
        if self._n_predicted >= self._max_tokens:
            return [*events, self.finish("length")]
        return events + self._draw(logits[-1])

    def _note_prompt(self, n_tokens: int, logits: Logits) -> list[Event]:
        prompt = self.request.prompt_ids
        following = prompt[self._n_done + 1 : self._n_done + n_tokens + 1]
        self._n_done += n_tokens
        events: list[Event] = [PromptProgress(self._n_done, len(prompt), self._n_cached)]
        if self.request.prompt_logprobs:
            n_top = self.request.n_logprobs or 0
            self._logprobs += [token_logprob(row, token, n_top) for row, token in zip(logits, following, strict=False)]
            if not self.is_reading:
                events.append(PromptLogprobs(tuple(self._logprobs)))
        return events

    def _draw(self, logits: Logits) -> list[Event]:
        n_top = self.request.n_logprobs
        token = self._drawn = self._sampler.sample(logits)
        self._n_predicted += 1
        if token in self._eog:
            return [self.finish("stop")]
        logprob = None if n_top is None else token_logprob(logits, token, n_top)
        step = TokenStep(token, self._text.feed(token), logprob, self._text.piece, self._text.added)
        if self._text.stopped:
            return [step, self.finish("stop")]
        if self._n_predicted >= self._max_tokens:
            return [step, self.finish("length")]
        return [step]

    def finish(self, reason: FinishReason) -> Finished:
        """Ends the request."""
        self.is_over = True
        now = time.perf_counter()
        total = now - (self._begin or now)
        prompt_seconds = self._prompt_seconds or total
        timings = Timings(
            prompt_n=self._n_done - self._n_cached,
            prompt_ms=prompt_seconds * 1000,
            predicted_n=self._n_predicted,
            predicted_ms=(total - prompt_seconds) * 1000,
            cached_n=self._n_cached,
        )
        return Finished(reason, self._text.finish(), timings, self._facts.memory(), self._tier_use())

    def _tier_use(self) -> TierUse:
        if self._begin is None:
            return TierUse()
        counted = self._counted
        counts = {name: value - counted.get(name, 0) for name, value in self._facts.counters().items()}
        return TierUse(counts, self.has_company)


def _check(request: GenerationRequest, facts: ModelFacts) -> None:
    prompt, n_vocab = request.prompt_ids, facts.n_vocab
    if not prompt:
        raise UsageError("The prompt is empty: at least one token is needed.")
    if min(prompt) < 0 or max(prompt) >= n_vocab:
        wrong = next(token for token in prompt if not 0 <= token < n_vocab)
        raise UsageError(f"The prompt holds token {wrong}, but the vocabulary has {n_vocab} tokens.")
    if request.max_tokens is not None and request.max_tokens < 0:
        raise UsageError(f"max_tokens is {request.max_tokens}, but must be 0 or more.")
    check_params(request.sampling, n_vocab)
    room = facts.n_ctx - (0 if request.max_tokens == 0 else 1)
    if len(prompt) > room:
        raise ContextOverflowError(len(prompt), facts.n_ctx)
