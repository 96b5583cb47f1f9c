"""Policies and the slot cache: sequences against plain references, hand-worked cases, random operations."""

from collections import Counter, OrderedDict
from collections.abc import Callable

import numpy as np
import pytest

from slimoe.offload.cache.policy import POLICIES, DecayedLfu, Policy, PolicyContext, make_policy
from slimoe.offload.cache.residency import Key, SlotCache, most_valuable
from slimoe.offload.cache.swap import SlotExchange, SwapRule, swap_pays
from slimoe.offload.errors import UsageError

N_LAYER, N_EXPERT, N_USED = 3, 5, 2
CONTEXT = PolicyContext(N_LAYER, N_EXPERT, N_USED)


def random_steps(seed: int, n_tokens: int) -> list[tuple[int, list[int]]]:
    """Layers in turn, each with distinct experts, some liked better than others."""
    rng = np.random.default_rng(seed)
    liking = rng.dirichlet(np.ones(N_EXPERT), N_LAYER) * 0.9 + 0.1 / N_EXPERT
    return [
        (layer, [int(e) for e in rng.choice(N_EXPERT, N_USED, replace=False, p=liking[layer] / liking[layer].sum())])
        for _ in range(n_tokens)
        for layer in range(N_LAYER)
    ]


def evictions(policy: Policy, n_slots: int, steps: list[tuple[int, list[int]]]) -> list[Key | None]:
    """What each load evicts when every miss is loaded and a layer's experts are kept until it is done."""
    cache, evicted = SlotCache(n_slots, policy), []
    for layer, experts in steps:
        policy.decode(layer, experts)
        keys = [(layer, expert) for expert in experts]
        evicted += [cache.acquire(key, set(keys))[1] for key in keys if key not in cache]
        cache.check()
        if layer == N_LAYER - 1:
            policy.end_token()
    return evicted


def lru_reference(n_slots: int, steps: list[tuple[int, list[int]]]) -> list[Key | None]:
    held: OrderedDict[Key, None] = OrderedDict()
    evicted: list[Key | None] = []
    for layer, experts in steps:
        keys = [(layer, expert) for expert in experts]
        missing = [key for key in keys if key not in held]
        for key in keys:
            if key in held:
                held.move_to_end(key)
        for key in missing:
            evicted.append(held.popitem(last=False)[0] if len(held) == n_slots else None)
            held[key] = None
        for key in keys:
            held.move_to_end(key)
    return evicted


def lfu_reference(n_slots: int, steps: list[tuple[int, list[int]]]) -> list[Key | None]:
    held: list[Key] = []
    evicted: list[Key | None] = []
    uses: Counter[Key] = Counter()
    for layer, experts in steps:
        keys = [(layer, expert) for expert in experts]
        uses.update(keys)
        for key in keys:
            if key in held:
                continue
            if len(held) == n_slots:
                leaving = sorted((other for other in held if other not in keys), key=lambda k: (-uses[k], k))[-1]
                held.remove(leaving)
                evicted.append(leaving)
            else:
                evicted.append(None)
            held.append(key)
    return evicted


@pytest.mark.parametrize("n_slots", [2, 3, 7, 11])
@pytest.mark.parametrize(("name", "reference"), [("lru", lru_reference), ("lfu", lfu_reference)])
def test_evictions_are_those_of_a_plain_reference(
    name: str, reference: Callable[[int, list[tuple[int, list[int]]]], list[Key | None]], n_slots: int
) -> None:
    for seed in range(5):
        steps = random_steps(seed, 40)
        evicted = evictions(POLICIES[name](CONTEXT), n_slots, steps)
        assert len([key for key in evicted if key]) > 0
        assert evicted == reference(n_slots, steps)


def test_a_cache_below_one_tokens_needs_never_hits_with_lru_but_every_second_time_with_heat() -> None:
    """The cyclic scan: each layer uses the same expert every time, and the pool lacks one of three slots.

    The best that is possible is one hit in two: of two residents, the one whose turn is next is kept each time.
    """
    steps = [(layer, [1]) for _ in range(20) for layer in range(N_LAYER)]
    assert len(evictions(POLICIES["lru"](CONTEXT), N_LAYER - 1, steps)) == len(steps)
    assert len(evictions(POLICIES["lfu-decay"](CONTEXT), N_LAYER - 1, steps)) == 1 + len(steps) // 2
    assert len(evictions(POLICIES["lfu-decay"](CONTEXT), N_LAYER, steps)) == N_LAYER


