"""The sums over tokens of a layer's statistics: outputs of experts, inputs of matrices, similarities and routing.

Sums are gathered in double precision: in bfloat16, the cosines of most layers of a large model are the same number.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.forward.expert import Expert
from slimoe.converter.forward.routing import Routing
from slimoe.converter.source.model_source import ModelSource, expert_width, shared_suffix
from slimoe.converter.stats.statistics import (
    GramSample,
    InputSums,
    OutputSums,
    SimilaritySums,
    TokenTrace,
    has_plain_attention,
)
from slimoe.offload.model.tensor_list import EXPERT_LATENT


class OutputTotals:
    """Gathers one layer's `OutputSums`, in double precision, from parts of the tokens of each expert."""

    def __init__(self, n_stored: int, n_embd: int) -> None:
        self._scalars = np.zeros((5, n_stored))
        self._n_pick = np.zeros(n_stored, np.int64)
        self._largest = np.zeros(n_stored)
        self._vectors = np.zeros((4, n_stored, n_embd))

    def add(self, expert: int, weights: Tensor, output: Tensor) -> None:
        """Adds tokens of one expert: its outputs [n, n_embd] and their expert weights [n]."""
        f, w = output.double(), weights.double()
        square = f.square()
        norm_square = square.sum(-1)
        norm, w_square = norm_square.sqrt(), w.square()
        scalars = (norm, norm_square, w * norm, w_square * norm_square, w_square)
        vectors = torch.stack((f.sum(0), square.sum(0), w @ f, w_square @ f))
        self._n_pick[expert] += len(f)
        self._scalars[:, expert] += torch.stack([value.sum() for value in scalars]).cpu().numpy()
        self._largest[expert] = max(self._largest[expert], float(f.abs().max()))
        self._vectors[:, expert] += vectors.cpu().numpy()

    def weighted_square(self, expert: int) -> float:
        """The sum of w^2 |f|^2 over an expert's tokens."""
        return float(self._scalars[3, expert])

    def means(self) -> Tensor:
        """Each expert's mean output, weighted by the square of the expert weight [E, n_embd] float64.

        That of an expert that no token selected is the mean over all experts of the layer.
        """
        weights, sums = self._scalars[4], self._vectors[3]
        weight = weights.sum()
        overall = sums.sum(0) / (weight if weight > 0 else 1.0)
        divided = sums / np.where(weights > 0, weights, 1.0)[:, None]
        return torch.from_numpy(np.where(weights[:, None] > 0, divided, overall))

    def finish(self) -> OutputSums:
        """The sums of all tokens."""
        norm, norm_square, share_norm, share_square_norm_square, share_square = self._scalars
        output, output_square, share_output, share_square_output = self._vectors.astype(np.float32)
        return OutputSums(
            n_pick=self._n_pick,
            norm=norm,
            norm_square=norm_square,
            share_norm=share_norm,
            share_square_norm_square=share_square_norm_square,
            largest=self._largest,
            share_square=share_square,
            output=output,
            output_square=output_square,
            share_output=share_output,
            share_square_output=share_square_output,
        )


