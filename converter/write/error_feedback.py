"""Fits each matrix to what the layers before it say after they were quantised, so that later ones make up for earlier.

The calibration's tokens run through the result as it grows: a matrix is fitted with the sums of products of its own
inputs (`feedback`), and the stream goes on through the values that it got. Beside it runs the stream as it would be if
nothing were quantised: what a matrix reads has drifted away from that, and as far as the drift follows from what it
reads, the matrix makes up for it (as in arXiv 2504.09629 and 2504.02692). Routers can be fitted last, to experts as
they are then.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.forward.block import read_expert, read_latent_space, read_output_norm, read_router
from slimoe.converter.forward.expert import Expert, Linear, SharedExpert
from slimoe.converter.forward.routing import Router, route
from slimoe.converter.forward.stream import Sequences, rows_by_expert
from slimoe.converter.layout.layer import ROUTER, Matrix, is_attention
from slimoe.converter.layout.plan import CompressPlan, LayerPlan
from slimoe.converter.methods.expert_matrices import merged_vectors
from slimoe.converter.methods.router_refit import refit
from slimoe.converter.quant.block_layout import BITS
from slimoe.converter.quant.feedback import Curvature, quantize_with_feedback
from slimoe.converter.quant.mixes import layer_and_role
from slimoe.converter.quant.quantize import dequantize_rows
from slimoe.converter.source.held_source import FittedSource
from slimoe.converter.source.model_source import ModelSource, vectors_key
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.write.feedback_time import ATTENTION_INPUT, N_TOKENS, input_of, is_chosen
from slimoe.converter.write.layer_pass import LayerPass
from slimoe.converter.write.matrix import read_matrix
from slimoe.converter.write.quantiser import PlainQuantiser
from slimoe.offload.model.tensor_list import EXPERT_LATENT

_REFIT_TOKENS = 2048
_FEW = 256
"""Tokens of the layer that stand in for those that an expert has too few of."""


@dataclass(slots=True)
class _LayerState:
    """What is known of the layer that is being fitted: its experts' matrices so far, and what they became."""

    plan: LayerPlan
    matrices: dict[int, dict[str, Matrix]] = field(default_factory=dict)
    experts: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    router: Router | None = None