def test_heat_keeps_what_has_its_turn_next_but_values_say_nothing_of_turns() -> None:
    """Layer 1 of 3 is being computed: layer 2 is next, then 0, and 1 itself comes last."""
    policy = DecayedLfu(CONTEXT)
    assert policy.keeping[:, 0].tolist() == sorted(policy.keeping[:, 0], reverse=True), "a step begins with layer 0"
    policy.prompt(1, np.zeros(N_EXPERT, np.int64))
    assert policy.keeping[2] == pytest.approx(policy.values[2])
    assert np.argsort(policy.keeping[:, 0]).tolist() == [1, 0, 2]
    policy.decode(2, [3])
    assert np.argsort(policy.keeping[:, 0]).tolist() == [2, 1, 0]
    assert policy.values[:, 0].tolist() == [N_USED / N_EXPERT] * 3
    assert (policy.keeping > 0.15 * policy.values).all()


@pytest.mark.parametrize("name", ["lru", "lfu", "static"])
def test_the_plain_policies_keep_what_they_value(name: str) -> None:
    policy = make_policy(name, CONTEXT)
    policy.decode(1, [2, 3])
    assert np.array_equal(policy.keeping, policy.values)


def test_static_keeps_what_the_file_says_and_lets_the_rest_pass_through_one_slot() -> None:
    priors = np.zeros((N_LAYER, N_EXPERT))
    priors[1, 4], priors[2, 0] = 0.9, 0.8
    policy = POLICIES["static"](PolicyContext(N_LAYER, N_EXPERT, 1, priors))
    cache = SlotCache(3, policy)
    for key in most_valuable(priors, [(layer, e) for layer in range(N_LAYER) for e in range(N_EXPERT)], 3):
        cache.acquire(key)
    assert list(cache) == [(1, 4), (2, 0), (0, 0)]
    evicted = [cache.acquire((layer, 1))[1] for layer in range(N_LAYER)]
    assert evicted == [(0, 0), (0, 1), (1, 1)]


def test_without_priors_the_first_layers_stay() -> None:
    cache = SlotCache(4, make_policy("lfu-decay", CONTEXT))
    for key in ((2, 0), (0, 3), (1, 1), (1, 4)):
        cache.acquire(key)
    assert [cache.victim(), cache.victim({(2, 0)}), cache.victim({(2, 0), (1, 4)})] == [(2, 0), (1, 4), (1, 1)]


def test_heat_is_the_mean_use_per_token() -> None:
    """Half the weight of what was before is gone after a half-life; a steady use rate is what it converges to."""
    policy = DecayedLfu(PolicyContext(1, 4, 1), half_life=8)
    for _ in range(8):
        policy.decode(0, [2])
        policy.end_token()
    assert policy.values[0, 0] == pytest.approx(0.25 / 2)
    for token in range(400):
        policy.decode(0, [0] if token % 4 else [3])
        policy.end_token()
    assert policy.values[0] == pytest.approx([0.75, 0, 0, 0.25], abs=0.08)
    assert policy.values[0, 2] < policy.values[0, 1] + 1e-3


def test_several_sequences_that_use_an_expert_in_one_step_load_it_once() -> None:
    once, thrice = DecayedLfu(CONTEXT), DecayedLfu(CONTEXT)
    once.decode(1, [4, 2])
    thrice.decode(1, [4, 2, 4, 4])
    assert np.array_equal(once.values, thrice.values)


def test_a_prompt_seeds_heat_but_its_weight_is_bounded() -> None:
    short, long = (
        DecayedLfu(CONTEXT, half_life=64, prompt_tokens=64),
        DecayedLfu(CONTEXT, half_life=64, prompt_tokens=64),
    )
    before = short.values[1].copy()
    short.prompt(1, np.array([64, 64, 0, 0, 0]))
    for _ in range(100):
        long.prompt(1, np.array([640, 640, 0, 0, 0]))
    expected = 0.5 * before + 0.5 * np.array([1, 1, 0, 0, 0])
    assert short.values[1] == pytest.approx(expected)
    assert long.values[1] == pytest.approx(expected)
    assert np.array_equal(short.values[0], DecayedLfu(CONTEXT).values[0])


