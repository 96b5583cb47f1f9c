"""Lossy rules on invented experts: against enumeration, sums by hand, and every mix that there is."""

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.offload.cache.host_slots import slot_bytes
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.slots import fit_slots, low_classes, slot_classes
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.lossy.decision import SKIPPED, Choice, Chooser, Decision
from slimoe.offload.lossy.elastic import Elastic, mix_copies, share_within
from slimoe.offload.lossy.limit import (
    low_slots_at,
    low_weights_within,
    lowered_loss,
    price_within,
    slots_of_low_weights,
)
from slimoe.offload.lossy.loss import loss_tables
from slimoe.offload.lossy.rules import (
    NEVER,
    Gate,
    LowWeights,
    NeverWait,
    Rule,
    Sensitivity,
    SmallWeights,
    weights_before,
)
from slimoe.offload.lossy.step import LossyStep
from slimoe.offload.model.experts import ExpertCopy, ExpertLayer
from slimoe.offload.model.native_layout import LayerHints
from slimoe.offload.model.tensors import Span, WeightSource

Array = np.ndarray[Any, Any]
N_EXPERT, N_USED = 5, 3


def copy(kind: Type, n_ff: int = 64) -> ExpertCopy:
    """An expert of 64 x `n_ff` that lies nowhere."""
    n_bytes = {Type.Q8_0: 34, Type.Q4_0: 18, Type.F16: 64}[kind] * 2 * n_ff
    parts = [WeightSource(name, (64, n_ff), kind, (Span(0, 0, n_bytes),)) for name in ("gate", "up", "down")]
    return ExpertCopy(tuple(parts))


def layer(
    *kinds: Type,
    hints: LayerHints | None = None,
    n_expert: int = N_EXPERT,
    scale: float = 1.0,
    renormalised: bool = True,
) -> ExpertLayer:
    router = WeightSource("router", (64, n_expert), Type.F32, (Span(0, 0, 256 * n_expert),))
    experts = tuple(tuple(copy(kind) for kind in kinds) for _ in range(n_expert))
    hints = hints or random_hints(n_expert)
    return ExpertLayer(router, experts, tuple(range(n_expert)), None, N_USED, hints, scale, renormalised)


def random_hints(n: int = N_EXPERT, seed: int = 3) -> LayerHints:
    rng = np.random.default_rng(seed)
    best = rng.uniform(0, 1e-3, n)
    return LayerHints(
        use=tuple(rng.uniform(0.2, 1, n)),
        share_square=tuple(rng.uniform(0.12, 0.3, n)),
        error=tuple((b, b + e) for b, e in zip(best, rng.uniform(1e-3, 1e-2, n), strict=True)),
        fallback=(0, -1, 1, -1, 0),
        fallback_error=tuple(best + rng.uniform(5e-3, 2e-2, n)),
        skip_error=tuple(best + rng.uniform(1e-2, 5e-2, n)),
    )


@dataclass
class Held:
    """Copies that are in memory; reading takes a nanosecond a byte."""

    copies: set[tuple[Key, int]] = field(default_factory=set)

    def holds(self, key: Key, copy_index: int) -> bool:
        return (key, copy_index) in self.copies

    def read_seconds(self, n_bytes: int) -> float:
        return n_bytes * 1e-9


def choices(n_rows: int, one: ExpertLayer, seed: int) -> Choice:
    rng = np.random.default_rng(seed)
    stored = np.stack([rng.permutation(len(one.experts))[:N_USED] for _ in range(n_rows)]).astype(np.int64)
    weights = -np.sort(-rng.dirichlet(np.ones(N_USED), n_rows).astype(np.float32), axis=1)
    table = loss_tables([one])[0]
    assert table is not None
    return Choice(0, one, table, stored, weights)


# --- the rule ----------------------------------------------------------------------------------------------


