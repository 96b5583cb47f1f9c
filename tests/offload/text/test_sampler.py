import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from slimoe.offload.errors import BadLogitsError, UsageError
from slimoe.offload.text.generation import SamplingParams
from slimoe.offload.text.sampler import Sampler, check_params, token_logprob

Logits = np.ndarray[Any, np.dtype[np.float32]]
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def random_logits(n_vocab: int, seed: int = 0) -> Logits:
    return (np.random.default_rng(seed).standard_normal(n_vocab) * 2).astype(np.float32)


def params(**changed: Any) -> SamplingParams:
    return SamplingParams(**OFF | {"seed": 1} | changed)


def naive_distribution(logits: Logits, p: SamplingParams) -> dict[int, float]:
    """Token probabilities by the definitions: top_k, top_p and min_p on sorted pairs, then temperature."""
    pairs = sorted(((float(value), -token) for token, value in enumerate(logits)), reverse=True)
    pairs = pairs[: p.top_k or len(pairs)]
    weights = [math.exp(value - pairs[0][0]) for value, _ in pairs]
    probabilities = [weight / math.fsum(weights) for weight in weights]
    kept = next((n for n in range(1, len(pairs)) if math.fsum(probabilities[:n]) >= p.top_p), len(pairs))
    kept = sum(one >= p.min_p * probabilities[0] for one in probabilities[:kept])
    heated = [math.exp((value - pairs[0][0]) / p.temperature) for value, _ in pairs[:kept]]
    return {-pairs[n][1]: weight / math.fsum(heated) for n, weight in enumerate(heated)}


def draws(logits: Logits, p: SamplingParams, n: int) -> list[int]:
    sampler = Sampler(p, [])
    return [sampler.sample(logits) for _ in range(n)]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.1, "temperature": 1.3},
    ],
)
def test_draws_follow_the_definitions(changed: dict[str, Any]) -> None:
    logits, p = random_logits(50), params(**changed)
    expected = naive_distribution(logits, p)
    n = 4000
    seen = Counter(draws(logits, p, n))
    assert seen.keys() <= expected.keys()
    frequent = [token for token, probability in expected.items() if probability * n >= 5]
    statistic = sum((seen[token] - n * expected[token]) ** 2 / (n * expected[token]) for token in frequent)
    freedom = max(1, len(frequent) - 1)
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("n_vocab", [1, 2, 63, 64, 65, 1000])
def test_every_kept_token_and_no_other_is_drawn(n_vocab: int) -> None:
    logits: Logits = np.arange(n_vocab, dtype=np.float32)
    p = params(top_k=3, temperature=5.0)
    assert set(draws(logits, p, 200)) == set(range(max(0, n_vocab - 3), n_vocab))


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    logits = np.array([math.log(probability) for probability in (0.5, 0.3, 0.2)], np.float32)
    assert set(draws(logits, params(top_p=0.49), 100)) == {0}
    assert set(draws(logits, params(top_p=0.51), 100)) == {0, 1}
    assert set(draws(logits, params(top_p=0.81), 100)) == {0, 1, 2}
    assert set(draws(logits, params(top_p=0.0), 100)) == {0}


def test_temperature_0_is_greedy_and_of_equals_takes_the_first() -> None:
    logits = np.array([1, 3, 3, 2], np.float32)
    assert draws(logits, params(temperature=0.0), 3) == [1, 1, 1]


@pytest.mark.parametrize("temperature", [1e-320, 1e-30])
def test_almost_no_temperature_is_greedy_too(temperature: float) -> None:
    assert set(draws(random_logits(300), params(temperature=temperature), 20)) == {int(random_logits(300).argmax())}


def test_penalties_are_openais_over_the_last_tokens() -> None:
    """logit[j] - count[j] * frequency - (count[j] > 0) * presence, shown by the token that wins after it."""
    logits = np.array([2.0, 1.9, 0, 0], np.float32)
    history = [0, 0, 0, 1]

    def winner(**changed: Any) -> int:
        return Sampler(params(temperature=0.0, **changed), history).sample(logits)

    assert winner() == 0
    assert winner(presence_penalty=1.0) == 0
    assert winner(presence_penalty=1.0, logit_bias={2: 1.2}) == 2
    assert winner(frequency_penalty=0.04) == 0
    assert winner(frequency_penalty=0.06) == 1
    assert winner(frequency_penalty=0.06, repeat_last_n=2) == 0
    assert winner(frequency_penalty=0.06, repeat_last_n=-1) == 1
    assert winner(frequency_penalty=2.0, repeat_last_n=0) == 0


def test_repeat_penalty_divides_gains_and_multiplies_losses() -> None:
    both = Sampler(params(temperature=0.0, repeat_penalty=2.0), [0, 1])
    assert both.sample(np.array([3.0, -1.0, 1.6], np.float32)) == 2
    assert Sampler(params(temperature=0.0, repeat_penalty=2.0), [0]).sample(np.array([-1, -1.9], np.float32)) == 1
    assert Sampler(params(temperature=0.0, repeat_penalty=2.0), [0]).sample(np.array([-1, -2.1], np.float32)) == 0


