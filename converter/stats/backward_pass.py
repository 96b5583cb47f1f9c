"""A backward pass of the likelihood through a model that is read block by block, and the sums of squared gradients."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from slimoe.converter.forward.block import (
    Mixer,
    attend,
    read_attention,
    read_dense,
    read_end,
    read_expert,
    read_latent_space,
    read_router,
    read_shared,
    read_tensor,
)
from slimoe.converter.forward.block_end import BlockEnd
from slimoe.converter.forward.expert import Expert, LatentSpace, SharedExpert, activate
from slimoe.converter.forward.head import Head, read_head
from slimoe.converter.forward.layer_states import LayerStates
from slimoe.converter.forward.norms import Norm
from slimoe.converter.forward.routing import Router, Routing, route
from slimoe.converter.forward.stream import HiddenStates, Sequences, rows_by_expert
from slimoe.converter.source.model_source import ModelSource, constant_key, expert_key, shared_suffix
from slimoe.converter.stats.gradient_sums import OutputMean, RemovalSums, Squares
from slimoe.converter.stats.resume import PartialBackward, Sums
from slimoe.converter.stats.statistics import Removals, Sensitivity, Single, has_plain_attention
from slimoe.offload.errors import BadLogitsError
from slimoe.offload.model.tensor_list import EXPERT_LATENT

_ROWS_AT_ONCE = 4096
_PLAIN = {"attn_q": "q", "attn_k": "k", "attn_v": "v"}
"""The fields of `Sensitivity` of the matrices that plain attention has."""


def _products(expert: Expert, x: Tensor) -> list[Tensor]:
    """The products of an expert's matrices, in the order of use, for its input [n, n_embd]."""
    inner = [linear(x) for linear in expert.inner]
    return [*inner, expert.down(activate(inner, expert.activation))]