def objective(choice: Choice, actions: tuple[int, ...], held: Held, mu: float) -> float:
    """Seconds and KL divergence of one action (high, low, none) per expert; infinite for what the rule must not do."""
    hints, read, loss = choice.layer.hints, set(), 0.0
    for (row, rank), action in zip(np.ndindex(choice.stored.shape), actions, strict=True):
        expert, weight = int(choice.stored[row, rank]), float(choice.weights[row, rank])
        assert hints.error
        assert hints.use
        assert hints.share_square
        assert hints.fallback
        assert hints.fallback_error
        assert hints.skip_error
        if action < 2:
            read |= {(expert, action)} - {(key[1], number) for key, number in held.copies}
            error = hints.error[expert][action]
        elif hints.fallback[expert] >= 0:
            error = hints.fallback_error[expert]
        elif rank == 0:
            return np.inf
        else:
            error = hints.skip_error[expert]
        rise = max(0.0, error - hints.error[expert][0])
        loss += rise * weight**2 / (hints.use[expert] * hints.share_square[expert])
    return sum(choice.layer.experts[e][number].n_bytes * 1e-9 for e, number in read) + mu * loss


def taken(choice: Choice, decision: Decision) -> tuple[int, ...]:
    gone = decision.stored != choice.stored
    return tuple(np.where(gone, 2, decision.copies).ravel().tolist())


