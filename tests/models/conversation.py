"""What tests say to engines that must answer alike: a conversation, requests at once, steps that are stopped."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from bench.baselines.stepping import kl_divergence, random_tokens
from slimoe.offload.engine import Engine
from slimoe.offload.text.generation import Event, Failed, GenerationRequest, SamplingParams, TokenStep

Array = np.ndarray[Any, Any]
TOKENS = random_tokens(48, 300)


def conversation(engine: Engine) -> Array:
    """Logits of parts that are read whole, in batches and token by token, some of whose rows are not wanted."""
    told = [engine.read(TOKENS[:9], 9).copy(), engine.prefill(TOKENS[9:30])[None].copy()]
    told += [engine.decode(token)[None].copy() for token in TOKENS[30:40]]
    told.append(engine.read(TOKENS[40:45], 2).copy())
    engine.truncate(20)
    told.append(engine.decode(TOKENS[45])[None].copy())
    return np.concatenate(told)


def events_of(engine: Engine, requests: Sequence[GenerationRequest]) -> list[list[Event]]:
    """The events of each of some requests that are submitted at once."""
    ids = [engine.submit(request) for request in requests]
    told = defaultdict[int, list[Event]](list)
    while not engine.is_idle:
        for id, event in engine.step():
            assert not isinstance(event, Failed), event.error
            told[id].append(event)
    return [told[id] for id in ids]


def tokens_of(events: Iterable[Event]) -> list[int]:
    """The tokens of an answer."""
    return [event.token for event in events if isinstance(event, TokenStep)]


def answers(engine: Engine) -> dict[int, list[tuple[int, float]]]:
    """Tokens and their scores by request."""
    greedy = SamplingParams(temperature=0.0)
    for length in (30, 3, 17, 40):
        engine.submit(GenerationRequest(tuple(TOKENS[:length]), 8, greedy, n_logprobs=0))
    told: dict[int, list[tuple[int, float]]] = {}
    while not engine.is_idle:
        for id, event in engine.step():
            assert not isinstance(event, Failed)
            if isinstance(event, TokenStep):
                assert event.logprob is not None
                told.setdefault(id, []).append((event.token, event.logprob.logprob))
    return told


def stopped_after(n_calls: int) -> Callable[[], bool]:
    """Says no so many times, and then yes."""
    calls = iter(range(n_calls))
    return lambda: next(calls, None) is None


def apart(got: Array, expected: Array) -> float:
    """The KL divergence in nats that nine tokens in ten stay below: a router's tie may fall otherwise now and then."""
    assert expected.std() > 0.3, "logits that are all alike show nothing"
    found = [kl_divergence(a, b) for a, b in zip(got, expected, strict=True)]
    assert np.mean(found) < 2e-2
    return float(np.quantile(found, 0.9))
