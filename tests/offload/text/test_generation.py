import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimoe.offload.engine import Engine
from slimoe.offload.errors import BadLogitsError, ContextOverflowError, ModelFileError, UsageError
from slimoe.offload.text.generation import (
    Event,
    Finished,
    GenerationRequest,
    PromptLogprobs,
    PromptProgress,
    SamplingParams,
    TokenStep,
)
from slimoe.offload.text.sampler import token_logprob
from tests.models.configs import engine_config
from tests.models.gguf_content import read_content, write_content
from tests.models.tiny_gguf import write_tiny_gguf

GREEDY = SamplingParams(temperature=0.0)
PROMPT = (1, 300, 17, 45, 301, 99, 4)
N_CTX = 48


def open_engine(model: Path, **changed: Any) -> Engine:
    return Engine.open(engine_config(model, **{"n_ctx": N_CTX, "n_threads": 1} | changed))


@pytest.fixture(scope="module")
def shared(tiny_model: Path) -> Iterator[Engine]:
    engine = open_engine(tiny_model)
    yield engine
    engine.close()


@pytest.fixture
def engine(shared: Engine) -> Engine:
    """An engine that has read nothing."""
    shared.truncate(0)
    return shared


def request(**changed: Any) -> GenerationRequest:
    """A greedy request whose answer no token ends."""
    return dataclasses.replace(GenerationRequest(PROMPT, sampling=GREEDY, ignore_eos=True), **changed)


def answer(engine: Engine, **changed: Any) -> list[Event]:
    return list(engine.generate(request(**changed)))


def tokens_of(events: list[Event]) -> list[int]:
    return [event.token for event in events if isinstance(event, TokenStep)]


def finished(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    assert not any(isinstance(event, Finished) for event in events[:-1])
    return events[-1]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TokenStep)) + finished(events).text


def test_greedy_tokens_are_the_likeliest(engine: Engine) -> None:
    expected = [int(engine.prefill(PROMPT).argmax())]
    while len(expected) < 10:
        expected.append(int(engine.decode(expected[-1]).argmax()))
    events = answer(engine, max_tokens=10)
    assert tokens_of(events) == expected
    end = finished(events)
    assert end.reason == "length"
    assert (end.timings.prompt_n + end.timings.cached_n, end.timings.predicted_n) == (len(PROMPT), 10)
    assert end.memory["kv"] > 0


def test_the_text_is_the_tokens_bytes(engine: Engine) -> None:
    assert engine.tokenizer
    events = answer(engine, max_tokens=20)
    pieces = b"".join(engine.tokenizer.piece(token) for token in tokens_of(events))
    assert text_of(events) == pieces.decode("utf-8", "replace")


def test_no_tokens(engine: Engine) -> None:
    events = answer(engine, max_tokens=0)
    assert tokens_of(events) == []
    assert finished(events).reason == "length"
    assert engine.n_past == len(PROMPT)


def test_without_a_limit_the_context_ends_the_answer(engine: Engine) -> None:
    """Every cell is used, and the last token drawn needs none."""
    for limit in (None, 10**9, N_CTX):
        events = answer(engine, max_tokens=limit)
        assert len(tokens_of(events)) == N_CTX - len(PROMPT) + 1
        assert finished(events).reason == "length"
        assert engine.n_past == N_CTX


def test_a_prompt_that_leaves_room_for_little(engine: Engine) -> None:
    events = answer(engine, prompt_ids=(7,) * (N_CTX - 1))
    assert len(tokens_of(events)) == 2
    assert len(tokens_of(answer(engine, prompt_ids=(7,) * N_CTX, max_tokens=0))) == 0