def draw_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a next token for each row [n] from the distribution that logits [n, n_vocab] give.

    `generator` must be on the CPU, wherever the logits are.
    """
    thresholds = torch.rand(logits.shape[0], 1, generator=generator, dtype=torch.float64)
    sums = logits.double().softmax(-1).cumsum(-1)
    labels = torch.searchsorted(sums, thresholds.to(logits.device) * sums[:, -1:])
    return labels[:, 0].clamp(max=logits.shape[1] - 1)


class Backward:
    """The gradient of the labels' log-likelihood by the residual stream, from the last layer back to the first."""

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
        self._partial, self._projections = partial, source.spec.architecture.projections
        n_latent = source.spec.experts.n_latent
        lengths = [source.spec.n_embd] * 3 + [n_latent] * bool(n_latent)
        self._buffers = [HiddenStates(sequences.n_rows, length, directory) for length in lengths]
        self._gradient, self._middle, self._by_input, *others = (buffer.rows for buffer in self._buffers)
        self._by_latent = others[0] if others else self._by_input
        self._squares = [Squares() for _ in range(source.spec.n_layer)]
        self._removals = [RemovalSums(layer.n_stored) for layer in source.layers]
        self._ends = Squares()
        self._by_experts: Tensor | None = None
        """The gradient by the sum of a layer's experts, where it is not that by the stream, times a constant."""

    def close(self) -> None:
        """Deletes the files on disk."""
        for buffer in self._buffers:
            buffer.close()

    def run(self, seed: int, on_layer: Callable[[], None]) -> None:
        """Draws a label for every token and adds the squares of their gradients; `on_layer` is called for each layer.

        Raises ModelFileError, and BadLogitsError where the model computes no finite numbers.
        """
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
            router, end = read_router(self.source, layer, self.device), read_end(self.source, layer, self.device)
            along_attention = self._along_attention(layer, end)
            along_ffn = self._through_end(layer, router, end)
            self._squares[layer].add("update", self._by_output())
            if router is not None:
                along_ffn += self._mixture(layer, router, has_end=end is not None)
            elif self.source.layers[layer].has_ffn:
                along_ffn += self._dense(layer)
            self._by_experts = None
            self._removals[layer].add_ffn(along_ffn, along_attention)
            if attention is not None:
                self._attention(layer, attention)
            self._keep(layer, self._squares[layer].arrays() | self._removals[layer].arrays())
            on_layer()
        self._ends.add("token", self.source.spec.multipliers.embedding * self._gradient)

    def _restored(self) -> int:
        """How many layers are left to do; one more than there are if the head is left too."""
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
        """The sensitivities of each layer: means over `count` tokens."""
        names = ("update", "gate", "up", "down", "q", "k", "v", "attention")
        return tuple(
            Sensitivity(
                *(squares.mean(name, count) for name in names),
                others={name: squares.mean(name, count) for name in squares.sums if name not in names},
            )
            for squares in self._squares
        )

    def removals(self, count: int) -> tuple[Removals, ...]:
        """What leaving out parts of each layer costs, as means over `count` tokens."""
        return tuple(sums.result(count) for sums in self._removals)

    def ends(self, count: int) -> tuple[Single, Single]:
        """Mean squared gradients by the logits [n_vocab] and by the rows of the token table [n_embd]."""
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
            self._ends.add("output", head.slopes(logits.detach()) * (chances * (1 - chances)).sqrt())

    def _find_middle(self, layer: int, attention: Mixer | None) -> None:
        """Computes the residual stream between attention and feed-forward part again."""
        for begin, end in self.sequences.spans():
            h = self.states.before[layer][begin:end].to(self.device)
            if attention is not None:
                with torch.no_grad():
                    h = h + attend(attention, self.source.spec, h).update
            self._middle[begin:end] = h

    def _spans(self) -> Iterator[slice]:
        n_rows = self.sequences.n_rows
        yield from (slice(begin, min(begin + _ROWS_AT_ONCE, n_rows)) for begin in range(0, n_rows, _ROWS_AT_ONCE))

    def _along_attention(self, layer: int, end: BlockEnd | None = None) -> Tensor:
        """The inner product of the gradient and attention's update, by token [n_rows], behind the block's `end`."""
        before, along = self.states.before[layer], torch.empty(self.sequences.n_rows)
        for rows in self._spans():
            middle = self._middle[rows] if end is None else end.scaled(self._middle[rows].to(self.device)).cpu()
            along[rows] = (self._gradient[rows] * (middle - before[rows])).sum(1)
        return along

    def _through_end(self, layer: int, router: Router | None, end: BlockEnd | None) -> Tensor:
        """Takes the gradient back to a layer's middle, through norms and what every token passes, and to its experts.

        Returns the inner product of the gradient and the part's output, by token [n_rows]; zeros where a layer's update
        is added as it is, for which nothing is done.
        """
        along = torch.zeros(self.sequences.n_rows)
        if end is None:
            return along
        shared = read_shared(self.source, layer, self.device) if router is not None else None
        space = read_latent_space(self.source, layer, self.device)
        total = None if router is None else self._expert_sum(layer, router, space)
        for rows in self._spans():
            middle, by_after = (part[rows].to(self.device) for part in (self._middle, self._gradient))
            middle.requires_grad_()
            if router is None or total is None:
                self._gradient[rows] = torch.autograd.grad(end.scaled(middle), middle, by_after)[0].cpu()
                continue
            experts, products, always = total[rows].to(self.device).requires_grad_(), list[Tensor](), None
            if shared is not None:
                read = shared.reads(router.norm(middle))
                products = _products(shared.expert, read)
                always = shared.output(read, products[-1])
            lifted = [] if space is None else [space.up(experts)]
            after = end.after(middle, lifted[0] if lifted else experts, always)
            wanted = (middle, experts, *lifted, *products)
            by_middle, by_experts, *by_matrix = torch.autograd.grad(after, wanted, by_after)
            if lifted:
                self._squares[layer].add(EXPERT_LATENT[1], by_matrix.pop(0))
            along[rows] = (by_after * (after - end.scaled(middle)).detach()).sum(1).cpu()
            self._gradient[rows], total[rows] = by_middle.cpu(), by_experts.cpu()
            self._add_shared(layer, by_matrix)
        self._by_experts = total
        return along

    def _expert_sum(self, layer: int, router: Router, space: LatentSpace | None) -> Tensor:
        """What a layer's experts say, weighted and added up [n_rows, n_embd_expert]."""
        total = torch.zeros(self.sequences.n_rows, self.source.spec.n_embd_expert)
        with torch.no_grad():
            for expert, rows, weights in rows_by_expert(self.source.layers[layer].target, self._routing(router)):
                if expert < 0:
                    constant = read_tensor(self.source, constant_key(layer, -1 - expert))
                    total.index_add_(0, rows, weights[:, None] * constant)
                    continue
                matrices = read_expert(self.source, layer, expert, self.device)
                for some, share in zip(rows.split(_ROWS_AT_ONCE), weights.split(_ROWS_AT_ONCE), strict=True):
                    x = router.norm(self._middle[some].to(self.device))
                    output = matrices(x if space is None else space.down(x)).cpu()
                    total.index_add_(0, some, share[:, None] * output)
        return total

    def _routing(self, router: Router) -> Routing:
        """What a layer's router answers to all tokens, in host memory."""
        with torch.no_grad():
            parts = [self._route(router, self._middle[rows].to(self.device))[1] for rows in self._spans()]
        every = zip(*((one.logits, one.probabilities, one.selected, one.weights) for one in parts), strict=True)
        return Routing(*(torch.cat(part).cpu() for part in every))

    def _mixture(self, layer: int, router: Router, *, has_end: bool) -> Tensor:
        """Takes the gradient back through the experts, one after the other, and through their expert weights.

        Returns the inner product of the gradient and the part's output, by token [n_rows]; zeros where the part
        `has_end` through which the gradient has been taken, and what every token passes as well.
        """
        routing = self._routing(router)
        selected, routed, space = routing.selected, routing.weights, read_latent_space(self.source, layer, self.device)
        by_read = self._by_input if space is None else self._by_latent
        by_read.zero_()

        def read(middle: Tensor) -> Tensor:
            return router.norm(middle) if space is None else space.down(router.norm(middle))

        by_weight = torch.zeros_like(routed)
        means = torch.tensor(self.source.layers[layer].target)[selected]
        n_stored, shapes = self.source.layers[layer].n_stored, self.source.shapes
        width = max((shapes[expert_key(layer, "up", expert)][0] for expert in range(n_stored)), default=0)
        for name, n_out in (("gate", width), ("up", width), ("down", self.source.spec.n_embd_expert)):
            self._squares[layer].declare(name, n_stored, n_out)
        for expert in means.unique().tolist():
            rows, ranks = torch.nonzero(means == expert, as_tuple=True)
            if expert < 0:
                key = constant_key(layer, -1 - expert)
                by_weight[rows, ranks] = self._by_output(rows) @ read_tensor(self.source, key)
                continue
            matrices = read_expert(self.source, layer, expert, self.device)
            mean = OutputMean(self.source.spec.n_embd_expert)
            for some, at in zip(rows.split(_ROWS_AT_ONCE), ranks.split(_ROWS_AT_ONCE), strict=True):
                found = self._expert(layer, expert, matrices, read, some, routed[some, at], mean)
                by_weight[some, at] = found[0]
                by_read.index_add_(0, some, found[1])
            along_constant = self._by_output(rows) @ mean.constant()
            self._removals[layer].add_constant(expert, routed[rows, ranks], by_weight[rows, ranks], along_constant)
        self._removals[layer].add_skips(means, routed, by_weight)
        shared = None if has_end else read_shared(self.source, layer, self.device)
        along_shared = torch.zeros(len(routed)) if shared is None else self._shared(layer, shared, router.norm)
        for span in self._spans():
            middle = self._middle[span].to(self.device).requires_grad_()
            x, routing = self._route(router, middle)
            gradients = (by_read[span].to(self.device), by_weight[span].to(self.device))
            if space is not None:
                x = space.down(x)
                self._squares[layer].add(EXPERT_LATENT[0], gradients[0])
            self._gradient[span] += torch.autograd.grad((x, routing.weights), middle, gradients)[0].cpu()
        return torch.zeros(len(routed)) if has_end else along_shared + (routed * by_weight).sum(1)

    def _route(self, router: Router, middle: Tensor) -> tuple[Tensor, Routing]:
        x = router.norm(middle)
        return x, route(router, self.source.spec, x)

    def _expert(
        self,
        layer: int,
        expert: int,
        matrices: Expert,
        read: Callable[[Tensor], Tensor],
        rows: Tensor,
        routed: Tensor,
        mean: OutputMean,
    ) -> tuple[Tensor, Tensor]:
        """Adds an expert's squared gradients and its outputs; it `read`s something of the stream.

        `routed` are the tokens' expert weights. Returns the gradients by them, and by what the expert read.
        """
        x = read(self._middle[rows].to(self.device)).detach().requires_grad_()
        weights = routed.to(self.device).detach().requires_grad_()
        products = _products(matrices, x)
        down, by_output = products[-1], self._by_output(rows).to(self.device)
        gradients = torch.autograd.grad(weights[:, None] * down, (*products, x, weights), by_output)
        *by_products, by_input, by_weight = gradients
        for name, gradient in zip(self._projections, by_products, strict=True):
            self._squares[layer].add(name, gradient, expert)
        mean.add(routed, down.detach().cpu())
        return by_weight.cpu(), by_input.cpu()

    def _shared(self, layer: int, shared: SharedExpert, norm: Norm) -> Tensor:
        """Adds a shared expert's squared gradients, and its part of the gradient by the experts' input.

        Returns the inner product of the gradient and its output, by token [n_rows].
        """
        along = torch.empty(self.sequences.n_rows)
        for rows in self._spans():
            x = norm(self._middle[rows].to(self.device)).requires_grad_()
            products = _products(shared.expert, x)
            output, by_output = shared.output(x, products[-1]), self._by_output(rows).to(self.device)
            *by_matrix, by_input = torch.autograd.grad(output, (*products, x), by_output)
            self._add_shared(layer, by_matrix)
            self._by_input[rows] += by_input.cpu()
            along[rows] = (by_output * output.detach()).sum(1).cpu()
        return along

    def _add_shared(self, layer: int, by_matrix: Sequence[Tensor]) -> None:
        """Adds the squares of gradients by the products of a shared expert's matrices, if there is one."""
        for name, gradient in zip(self._projections if by_matrix else (), by_matrix, strict=True):
            self._squares[layer].add(f"ffn_{name}{shared_suffix(self.source, layer)}", gradient)

    def _by_output(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """The gradient by what the experts or a dense part put out, which some models scale before adding it."""
        if self._by_experts is not None:
            return self._by_experts[rows]
        return self.source.spec.multipliers.residual * self._gradient[rows]

    def _dense(self, layer: int) -> Tensor:
        """Takes the gradient back through a dense feed-forward part, which is one expert that all tokens select.

        Returns the inner product of the gradient and the part's output, by token [n_rows].
        """
        along, mean = torch.zeros(self.sequences.n_rows), OutputMean(self.source.spec.n_embd)
        norm, matrices = read_dense(self.source, layer, self.device)
        for name, linear in zip(self._projections, (*matrices.inner, matrices.down), strict=True):
            self._squares[layer].declare(name, 1, linear.weight.shape[0])
        for rows in torch.arange(self.sequences.n_rows).split(_ROWS_AT_ONCE):
            along[rows], by_input = self._expert(layer, 0, matrices, norm, rows, torch.ones(len(rows)), mean)
            middle = self._middle[rows].to(self.device).requires_grad_()
            x = norm(middle)
            by_middle = torch.autograd.grad(x, middle, by_input.to(self.device))[0]
            self._gradient[rows] += by_middle.cpu()
        return along

    def _attention(self, layer: int, attention: Mixer) -> None:
        names = {"attn_output": "attention"} | (_PLAIN if has_plain_attention(self.source.spec, layer) else {})
        self._removals[layer].add_attention(self._along_attention(layer))
        for begin, end in self.sequences.spans():
            h = self.states.before[layer][begin:end].to(self.device).requires_grad_()
            seen = attend(attention, self.source.spec, h)
            by_update = self._gradient[begin:end].to(self.device)
            by_stream, *by_product = torch.autograd.grad(seen.update, (h, *seen.products.values()), by_update)
            for role, gradient in zip(seen.products, by_product, strict=True):
                self._squares[layer].add(names.get(role, role), gradient)
            self._gradient[begin:end] += by_stream.cpu()
