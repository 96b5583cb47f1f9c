"""An engine that answers several requests at once gives each the answer it would get alone."""

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from slimoe.offload.engine import Engine
from slimoe.offload.errors import ContextOverflowError, UsageError
from slimoe.offload.text.generation import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    PromptLogprobs,
    SamplingParams,
    TokenStep,
)
from tests.models.configs import engine_config
from tests.models.conversation import events_of, tokens_of
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf

GREEDY = SamplingParams(temperature=0.0)
N_PARALLEL = 4
N_CTX = 300
draw = random.Random(5)
SYSTEM = tuple(draw.randrange(3, 500) for _ in range(90))
PROMPTS = [
    (1, 300, 17, 45),
    (*SYSTEM, 7, 8, 9),
    (*SYSTEM, 7, 8, 9, 10, 11),
    tuple(draw.randrange(3, 500) for _ in range(200)),
    (5,),
    (*SYSTEM[:40], 77),
    (*SYSTEM, 7, 8, 9),
]


def open_engine(model: Path, **changed: Any) -> Engine:
    """Its cache is in F32: rounding to F16 turns differences in the last bit into ones that change close choices."""
    options: dict[str, Any] = {
        "n_ctx": N_CTX,
        "n_batch": 64,
        "n_parallel": N_PARALLEL,
        "n_threads": 1,
        "kv_type": "f32",
    }
    return Engine.open(engine_config(model, **options | changed))


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    engine = open_engine(tiny_model)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> Iterator[Engine]:
    """Answers one request at a time and remembers nothing."""
    engine = open_engine(tiny_model, n_parallel=1)
    yield engine
    engine.close()


def greedy(prompt: tuple[int, ...], max_tokens: int | None = 20) -> GenerationRequest:
    return GenerationRequest(prompt, max_tokens, GREEDY, ignore_eos=True)


def answer(engine: Engine, request: GenerationRequest) -> list[Event]:
    engine.truncate(0)
    return list(engine.generate(request))


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TokenStep | Finished))


def test_greedy_answers_are_those_of_each_alone(engine: Engine, alone: Engine) -> None:
    requests = [greedy(prompt) for prompt in PROMPTS]
    together = events_of(engine, requests)
    for events, request in zip(together, requests, strict=True):
        expected = answer(alone, request)
        assert tokens_of(events) == tokens_of(expected)
        assert text_of(events) == text_of(expected)
    cached = [events[-1].timings.cached_n for events in together if isinstance(events[-1], Finished)]
    assert sum(cached) >= 3 * 64, "what prompts share is computed once"


@pytest.mark.parametrize("changed", [{"weights": "both"}, {"n_batch": 7}, {"n_parallel": 2}], ids=str)
def test_however_the_model_is_opened(tiny_model: Path, alone: Engine, changed: dict[str, Any]) -> None:
    engine = open_engine(tiny_model, **changed)
    requests = [greedy(prompt, 8) for prompt in PROMPTS]
    together = events_of(engine, requests)
    engine.close()
    assert [tokens_of(events) for events in together] == [tokens_of(answer(alone, request)) for request in requests]


def test_each_has_its_own_settings(engine: Engine, alone: Engine) -> None:
    plain = answer(alone, greedy(PROMPTS[0], 30))
    stop = text_of(plain)[10:13]
    requests = [
        dataclasses.replace(greedy(PROMPTS[0], 30), stop=(stop,)),
        dataclasses.replace(greedy(PROMPTS[0], 30), sampling=SamplingParams(temperature=1.5, seed=3)),
        dataclasses.replace(greedy(PROMPTS[0], 30), sampling=SamplingParams(temperature=1.5, seed=4)),
        dataclasses.replace(greedy(PROMPTS[0], 30), n_logprobs=3),
        dataclasses.replace(greedy(PROMPTS[0], 30), sampling=SamplingParams(temperature=0.0, presence_penalty=100.0)),
    ]
    together = events_of(engine, requests)
    expected = [answer(alone, request) for request in requests]
    assert [text_of(events) for events in together] == [text_of(events) for events in expected]
    assert len({text_of(events) for events in together}) == len(requests)
    for got, wanted in zip(together[3], expected[3], strict=False):
        if isinstance(got, TokenStep) and isinstance(wanted, TokenStep):
            assert got.logprob
            assert wanted.logprob
            assert got.logprob.logprob == pytest.approx(wanted.logprob.logprob, abs=1e-3)
    assert all(event.logprob is None for event in together[0] if isinstance(event, TokenStep))


def test_scores_of_a_prompt_beside_others(engine: Engine, alone: Engine) -> None:
    scored = dataclasses.replace(greedy(PROMPTS[3], 2), prompt_logprobs=True, n_logprobs=2)
    together = events_of(engine, [greedy(PROMPTS[1]), scored, greedy(PROMPTS[3])])
    (got,) = (event for event in together[1] if isinstance(event, PromptLogprobs))
    (wanted,) = (event for event in answer(alone, scored) if isinstance(event, PromptLogprobs))
    assert len(got.tokens) == len(wanted.tokens) == len(PROMPTS[3])
    assert got.tokens[0] is None
    for ours, theirs in zip(got.tokens[1:], wanted.tokens[1:], strict=True):
        assert ours
        assert theirs
        assert ours.token == theirs.token
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


