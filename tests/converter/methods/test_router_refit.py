"""Routers fitted to changed experts: better where they can be, never worse."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from slimoe.converter.forward.norms import Norm
from slimoe.converter.forward.routing import Router
from slimoe.converter.methods.router_refit import RefitSpec, refit
from slimoe.offload.errors import UsageError
from slimoe.offload.model.architectures import LLAMA
from slimoe.offload.model.attention_spec import AttentionSpec
from slimoe.offload.model.expert_spec import ExpertSpec
from slimoe.offload.model.rope import RopeSpec
from slimoe.offload.model.spec import ModelSpec

N_EMBD, N_ROW, N_USED, N_TOKEN = 16, 5, 2, 300
MODEL = ModelSpec(
    architecture=LLAMA,
    n_layer=1,
    n_embd=N_EMBD,
    n_ff=8,
    n_vocab=10,
    n_ctx_train=64,
    rms_eps=1e-5,
    attention=AttentionSpec(2, 2, 8),
    experts=ExpertSpec(N_ROW, N_USED),
    rope=RopeSpec(8, 64),
)
FEW_STEPS = RefitSpec(n_step=100, n_batch=256, rate=0.03)


def given(weight: NDArray[np.float32]) -> Router:
    return Router(Norm(torch.ones(N_EMBD), 1e-5), torch.from_numpy(weight))


def mixed(x: torch.Tensor, outputs: torch.Tensor, router: NDArray[np.float32], scale: float = 1.0) -> torch.Tensor:
    """What a layer adds, token by token and expert by expert."""
    added = torch.zeros(len(x), outputs.shape[2], dtype=torch.float64)
    for token in range(len(x)):
        logits = router.astype(np.float64) @ x[token].double().numpy()
        best = np.argsort(-logits)[:N_USED]
        weights = np.exp(logits[best] - logits[best].max())
        for row, weight in zip(best.tolist(), (scale * weights / weights.sum()).tolist(), strict=True):
            added[token] += weight * outputs[token, row].double()
    return added


def relative_error(x: torch.Tensor, outputs: torch.Tensor, y: torch.Tensor, router: NDArray[np.float32]) -> float:
    return float((mixed(x, outputs, router) - y.double()).square().sum() / y.double().square().sum())


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, torch.Tensor, NDArray[np.float32]]:
    """Inputs, outputs of experts that are linear maps, and a router."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(N_TOKEN, N_EMBD, generator=random)
    experts = torch.randn(N_ROW, N_EMBD, N_EMBD, generator=random)
    return x, torch.einsum("eij,tj->tei", experts, x), torch.randn(N_ROW, N_EMBD, generator=random).numpy()


def test_a_disturbed_router_is_led_back(layer: tuple[torch.Tensor, torch.Tensor, NDArray[np.float32]]) -> None:
    x, outputs, router = layer
    y = mixed(x, outputs, router).float()
    noise = np.random.default_rng(2).standard_normal(router.shape).astype(np.float32)
    start = router + 0.3 * noise
    fitted = refit(x, outputs, y, given(start), MODEL, FEW_STEPS)
    assert fitted.after < 0.7 * fitted.before
    first, last = (relative_error(x, outputs, y, rows) for rows in (start, fitted.weight))
    assert last < 0.7 * first
    assert fitted.before == pytest.approx(first, rel=0.3)


def test_the_error_is_that_of_a_naive_loop(layer: tuple[torch.Tensor, torch.Tensor, NDArray[np.float32]]) -> None:
    """A sample of one token many times over, so that it does not matter which are held out."""
    router, y = layer[2], torch.randn(N_TOKEN, N_EMBD, generator=torch.Generator().manual_seed(5))
    for token in (0, 1, 2, 3):
        x, outputs, wanted = (part[token : token + 1] for part in (layer[0], layer[1], y))
        repeated = x.repeat(9, 1), outputs.repeat(9, 1, 1), wanted.repeat(9, 1)
        fitted = refit(*repeated, given(router), MODEL, RefitSpec(n_step=0))
        assert fitted.before == pytest.approx(relative_error(x, outputs, wanted, router), rel=1e-4)
        assert fitted.after == fitted.before


@pytest.mark.parametrize("rate", [1e-3, 10.0])
def test_a_router_that_is_right_or_cannot_be_fitted_stays_bit_for_bit(
    layer: tuple[torch.Tensor, torch.Tensor, NDArray[np.float32]], rate: float
) -> None:
    x, outputs, router = layer
    y = mixed(x, outputs, router).float()
    fitted = refit(x, outputs, y, given(router), MODEL, replace(FEW_STEPS, rate=rate, n_step=40))
    assert np.array_equal(fitted.weight, router)
    assert fitted.after == fitted.before < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_no_sample_of_tokens_makes_it_worse(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(24, N_EMBD, generator=random) for _ in range(2))
    outputs = torch.randn(24, N_ROW, N_EMBD, generator=random)
    router = torch.randn(N_ROW, N_EMBD, generator=random).numpy()
    fitted = refit(x, outputs, y, given(router), MODEL, RefitSpec(n_step=60, rate=0.05, n_between=5))
    assert fitted.after <= fitted.before
    start = relative_error(x, outputs, y, router)
    assert relative_error(x, outputs, y, fitted.weight) <= start * (1 + 1e-6)


def test_scaled_expert_weights_are_those_of_the_model(
    layer: tuple[torch.Tensor, torch.Tensor, NDArray[np.float32]],
) -> None:
    x, outputs, router = layer
    doubled = replace(MODEL, experts=ExpertSpec(N_ROW, N_USED, weights_scale=2.5))
    y = mixed(x, outputs, router, 2.5).float()
    assert refit(x, outputs, y, given(router), doubled, replace(FEW_STEPS, n_step=1)).before < 1e-6
    assert refit(x, outputs, y, given(router), MODEL, replace(FEW_STEPS, n_step=1)).before > 0.1


def test_the_same_sample_gives_the_same_router(
    layer: tuple[torch.Tensor, torch.Tensor, NDArray[np.float32]],
) -> None:
    x, outputs, router = layer
    y = torch.roll(mixed(x, outputs, router).float(), 1, 1)
    first, second = (refit(x, outputs, y, given(router), MODEL, replace(FEW_STEPS, n_step=40)) for _ in range(2))
    assert np.array_equal(first.weight, second.weight)


def test_too_few_tokens_are_refused() -> None:
    x, router = torch.zeros(7, N_EMBD), np.zeros((N_ROW, N_EMBD), np.float32)
    with pytest.raises(UsageError, match="7 tokens"):
        refit(x, torch.zeros(7, N_ROW, N_EMBD), x, given(router), MODEL)