def test_batches_of_one_prompt_count_alike_and_the_next_prompt_starts_anew() -> None:
    parts, whole = DecayedLfu(CONTEXT), DecayedLfu(CONTEXT)
    parts.prompt(0, np.array([90, 30, 0, 0, 0]))
    parts.prompt(0, np.array([0, 0, 200, 280, 0]))
    whole.prompt(0, np.array([90, 30, 200, 280, 0]))
    assert parts.values == pytest.approx(whole.values)
    for policy in (parts, whole):
        policy.decode(0, [0, 1])
        policy.end_token()
    whole.prompt(0, np.array([0, 0, 0, 0, 7]))
    never = DecayedLfu(CONTEXT)
    never.decode(0, [0, 1])
    never.end_token()
    never.prompt(0, np.array([0, 0, 0, 0, 7]))
    assert whole.values == pytest.approx(never.values), "the first prompt has left a trace"


def test_a_layer_with_fewer_experts_reports_only_those() -> None:
    policy, padded = DecayedLfu(CONTEXT), DecayedLfu(CONTEXT)
    policy.prompt(2, np.array([3, 0, 5]))
    padded.prompt(2, np.array([3, 0, 5, 0, 0]))
    assert np.array_equal(policy.values, padded.values)


def test_an_empty_prompt_changes_nothing() -> None:
    policy = DecayedLfu(CONTEXT)
    policy.prompt(0, np.zeros(N_EXPERT, np.int64))
    assert np.array_equal(policy.values, DecayedLfu(CONTEXT).values)


@pytest.mark.parametrize("name", ["lru", "lfu", "static"])
def test_prompts_do_not_touch_the_plain_policies(name: str) -> None:
    policy, other = make_policy(name, CONTEXT), make_policy(name, CONTEXT)
    policy.prompt(0, np.array([1000, 1, 0, 0, 0]))
    assert np.array_equal(policy.values, other.values)


@pytest.mark.parametrize("name", POLICIES)
def test_priors_are_what_every_policy_starts_from_and_stay_unharmed(name: str) -> None:
    priors = np.random.default_rng(0).random((N_LAYER, N_EXPERT))
    kept = priors.copy()
    policy = make_policy(name, PolicyContext(N_LAYER, N_EXPERT, N_USED, priors))
    ranks, values = policy.ranks, policy.values
    assert np.array_equal(np.argsort(values, axis=None), np.argsort(priors, axis=None))
    policy.decode(0, [int(priors[0].argmin())])
    policy.end_token()
    assert policy.ranks is ranks
    assert np.array_equal(priors, kept)


def test_an_unknown_policy_is_a_usage_error_that_names_the_others() -> None:
    with pytest.raises(UsageError, match="lfu-decay, lru, lfu, static"):
        make_policy("magic", CONTEXT)


@pytest.mark.parametrize("name", POLICIES)
def test_random_operations_keep_slots_and_experts_one_to_one(name: str) -> None:
    """A dict of slots kept beside: no expert twice, no stale slot, nothing pinned evicted, the lowest value evicted."""
    rng = np.random.default_rng(7)
    policy = make_policy(name, CONTEXT)
    cache = SlotCache(6, policy)
    slots: dict[int, Key] = {}
    for _ in range(1500):
        layer, expert = int(rng.integers(N_LAYER)), int(rng.integers(N_EXPERT))
        key = (layer, expert)
        held = set(slots.values())
        pinned = {other for other in held if rng.random() < 0.3}
        operation = rng.random()
        if operation < 0.1 and held:
            leaving = sorted(held)[int(rng.integers(len(held)))]
            assert slots.pop(cache.free(leaving)) == leaving
        elif operation < 0.3:
            policy.decode(layer, [expert])
            policy.end_token()
        elif key in cache:
            slot = cache.lookup(key)
            assert slot is not None
            assert slots[slot] == key
        elif len(held) < cache.n_slots or held - pinned:
            expected = cache.victim(pinned)
            slot, evicted = cache.acquire(key, pinned)
            assert evicted == expected
            assert evicted == slots.get(slot)
            assert evicted not in pinned
            if evicted:
                assert all(cache.value(evicted) <= cache.value(other) for other in held - pinned)
            slots[slot] = key
        else:
            assert cache.victim(pinned) is None
            with pytest.raises(AssertionError, match="pinned"):
                cache.acquire(key, pinned)
        cache.check()
        assert {cache.lookup(key): key for key in cache} == slots
        assert len(cache) == len(slots)


