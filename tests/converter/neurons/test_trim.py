"""Narrower experts: equal neurons given up without loss, fits never worse than what they start from."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from slimoe.converter.forward.block import read_expert
from slimoe.converter.forward.expert import Expert, Linear
from slimoe.converter.forward.stream import Observer, Sequences, run
from slimoe.converter.neurons.hidden_sums import HiddenCollector, HiddenSums, hidden_sums, shrunk_covariance
from slimoe.converter.neurons.trim import (
    SELECTIONS,
    TrimmedExpert,
    fit_down,
    ridge_leverage,
    trim,
)
from slimoe.offload.errors import UsageError
from tests.models.held_model import HeldModel, hold, random_mixtral
from tests.models.tiny_checkpoint import TinyConfig

SIZES = TinyConfig(n_layer=2, n_embd=32, n_ff=40, n_expert=5, n_expert_used=2)
TEXTS = Sequences((tuple(range(3, 43)), tuple(range(100, 160)), (7,)))
LAYER = 1


def trim_error(down: NDArray[np.float32], trimmed: TrimmedExpert, product: NDArray[np.floating]) -> float:
    """tr(D C D^T) of the change D of `down`: with `HiddenSums.product`, the sum of w^2 |change of the output|^2."""
    change = down.astype(np.float64)
    change[:, trimmed.kept] -= trimmed.down
    return max(float(np.einsum("ij,ij->", change @ product, change)), 0.0)


@pytest.fixture(scope="module")
def model() -> HeldModel:
    return hold(random_mixtral(SIZES))


def random_expert(n_ff: int, n_embd: int, seed: int) -> Expert:
    random = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(n_ff, n_embd, generator=random) / math.sqrt(n_embd) for _ in range(2))
    return Expert(Linear(gate), Linear(up), Linear(torch.randn(n_embd, n_ff, generator=random) / math.sqrt(n_ff)))


def inputs(n: int, n_embd: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, n_embd, generator=torch.Generator().manual_seed(seed))


def down_of(expert: Expert) -> NDArray[np.float32]:
    down: NDArray[np.float32] = expert.down.weight.numpy()
    return down


def narrowed(expert: Expert, trimmed: TrimmedExpert) -> Expert:
    kept = torch.from_numpy(trimmed.kept)
    down = Linear(torch.from_numpy(trimmed.down))
    return Expert.of([*(Linear(one.weight[kept]) for one in expert.inner), down])


@pytest.mark.parametrize("n_pair", [20, 150])
def test_half_of_paired_neurons_answers_like_all(n_pair: int) -> None:
    half = random_expert(n_pair, 24, 1)
    order = torch.randperm(2 * n_pair, generator=torch.Generator().manual_seed(2))
    gate, up = (torch.cat((one.weight, one.weight))[order] for one in half.inner)
    expert = Expert(Linear(gate), Linear(up), random_expert(2 * n_pair, 24, 3).down)
    x = inputs(1500, 24)
    covariance = hidden_sums(expert, x).covariance()
    (trimmed,) = trim(down_of(expert), covariance, [n_pair])
    assert len({int(order[neuron]) % n_pair for neuron in trimmed.kept}) == n_pair
    fresh = inputs(100, 24, 9)
    answers = expert(fresh)
    assert (narrowed(expert, trimmed)(fresh) - answers).norm() < 1e-5 * answers.norm()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_full_width_is_the_same_expert_bit_for_bit(selection: str) -> None:
    expert = random_expert(30, 12, 4)
    (trimmed,) = trim(down_of(expert), hidden_sums(expert, inputs(10, 12)).covariance(), [30], selection)
    assert (trimmed.kept == np.arange(30)).all()
    assert np.array_equal(trimmed.down, down_of(expert))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_fit_is_better_than_the_kept_columns_and_wider_is_better(selection: str) -> None:
    expert, x = random_expert(64, 16, 5), inputs(700, 16)
    sums = hidden_sums(expert, x)
    down, widths = down_of(expert), [16, 32, 48, 63]
    errors = []
    for width, trimmed in zip(widths, trim(down, sums.covariance(), widths, selection), strict=True):
        assert trimmed.down.shape == (16, width)
        assert (np.diff(trimmed.kept) > 0).all()
        errors.append(trim_error(down, trimmed, sums.product))
        plain = TrimmedExpert(trimmed.kept, down[:, trimmed.kept])
        assert errors[-1] < trim_error(down, plain, sums.product)
        naive = float((narrowed(expert, trimmed)(x) - expert(x)).double().square().sum())
        assert errors[-1] == pytest.approx(naive, rel=1e-3)
    assert errors == sorted(errors, reverse=True)


def test_elimination_takes_what_costs_the_output_least_as_a_naive_search_does() -> None:
    expert, x = random_expert(12, 6, 6), inputs(300, 6)
    hidden, down = expert.hidden(x).double().numpy(), down_of(expert).astype(np.float64)
    left, wanted = list(range(12)), hidden @ down.T
    for _ in range(7):
        costs = {}
        for neuron in left:
            rest = [one for one in left if one != neuron]
            costs[neuron] = float(np.linalg.lstsq(hidden[:, rest], wanted, rcond=None)[1].sum())
        left.remove(min(costs, key=lambda one: costs[one]))
    (trimmed,) = trim(down_of(expert), hidden_sums(expert, x).covariance(), [5])
    assert trimmed.kept.tolist() == left
    fitted = np.linalg.lstsq(hidden[:, left], wanted, rcond=None)[0].T
    np.testing.assert_allclose(trimmed.down, fitted, rtol=1e-3, atol=1e-4)


def test_elimination_in_rounds_is_hardly_worse_than_one_by_one() -> None:
    expert, x = random_expert(96, 16, 7), inputs(1000, 16)
    sums, down = hidden_sums(expert, x), down_of(expert)
    found = {}
    for pool in (2, 12, 96):
        (trimmed,) = trim(down, sums.covariance(), [48], n_pool=pool)
        found[pool] = trim_error(down, trimmed, sums.product)
    assert max(found.values()) < 1.15 * found[2]
    by_leverage = trim(down, sums.covariance(), [48], "leverage")[0]
    assert max(found.values()) < trim_error(down, by_leverage, sums.product)


def test_leverage_is_the_diagonal_of_the_smoother() -> None:
    sums = hidden_sums(random_expert(20, 8, 8), inputs(50, 8))
    covariance = sums.covariance()
    ridge = 1e-2 * np.trace(covariance) / 20
    naive = np.diag(covariance @ np.linalg.inv(covariance + ridge * np.eye(20)))
    np.testing.assert_allclose(ridge_leverage(covariance), naive, rtol=1e-8)
    (trimmed,) = trim(np.ones((8, 20), np.float32), covariance, [7], "leverage")
    assert set(trimmed.kept.tolist()) == set(np.argsort(-naive)[:7].tolist())


@pytest.mark.parametrize("selection", SELECTIONS)
def test_an_expert_without_tokens_keeps_its_columns(selection: str) -> None:
    down = random_expert(10, 6, 9).down.weight.numpy()
    (trimmed,) = trim(down, np.zeros((10, 10)), [4], selection)
    np.testing.assert_allclose(trimmed.down, down[:, trimmed.kept], rtol=1e-6)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_fewer_tokens_than_neurons_are_no_mistake(selection: str) -> None:
    """Products in float32 of a tenth as many tokens may round to a matrix that is no covariance."""
    expert = random_expert(256, 64, 3)
    tokens = inputs(24, 64) / 8 + 4 * inputs(1, 64, 1)
    own = hidden_sums(expert, tokens)
    assert np.linalg.eigvalsh(own.covariance()).min() < -1e-6 * np.trace(own.covariance()) / 256
    (trimmed,) = trim(down_of(expert), shrunk_covariance(own), [128], selection)
    answers, expected = narrowed(expert, trimmed)(tokens), expert(tokens)
    assert float((answers - expected).square().mean()) < 1e-4 * float(expected.square().mean())


def test_tokens_of_the_layer_help_an_expert_with_few_of_its_own() -> None:
    expert, fresh = random_expert(64, 16, 10), inputs(600, 16, 1)
    own, layer = hidden_sums(expert, inputs(20, 16, 2)), hidden_sums(expert, inputs(2000, 16, 3))
    down, errors = down_of(expert), []
    for covariance in (shrunk_covariance(own), shrunk_covariance(own, layer)):
        (trimmed,) = trim(down, covariance, [40])
        errors.append(float((narrowed(expert, trimmed)(fresh) - expert(fresh)).square().sum()))
    assert errors[1] < 0.5 * errors[0]


def test_the_layers_tokens_weigh_like_as_many_as_there_are_neurons() -> None:
    own = HiddenSums(np.eye(4, dtype=np.float32) * 6, 2.0, 12)
    layer = HiddenSums(np.ones((4, 4), np.float32) * 5, 1.0, 5)
    np.testing.assert_allclose(shrunk_covariance(own, layer), 0.75 * 3 * np.eye(4) + 0.25 * 5 * np.ones((4, 4)))
    unseen = HiddenSums(np.zeros((4, 4), np.float32), 0.0, 0)
    np.testing.assert_allclose(shrunk_covariance(unseen, layer), 5 * np.ones((4, 4)))


def test_impossible_widths_and_selections_are_refused() -> None:
    down = np.ones((3, 8), np.float32)
    with pytest.raises(UsageError, match="cannot have 0 to 9"):
        trim(down, np.eye(8), [0, 9])
    with pytest.raises(UsageError, match="elimination, leverage"):
        trim(down, np.eye(8), [4], "magnitude")


def test_fitting_reads_only_what_the_kept_neurons_say() -> None:
    """Independent neurons say nothing of each other: kept columns stay."""
    down = random_expert(8, 5, 11).down.weight.numpy()
    kept = np.array([0, 3, 7])
    np.testing.assert_allclose(fit_down(down, np.diag(np.arange(1.0, 9)), kept), down[:, kept], rtol=1e-6)


class _Everything(Observer):
    """Inputs of a layer, for a naive loop."""

    def __init__(self) -> None:
        self.x: list[torch.Tensor] = []
        self.y: list[torch.Tensor] = []

    def routed(self, layer: int, first_row: int, x: torch.Tensor, read: torch.Tensor, routing: object) -> None:
        if layer == LAYER:
            self.x.extend(x)

    def block(self, layer: int, first_row: int, h: torch.Tensor, middle: torch.Tensor, after: torch.Tensor) -> None:
        if layer == LAYER:
            self.y.extend(after - middle)


class _InParts(Observer):
    """Hands the tokens of an expert on to another observer in parts of seven, as a pass does with many tokens."""

    def __init__(self, other: Observer) -> None:
        self.other = other

    def expert(
        self,
        layer: int,
        expert: int,
        rows: torch.Tensor,
        x: torch.Tensor,
        hidden: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        for part in zip(*(one.split(7) for one in (rows, x, hidden, weights)), strict=True):
            self.other.expert(layer, expert, *part)


def test_collected_sums_are_those_of_a_naive_loop(model: HeldModel) -> None:
    taken: dict[int, HiddenSums] = {}
    collector = HiddenCollector(LAYER, lambda expert, sums: taken.update({expert: sums}))
    run(model, TEXTS, _InParts(collector))
    collector.finish()
    collector.finish()
    seen = _Everything()
    run(model, TEXTS, seen)
    router = model.matrices[next(key for key in model.matrices if key.name == f"blk.{LAYER}.ffn_gate_inp.weight")]
    products = {expert: np.zeros((SIZES.n_ff, SIZES.n_ff)) for expert in range(SIZES.n_expert)}
    squares, counts = dict.fromkeys(products, 0.0), dict.fromkeys(products, 0)
    for x in seen.x:
        logits = router @ x.numpy()
        best = np.argsort(-logits)[: SIZES.n_expert_used]
        weights = np.exp(logits[best]) / np.exp(logits[best]).sum()
        for expert, weight in zip(best.tolist(), weights.tolist(), strict=True):
            hidden = read_expert(model, LAYER, expert).hidden(x).double().numpy()
            products[expert] += weight**2 * np.outer(hidden, hidden)
            squares[expert] += weight**2
            counts[expert] += 1
    assert list(taken) == [expert for expert, count in counts.items() if count]
    for expert, sums in taken.items():
        assert sums.n_token == counts[expert]
        assert sums.weight_square == pytest.approx(squares[expert], rel=1e-5)
        scale = np.abs(products[expert]).max()
        np.testing.assert_allclose(sums.product, products[expert], rtol=1e-4, atol=1e-6 * scale)
    assert sum(counts.values()) == TEXTS.n_rows * SIZES.n_expert_used