class InputTotals:
    """Gathers one layer's `InputSums`, in double precision; the sums of narrower experts end in zeros."""

    def __init__(self, source: ModelSource, layer: int) -> None:
        spec, of = source.spec, source.layers[layer]
        self._is_plain = of.has_attention and has_plain_attention(spec, layer)
        self._expert = np.zeros((of.n_stored, spec.n_embd_expert))
        self._n_ff = [expert_width(source, layer, expert) for expert in range(of.n_stored)]
        self._inner = spec.architecture.projections[:-1]
        self._hidden = np.zeros((of.n_stored, max(self._n_ff, default=0)))
        self._attention = np.zeros(spec.n_embd if self._is_plain else 0)
        self._mixed = np.zeros(
            spec.attention_of(layer).n_output if of.has_attention and not spec.is_recurrent(layer) else 0
        )
        self._router = np.zeros(spec.n_embd if of.target else 0)
        self._suffix = shared_suffix(source, layer)
        self._others: dict[str, NDArray[np.float64]] = {}

    def add_attention(self, reads: Mapping[str, Tensor]) -> None:
        """Adds a sequence's attention: what each of its matrices reads, by role, as `AttentionPass` has it."""
        for role, values in reads.items():
            if role == "attn_output":
                self._mixed += column_squares(values)
            elif not self._is_plain:
                self._others[role] = self._others.get(role, 0.0) + column_squares(values)
            elif role == "attn_q":  # keys and values read the same
                self._attention += column_squares(values)

    def add_router(self, x: Tensor) -> None:
        """Adds the router's inputs of one sequence."""
        self._router += column_squares(x)

    def add_expert(self, expert: int, x: Tensor, hidden: Tensor) -> None:
        """Adds tokens of one expert: its inputs [n, n_embd], and those of its down [n, n_ff]."""
        self._expert[expert] += column_squares(x)
        self._hidden[expert, : self._n_ff[expert]] += column_squares(hidden)

    def add_always(self, x: Tensor, hidden: Tensor) -> None:
        """Adds tokens of a dense layer or a shared expert: its inputs [n, n_embd], and those of its down [n, n_ff].

        A shared expert's inputs are the router's, unless it is the dense part beside the experts.
        """
        read = {"ffn_down" + self._suffix: hidden}
        if not self._suffix:
            read = {f"ffn_{name}": x for name in self._inner} | read
        for role, values in read.items():
            self._others[role] = self._others.get(role, 0.0) + column_squares(values)

    def add_sum(self, total: Tensor) -> None:
        """Adds tokens of the matrix behind the experts, which reads their sum; that before them reads the router's."""
        self._others[EXPERT_LATENT[1]] = self._others.get(EXPERT_LATENT[1], 0.0) + column_squares(total)

    def of_expert(self, expert: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The sums so far of the inputs of one expert [n_embd], and of its down [n_ff]."""
        return self._expert[expert].astype(np.float32), self._hidden[expert, : self._n_ff[expert]].astype(np.float32)

    def finish(self) -> InputSums:
        """The sums of all tokens."""
        sums = (self._expert, self._hidden, self._attention, self._mixed, self._router)
        others = {role: one.astype(np.float32) for role, one in self._others.items()}
        return InputSums(*(one.astype(np.float32) for one in sums), others=others)


def column_squares(values: Tensor) -> NDArray[np.float64]:
    """The sum of squares over the rows [n, ...], for each column [...]."""
    sums: NDArray[np.float64] = values.double().square().sum(0).cpu().numpy()
    return sums


_LEAST = 1e-300


class SimilarityTotals:
    """Gathers one layer's `SimilaritySums`, one sequence after the other."""

    def __init__(self) -> None:
        self._sums = np.zeros(5)

    def add(self, h: Tensor, middle: Tensor, after: Tensor, x: Tensor | None) -> None:
        """Adds a sequence's residual streams [n, n_embd] before the block, after its attention and after the block.

        `x` is the input of its feed-forward part, None if it has none.
        """
        h, middle, after = h.double(), middle.double(), after.double()
        y = after - middle
        cosines = [_cosine(h, after), _cosine(h, middle), _cosine(middle, after)]
        cosines.append(torch.zeros_like(cosines[0]) if x is None else _cosine(x.double(), y))
        relative = y.square().sum(-1) / middle.square().sum(-1).clamp(min=_LEAST)
        self._sums += torch.stack([*cosines, relative]).sum(-1).cpu().numpy()

    def finish(self) -> SimilaritySums:
        """The sums of all tokens."""
        return SimilaritySums(*self._sums.tolist())


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosines of rows; 0 where a row is 0."""
    lengths = a.square().sum(-1) * b.square().sum(-1)
    return (a * b).sum(-1) / lengths.clamp(min=_LEAST).sqrt()


_F16_MAX = 65504.0


class TraceRows:
    """Gathers one layer's `TokenTrace`; attention that exceeds float16's largest number becomes that number."""

    def __init__(self, n_rows: int, n_used: int) -> None:
        self._picks = np.zeros((n_rows, n_used), np.uint16)
        self._shares = np.zeros((n_rows, n_used), np.float16)
        self._received = np.zeros(n_rows, np.float16)
        self._norm = np.zeros(n_rows, np.float32)

    def add_attention(self, first_row: int, received: Tensor) -> None:
        """Adds the attention that each token of a sequence received."""
        rows = slice(first_row, first_row + len(received))
        self._received[rows] = received.clamp(max=_F16_MAX).cpu().numpy()

    def add_routing(self, first_row: int, x: Tensor, routing: Routing) -> None:
        """Adds a sequence's inputs of the router, and its routing."""
        rows = slice(first_row, first_row + len(x))
        self._picks[rows], self._shares[rows] = routing.selected.cpu().numpy(), routing.weights.cpu().numpy()
        self._norm[rows] = x.abs().sum(-1).cpu().numpy()

    def finish(self) -> TokenTrace:
        """The routing of all tokens."""
        return TokenTrace(self._picks, self._shares, self._received, self._norm)


_MOST_BYTES = 1 << 25
"""Bytes of a layer's Gram matrices, beyond which they are made of fewer tokens."""
_MOST_OUTPUT_BYTES = 1 << 29
_TOKENS_AT_ONCE = 64


def spread_rows(n_rows: int, n_sample: int) -> NDArray[np.int64]:
    """A sorted sample of `n_rows` rows: one at random of each of `n_sample` even parts, or all if they are fewer."""
    if n_sample >= n_rows:
        return np.arange(n_rows, dtype=np.int64)
    places = np.arange(n_sample) + np.random.default_rng(0).random(n_sample)
    return (places * n_rows / n_sample).astype(np.int64)


def gram_size(n_sample: int, n_rows: int, n_stored: int, n_embd: int) -> int:
    """The number of tokens for Gram matrices: `n_sample`, or fewer if there are fewer or memory would not suffice."""
    n_vectors = 2 * n_stored + 1
    room = min(_MOST_BYTES // (4 * n_vectors**2), _MOST_OUTPUT_BYTES // (4 * n_stored * n_embd))
    return max(1, min(n_sample, n_rows, room))


class GramRows:
    """Gathers one layer's `GramSample`: inputs of the sampled `rows` first, then every expert's outputs for them.

    Where experts write fewer values than the stream has, it is what experts would write for the stream.

    The Gram matrix holds all inner products of what a policy could add to a token's residual stream. The squared error
    of any linear combination of these vectors (fewer experts, skipped ones, constant ones in their place) follows from
    it, without the model.
    """

    def __init__(self, rows: NDArray[np.int64], n_stored: int, n_row: int, n_embd: int) -> None:
        self._rows = rows
        self._x, self._middle = torch.zeros(len(rows), n_embd), torch.zeros(len(rows), n_embd)
        self._logits = torch.zeros(len(rows), n_row)
        self._outputs = torch.zeros(len(rows), n_stored, n_embd)
        self._missing = set(range(n_stored))

    def add_routing(self, first_row: int, x: Tensor, logits: Tensor) -> None:
        """Adds what a sequence's experts read, and the router's logits."""
        sampled, own = self._sampled(first_row, len(x))
        self._x[sampled], self._logits[sampled] = x[own.to(x.device)].cpu(), logits[own.to(x.device)].cpu()

    def add_middle(self, first_row: int, middle: Tensor) -> None:
        """Adds a sequence's residual stream to which the experts' outputs are added."""
        sampled, own = self._sampled(first_row, len(middle))
        self._middle[sampled] = middle[own]

    def _sampled(self, first_row: int, n_rows: int) -> tuple[slice, Tensor]:
        """Which of the sampled rows are in a sequence, and where in it they are."""
        begin, end = np.searchsorted(self._rows, (first_row, first_row + n_rows)).tolist()
        return slice(begin, end), torch.from_numpy(self._rows[begin:end] - first_row)

    def add_expert(self, number: int, expert: Expert) -> None:
        """Adds the outputs of an expert for all sampled rows."""
        self._outputs[:, number] = expert(self._x.to(expert.down.weight.device)).cpu()
        self._missing.discard(number)

    @property
    def missing(self) -> list[int]:
        """The experts that have not been added, in order."""
        return sorted(self._missing)

    def finish(self, means: Tensor) -> GramSample:
        """The Gram matrices, with `means` [E, n_embd] float64 as the experts' mean outputs."""
        assert not self._missing
        n_vectors = 2 * len(means) + 1
        gram = np.empty((len(self._rows), n_vectors, n_vectors), np.float32)
        for begin in range(0, len(self._rows), _TOKENS_AT_ONCE):
            part = slice(begin, begin + _TOKENS_AT_ONCE)
            outputs, middle = self._outputs[part].double(), self._middle[part].double()[:, None]
            vectors = torch.cat((outputs, means.expand(len(outputs), -1, -1), middle), 1)
            gram[part] = (vectors @ vectors.mT).numpy()
        return GramSample(gram, self._logits.numpy(), self._rows)