def test_victims_are_those_of_looking_at_all_slots_after_many_steps_and_prompts() -> None:
    """Through the policy's taking its scale out, too: half-lives of a token, so that it does so every 256."""
    rng = np.random.default_rng(11)
    policy = DecayedLfu(CONTEXT, half_life=1)
    cache = SlotCache(6, policy)
    for step in range(3000):
        layer = step % N_LAYER
        experts = rng.choice(N_EXPERT, N_USED, replace=False).tolist()
        if rng.random() < 0.02:
            policy.prompt(layer, rng.integers(0, 9, N_EXPERT))
        policy.decode(layer, experts)
        pinned = {(layer, expert) for expert in experts}
        for key in sorted(pinned - set(cache)):
            values = policy.keeping
            looked = [other for other in cache if other not in pinned] if len(cache) == 6 else []
            expected = min(looked, key=lambda other: (values[other], -other[0], -other[1])) if looked else None
            assert cache.acquire(key, pinned)[1] == expected
        if layer == N_LAYER - 1:
            policy.end_token()
        if rng.random() < 0.1:
            cache.free(next(iter(cache)))
        cache.check()
    assert 2.0**-256 <= policy.scale < 1


def expected_after(liked: list[float], n_tokens: int) -> np.ndarray:
    """What a policy without priors expects of five experts that are used as often as `liked`, two at a time."""
    policy = DecayedLfu(PolicyContext(40, 5, 2))
    policy.foresee()
    rng = np.random.default_rng(1)
    for _ in range(n_tokens):
        for layer in range(40):
            policy.decode(layer, rng.choice(5, 2, replace=False, p=liked))
        policy.end_token()
    expected = np.array([[policy.expected((layer, expert)) for expert in range(5)] for layer in range(40)])
    shown: np.ndarray = np.abs(expected - 0.4).mean(axis=0) / np.abs(policy.values - 0.4).mean(axis=0)
    return shown


def test_what_is_chance_is_not_expected_to_last() -> None:
    """Of differences that last, far more is expected to be seen again than of those that are chance."""
    assert expected_after([0.2] * 5, 2000).max() < 0.35
    assert expected_after([0.7, 0.02, 0.02, 0.02, 0.24], 2000).min() > 0.85


def test_priors_are_what_is_usual() -> None:
    policy = DecayedLfu(PolicyContext(1, 3, 1, np.array([[0.6, 0.3, 0.1]])))
    policy.foresee()
    for _ in range(40):
        policy.decode(0, [2])
        policy.end_token()
    assert policy.value((0, 2)) > policy.value((0, 0))
    assert policy.expected((0, 2)) < policy.expected((0, 0))


def test_an_expert_has_one_slot_only() -> None:
    cache = SlotCache(2, make_policy("lru", CONTEXT))
    cache.acquire((0, 0))
    with pytest.raises(AssertionError, match="has a slot"):
        cache.acquire((0, 0))


def test_a_move_pays_when_what_it_saves_exceeds_what_it_costs() -> None:
    """2 ms saved per use, 0.3 uses per token more, 100 tokens: 60 ms."""
    assert swap_pays(0.002, 0.3, 0.059, 100)
    assert not swap_pays(0.002, 0.3, 0.061, 100)
    assert not swap_pays(0.0, 1.0, 0.0, 100)


def swaps(
    rule: SwapRule, values: np.ndarray, resident: np.ndarray, movable: np.ndarray, name: str = "static"
) -> list[tuple[Key, Key]]:
    """What an exchange chooses where everything movable is of one kind, and was not missed."""
    policy = make_policy(name, PolicyContext(len(values), values.shape[1], 1, values))
    exchange = SlotExchange(policy, rule, lambda key: "one" if movable[key] else None)
    there: set[Key] = {(layer, expert) for layer, expert in np.argwhere(resident).tolist()}
    return exchange.choose(there, [], lambda key: True)


def test_swaps_are_the_best_newcomers_for_the_worst_victims_and_bounded() -> None:
    values = np.array([[0.9, 0.8, 0.1], [0.2, 0.7, 0.05]])
    resident = np.array([[True, False, True], [True, False, False]])
    everything = np.ones_like(resident)
    rule = SwapRule(gain_seconds=1e-3, cost_seconds=1e-2, horizon_tokens=100, margin=1.3, max_swaps=5)
    assert swaps(rule, values, resident, everything) == [((0, 2), (0, 1)), ((1, 0), (1, 1))]
    assert swaps(SwapRule(1e-3, 1e-2, 100, 1.3, max_swaps=1), values, resident, everything) == [((0, 2), (0, 1))]
    # 0.7 - 0.2 uses over 100 tokens save 50 ms, 0.8 - 0.1 save 70 ms; 45 ms with the margin are 58.5.
    assert swaps(SwapRule(1e-3, 0.045, 100, 1.3), values, resident, everything) == [((0, 2), (0, 1))]
    assert swaps(SwapRule(1e-3, 0.06, 100, 1.3), values, resident, everything) == []


