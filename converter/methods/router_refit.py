"""Fits a layer's router to experts that have changed since it was trained: trimmed, merged or quantised ones.

The experts are fixed, so that the router's rows can change only a token's expert weights. The error of the output is
u^T G u, where G is the Gram matrix of the experts' outputs and the wanted output, and u are the expert weights and -1.
The outputs are not needed after G. At every step the rows as they are then select the experts; gradients flow through
the expert weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimoe.converter.forward.routing import Router, route
from slimoe.converter.stats.statistics import Single
from slimoe.offload.errors import UsageError
from slimoe.offload.model.spec import ModelSpec

_TOKENS_AT_ONCE = 1024
_DECAY, _SQUARE_DECAY = 0.9, 0.999


@dataclass(frozen=True, slots=True)
class RefitSpec:
    """How the router is fitted: by `n_step` steps of Adam on `n_batch` tokens each.

    The learning rate is `rate` times the root mean square of the rows and falls to 0. Every `n_between` steps the rows
    are evaluated on the `held_out` part of the tokens.
    """

    n_step: int = 400
    n_batch: int = 1024
    rate: float = 0.01
    n_between: int = 20
    held_out: float = 0.25
    seed: int = 1


_USUAL = RefitSpec()


@dataclass(frozen=True, slots=True)
class RefittedRouter:
    """The rows `weight` [n_row, n_embd], and the errors of the layer's output on the held-out tokens.

    `before` and `after` are means of |y' - y|^2 over the mean of |y|^2; `after` is never greater.
    """

    weight: Single
    before: float
    after: float


def refit(
    x: Tensor, outputs: Tensor, y: Tensor, router: Router, model: ModelSpec, spec: RefitSpec = _USUAL
) -> RefittedRouter:
    """Finds rows with which the weighted sum of `outputs` [n, n_row, n_embd] is nearest to `y` [n, n_embd].

    Starts from `router`, whose bias stays as it is, with inputs `x` [n, n_embd]. `outputs` are by row of the router:
    rows that mean the same expert repeat its output. `model` says how many rows a token selects and how expert weights
    are scaled.
    Takes memory for n (n_row + 1)^2 floats beside the arguments. Raises UsageError for fewer than 8 tokens.
    """
    assert outputs.shape[1] == len(router.weight)
    if len(x) < 8:
        raise UsageError(f"A router cannot be fitted to {len(x)} tokens. Give more calibration text.")
    scale = y.double().square().sum(1).mean().clamp(min=1e-30).sqrt().float()
    parts = zip(outputs.split(_TOKENS_AT_ONCE), y.split(_TOKENS_AT_ONCE), strict=True)
    vectors = (torch.cat((some.float(), wanted[:, None].float()), 1) / scale for some, wanted in parts)
    tokens = _Tokens(x.float(), torch.cat([part @ part.mT for part in vectors]), router, model)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(spec.seed))
    n_held = max(int(len(x) * spec.held_out), 1)
    held, train = order[:n_held], order[n_held:]
    start = router.weight.clone()
    best, before = start, tokens.evaluate(start, held)
    after, most = before, tokens.evaluate(start, train)
    for rows in _iterates(tokens, start, train, spec):
        error = tokens.evaluate(rows, held)
        if error < after and tokens.evaluate(rows, train) <= most:
            best, after = rows, error
    return RefittedRouter(best.numpy(), before, after)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A sample of tokens: inputs `x` [n, n_embd], and Gram matrices `products` [n, n_row + 1, n_row + 1].

    Their vectors are the token's outputs by row and last the wanted output, all over the root of the mean |y|^2.
    """

    x: Tensor
    products: Tensor
    router: Router
    model: ModelSpec

    def error(self, weight: Tensor, rows: Tensor) -> Tensor:
        """The mean squared error of the output of some tokens, differentiable while they select the same experts."""
        routing = route(replace(self.router, weight=weight), self.model, self.x[rows])
        mix = torch.zeros_like(routing.logits).scatter(-1, routing.selected, routing.weights)
        mix = torch.cat((mix, -torch.ones(len(rows), 1)), -1)
        return torch.einsum("ti,tij,tj->t", mix, self.products[rows], mix).mean()

    def gradient(self, weight: Tensor, rows: Tensor) -> Tensor:
        """The gradient of the error of some tokens by the rows of the router."""
        weight = weight.detach().requires_grad_()
        return torch.autograd.grad(self.error(weight, rows), weight)[0]

    def evaluate(self, weight: Tensor, rows: Tensor) -> float:
        """The error of all of these tokens."""
        with torch.no_grad():
            return sum(float(self.error(weight, part)) * len(part) / len(rows) for part in rows.split(_TOKENS_AT_ONCE))


def _iterates(tokens: _Tokens, start: Tensor, train: Tensor, spec: RefitSpec) -> Iterator[Tensor]:
    """Yields the rows after every few steps of Adam, written out, as torch's own takes seconds to import."""
    rows, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    rate = spec.rate * float(start.square().mean().sqrt())
    random = torch.Generator().manual_seed(spec.seed)
    for step in range(1, spec.n_step + 1):
        batch = train[torch.randint(len(train), (min(spec.n_batch, len(train)),), generator=random)]
        gradient = tokens.gradient(rows, batch)
        mean.lerp_(gradient, 1 - _DECAY)
        square.lerp_(gradient.square(), 1 - _SQUARE_DECAY)
        move = mean / (1 - _DECAY**step) / ((square / (1 - _SQUARE_DECAY**step)).sqrt() + 1e-8)
        rows = rows - rate * (1 - (step - 1) / spec.n_step) * move
        if step % spec.n_between == 0 or step == spec.n_step:
            yield rows
