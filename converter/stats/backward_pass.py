"""One backward pass of a likelihood through a model that is read block by block, and what is summed on the way."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from slimoe.converter.forward.block import (
    Attention,
    Expert,
    Head,
    Router,
    Routing,
    activate,
    attend,
    read_attention,
    read_dense,
    read_expert,
    read_head,
    read_router,
    read_tensor,
    rms_norm,
    route,
)
from slimoe.converter.forward.layer_states import LayerStates
from slimoe.converter.forward.stream import HiddenStates, Sequences
from slimoe.converter.source.model_source import MatrixKey, ModelSource, expert_key
from slimoe.converter.stats.gradient_sums import Answers, RemovalSums, Squares
from slimoe.converter.stats.resume import PartialBackward, Sums
from slimoe.converter.stats.statistics import Removals, Sensitivity, Single
from slimoe.offload.errors import BadLogitsError

_ROWS_AT_ONCE = 4096


def draw_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A next token for each row [n] from the distribution that logits [n, n_vocab] give. `generator` is a CPU's."""
    thresholds = torch.rand(logits.shape[0], 1, generator=generator, dtype=torch.float64)
    sums = logits.double().softmax(-1).cumsum(-1)
    labels = torch.searchsorted(sums, thresholds.to(logits.device) * sums[:, -1:])
    return labels[:, 0].clamp(max=logits.shape[1] - 1)