def test_what_may_not_move_does_not() -> None:
    values = np.array([[0.9, 0.8, 0.1, 0.2]])
    resident = np.array([[False, False, True, True]])
    rule = SwapRule(1.0, 1e-3)
    assert swaps(rule, values, resident, np.array([[False, True, False, True]])) == [((0, 3), (0, 1))]
    assert swaps(rule, values, resident, np.zeros((1, 4), np.bool_)) == []
    assert swaps(rule, values, np.ones((1, 4), np.bool_), np.ones((1, 4), np.bool_)) == []
    assert swaps(rule, values, np.zeros((1, 4), np.bool_), np.ones((1, 4), np.bool_)) == []


def test_experts_of_about_equal_use_do_not_take_turns() -> None:
    rule = SwapRule(gain_seconds=1.0, cost_seconds=0.0, margin=1.3)
    resident, everything = np.array([[True, False]]), np.ones((1, 2), np.bool_)
    assert swaps(rule, np.array([[0.40, 0.50]]), resident, everything) == []
    assert swaps(rule, np.array([[0.40, 0.53]]), resident, everything) == [((0, 0), (0, 1))]


def test_of_equals_the_last_layer_gives_way_and_the_first_comes_in() -> None:
    values = np.array([[0.1, 0.9], [0.1, 0.9]])
    resident = np.array([[True, False], [True, False]])
    rule = SwapRule(1.0, 1e-3, max_swaps=1)
    assert swaps(rule, values, resident, np.ones((2, 2), np.bool_)) == [((1, 0), (0, 1))]


def swaps_by_looking_at_all(
    policy: Policy, rule: SwapRule, resident: set[Key], can_come: Callable[[Key], bool]
) -> list[tuple[Key, Key]]:
    """Pairs victims and newcomers of one kind in the order of their values, for as long as that pays."""
    value = {key: policy.value(key) for key in np.ndindex(N_LAYER, N_EXPERT)}
    leaving = sorted(resident, key=lambda key: (value[key], -key[0], -key[1]))
    coming = sorted((key for key in value if key not in resident), key=lambda key: (-value[key], key))
    coming = [key for key in coming if can_come(key)]
    pairs = list(zip(leaving, coming, strict=False))[: rule.max_swaps]
    more = [policy.expected(newcomer) - policy.expected(victim) for victim, newcomer in pairs]
    paying = [rule.pays(value[new], value[old], uses) for (old, new), uses in zip(pairs, more, strict=True)]
    return pairs[: [*paying, False].index(False)]


def test_swaps_of_many_steps_are_those_of_looking_at_all_experts() -> None:
    """Prompts between the tokens, and experts whose bytes cannot be had for some time."""
    rng = np.random.default_rng(3)
    policy = DecayedLfu(CONTEXT, half_life=4)
    rule = SwapRule(gain_seconds=20.0, cost_seconds=0.25, horizon_tokens=10, margin=1.2)
    exchange = SlotExchange(policy, rule, lambda key: "one")
    resident: set[Key] = {(layer, expert) for layer in range(N_LAYER) for expert in (0, 1)}
    n_swaps = 0
    for step in range(400):
        missed = []
        if rng.random() < 0.05:
            policy.prompt(int(rng.integers(N_LAYER)), rng.integers(0, 9, N_EXPERT))
        for layer in range(N_LAYER):
            liked = np.roll([0.4, 0.3, 0.1, 0.1, 0.1], step // 50)
            experts = rng.choice(N_EXPERT, N_USED, replace=False, p=liked).tolist()
            policy.decode(layer, experts)
            missed += [(layer, expert) for expert in experts if (layer, expert) not in resident]
        at_hand = {key for key in np.ndindex(N_LAYER, N_EXPERT) if rng.random() < 0.7}
        expected = swaps_by_looking_at_all(policy, rule, resident, at_hand.__contains__)
        assert exchange.choose(resident, missed, at_hand.__contains__) == expected
        resident = (resident - {victim for victim, _ in expected}) | {newcomer for _, newcomer in expected}
        n_swaps += len(expected)
        policy.end_token()
    assert n_swaps > 20