def test_every_context_is_whole(engine: Engine, alone: Engine) -> None:
    """All of them at once use theirs to the end."""
    requests = [greedy((n, n, n), None) for n in range(3, 3 + N_PARALLEL)]
    together = events_of(engine, requests)
    for events, request in zip(together, requests, strict=True):
        assert len(tokens_of(events)) == N_CTX - 3 + 1
        assert tokens_of(events)[:100] == tokens_of(answer(alone, dataclasses.replace(request, max_tokens=100)))


def test_the_two_ways_to_use_an_engine_in_turn(engine: Engine, alone: Engine) -> None:
    expected = tokens_of(answer(alone, greedy(PROMPTS[1])))
    for _ in range(2):
        assert tokens_of(events_of(engine, [greedy(PROMPTS[1])])[0]) == expected
        assert tokens_of(answer(engine, greedy(PROMPTS[1]))) == expected
        engine.truncate(0)
        first = int(engine.prefill(PROMPTS[0]).argmax())
        assert first == tokens_of(answer(alone, greedy(PROMPTS[0])))[0]


def test_the_ways_do_not_mix(engine: Engine) -> None:
    engine.submit(greedy(PROMPTS[0], 3))
    with pytest.raises(AssertionError, match="being answered"):
        engine.decode(3)
    with pytest.raises(AssertionError, match="being answered"):
        list(engine.generate(greedy(PROMPTS[0])))
    while not engine.is_idle:
        engine.step()
    assert tokens_of(list(engine.generate(greedy(PROMPTS[0], 3))))


def test_a_request_that_makes_no_sense_disturbs_nobody(engine: Engine, alone: Engine) -> None:
    id = engine.submit(greedy(PROMPTS[0]))
    got = engine.step()
    with pytest.raises(UsageError, match="max_tokens"):
        engine.submit(greedy(PROMPTS[1], -1))
    with pytest.raises(ContextOverflowError):
        engine.submit(greedy((3,) * (N_CTX + 1)))
    while not engine.is_idle:
        got += engine.step()
    events = [event for owner, event in got if owner == id and not isinstance(event, Failed)]
    assert tokens_of(events) == tokens_of(answer(alone, greedy(PROMPTS[0])))


@pytest.mark.parametrize("changed", [{"n_parallel": 0}, {"n_parallel": 10**6}])
def test_numbers_of_requests_that_make_no_sense(tiny_model: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--parallel"):
        open_engine(tiny_model, **changed)


def test_a_batch_has_room_for_everyone(tiny_model: Path, alone: Engine) -> None:
    engine = open_engine(tiny_model, n_batch=2, n_parallel=5)
    together = events_of(engine, [greedy(prompt, 5) for prompt in PROMPTS])
    engine.close()
    assert [tokens_of(events) for events in together] == [tokens_of(answer(alone, greedy(p, 5))) for p in PROMPTS]


def test_a_thousand_come_and_go_and_nothing_stays(tmp_path: Path) -> None:
    """After the first hundreds no more memory is taken: what keeps ten kilobytes of each shows."""
    shape = TinyShape(n_layer=1, n_embd=32, n_ff=32, n_head=2, n_head_kv=1, n_expert=3, n_expert_used=2)
    engine = open_engine(write_tiny_gguf(tmp_path / "m.gguf", None, shape=shape))
    draw = random.Random(1)
    cancelled: set[int] = set()

    def is_cancelled(n: int) -> Callable[[], bool]:
        return lambda: n in cancelled

    waiting: list[int] = []
    ends: Counter[str] = Counter()
    resident: list[int] = []
    for n in range(1000):
        prompt = tuple(draw.randrange(3) for _ in range(draw.randint(1, 60)))
        request = dataclasses.replace(greedy(prompt, draw.randint(0, 12)), prompt_logprobs=n % 9 == 0)
        waiting.append(engine.submit(request, is_cancelled(n)))
        if draw.random() < 0.5:
            cancelled.add(draw.randint(max(0, n - 6), n))
        for _ in range(draw.randint(0, 4)):
            ends.update(event.reason for _, event in engine.step() if isinstance(event, Finished))
        if n in (400, 999):
            resident.append(psutil.Process().memory_info().rss)
    while not engine.is_idle:
        ends.update(event.reason for _, event in engine.step() if isinstance(event, Finished))
    assert sum(ends.values()) == 1000
    assert min(ends["length"], ends["cancelled"]) > 100, ends
    assert resident[1] - resident[0] < 4 << 20
    assert tokens_of(events_of(engine, [greedy((3, 4), None)])[0])
    engine.close()