def test_drawn_tokens_count_for_the_penalties() -> None:
    sampler = Sampler(params(temperature=0.0, presence_penalty=1.0), [])
    logits = np.array([1.0, 0.5, 0.2], np.float32)
    assert [sampler.sample(logits) for _ in range(3)] == [0, 1, 2]


def test_logit_bias_bans_and_forces() -> None:
    logits = random_logits(100)
    best = int(logits.argmax())
    assert best not in draws(logits, params(logit_bias={best: -math.inf}), 300)
    assert set(draws(logits, params(logit_bias={7: 100.0}), 100)) == {7}
    assert set(draws(logits, params(logit_bias={7: math.inf}), 100)) == {7}
    everything = dict.fromkeys(range(100), -math.inf)
    assert len(set(draws(logits, params(logit_bias=everything), 300))) > 50


@pytest.mark.parametrize("share", [0.01, 0.3, 0.99])
@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0.0},
        {},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "temperature": 1.5},
        {"top_k": 200, "repeat_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {7: 5.0, 8: -math.inf}},
    ],
    ids=("greedy", "free", "filtered", "penalised"),
)
def test_what_is_not_allowed_is_as_if_its_logits_were_minus_infinity(share: float, changed: dict[str, Any]) -> None:
    held, free = Sampler(params(**changed), [3, 7, 7]), Sampler(params(**changed), [3, 7, 7])
    for seed in range(50):
        logits, allowed = random_logits(1000, seed), np.random.default_rng(seed).random(1000) < share
        allowed[7:9] = True
        expected = free.sample(np.where(allowed, logits, np.float32(-np.inf)))
        assert held.sample(logits, allowed) == expected


def test_logits_are_left_alone() -> None:
    logits = random_logits(100)
    before = logits.copy()
    draws(logits, params(logit_bias={3: 5.0}, presence_penalty=1.0, repeat_penalty=1.5), 10)
    np.testing.assert_array_equal(logits, before)


def test_a_seed_repeats_itself() -> None:
    logits = random_logits(100)
    assert draws(logits, params(seed=5), 50) == draws(logits, params(seed=5), 50)
    assert draws(logits, params(seed=5), 50) != draws(logits, params(seed=6), 50)
    assert draws(logits, params(seed=-1), 50) == draws(logits, params(seed=-1), 50)
    assert draws(logits, params(seed=None), 50) != draws(logits, params(seed=None), 50)


@pytest.mark.parametrize("n_vocab", [5, 130, 520, 32000])
@pytest.mark.parametrize("n_values", [1, 3, 1000])
def test_the_likeliest_are_those_of_a_full_sort(n_vocab: int, n_values: int) -> None:
    """With few distinct values nearly all are equal, and the lower token comes first."""
    logits = np.random.default_rng(n_vocab).integers(0, n_values, n_vocab).astype(np.float32)
    for n in (1, 2, 5, 20, 129, 600):
        expected = np.lexsort((np.arange(n_vocab), -logits))[:n]
        assert [token for token, _ in token_logprob(logits, 0, n).top] == expected.tolist()


def test_logprobs_are_the_log_softmax() -> None:
    logits = random_logits(1000) + np.float32(700)
    values = [float(value) for value in logits]
    total = math.log(math.fsum(math.exp(value - 700) for value in values)) + 700
    got = token_logprob(logits, 17, 3)
    assert got.token == 17
    assert got.logprob == pytest.approx(values[17] - total, abs=1e-5)
    assert [logprob for _, logprob in got.top] == pytest.approx(
        sorted((value - total for value in values), reverse=True)[:3], abs=1e-5
    )
    assert token_logprob(logits, 17, 0).top == ()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_without_numbers_is_an_error(bad: float, temperature: float) -> None:
    logits = random_logits(300)
    logits[42] = bad
    with pytest.raises(BadLogitsError, match="damaged"):
        Sampler(params(temperature=temperature), []).sample(logits)


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 1.5},
        {"top_p": -0.1},
        {"min_p": 2.0},
        {"repeat_penalty": 0.0},
        {"repeat_penalty": math.inf},
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"repeat_last_n": -2},
        {"logit_bias": {10: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": dict.fromkeys(range(10), -100.0)},
        {"logit_bias": dict.fromkeys(range(10), -math.inf)},
    ],
    ids=str,
)
def test_values_out_of_range(changed: dict[str, Any]) -> None:
    check_params(params(), 10)
    check_params(params(logit_bias=dict.fromkeys(range(9), -math.inf)), 10)
    check_params(params(logit_bias=dict.fromkeys(range(10), -99.0)), 10)
    with pytest.raises(UsageError, match=next(iter(changed))):
        check_params(params(**changed), 10)