@dataclass(slots=True)
class _Sums:
    """Sums over `n` tokens, of what a matrix reads: of x x^T and of d x^T, where x + d is what it would read if nothing
    were quantised. Both are [n_in, n_in], or [n_head, n_in, n_in] where each head has a matrix.
    """

    squares: Tensor
    drifts: Tensor
    n: int

    @classmethod
    def of(cls, x: Tensor, unquantised: Tensor) -> "_Sums":
        """Over rows [n, n_in], or the rows of each head [n, n_head, n_in]."""
        by_head, drift = (one.transpose(0, -2) if one.ndim > 2 else one for one in (x, unquantised - x))
        return cls(by_head.mT @ by_head, drift.mT @ by_head, len(x))

    def add(self, other: "_Sums") -> None:
        """Takes the sums over other tokens too."""
        self.squares += other.squares
        self.drifts += other.drifts
        self.n += other.n


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What matrices are fitted with that read the same: a Hessian, and by what drift of their inputs."""

    curvature: Curvature
    drift: Tensor

    def target(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """The weights [n_out, n_in] that answer to what is read as nearly as can be what `weight` would have said."""
        w = torch.from_numpy(weight).to(self.drift.device)
        moved: NDArray[np.float32] = (w + self.curvature.solve(w @ self.drift)).cpu().numpy()
        return moved


class FeedbackQuantiser:
    """A `Quantiser` with error feedback on at most `n_tokens` of the statistics' tokens; holds 6 streams of them."""

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
        self.h, self._unquantised = torch.empty(0), torch.empty(0)
        self.begin_layer(0)
        self._last: tuple[tuple[int, int, str], tuple[_Inputs, ...]] = (-1, -1, ""), ()

    def begin_layer(self, layer: int) -> None:
        """Forgets the layer before."""
        plan = self._plan.layers[layer]
        self._state = _LayerState(plan)
        self._fitted.restore()
        self._now = LayerPass(self._fitted, self._sequences, plan, self.h, self._expert)
        self._before = LayerPass(self._source, self._sequences, plan, self._unquantised, self._unquantised_expert)

    def quantise(self, matrix: Matrix, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Blocks of the matrix; raises as `PlainQuantiser.quantise` does."""
        if matrix.key.name.endswith("ffn_gate_inp.weight"):
            return self._fit_router(weights)
        inputs = self._inputs(matrix) if self._has_feedback(matrix) else ()
        if not inputs:
            blocks = self._plain.quantise(matrix, weights)
            values = dequantize_rows(blocks, matrix.type, weights.shape[1])
        else:
            # Of a stack every matrix, one for each head, reads something else.
            pairs = zip(np.split(weights, len(inputs)), inputs, strict=True)
            found = [
                quantize_with_feedback(own.target(part), own.curvature, matrix.type, self._n_threads)
                for part, own in pairs
            ]
            blocks, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
        self._take(matrix, torch.from_numpy(values))
        return blocks

    def _has_feedback(self, matrix: Matrix) -> bool:
        return bool(self._plan.feedback) and is_chosen(self._plan, matrix) and matrix.type in BITS

    def kept(self, matrix: Matrix) -> None:
        """Takes the source's values."""
        self._take(matrix, torch.from_numpy(read_matrix(self._source, matrix)))

    def end_layer(self, layer: int) -> None:
        """Moves the streams behind the layer."""
        self.h = self._now.behind(self._state.router)
        if self._plan.feedback:
            self._unquantised = self._before.behind()

    # --- what is known so far -------------------------------------------------------------------------------

    def _take(self, matrix: Matrix, values: Tensor) -> None:
        layer, role = layer_and_role(matrix.key.name)
        if matrix.copy:
            return
        if role == "token_embd":
            tokens = torch.tensor([token for one in self._sequences.tokens for token in one])
            table = torch.from_numpy(read_matrix(self._source, matrix))
            self.h, self._unquantised = (
                one[tokens] * self._source.spec.multipliers.embedding for one in (values, table)
            )
        elif matrix.key.expert >= 0:
            self._state.matrices.setdefault(matrix.key.expert, {})[matrix.projection] = matrix
            self._state.experts.setdefault(matrix.key.expert, {})[matrix.projection] = values
        elif layer >= 0 and role != ROUTER:
            assert matrix.origin is not None
            self._fitted.replace(matrix.origin, values.numpy())

    def _inputs(self, matrix: Matrix) -> tuple[_Inputs, ...]:
        """The matrix's, or each head's; none where nothing is multiplied with it, or nothing seen.

        Matrices that read the same follow each other, so that the last ones are kept.
        """
        key = input_of(matrix)
        if key != self._last[0]:
            self._last = key, ()
            sums = self._sums(matrix)
            if sums is not None:
                squares, drifts = (one if one.ndim > 2 else one[None] for one in (sums.squares, sums.drifts))
                # What so many tokens tell of so many inputs is no more certain than that.
                share = sums.n / (sums.n + matrix.shape[1])
                self._last = (
                    key,
                    tuple(
                        _Inputs(Curvature.of(square.numpy(), _device()), share * drift.to(_device()))
                        for square, drift in zip(squares, drifts, strict=True)
                    ),
                )
        return self._last[1]

    def _sums(self, matrix: Matrix) -> _Sums | None:
        """Over what a matrix reads; None where nothing is multiplied with it, or nothing seen."""
        layer, role = layer_and_role(matrix.key.name)
        passes = self._now, self._before
        if role == "output":
            norm = read_output_norm(self._source)
            return _Sums.of(norm(self.h), norm(self._unquantised))
        if layer < 0:
            return None
        if matrix.key.expert >= 0:
            return self._expert_sums(matrix)
        if role == EXPERT_LATENT[0]:
            return _Sums.of(*(one.input() for one in passes))
        if role == EXPERT_LATENT[1]:
            return _Sums.of(*(one.expert_sum() for one in passes))
        if not is_attention(role):
            inputs = [_always(one).reads(one.input()) for one in passes]
            if role.startswith("ffn_down"):
                inputs = [_always(one).expert.hidden(x) for one, x in zip(passes, inputs, strict=True)]
            return _Sums.of(*inputs)
        if role in ATTENTION_INPUT:
            return _Sums.of(*(one.attention_input() for one in passes))
        sums = None
        for now, before in zip(*(one.attended() for one in passes), strict=True):
            part = _Sums.of(now.reads[role], before.reads[role])
            if sums is None:
                sums = part
            else:
                sums.add(part)
        return sums

    def _expert_sums(self, matrix: Matrix) -> _Sums:
        """Over the tokens that selected the expert, by the square of its weight; others help where these are few."""
        routing, number, n_in = self._now.routing(), matrix.key.expert, matrix.shape[1]
        found = [
            (rows, expert_weights)
            for one, rows, expert_weights in rows_by_expert(self._state.plan.target, routing)
            if one == number
        ]
        rows, expert_weights = found[0] if found else (torch.empty(0, dtype=torch.long), torch.empty(0))
        anyone = torch.arange(0, len(routing.weights), max(1, len(routing.weights) // _FEW))
        part = n_in / (n_in + len(rows))
        own = expert_weights * ((1 - part) / expert_weights.square().sum().clamp(min=1e-12)).sqrt()
        others = torch.full((len(anyone),), (part / len(anyone)) ** 0.5)
        all_rows, scales = torch.cat((rows, anyone)), torch.cat((own, others))[:, None]
        inputs = [one.expert_input()[all_rows] for one in (self._now, self._before)]
        if matrix.projection == "down":
            experts = self._now.expert(number), self._before.expert(number)
            inputs = [expert.hidden(x) for expert, x in zip(experts, inputs, strict=True)]
        return replace(_Sums.of(*(scales * x for x in inputs)), n=len(rows))

    def _expert(self, number: int) -> Expert:
        """The result's expert as far as it is fitted; `down` may be missing yet."""
        return self._made_of(number, self._state.experts[number])

    def _unquantised_expert(self, number: int) -> Expert:
        """The same expert before it is quantised."""
        matrices = self._state.matrices[number]
        return self._made_of(
            number, {name: torch.from_numpy(read_matrix(self._source, one)) for name, one in matrices.items()}
        )

    def _made_of(self, number: int, parts: Mapping[str, Tensor]) -> Expert:
        block, plan = self._state.plan.block, self._state.plan.experts[number]
        linears = []
        for name in plan.projections:
            weight = parts.get(name, torch.empty(0, 0))
            scales, biases = (vectors_key(block, name, kind) for kind in ("scale", "bias"))
            if scales in self._source.shapes:
                weight = weight * float(merged_vectors(self._source, scales, [plan], 1)[0])
            if biases in self._source.shapes and len(weight):
                bias = torch.from_numpy(merged_vectors(self._source, biases, [plan], len(weight))[0])
                linears.append(Linear(weight, bias))
            else:
                linears.append(Linear(weight))
        return Expert.of(linears, self._source.spec.architecture.activation)

    # --- the router -----------------------------------------------------------------------------------------

    def _fit_router(self, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        """F32 either way: fitted so that the mix of the result's experts is near that of the source's."""
        fitted = weights
        if self._plan.refit:
            x, read = self._now.input(), self._now.expert_input()
            step = max(1, len(x) // _REFIT_TOKENS)
            x, read = x[::step], read[::step]
            outputs = torch.stack([self._now.output(expert, read) for expert in self._state.plan.target], 1)
            outputs = self._now.lifted(outputs)
            router = replace(self._now.router(), weight=torch.from_numpy(weights.copy()))
            fitted = refit(x, outputs, self._wanted(x), router, self._source.spec).weight
            self._state.router = replace(router, weight=torch.from_numpy(fitted))
        return np.ascontiguousarray(fitted).reshape(-1).view(np.uint8)

    def _wanted(self, x: Tensor) -> Tensor:
        """What the source's experts would answer to the same inputs."""
        block = self._state.plan.block
        router = read_router(self._source, block)
        assert router is not None
        space = read_latent_space(self._source, block)
        read = x if space is None else space.down(x)
        result, routing = torch.zeros_like(read), route(router, self._source.spec, x)
        for expert, rows, expert_weights in rows_by_expert(self._source.layers[block].target, routing):
            if expert >= 0:
                result.index_add_(
                    0, rows, expert_weights[:, None] * read_expert(self._source, block, expert)(read[rows])
                )
        return result if space is None else space.up(result)


def _always(one: LayerPass) -> SharedExpert:
    """What every token passes, where there is such a thing."""
    shared = one.always()
    assert shared is not None
    return shared


def _device() -> str:
    """Where matrices are fitted: on a graphics card if torch has one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
