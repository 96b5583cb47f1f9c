"""What narrower experts would lose, against computing it token by token."""

import numpy as np
import pytest
import torch

from slimoe.converter.forward.expert import Expert, Linear
from slimoe.converter.neurons.hidden_sums import HiddenSums
from slimoe.converter.neurons.trim import trim
from slimoe.converter.neurons.width_errors import WidthErrorTable, narrower_widths

N_FF, N_EMBD, N_TOKEN = 64, 16, 2048


def random_expert(seed: int, n_equal: int = 1) -> Expert:
    """An expert of whose neurons so many are always the same one."""
    random = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(N_FF // n_equal, N_EMBD, generator=random).repeat(n_equal, 1) / 4 for _ in range(2))
    return Expert(Linear(gate), Linear(up), Linear(torch.randn(N_EMBD, N_FF, generator=random) / 8))


def measured(table: WidthErrorTable, number: int, expert: Expert, x: torch.Tensor, weights: torch.Tensor) -> None:
    table.begin(number, N_FF)
    for rows in torch.arange(len(x)).split(300):
        table.add(rows, expert.hidden(x[rows]), weights[rows])
    table.end(expert.down.weight)


def test_errors_are_those_of_tokens_that_the_fit_has_not_seen() -> None:
    random = torch.Generator().manual_seed(5)
    x, weights = torch.randn(N_TOKEN, N_EMBD, generator=random), torch.rand(N_TOKEN, generator=random)
    expert, table = random_expert(1), WidthErrorTable(1, N_FF)
    measured(table, 0, expert, x, weights)
    hidden, is_held = expert.hidden(x), torch.arange(N_TOKEN) // 256 % 2 == 1
    fit = (weights[:, None] * hidden)[~is_held]
    sums = HiddenSums((fit.T @ fit).numpy(), float(weights[~is_held].square().sum()), len(fit))
    square = weights.double().square()
    for row, width in enumerate(table.widths):
        (one,) = trim(expert.down.weight.numpy(), sums.covariance(), [width])
        change = hidden[:, one.kept] @ torch.from_numpy(one.down).T - expert(x)
        errors = square * change.double().square().sum(1)
        expected = errors[is_held].sum() / square[is_held].sum() * square.sum()
        assert table.error[row, 0] == pytest.approx(float(expected), rel=1e-3)
    assert list(table.error[:, 0]) == sorted(table.error[:, 0], reverse=True), "narrower ones lose more"


def test_equal_neurons_go_for_nothing_and_the_others_count_more() -> None:
    random = torch.Generator().manual_seed(6)
    x, weights = torch.randn(N_TOKEN, N_EMBD, generator=random), torch.ones(N_TOKEN)
    table, expert = WidthErrorTable(1, N_FF), random_expert(2, n_equal=2)
    measured(table, 0, expert, x, weights)
    assert table.widths == (32,)
    assert table.error[0, 0] < 1e-4 * float(expert(x).square().sum())
    # Half of the neurons say what all said: what errors add to it is no less.
    assert 0.8 < table.type_share[0, 0] < 1.2


def test_experts_that_were_not_measured_have_the_share_of_the_others() -> None:
    random = torch.Generator().manual_seed(7)
    x, weights = torch.randn(N_TOKEN, N_EMBD, generator=random), torch.ones(N_TOKEN)
    table = WidthErrorTable(3, N_FF)
    norms = np.zeros(3)
    for number in (0, 1):
        expert = random_expert(number)
        measured(table, number, expert, x, weights)
        norms[number] = float(expert(x).double().square().sum())
    assert np.isnan(table.error[:, 2]).all()
    norms[2] = 10.0
    table.finish(norms)
    shares = table.error[:, :2].sum(1) / norms[:2].sum()
    np.testing.assert_allclose(table.error[:, 2], 10 * shares)
    assert np.isfinite(table.type_share).all()
    nothing = WidthErrorTable(2, N_FF)
    nothing.finish(np.ones(2))
    assert not nothing.error.any()


@pytest.mark.parametrize(
    ("n_ff", "widths"),
    [
        (32, ()),
        (96, (32, 64)),
        (256, (32, 64, 96, 128, 160, 192, 224)),
        (768, (96, 192, 256, 288, 384, 480, 512, 576, 672)),
        (14336, tuple(range(1792, 14336, 1792))),
    ],
)
def test_widths_are_what_blocks_divide(n_ff: int, widths: tuple[int, ...]) -> None:
    assert narrower_widths(n_ff) == widths


def test_of_large_experts_few_are_measured_and_of_the_largest_none() -> None:
    assert np.isnan(WidthErrorTable(8, 8192).error).all()
    table = WidthErrorTable(8, 8192)
    table.begin(0, 8192)
    table.add(torch.arange(2), torch.ones(2, 8192), torch.ones(2))
    table.end(torch.ones(4, 8192))
    assert np.isnan(table.error).all()
