"""Fits each matrix to what the layers before it say after they were quantised, so that later ones make up for earlier.

The calibration's tokens run through the result as it grows: a matrix is fitted with the sums of products of its own
inputs (`feedback`), and the stream goes on through the values that it got. Routers can be fitted last, to experts as
they are then.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.forward.block import (
    AttentionPass,
    Expert,
    Linear,
    Router,
    Routing,
    SharedExpert,
    attend,
    read_attention,
    read_dense,
    read_expert,
    read_ffn_norm,
    read_output_norm,
    read_router,
    read_shared,
    read_tensor,
    route,
)
from slimoe.converter.forward.stream import Sequences, rows_by_expert
from slimoe.converter.layout.layer import CHOICE_BIAS, ROUTER, Matrix
from slimoe.converter.layout.plan import CompressPlan, LayerPlan
from slimoe.converter.methods.expert_matrices import merged_vectors
from slimoe.converter.methods.router_refit import refit
from slimoe.converter.quant.block_layout import BITS
from slimoe.converter.quant.feedback import Curvature, quantize_with_feedback
from slimoe.converter.quant.mixes import layer_and_role
from slimoe.converter.quant.quantize import dequantize_rows
from slimoe.converter.source.held_source import FittedSource
from slimoe.converter.source.model_source import PROJECTIONS, ModelSource, constant_key, vectors_key
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.write.feedback_time import ATTENTION_INPUT, N_TOKENS, input_of, is_chosen
from slimoe.converter.write.matrix import read_matrix
from slimoe.converter.write.quantiser import PlainQuantiser

_REFIT_TOKENS = 2048
_FEW = 256
"""Tokens of the layer that stand in for those that an expert has too few of."""


@dataclass(slots=True)
class _LayerState:
    """What is known of the layer that is being fitted: its values so far, and the stream within it."""

    plan: LayerPlan
    experts: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    middle: Tensor | None = None
    x: Tensor | None = None
    routing: Routing | None = None
    router: Router | None = None


class FeedbackQuantiser:
    """A `Quantiser` with error feedback on at most `n_tokens` of the statistics' tokens; holds 3 streams of them."""

    def __init__(
        self,
        source: ModelSource,
        plan: CompressPlan,
        statistics: Statistics,
        plain: PlainQuantiser,
        n_tokens: int = N_TOKENS,
        n_threads: int = 1,
    ) -> None:
        self._source, self._plan, self._plain, self._n_threads = source, plan, plain, n_threads
        self._fitted = FittedSource(source)
        length = max(1, statistics.n_tokens // max(1, len(statistics.tokens)))
        step = max(1, len(statistics.tokens) * length // max(1, n_tokens))
        self._sequences = Sequences(statistics.tokens[::step])
        self.h = torch.empty(0)
        self._state = _LayerState(plan.layers[0])
        self._last: tuple[tuple[int, int, str], tuple[Curvature, ...]] = (-1, -1, ""), ()

    def begin_layer(self, layer: int) -> None:
        """Forgets the layer before."""
        self._state = _LayerState(self._plan.layers[layer])
        self._fitted.restore()

    def quantise(self, matrix: Matrix, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Blocks of the matrix; raises as `PlainQuantiser.quantise` does."""
        if matrix.key.name.endswith("ffn_gate_inp.weight"):
            return self._fit_router(weights)
        curvatures = self._curvatures(matrix) if self._has_feedback(matrix) else ()
        if not curvatures:
            blocks = self._plain.quantise(matrix, weights)
            values = dequantize_rows(blocks, matrix.type, weights.shape[1])
        else:
            # Of a stack every matrix, one for each head, reads something else.
            pairs = zip(np.split(weights, len(curvatures)), curvatures, strict=True)
            found = [quantize_with_feedback(part, own, matrix.type, self._n_threads) for part, own in pairs]
            blocks, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
        self._take(matrix, torch.from_numpy(values))
        return blocks

    def _has_feedback(self, matrix: Matrix) -> bool:
        return bool(self._plan.feedback) and is_chosen(self._plan, matrix) and matrix.type in BITS

    def kept(self, matrix: Matrix) -> None:
        """Takes the source's values."""
        self._take(matrix, torch.from_numpy(read_matrix(self._source, matrix)))

    def end_layer(self, layer: int) -> None:
        """Moves the stream behind the layer."""
        state = self._state
        middle = self._middle()
        update = None
        if state.plan.rows:
            x, routing = self._routed()
            if state.router is not None:
                routing = route(state.router, self._source.spec, x)
            update = torch.zeros_like(x)
            for expert, rows, expert_weights in rows_by_expert(state.plan.target, routing):
                update.index_add_(0, rows, expert_weights[:, None] * self._output(expert, x[rows]))
        if (always := self._always()) is not None:
            output = always(self._input())
            update = output if update is None else update + output
        self.h = middle if update is None else middle + self._source.spec.multipliers.residual * update

    # --- what is known so far -------------------------------------------------------------------------------

    def _take(self, matrix: Matrix, values: Tensor) -> None:
        layer, role = layer_and_role(matrix.key.name)
        if matrix.copy:
            return
        if role == "token_embd":
            tokens = [token for one in self._sequences.tokens for token in one]
            self.h = values[torch.tensor(tokens)] * self._source.spec.multipliers.embedding
        elif matrix.key.expert >= 0:
            self._state.experts.setdefault(matrix.key.expert, {})[matrix.projection] = values
        elif layer >= 0 and role != ROUTER:
            assert matrix.origin is not None
            self._fitted.replace(matrix.origin, values.numpy())

    def _curvatures(self, matrix: Matrix) -> tuple[Curvature, ...]:
        """Of the matrix's inputs, or of each head's; none where nothing is multiplied with it, or nothing seen.

        Matrices that read the same follow each other, so that the last ones are kept.
        """
        key = input_of(matrix)
        if key != self._last[0]:
            self._last = key, ()
            hessian = self._hessian(matrix)
            if hessian is not None:
                each = hessian if hessian.ndim > 2 else hessian[None]
                self._last = key, tuple(Curvature.of(own.numpy(), _device()) for own in each)
        return self._last[1]

    def _hessian(self, matrix: Matrix) -> Tensor | None:
        """The sum of products of a matrix's inputs [n_in, n_in], or [n_head, n_in, n_in] where each head has a matrix.

        None where nothing is multiplied with it, or nothing seen.
        """
        layer, role = layer_and_role(matrix.key.name)
        if role == "output":
            return _products(read_output_norm(self._source)(self.h))
        if layer < 0:
            return None
        if matrix.key.expert >= 0:
            return self._expert_products(matrix)
        if not role.startswith("attn_"):
            always = self._always()
            assert always is not None, role
            x = self._input()
            return _products(always.expert.hidden(x) if role.startswith("ffn_down") else x)
        if role not in ATTENTION_INPUT:
            return sum((_products(one.reads[role]) for one in self._attended()), torch.zeros(()))
        block = read_attention(self._source, self._state.plan.block)
        assert block is not None
        return _products(block.norm(self.h))

    def _expert_products(self, matrix: Matrix) -> Tensor:
        """Over the tokens that selected the expert, by the square of its weight; others help where these are few."""
        x, routing = self._routed()
        number = matrix.key.expert
        found = [
            (rows, expert_weights)
            for one, rows, expert_weights in rows_by_expert(self._state.plan.target, routing)
            if one == number
        ]
        rows, expert_weights = found[0] if found else (torch.empty(0, dtype=torch.long), torch.empty(0))
        anyone = x[:: max(1, len(x) // _FEW)]
        own = x[rows]
        if matrix.projection == "down":
            expert = self._expert(number)
            own, anyone = expert.hidden(own), expert.hidden(anyone)
        n_in = matrix.shape[1]
        part = n_in / (n_in + len(rows))
        mean = _products(own * expert_weights[:, None]) / max(float(expert_weights.square().sum()), 1e-12)
        return (1 - part) * mean + part * _products(anyone) / len(anyone)

    def _attended(self) -> Iterator[AttentionPass]:
        """The passes of the layer's attention over the sequences, with the values that are fitted already."""
        block = read_attention(self._fitted, self._state.plan.block)
        assert block is not None
        for begin, end in self._sequences.spans():
            yield attend(block, self._source.spec, self.h[begin:end])

    def _always(self) -> SharedExpert | None:
        """What every token passes, the shared expert or a dense feed-forward part, with the values fitted already."""
        plan = self._state.plan
        if f"ffn_down{'_shexp' if plan.rows else ''}" not in plan.types:
            return None
        shared = read_shared(self._fitted, plan.block)
        return SharedExpert(read_dense(self._fitted, plan.block)[1]) if shared is None else shared

    def _middle(self) -> Tensor:
        """The stream behind the layer's attention."""
        state = self._state
        if state.middle is None:
            state.middle = self.h
            if state.plan.has_attention:
                state.middle = self.h + torch.cat([one.update for one in self._attended()])
        return state.middle

    def _routed(self) -> tuple[Tensor, Routing]:
        """The experts' input, and the experts that the router selects as it is in the plan."""
        state = self._state
        if state.routing is None:
            state.routing = route(self._router(), self._source.spec, self._input())
        return self._input(), state.routing

    def _input(self) -> Tensor:
        """What the layer's feed-forward part reads."""
        state = self._state
        if state.x is None:
            state.x = read_ffn_norm(self._source, state.plan.block)(self._middle())
        return state.x

    def _router(self) -> Router:
        """The router as it is in the plan."""
        plan = self._state.plan
        router = read_router(self._source, plan.block)
        assert router is not None
        own = router.with_rows(plan.rows)
        biases = {role: torch.from_numpy(values) for role, values in plan.router_biases.items()}
        return replace(
            own,
            weight=own.weight if plan.router is None else torch.from_numpy(plan.router),
            bias=biases.get(ROUTER, own.bias),
            choice_bias=biases.get(CHOICE_BIAS, own.choice_bias),
        )

    def _expert(self, number: int) -> Expert:
        """The result's expert as far as it is fitted; `down` may be missing yet."""
        parts, block, plan = self._state.experts[number], self._state.plan.block, self._state.plan.experts[number]
        linears = []
        for name in PROJECTIONS:
            weight = parts.get(name, torch.empty(0, 0))
            scales, biases = (vectors_key(block, name, kind) for kind in ("scale", "bias"))
            if scales in self._source.shapes:
                weight = weight * float(merged_vectors(self._source, scales, [plan], 1)[0])
            if biases in self._source.shapes and len(weight):
                bias = torch.from_numpy(merged_vectors(self._source, biases, [plan], len(weight))[0])
                linears.append(Linear(weight, bias))
            else:
                linears.append(Linear(weight))
        gate, up, down = linears
        return Expert(gate, up, down, activation=self._source.spec.architecture.activation)

    def _output(self, expert: int, x: Tensor) -> Tensor:
        if expert >= 0:
            return self._expert(expert)(x)
        constants = self._state.plan.constants
        vector = (
            torch.from_numpy(constants[-1 - expert])
            if constants is not None
            else read_tensor(self._source, constant_key(self._state.plan.block, -1 - expert))
        )
        return vector.expand(len(x), -1)

    # --- the router -----------------------------------------------------------------------------------------

    def _fit_router(self, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        """F32 either way: fitted so that the mix of the result's experts is near that of the source's."""
        fitted = weights
        if self._plan.refit:
            x = self._routed()[0]
            x = x[:: max(1, len(x) // _REFIT_TOKENS)]
            outputs = torch.stack([self._output(expert, x) for expert in self._state.plan.target], 1)
            router = replace(self._router(), weight=torch.from_numpy(weights.copy()))
            fitted = refit(x, outputs, self._wanted(x), router, self._source.spec).weight
            self._state.router = replace(router, weight=torch.from_numpy(fitted))
        return np.ascontiguousarray(fitted).reshape(-1).view(np.uint8)

    def _wanted(self, x: Tensor) -> Tensor:
        """What the source's experts would answer to the same inputs."""
        block = self._state.plan.block
        router = read_router(self._source, block)
        assert router is not None
        result = torch.zeros_like(x)
        routing = route(router, self._source.spec, x)
        for expert, rows, expert_weights in rows_by_expert(self._source.layers[block].target, routing):
            if expert >= 0:
                result.index_add_(0, rows, expert_weights[:, None] * read_expert(self._source, block, expert)(x[rows]))
        return result


def _device() -> str:
    """Where matrices are fitted: on a graphics card if torch has one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _products(x: Tensor) -> Tensor:
    """The sum of products of rows [n, n_in], or of the rows of each head [n, n_head, n_in]."""
    by_head = x.transpose(0, -2) if x.ndim > 2 else x
    return by_head.mT @ by_head