@pytest.mark.parametrize(("n_prompt", "max_tokens"), [(N_CTX, None), (N_CTX + 1, 0), (10 * N_CTX, 5)])
def test_a_prompt_that_does_not_fit(engine: Engine, n_prompt: int, max_tokens: int | None) -> None:
    with pytest.raises(ContextOverflowError) as caught:
        answer(engine, prompt_ids=(5,) * n_prompt, max_tokens=max_tokens)
    assert (caught.value.n_prompt, caught.value.n_ctx) == (n_prompt, N_CTX)
    assert tokens_of(answer(engine, max_tokens=1))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt_ids": ()}, "prompt is empty"),
        ({"prompt_ids": (1, 512)}, "token 512, but the vocabulary has 512"),
        ({"prompt_ids": (1, -1)}, "token -1"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"sampling": SamplingParams(temperature=-1)}, "temperature"),
        ({"sampling": SamplingParams(logit_bias={512: 1})}, "logit_bias names token 512"),
    ],
    ids=str,
)
def test_requests_that_make_no_sense(engine: Engine, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        answer(engine, **changed)
    assert tokens_of(answer(engine, max_tokens=1))


def test_eos_ends_the_answer_unless_it_is_ignored(engine: Engine) -> None:
    forced = SamplingParams(temperature=0.0, logit_bias={2: 100.0})
    events = answer(engine, sampling=forced, ignore_eos=False)
    assert tokens_of(events) == []
    assert finished(events).reason == "stop"
    events = answer(engine, sampling=forced, max_tokens=3)
    assert tokens_of(events) == [2, 2, 2]
    assert text_of(events) == ""


def test_control_tokens_appear_by_name_if_asked_for_but_not_those_that_end_an_answer(
    tmp_path: Path, sentencepiece_path: Path
) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", sentencepiece_path, added=("<tool>", "<|im_end|>"))
    engine = open_engine(path)
    assert engine.tokenizer is not None
    special = engine.tokenizer.special_tokens
    for name, shows_control, text in (
        ("<tool>", True, "<tool><tool>"),
        ("<tool>", False, ""),
        ("<|im_end|>", True, ""),
        ("</s>", True, ""),
    ):
        forced = SamplingParams(temperature=0.0, logit_bias={special[name]: 100.0})
        events = answer(engine, sampling=forced, shows_control=shows_control, max_tokens=2)
        assert (tokens_of(events), text_of(events)) == ([special[name]] * 2, text)
    engine.close()


def test_a_stop_string_ends_the_answer(engine: Engine) -> None:
    whole = text_of(answer(engine, max_tokens=20))
    stop = whole[8:12]
    events = answer(engine, max_tokens=20, stop=("never there", stop))
    assert text_of(events) == whole[: whole.index(stop)]
    assert finished(events).reason == "stop"
    assert len(tokens_of(events)) < 20


@pytest.mark.parametrize("n_kept", [0, 1, 3, len(PROMPT) - 1, len(PROMPT)])
def test_a_known_beginning_is_not_read_again(engine: Engine, tiny_model: Path, n_kept: int) -> None:
    answer(engine, prompt_ids=(*PROMPT[:n_kept], 50, 51, 52), max_tokens=5)
    events = answer(engine, max_tokens=12)
    n_cached = min(n_kept, len(PROMPT) - 1)
    timings = finished(events).timings
    assert (timings.cached_n, timings.prompt_n) == (n_cached, len(PROMPT) - n_cached)
    assert isinstance(events[0], PromptProgress)
    assert events[0].n_cached == n_cached
    fresh = open_engine(tiny_model)
    expected = answer(fresh, max_tokens=12)
    fresh.close()
    assert tokens_of(events) == tokens_of(expected)


def test_an_answer_is_known_in_the_next_turn(engine: Engine) -> None:
    said = tokens_of(answer(engine, max_tokens=6))
    following = (*PROMPT, *said, 77, 78)
    events = answer(engine, prompt_ids=following, max_tokens=4)
    # The last token was drawn, but not read.
    assert finished(events).timings.cached_n == len(PROMPT) + len(said) - 1
    engine.truncate(0)
    assert tokens_of(answer(engine, prompt_ids=following, max_tokens=4)) == tokens_of(events)


def test_progress_counts_batches(tiny_model: Path) -> None:
    engine = open_engine(tiny_model, n_batch=3)
    progress = [event for event in answer(engine, max_tokens=1) if isinstance(event, PromptProgress)]
    engine.close()
    assert [(event.n_done, event.n_total) for event in progress] == [(3, 7), (6, 7), (7, 7)]


def test_logprobs_of_the_answer(engine: Engine) -> None:
    steps = [event for event in answer(engine, max_tokens=5, n_logprobs=3) if isinstance(event, TokenStep)]
    engine.truncate(0)
    logits = engine.prefill(PROMPT)
    for step in steps:
        expected = token_logprob(logits, step.token, 3)
        assert step.logprob
        assert step.logprob.token == step.token == step.logprob.top[0][0]
        assert step.logprob.logprob == pytest.approx(expected.logprob, abs=1e-3)
        assert [token for token, _ in step.logprob.top] == [token for token, _ in expected.top]
        logits = engine.decode(step.token)
    assert all(event.logprob is None for event in answer(engine, max_tokens=3) if isinstance(event, TokenStep))


@pytest.mark.parametrize("n_prompt", [1, 2, 47])
def test_logprobs_of_the_prompt_are_those_of_single_steps(engine: Engine, n_prompt: int) -> None:
    prompt = tuple(int(token) for token in np.random.default_rng(0).integers(0, 512, n_prompt))
    events = answer(engine, prompt_ids=prompt, prompt_logprobs=True, n_logprobs=2, max_tokens=1)
    (scored,) = (event for event in events if isinstance(event, PromptLogprobs))
    engine.truncate(0)
    assert scored.tokens[0] is None
    assert len(scored.tokens) == n_prompt
    for before, token, got in zip(prompt, prompt[1:], scored.tokens[1:], strict=False):
        expected = token_logprob(engine.decode(before), token, 2)
        assert got
        assert got.token == token
        assert got.logprob == pytest.approx(expected.logprob, abs=1e-3)
        assert [value for _, value in got.top] == pytest.approx([value for _, value in expected.top], abs=1e-3)


def test_a_prompt_that_is_scored_answers_the_same(tiny_model: Path) -> None:
    """Scoring takes logits of whole batches, more memory than anything else: nothing computed before may break."""
    engine = open_engine(tiny_model, n_ctx=300)
    prompt = tuple(range(10, 210))
    plain = tokens_of(answer(engine, prompt_ids=prompt, max_tokens=5))
    scored = tokens_of(answer(engine, prompt_ids=prompt, max_tokens=5, prompt_logprobs=True))
    again = tokens_of(answer(engine, prompt_ids=prompt, max_tokens=5))
    engine.close()
    assert plain == scored == again


def test_a_prompt_that_is_to_be_read_whole_is(engine: Engine) -> None:
    prompt = tuple(range(10, 40))
    counts = []
    for is_read_whole in (False, False, True, False):
        events = answer(engine, prompt_ids=prompt, max_tokens=2, is_read_whole=is_read_whole)
        (finished,) = (event for event in events if isinstance(event, Finished))
        counts.append(finished.timings.prompt_n)
    assert counts == [30, 1, 30, 1]


class Cancelled:
    """Says no so many times, and then yes."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def __call__(self) -> bool:
        self.patience -= 1
        return self.patience < 0


def test_cancelling_at_any_moment_leaves_a_sound_engine(engine: Engine) -> None:
    expected = tokens_of(answer(engine, max_tokens=6))
    engine.truncate(0)
    seen = set()
    endless = Cancelled(10**6)
    list(engine.generate(request(max_tokens=6), endless))
    engine.truncate(0)
    asked = 10**6 - endless.patience
    for patience in (0, 1, 5, asked // 2, *range(asked - 7, asked + 1)):
        events = list(engine.generate(request(max_tokens=6), Cancelled(patience)))
        reason = finished(events).reason
        got = tokens_of(events)
        seen.add((reason, len(got)))
        assert got == expected[: len(got)]
        assert reason == ("length" if len(got) == 6 else "cancelled")
        if patience % 2:
            engine.truncate(0)
        assert tokens_of(answer(engine, max_tokens=6)) == expected
        engine.truncate(0)
    assert ("cancelled", 0) in seen
    assert any(reason == "cancelled" and n > 0 for reason, n in seen), seen


def test_a_prompt_is_cancelled_inside_its_batch(engine: Engine) -> None:
    """The question is asked between operations, so that a long batch need not end first."""
    asked = Cancelled(3)
    events = list(engine.generate(request(prompt_ids=tuple(range(3, 43))), asked))
    assert [type(event) for event in events] == [Finished]
    assert finished(events).reason == "cancelled"
    assert engine.n_past == 0


def test_an_abandoned_answer_leaves_a_sound_engine(engine: Engine) -> None:
    expected = tokens_of(answer(engine, max_tokens=6))
    steps = engine.generate(request(max_tokens=6))
    for _ in range(3):
        next(steps)
    del steps
    assert tokens_of(answer(engine, max_tokens=6)) == expected


def test_a_seed_repeats_an_answer(engine: Engine) -> None:
    def drawn(seed: int | None) -> list[int]:
        return tokens_of(answer(engine, sampling=SamplingParams(temperature=2.0, seed=seed), max_tokens=20))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(None) != drawn(None)


def test_penalties_count_the_prompt(engine: Engine) -> None:
    likeliest = tokens_of(answer(engine, max_tokens=1))[0]
    forbidding = dataclasses.replace(GREEDY, presence_penalty=100.0)
    prompt = (likeliest, *PROMPT)
    first = tokens_of(answer(engine, prompt_ids=prompt, max_tokens=30, sampling=forbidding))
    assert len({*first, *prompt}) == len(first) + len(prompt), "a token came twice"


def test_a_file_without_a_tokenizer_answers_in_tokens(tmp_path: Path) -> None:
    engine = open_engine(write_tiny_gguf(tmp_path / "m.gguf", None))
    events = answer(engine, prompt_ids=(1, 299), max_tokens=5, ignore_eos=False, stop=("x",))
    engine.close()
    assert len(tokens_of(events)) == 5
    assert text_of(events) == ""


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    content = read_content(tiny_model)
    longer = {name: np.ones((520, 64), np.float32) for name in ("token_embd.weight", "output.weight")}
    path = write_content(tmp_path / "m.gguf", content.with_values(longer))
    with pytest.raises(ModelFileError, match="the tokenizer has 512 tokens, the model 520"):
        open_engine(path)


def test_weights_that_are_no_numbers(tmp_path: Path, tiny_model: Path) -> None:
    content = read_content(tiny_model)
    path = write_content(
        tmp_path / "m.gguf", content.with_values({"blk.0.attn_output.weight": np.full((64, 64), np.nan, np.float32)})
    )
    engine = open_engine(path)
    with pytest.raises(BadLogitsError):
        answer(engine)
    engine.close()


@pytest.mark.parametrize("n_ctx", [2, 255, 256, 257])
def test_contexts_of_any_size_are_used_to_their_end(tiny_model: Path, n_ctx: int) -> None:
    engine = open_engine(tiny_model, n_ctx=n_ctx)
    events = answer(engine, prompt_ids=(1,) * (n_ctx - 1))
    assert len(tokens_of(events)) == 2
    assert engine.n_past == n_ctx
    with pytest.raises(ContextOverflowError):
        engine.decode(5)
    engine.close()


@pytest.mark.parametrize(
    "changed",
    [{"n_ctx": 0}, {"n_batch": 0}, {"n_threads": 0}, {"n_threads": 10**5}, {"kv_type": "q3"}, {"weights": "x"}],
)
def test_settings_that_make_no_sense(tiny_model: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        open_engine(tiny_model, **changed)


def test_a_closed_engine_may_be_closed_again(tiny_model: Path) -> None:
    engine = open_engine(tiny_model)
    answer(engine, max_tokens=2)
    engine.close()
    engine.close()
    use: list[Callable[[], object]] = [lambda: engine.decode(1), lambda: answer(engine, max_tokens=1)]
    for step in use:
        with pytest.raises(AssertionError, match="closed"):
            step()