class Backward:
    """The gradient of the labels' likelihood by the stream, on its way from the last layer to the first."""

    def __init__(
        self,
        source: ModelSource,
        sequences: Sequences,
        states: LayerStates,
        device: str,
        directory: Path | None,
        partial: PartialBackward | None = None,
    ) -> None:
        self.source, self.sequences, self.states, self.device = source, sequences, states, device
        self._partial = partial
        self._buffers = [HiddenStates(sequences.n_rows, source.spec.n_embd, directory) for _ in range(3)]
        self._gradient, self._middle, self._by_input = (buffer.rows for buffer in self._buffers)
        self._squares = [Squares() for _ in range(source.spec.n_layer)]
        self._removals = [RemovalSums(layer.n_stored) for layer in source.layers]
        self._ends = Squares()

    def close(self) -> None:
        """Deletes what lies on disk."""
        for buffer in self._buffers:
            buffer.close()

    def run(self, seed: int, on_layer: Callable[[], None]) -> None:
        """One draw of labels, and their gradients' squares."""
        n_layer = self.source.spec.n_layer
        n_left = self._restored()
        if n_left > n_layer:
            self._head(read_head(self.source, self.device), torch.Generator().manual_seed(seed))
            self._keep(n_layer, self._ends.arrays())
        for _ in range(n_layer - n_left):
            on_layer()
        for layer in reversed(range(min(n_left, n_layer))):
            attention = read_attention(self.source, layer, self.device)
            self._find_middle(layer, attention)
            self._squares[layer].add("update", self._gradient)
            along_attention = self._along_attention(layer)
            router = read_router(self.source, layer, self.device)
            along_ffn = torch.zeros(self.sequences.n_rows)
            if router is not None:
                along_ffn = self._mixture(layer, router)
            elif self.source.layers[layer].has_ffn:
                along_ffn = self._dense(layer)
            self._removals[layer].add_ffn(along_ffn, along_attention)
            if attention is not None:
                self._attention(layer, attention)
            self._keep(layer, self._squares[layer].arrays() | self._removals[layer].arrays())
            on_layer()
        self._ends.add("token", self._gradient)

    def _restored(self) -> int:
        """How many layers are not done; one more than there are if not even the head is."""
        found = self._partial.restore(self._gradient) if self._partial is not None else {}
        n_layer = self.source.spec.n_layer
        for step, sums in found.items():
            if step == n_layer:
                self._ends.restore(sums)
                continue
            removals = self._removals[step].arrays().keys()
            self._squares[step].restore({name: array for name, array in sums.items() if name not in removals})
            self._removals[step].restore(sums)
        return min(found, default=n_layer + 1)

    def _keep(self, step: int, sums: Sums) -> None:
        if self._partial is not None:
            self._partial.add(step, sums, self._gradient)

    def layers(self, count: int) -> tuple[Sensitivity, ...]:
        """The means over `count` tokens of all that was added up, by layer."""
        names = ("update", "gate", "up", "down", "q", "k", "v", "attention")
        return tuple(Sensitivity(*(squares.mean(name, count) for name in names)) for squares in self._squares)

    def removals(self, count: int) -> tuple[Removals, ...]:
        """What leaving parts out costs, by layer."""
        return tuple(sums.result(count) for sums in self._removals)

    def ends(self, count: int) -> tuple[Single, Single]:
        """By the logits and by the rows of the embeddings."""
        return self._ends.mean("output", count), self._ends.mean("token", count)

    def _head(self, head: Head, generator: torch.Generator) -> None:
        last = self.states.before[-1]
        for rows in head.spans(self.sequences.n_rows):
            h = last[rows].to(self.device).requires_grad_()
            logits = head(h)
            if not bool(logits.isfinite().all()):
                raise BadLogitsError
            labels = draw_labels(logits.detach(), generator)
            likelihood = -torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            self._gradient[rows] = torch.autograd.grad(likelihood, h)[0].cpu()
            chances = logits.detach().softmax(-1)
            self._ends.add("output", (chances * (1 - chances)).sqrt())

    def _find_middle(self, layer: int, attention: Attention | None) -> None:
        """The stream between attention and feed-forward part once more."""
        for begin, end in self.sequences.spans():
            h = self.states.before[layer][begin:end].to(self.device)
            if attention is not None:
                with torch.no_grad():
                    h = h + attend(attention, self.source.spec, h).update
            self._middle[begin:end] = h

    def _spans(self) -> Iterator[slice]:
        n_rows = self.sequences.n_rows
        yield from (slice(begin, min(begin + _ROWS_AT_ONCE, n_rows)) for begin in range(0, n_rows, _ROWS_AT_ONCE))

    def _along_attention(self, layer: int) -> Tensor:
        """The gradient along attention's update, by token."""
        before, along = self.states.before[layer], torch.empty(self.sequences.n_rows)
        for rows in self._spans():
            along[rows] = (self._gradient[rows] * (self._middle[rows] - before[rows])).sum(1)
        return along

    def _mixture(self, layer: int, router: Router) -> Tensor:
        """The gradient goes back through the experts, one after the other, and through the shares they had.

        Returns that along the part's output, by token.
        """
        with torch.no_grad():
            parts = [self._route(router, self._middle[rows].to(self.device))[1] for rows in self._spans()]
        picks, shares = (torch.cat([getattr(part, name).cpu() for part in parts]) for name in ("picks", "shares"))
        self._by_input.zero_()
        by_share = torch.zeros_like(shares)
        means = torch.tensor(self.source.layers[layer].target)[picks]
        self._declare(layer, self.source.layers[layer].n_stored)
        for expert in means.unique().tolist():
            weights = self._read_expert(layer, expert)
            rows, ranks = torch.nonzero(means == expert, as_tuple=True)
            if isinstance(weights, Tensor):
                by_share[rows, ranks] = self._gradient[rows] @ weights.cpu()
                continue
            answers = Answers(self.source.spec.n_embd)
            for some, at in zip(rows.split(_ROWS_AT_ONCE), ranks.split(_ROWS_AT_ONCE), strict=True):
                by_share[some, at] = self._expert(layer, expert, weights, router.norm, some, shares[some, at], answers)
            own = shares[rows, ranks]
            along_constant = self._gradient[rows] @ answers.constant()
            self._removals[layer].add_constant(expert, own, by_share[rows, ranks], along_constant)
        self._removals[layer].add_skips(means, shares, by_share)
        for span in self._spans():
            self._through_router(router, span, by_share[span])
        return (shares * by_share).sum(1)

    def _route(self, router: Router, middle: Tensor) -> tuple[Tensor, Routing]:
        x = rms_norm(middle, router.norm, self.source.spec.rms_eps)
        return x, route(router.weight, self.source.spec, x)

    def _read_expert(self, layer: int, expert: int) -> Expert | Tensor:
        """A stored expert, or the vector of constant expert -1 - expert."""
        if expert < 0:
            return read_tensor(self.source, MatrixKey(f"blk.{layer}.ffn_novice.weight", -1 - expert), self.device)
        return read_expert(self.source, layer, expert, self.device)

    def _declare(self, layer: int, n_stored: int) -> None:
        shapes = self.source.shapes
        width = max((shapes[expert_key(layer, "gate", expert)][0] for expert in range(n_stored)), default=0)
        for name, n_out in (("gate", width), ("up", width), ("down", self.source.spec.n_embd)):
            self._squares[layer].declare(name, n_stored, n_out)

    def _expert(
        self,
        layer: int,
        expert: int,
        weights: Expert,
        norm: Tensor,
        rows: Tensor,
        shares: Tensor,
        answers: Answers,
    ) -> Tensor:
        """Adds an expert's squares, its answers and its part of the gradient by the experts' input.

        Returns that by the shares.
        """
        x = rms_norm(self._middle[rows].to(self.device), norm, self.source.spec.rms_eps).requires_grad_()
        share = shares.to(self.device).detach().requires_grad_()
        gate, up = weights.gate(x), weights.up(x)
        down = weights.down(activate(gate, up))
        by_output = self._gradient[rows].to(self.device)
        gradients = torch.autograd.grad(share[:, None] * down, (gate, up, down, x, share), by_output)
        by_gate, by_up, by_down, by_input, by_share = gradients
        for name, gradient in (("gate", by_gate), ("up", by_up), ("down", by_down)):
            self._squares[layer].add(name, gradient, expert)
        self._by_input.index_add_(0, rows, by_input.cpu())
        answers.add(shares, down.detach().cpu())
        return by_share.cpu()

    def _through_router(self, router: Router, rows: slice, by_share: Tensor) -> None:
        """Adds to the gradient what comes through norm and router, from the experts' input and from their shares."""
        middle = self._middle[rows].to(self.device).requires_grad_()
        x, routing = self._route(router, middle)
        gradients = (self._by_input[rows].to(self.device), by_share.to(self.device))
        self._gradient[rows] += torch.autograd.grad((x, routing.shares), middle, gradients)[0].cpu()

    def _dense(self, layer: int) -> Tensor:
        """The same for a single expert of all tokens."""
        along, answers = torch.zeros(self.sequences.n_rows), Answers(self.source.spec.n_embd)
        norm, weights = read_dense(self.source, layer, self.device)
        for name, linear in (("gate", weights.gate), ("up", weights.up), ("down", weights.down)):
            self._squares[layer].declare(name, 1, linear.weight.shape[0])
        self._by_input.zero_()
        for rows in torch.arange(self.sequences.n_rows).split(_ROWS_AT_ONCE):
            along[rows] = self._expert(layer, 0, weights, norm, rows, torch.ones(len(rows)), answers)
            middle = self._middle[rows].to(self.device).requires_grad_()
            x = rms_norm(middle, norm, self.source.spec.rms_eps)
            by_middle = torch.autograd.grad(x, middle, self._by_input[rows].to(self.device))[0]
            self._gradient[rows] += by_middle.cpu()
        return along

    def _attention(self, layer: int, attention: Attention) -> None:
        self._squares[layer].add("attention", self._gradient)
        self._removals[layer].add_attention(self._along_attention(layer))
        for begin, end in self.sequences.spans():
            h = self.states.before[layer][begin:end].to(self.device).requires_grad_()
            seen = attend(attention, self.source.spec, h)
            by_update = self._gradient[begin:end].to(self.device)
            by_stream, *by_projection = torch.autograd.grad(seen.update, (h, seen.q, seen.k, seen.v), by_update)
            for name, gradient in zip(("q", "k", "v"), by_projection, strict=True):
                self._squares[layer].add(name, gradient)
            self._gradient[begin:end] += by_stream.cpu()
