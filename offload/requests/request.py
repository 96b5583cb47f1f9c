"""One request's generation: which tokens are to be read next, and the events that follow from their logits."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from slimoe.offload.errors import ContextOverflowError, SlimoeError, UsageError
from slimoe.offload.graph.runner import Logits
from slimoe.offload.memory.cells import Sequence, Tokens
from slimoe.offload.requests.text_drafts import NO_DRAFT, Draft, TextDrafts
from slimoe.offload.text.generation import (
    Event,
    ExchangeNow,
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
from slimoe.offload.text.grammars import Grammars, Held
from slimoe.offload.text.sampler import Sampler, check_params, token_logprob
from slimoe.offload.text.tokenizer import TextStream, Tokenizer

_LOGPROB_BATCH = 64
"""Logits of a whole batch are n_batch * n_vocab floats: with all of them wanted, batches are smaller."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a request must know of the model.

    `memory` returns the bytes held by each tier, by name, `counters` the tiers' running totals, by name, `exchange` how
    devices exchange experts, and `expected_ms` what a token of an answer is predicted to take; `on_begin` is called
    when a request begins.
    """

    n_ctx: int
    n_vocab: int
    tokenizer: Tokenizer | None
    memory: Callable[[], dict[str, int]]
    counters: Callable[[], dict[str, float]] = dict
    on_begin: Callable[[], None] = lambda: None
    grammars: Grammars | None = None
    exchange: Callable[[], tuple[ExchangeNow, ...]] = tuple
    expected_ms: Callable[[], float | None] = lambda: None


class Generator:
    """The state of one request, which computes nothing: a scheduler reads tokens for it and hands it their logits.

    The scheduler sets `sequence`, the request's tokens, when the request becomes active, and `has_company` when others
    are active at the same time. `is_over` is true once `Finished` was made. Of the tokens that were read last,
    `n_rejected` are drafts that the answer has not followed, which the scheduler takes out of the sequence; what else
    it has to take out with them it hands to `read_again`. Raises
    UsageError for a prompt or parameters that make no sense, and ContextOverflowError for a prompt that is too long.
    """

    def __init__(
        self, request: GenerationRequest, facts: ModelFacts, is_cancelled: Callable[[], bool], id: int = 0
    ) -> None:
        _check(request, facts)
        self.request, self.is_cancelled, self.id = request, is_cancelled, id
        self.sequence: Sequence | None = None
        self._last_tokens: Tokens | None = None
        self.is_over = self.has_company = False
        self._facts = facts
        tokenizer = facts.tokenizer
        self._eog = tokenizer.eog if tokenizer and not request.ignore_eos else frozenset[int]()
        self._text = TextStream(self._piece, request.stop, request.strips_space)
        self._held: Held | None = None
        self._sampler = Sampler(request.sampling, request.prompt_ids)
        self._logprobs: list[TokenLogprob | None] = [None]
        self._n_done = 0
        self._n_cached = 0
        self._n_predicted = 0
        self._n_drafted = self._n_accepted = 0
        self._drafts: TextDrafts | None = None
        self.n_rejected = 0
        self._drawn = -1
        self._again: tuple[int, ...] = ()
        self._prompt_seconds = 0.0
        self._begin: float | None = None
        self._counted: dict[str, float] = {}

    @property
    def tokens(self) -> Tokens:
        """The tokens in its sequence now, or when it ended."""
        if self._last_tokens is not None:
            return self._last_tokens
        return np.empty(0, np.int32) if self.sequence is None else self.sequence.tokens

    @property
    def is_reading(self) -> bool:
        """Whether some of the prompt is still to be read."""
        return self._n_done < len(self.request.prompt_ids)

    @property
    def n_tokens_at_most(self) -> int:
        """The most tokens that the sequence can come to hold; the last token drawn is never read."""
        return len(self.request.prompt_ids) + max(0, self._max_tokens - 1)

    @property
    def shareable(self) -> tuple[int, ...]:
        """The tokens of the prompt that need not be read again where they are in the KV cache: no logits are wanted."""
        is_read_whole = self.request.prompt_logprobs or self.request.is_read_whole
        return () if is_read_whole else self.request.prompt_ids[:-1]

    @property
    def _max_tokens(self) -> int:
        room = self._facts.n_ctx - len(self.request.prompt_ids) + 1
        return room if self.request.max_tokens is None else min(room, self.request.max_tokens)

    # --- what to read --------------------------------------------------------------------------------------

    @property
    def n_again(self) -> int:
        """Tokens of the answer, before the one drawn last, that are no longer in the sequence."""
        return len(self._again)

    def read_again(self, tokens: tuple[int, ...]) -> None:
        """Notes that the last tokens of the answer but the one drawn last are no longer in the sequence."""
        self._again = tokens

    def skip(self, n_known: int) -> None:
        """Notes that the first `n_known` tokens of the prompt are in the sequence already."""
        if self._begin is None:
            self._begin = time.perf_counter()
            self._counted = self._facts.counters()
            self._facts.on_begin()
        self._n_cached += n_known - self._n_done
        self._n_done = n_known

    @property
    def n_draftable(self) -> int:
        """How many tokens behind the one drawn last the answer has room for."""
        return max(0, self._max_tokens - self._n_predicted - 1)

    def draft(self, n_most: int) -> Draft:
        """At most `n_most` tokens that may follow on the one drawn last, as many as the answer has room for."""
        assert self.sequence is not None
        n_most = min(n_most, self.n_draftable)
        if n_most <= 0:
            return NO_DRAFT
        if self._drafts is None:
            self._drafts = TextDrafts()
        text = [*self.sequence.tokens[len(self._drafts) :].tolist(), *self._again, self._drawn]
        n_new = len(self.sequence) + self.n_again + 1 - len(self._drafts)
        self._drafts.go_on(text[len(text) - n_new :])
        return self._drafts.propose(n_most)

    def next_tokens(self, n_most: int) -> tuple[int, ...]:
        """The tokens to read next: at most `n_most` of the prompt, or of the answer all that the sequence lacks."""
        if not self.is_reading:
            return (*self._again, self._drawn)
        n_tokens = min(n_most, _LOGPROB_BATCH) if self.request.prompt_logprobs else n_most
        return self.request.prompt_ids[self._n_done : self._n_done + n_tokens]

    def n_rows(self, n_tokens: int) -> int:
        """How many of the next `n_tokens` tokens need logits; they are the last ones."""
        if not self.is_reading or self.request.prompt_logprobs:
            return n_tokens
        return 1 if self._n_done + n_tokens >= len(self.request.prompt_ids) else 0

    # --- what comes of it ----------------------------------------------------------------------------------

    def take(self, tokens: tuple[int, ...], logits: Logits) -> list[Event]:
        """Takes in that `tokens` were read, with logits [n_rows, n_vocab], and returns the events that follow.

        Raises BadLogitsError for logits that are no numbers.
        """
        events: list[Event] = []
        if self.is_reading:
            events += self._note_prompt(len(tokens), logits)
            if self.is_reading:
                return events
            assert self._begin is not None
            self._prompt_seconds = time.perf_counter() - self._begin
            if self._n_predicted >= self._max_tokens:
                return [*events, self.finish("length")]
            return events + self._draw(logits[-1])
        # Logits of what was read again are computed too: graphs are built for few numbers of tokens and rows.
        n_again, self._again = self.n_again, ()
        return self._verify(tokens[n_again + 1 :], logits[n_again:])

    def _verify(self, drafted: tuple[int, ...], logits: Logits) -> list[Event]:
        """Draws a token from each row of logits, as long as those before are what was drafted."""
        events: list[Event] = []
        self._n_drafted += len(drafted)
        for n_right, row in enumerate(logits):
            self.n_rejected = len(drafted) - n_right
            try:
                events += self._draw(row)
            except SlimoeError:
                if not n_right:
                    raise
                # The tokens before are given out first: the next step reads the last of them again, and raises it.
                self.n_rejected += 1
                self._n_accepted -= 1
                break
            if self.is_over or n_right == len(drafted) or self._drawn != drafted[n_right]:
                break
            self._n_accepted += 1
        return events

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
        allowed, constraint = None, self.request.constraint
        if constraint is not None and self._held is None:
            assert self._facts.grammars is not None, "a model without tokenizer holds no answers"
            self._held = self._facts.grammars.hold(constraint, strips_space=self.request.strips_space)
        if self._held is not None:
            allowed = self._held.allowed()
            if self.request.ignore_eos and self._facts.tokenizer is not None:
                allowed[list(self._facts.tokenizer.eog)] = False
            if not allowed.any():
                return [self.finish("stop")]
        n_top = self.request.n_logprobs
        token = self._drawn = self._sampler.sample(logits, allowed)
        self._n_predicted += 1
        if token in self._eog:
            return [self.finish("stop")]
        if self._held is not None:
            self._held.take(token)
        logprob = None if n_top is None else token_logprob(logits, token, n_top)
        step = TokenStep(token, self._text.feed(token), logprob, self._text.piece, self._text.added)
        if self._text.stopped:
            return [step, self.finish("stop")]
        if self._held is not None and self._held.is_complete:
            return [step, self.finish("stop")]
        if self._n_predicted >= self._max_tokens:
            return [step, self.finish("length")]
        return [step]

    def release(self) -> None:
        """Keeps what the sequence holds, which is somebody else's from now on."""
        self._last_tokens = self.tokens.copy()

    def _piece(self, token: int) -> bytes:
        """The bytes that a token stands for in the answer."""
        tokenizer = self._facts.tokenizer
        if tokenizer is None:
            return b""
        return tokenizer.piece(token, special=self.request.shows_control and token not in tokenizer.eog)

    def finish(self, reason: FinishReason) -> Finished:
        """Ends the request and returns its last event."""
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
            expected_per_token_ms=self._facts.expected_ms(),
            draft_n=self._n_drafted,
            draft_n_accepted=self._n_accepted,
        )
        tier_use = TierUse()
        if self._begin is not None:
            totals = self._facts.counters()
            counts = {name: total - self._counted.get(name, 0) for name, total in totals.items()}
            tier_use = TierUse(counts, self.has_company, self._facts.exchange())
        text = self._text.finish()
        return Finished(reason, text, timings, self._facts.memory(), tier_use, self._text.stop_text)


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