@pytest.mark.parametrize("mu", [1e-6, 1e-4, 1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("n_rows", [1, 2])
def test_the_rule_is_the_best_of_all_combinations(n_rows: int, mu: float) -> None:
    one, rng = layer(Type.Q8_0, Type.Q4_0), np.random.default_rng(n_rows)
    actions_seen = set()
    for seed in range(12):
        choice = choices(n_rows, one, seed)
        held = Held({((0, e), number) for e in range(N_EXPERT) for number in (0, 1) if rng.random() < 0.4})
        decision = Rule(mu=mu).choose(choice, held)
        every = itertools.product(range(3), repeat=choice.stored.size)
        best = min(objective(choice, actions, held, mu) for actions in every)
        assert objective(choice, taken(choice, decision), held, mu) == pytest.approx(best, rel=1e-6)
        actions_seen |= set(taken(choice, decision))
    assert 0 in actions_seen
    assert mu == 1.0 or len(actions_seen) > 1


def test_a_price_of_bytes_says_the_same_as_seconds() -> None:
    choice, held = choices(4, layer(Type.Q8_0, Type.Q4_0), 1), Held({((0, 1), 0), ((0, 2), 1)})
    for mu in (1e-5, 1e-3, 1e-1):
        decisions = [rule.choose(choice, held) for rule in (Rule(mu=mu), Rule(price=1e-9 / mu))]
        assert taken(choice, decisions[0]) == taken(choice, decisions[1])


def test_at_no_price_nothing_is_read_but_what_must_be() -> None:
    """Without constant experts the first selected one cannot be left out: then its smaller copy is read."""
    hints = replace(random_hints(), fallback=None, fallback_error=None)
    choice = choices(3, layer(Type.Q8_0, Type.Q4_0, hints=hints), 2)
    decision = Rule(mu=0.0).choose(choice, Held())
    assert taken(choice, decision) == (1, 2, 2) * 3 or 0 not in taken(choice, decision)
    assert (decision.stored[:, 0] == choice.stored[:, 0]).all()
    assert (decision.copies[:, 0] == 1).all()


def test_experts_of_one_copy_are_waited_for() -> None:
    hints = LayerHints(error=((0.0,),) * N_EXPERT)
    choice = choices(3, layer(Type.Q8_0, hints=hints), 2)
    for rule in (Rule(mu=0.0), NeverWait()):
        decision = rule.choose(choice, Held())
        assert taken(choice, decision) == (0,) * 9


def test_never_wait_takes_what_is_here() -> None:
    choice = choices(6, layer(Type.Q8_0, Type.Q4_0), 4)
    held = Held({((0, e), 0) for e in (1, 3)})
    decision = NeverWait().choose(choice, held)
    np.testing.assert_array_equal(decision.copies, ~np.isin(choice.stored, (1, 3)))
    assert decision.weights is None


# --- weights -----------------------------------------------------------------------------------------------


def test_shares_before_are_of_the_whole_and_at_most_one() -> None:
    weights = np.array([[0.8, 0.4, 0.4], [1, 0, 0]], np.float32)
    assert np.abs(weights_before(weights) - np.array([[0, 0.5, 0.75], [0, 1, 1]])).max() < 1e-6
    tiny = np.array([[0.1, 0.7, 0.2 + 1e-7, 1e-9]], np.float32)
    assert weights_before(tiny).max() <= 1


def test_what_is_skipped_goes_to_the_others_and_else_no_bit_changes() -> None:
    choice = choices(50, layer(Type.Q8_0, Type.Q4_0), 5)
    decision = SmallWeights({0: 0.5}).choose(choice, Held())
    lost = (decision.stored == SKIPPED).any(axis=1)
    assert 0 < lost.sum() < 50
    assert decision.weights is not None
    np.testing.assert_array_equal(decision.weights[~lost], choice.weights[~lost])
    np.testing.assert_allclose(decision.weights.sum(axis=1), choice.weights.sum(axis=1), rtol=1e-6)
    assert (decision.weights[decision.stored == SKIPPED] == 0).all()


def test_a_constant_takes_the_weight_of_its_expert() -> None:
    choice = choices(50, layer(Type.Q8_0, Type.Q4_0), 6)
    decision = SmallWeights({0: 1.0}, constants=True).choose(choice, Held())
    is_constant = (decision.stored < 0) & (decision.stored != SKIPPED)
    assert choice.layer.hints.fallback is not None
    fallback = np.array(choice.layer.hints.fallback)
    np.testing.assert_array_equal(is_constant[:, 1:], fallback[choice.stored[:, 1:]] >= 0)
    np.testing.assert_array_equal(decision.stored[is_constant], -1 - fallback[choice.stored[is_constant]])


def test_selected_experts_that_are_constants_already_stay() -> None:
    one = choices(4, layer(Type.Q8_0, Type.Q4_0), 7)
    choice = replace(one, stored=np.where(one.stored == 2, -2, one.stored))
    for chooser in (Gate(0.2, 0.5), SmallWeights({0: 1.0}), Rule(mu=0.0), NeverWait()):
        decision = chooser.choose(choice, Held())
        assert (decision.stored[choice.stored == -2] == -2).all()
        assert (decision.copies[choice.stored == -2] == 0).all()


# --- the account -------------------------------------------------------------------------------------------


def test_costs_are_those_of_the_file() -> None:
    """An expert that is always in its low-bit copy costs what the file says of just that."""
    one = layer(Type.Q8_0, Type.Q4_0)
    hints = one.hints
    assert hints.use
    assert hints.share_square
    assert hints.low_error
    tables = loss_tables([one])
    account = LossyStep([one], tables, NeverWait(), Held())
    n_tokens, expert = 1000, 3
    n_selected = round(n_tokens * hints.use[expert])
    weight = np.sqrt(hints.share_square[expert])
    stored = np.full((n_selected, N_USED), -1, np.int64)
    stored[:, 0] = expert
    weights = np.zeros((n_selected, N_USED), np.float32)
    weights[:, 0] = weight
    account.decide(0, stored, weights)
    assert account.counters.low_selected == n_selected
    assert account.counters.expected_kl / n_tokens == pytest.approx(hints.low_error[expert], rel=1e-2)


def test_a_limit_is_never_passed() -> None:
    one = layer(Type.Q8_0, Type.Q4_0)
    for limit in (0.0, 0.05, 0.2):
        account = LossyStep([one], loss_tables([one]), NeverWait(), Held(), limit)
        n_read = 0
        for n_tokens in (1, 1, 7, 1, 3):
            n_read += n_tokens
            account.begin(n_tokens)
            choice = choices(n_tokens, one, n_tokens)
            decision = account.decide(0, choice.stored, choice.weights)
            assert account.counters.expected_kl <= limit * n_read
            assert limit or (decision.copies == 0).all()
        assert (account.counters.low_selected > 0) == (limit > 0)


def test_a_price_rises_while_less_is_lost_than_allowed() -> None:
    one = layer(Type.Q8_0, Type.Q4_0)
    low_selected = []
    for limit in (1e-4, 1e-2, 1.0):
        account = LossyStep([one], loss_tables([one]), Rule(price=1e-9), Held(), limit)
        for step in range(200):
            account.begin(1)
            choice = choices(1, one, step)
            account.decide(0, choice.stored, choice.weights)
        assert account.counters.expected_kl <= 200 * limit
        low_selected.append(account.counters.low_selected)
    assert 0 < low_selected[0] < low_selected[1] < low_selected[2]


def test_low_copies_come_first_where_most_would_use_them() -> None:
    layers = [layer(Type.Q8_0, Type.Q4_0)]
    tables = loss_tables(layers)
    assert low_slots_at(0.0, layers, tables) == "last"
    assert low_slots_at(NEVER, layers, tables) == "first"
    with pytest.raises(DoesNotFitError):
        fit_slots(layers, 1, 0, "m", "last")


def test_an_expert_that_was_never_selected_is_taken_for_the_worst() -> None:
    hints = random_hints()
    assert hints.use
    one = layer(Type.Q8_0, Type.Q4_0, hints=replace(hints, use=(0.0, *hints.use[1:])))
    table = loss_tables([one])[0]
    assert table is not None
    assert table.low[0] == table.low[1:N_EXPERT].max() > 0


# --- limits ------------------------------------------------------------------------------------------------


def bound(price: float, layers: list[ExpertLayer], resident: set[Key]) -> float:
    total = 0.0
    for index, one in enumerate(layers):
        hints = one.hints
        assert hints.use
        assert hints.low_error
        for expert, copies in enumerate(one.experts):
            if (index, expert) not in resident:
                total += min(hints.low_error[expert], price * hints.use[expert] * copies[0].n_bytes)
    return total


def test_the_price_is_the_highest_within_the_limit() -> None:
    layers = [layer(Type.Q8_0, Type.Q4_0, hints=random_hints(seed=seed)) for seed in range(3)]
    resident: set[Key] = {(0, 1), (2, 4)}
    tables = loss_tables(layers)
    for limit in (1e-4, 5e-3, 2e-2):
        price = price_within(limit, layers, tables, resident)
        assert bound(price, layers, resident) == pytest.approx(limit, rel=1e-6)
    assert price_within(0.0, layers, tables, resident) < 1e-12
    assert price_within(1.0, layers, tables, resident) == NEVER
    everything = {(index, expert) for index in range(3) for expert in range(N_EXPERT)}
    assert price_within(0.0, layers, tables, everything) == NEVER


@pytest.mark.parametrize("limit", [0.0, 1e-3, 5e-3, 2e-2, 1.0])
def test_low_weights_keep_to_a_limit_whatever_the_weights_are(limit: float) -> None:
    """Of an expert's weights only the mean square is known: they may be equal, or small ones and few large ones."""
    layers = [layer(Type.Q8_0, Type.Q4_0, hints=random_hints(seed=seed)) for seed in range(2)]
    found, rng, n_low = low_weights_within(limit, layers, loss_tables(layers)), np.random.default_rng(7), 0
    for spread in (0.01, 0.5, 2.0):
        expected = 0.0
        for index, one in enumerate(layers):
            hints = one.hints
            assert hints.use
            assert hints.share_square
            assert hints.low_error
            for expert, mean_square in enumerate(hints.share_square):
                weights = rng.lognormal(0, spread, 4000)
                weights *= (mean_square / np.square(weights).mean()) ** 0.5
                is_low = weights < found[index][expert]
                expected += hints.low_error[expert] * np.square(weights[is_low]).sum() / np.square(weights).sum()
                n_low += int(is_low.sum())
        assert expected <= limit * (1 + 1e-6)
    assert (n_low > 0) == (limit > 0)
    assert all(np.isinf(one[:-1]).all() for one in found.values()) == (limit == 1.0)
    assert all(one[-1] == 0 for one in found.values()), "no expert has no copies"


def test_low_weights_are_at_one_price_of_a_byte() -> None:
    """Where small and large experts stand side by side, both lose as much for a byte at their thresholds."""
    hints = random_hints()
    assert hints.use
    assert hints.share_square
    assert hints.low_error
    narrow, wide_copies = layer(Type.Q8_0, Type.Q4_0, hints=hints), (copy(Type.Q8_0, 256), copy(Type.Q4_0, 256))
    layers = [narrow, replace(narrow, experts=(wide_copies,) * N_EXPERT), layer(Type.Q8_0, hints=hints)]
    narrow_weights, wide_weights, single = low_weights_within(2e-3, layers, loss_tables(layers)).values()
    prices = []
    for one, weights in zip(layers[:2], (narrow_weights, wide_weights), strict=True):
        for expert, (high, low) in enumerate(one.experts):
            rate = hints.low_error[expert] / (hints.use[expert] * hints.share_square[expert])
            prices.append(weights[expert] ** 2 * rate / (high.n_bytes - low.n_bytes))
    finite = np.array(prices)[np.isfinite(prices)]
    assert len(finite) > N_EXPERT
    np.testing.assert_allclose(finite, finite[0], rtol=1e-6)
    assert (single == 0).all(), "what has one copy has no low one"


def test_experts_below_their_weights_use_low_copies() -> None:
    one = layer(Type.Q8_0, Type.Q4_0)
    choice, weights = choices(40, one, 5), np.array([0.0, 0.2, 0.4, np.inf, 0.3, 0.0])
    mode = LowWeights({0: weights})
    decision = mode.choose(choice, Held())
    for place in np.ndindex(choice.stored.shape):
        assert decision.copies[place] == int(choice.weights[place] < weights[choice.stored[place]])
    assert 0 < decision.copies.mean() < 1
    assert decision.weights is None
    np.testing.assert_array_equal(decision.stored, choice.stored)
    constants = mode.choose(replace(choice, stored=np.full_like(choice.stored, -1)), Held())
    assert (constants.copies == 0).all()
    # Mean squares of the weights are between 0.12 and 0.3.
    assert [mode.prefetch_copy((0, expert), choice.table, Held()) for expert in range(4)] == [0, 0, 0, 1]


def test_slots_go_first_to_the_copies_that_most_selections_use() -> None:
    layers = [layer(Type.Q8_0, Type.Q4_0, hints=random_hints(seed=seed)) for seed in range(2)]
    tables = loss_tables(layers)
    found = [low_weights_within(limit, layers, tables) for limit in (1e-4, 1.0)]
    assert [slots_of_low_weights(weights, layers, tables) for weights in found] == ["last", "first"]


def test_larger_weights_count_before_smaller_ones_in_any_order() -> None:
    """With a bias of the choice, experts of smaller weights may come first."""
    one = layer(Type.Q8_0, Type.Q4_0)
    choice, order = choices(50, one, 4), [2, 0, 1]
    mixed = replace(choice, weights=choice.weights[:, order], stored=choice.stored[:, order])
    np.testing.assert_array_equal(weights_before(mixed.weights), weights_before(choice.weights)[:, order])
    for mode in (Gate(0.5, 0.8), Sensitivity(1e9, {0: 1.0})):
        decision, expected = mode.choose(mixed, Held()), mode.choose(choice, Held())
        np.testing.assert_array_equal(decision.stored, expected.stored[:, order])
        np.testing.assert_array_equal(decision.copies, expected.copies[:, order])
    assert (decision.stored[:, 1] == mixed.stored[:, 1]).all(), "the largest stays"


def test_low_weights_grow_with_what_weights_sum_up_to() -> None:
    """Twice the weights cost four times as much, which a hint of a squared weight four times as large takes back."""
    hints = random_hints()
    scaled = replace(hints, share_square=tuple(4 * square for square in hints.share_square or ()))
    for limit in (1e-3, 5e-3):
        plain, doubled = (
            low_weights_within(limit, [one], loss_tables([one]))[0]
            for one in (layer(Type.Q8_0, Type.Q4_0, hints=hints), layer(Type.Q8_0, Type.Q4_0, hints=scaled, scale=2.0))
        )
        np.testing.assert_allclose(2 * plain, doubled, rtol=1e-6)


@pytest.mark.parametrize(("renormalised", "least"), [(True, 2 / N_USED), (False, 2 / N_EXPERT)])
def test_without_hints_weights_are_taken_for_equal(renormalised: bool, least: float) -> None:
    """The least that the mean square of a selected expert's weight can be."""
    one = layer(Type.Q8_0, Type.Q4_0, hints=LayerHints(), scale=2.0, renormalised=renormalised)
    table = loss_tables([one])[0]
    assert table is not None
    np.testing.assert_allclose(table.weight_square[:-1], least**2)


# --- elastic mixes -----------------------------------------------------------------------------------------


def test_every_mix_fits_and_grows_with_the_room() -> None:
    layers = [layer(Type.Q8_0, Type.Q4_0, hints=random_hints(seed=seed)) for seed in range(3)]
    layers[1] = layer(Type.F16)
    low, high = (sum(slot_bytes(c[n].slot_class) for one in layers for c in one.experts) for n in (-1, 0))
    losses = []
    for room in np.linspace(low, high, 23).astype(int).tolist():
        share = share_within(layers, room, 0, "m")
        mix = mix_copies(layers, share, None)
        kept = [copies for one in mix.layers if one is not None for copies in one.experts]
        assert {len(copies) for copies in kept} == {1}
        assert sum(slot_bytes(copies[0].slot_class) for copies in kept) <= room
        losses.append(lowered_loss(loss_tables(mix.layers, mix.lowered)))
        assert mix.n_experts == 3 * N_EXPERT
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0
    assert losses[0] == pytest.approx(sum(sum(layers[n].low_error or ()) for n in (0, 2)))


def test_the_costliest_experts_keep_their_best_copy() -> None:
    layers = [layer(Type.Q8_0, Type.Q4_0)]
    mix = mix_copies(layers, 0.4, None)
    errors = np.array(layers[0].low_error)
    assert errors[mix.lowered[0]].max() < errors[~mix.lowered[0]].min()
    plain = layer(Type.Q8_0, Type.Q4_0, hints=LayerHints())
    mix = mix_copies([plain], 0.4, np.array([[0.1, 0.9, 0.2, 0.8, 0.3]]))
    assert mix.lowered[0].tolist() == [True, False, True, False, True]


def test_a_mix_that_does_not_fit_says_what_would() -> None:
    layers = [layer(Type.Q8_0, Type.Q4_0)]
    low, high = (sum(slot_bytes(c[n].slot_class) for c in layers[0].experts) for n in (-1, 0))
    with pytest.raises(DoesNotFitError) as raised:
        Elastic().mix(layers, low - 1, 1000, None, "m")
    assert raised.value.required_bytes == low + 1000
    with pytest.raises(DoesNotFitError, match=r"elastic:0\.5") as raised:
        Elastic(0.9).mix(layers, (low + high) // 2 + 1, 1000, None, "m")
    assert raised.value.required_bytes > (low + high) // 2
    assert Elastic(0.25).mix(layers, high, 0, None, "m").share == 0.25


# --- slots for low copies ----------------------------------------------------------------------------------


def test_low_copies_come_first_or_share() -> None:
    layers = [layer(Type.Q8_0, Type.Q4_0) for _ in range(4)]
    (high,), (low,) = slot_classes(layers), low_classes(layers, "first")
    sizes = {high: slot_bytes(high), low: slot_bytes(low)}
    whole = 4 * N_EXPERT * sum(sizes.values())

    def slots(room: int, mode: Any) -> tuple[int, int]:
        got = fit_slots(layers, room + 77, 77, "m", mode)
        assert sum(n * sizes[kind] for kind, n in got.items()) <= room
        return got[high], got.get(low, 0)

    assert slots(whole, "none") == (20, 0)
    assert slots(whole, "first") == slots(whole, "shared") == slots(whole, "last") == (20, 20)
    least = N_USED * sum(sizes.values())
    assert slots(least, "first") == slots(least, "shared") == (3, 3)
    few_high, all_low = slots(20 * sizes[low] + 5 * sizes[high], "first")
    assert (few_high, all_low) == (5, 20)
    some = slots(12 * sizes[low] + N_USED * sizes[high], "first")
    assert some == (3, 12)
    shared = slots(whole // 2, "shared")
    assert abs(shared[0] - shared[1]) <= 1
    assert slots(20 * sizes[high] + 5 * sizes[low], "last") == (20, 5)
    assert slots(12 * sizes[high] + N_USED * sizes[low], "last") == (12, 3)
    with pytest.raises(DoesNotFitError):
        slots(least - 1, "first")


def test_every_mode_can_be_asked_what_to_read_early() -> None:
    one = layer(Type.Q8_0, Type.Q4_0)
    table = loss_tables([one])[0]
    assert table is not None
    key: Key = (0, 2)
    held = Held({(key, 0)})
    modes: list[tuple[Chooser, int, int]] = [
        (NeverWait(), 1, 0),
        (Rule(mu=1e-9), 1, 0),
        (Rule(mu=1e9), 0, 0),
        (Gate(0.6), 0, 0),
        (Elastic(), 0, 0),
    ]
    for mode, missing, here in modes:
        assert (mode.prefetch_copy(key, table, Held()), mode.prefetch_copy(key, table, held)) == (missing, here)
