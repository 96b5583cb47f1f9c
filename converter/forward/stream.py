"""Runs texts through a model layer by layer and expert by expert, so that little more than one expert is in memory.

All sequences pass a layer before the next layer is read. An observer sums up what is to be learnt on the way.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slimoe.converter.forward.attention_pass import AttentionPass
from slimoe.converter.forward.block import (
    attend,
    read_attention,
    read_aux_vectors,
    read_dense,
    read_end,
    read_expert,
    read_latent_space,
    read_router,
    read_shared,
    read_tensor,
)
from slimoe.converter.forward.block_end import BlockEnd
from slimoe.converter.forward.expert import Expert, SharedExpert
from slimoe.converter.forward.head import read_head
from slimoe.converter.forward.norms import Norm
from slimoe.converter.forward.routing import Router, Routing, route
from slimoe.converter.source.model_source import MatrixKey, ModelSource, constant_key
from slimoe.offload.files.whole_file import write_error

_ROWS_AT_ONCE = 4096


class Observer:
    """Is told of everything that a forward pass computes; this one ignores it.

    Rows are the tokens of all sequences, one sequence after the other, numbered from 0.
    """

    def attention(self, layer: int, first_row: int, h: Tensor, seen: AttentionPass) -> None:
        """One sequence's residual stream before attention, and the pass of attention."""

    def routed(self, layer: int, first_row: int, x: Tensor, read: Tensor, routing: Routing) -> None:
        """The normalised input of a sequence's router, what its experts `read`, and what the router answers."""

    def expert(
        self, layer: int, expert: int, rows: Tensor, x: Tensor, hidden: Tensor, weights: Tensor
    ) -> Tensor | None:
        """The tokens `rows` that selected a stored expert, its inputs and activations for them, and its weights.

        May return an output [n, n_embd] in place of the product with `down`, such as that of other matrices.
        """

    def output(self, layer: int, expert: int, rows: Tensor, weights: Tensor, output: Tensor) -> None:
        """The expert's output [n, n_embd] for these tokens, not yet weighted."""

    def always(self, layer: int, x: Tensor, hidden: Tensor) -> None:
        """The inputs and activations of what the next tokens all pass: a dense feed-forward part or a shared expert."""

    def summed(self, layer: int, total: Tensor) -> None:
        """The sums of the next tokens' experts, in layers where a matrix or a norm is behind it."""

    def block(self, layer: int, first_row: int, h: Tensor, middle: Tensor, after: Tensor) -> None:
        """A sequence's residual stream before the block, after its attention, and after its feed-forward part."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """The token ids of texts that do not attend to each other."""

    tokens: tuple[tuple[int, ...], ...]

    @property
    def n_rows(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.tokens))

    def spans(self) -> Iterator[tuple[int, int]]:
        """The first row of each sequence, and the row after its last."""
        begin = 0
        for tokens in self.tokens:
            yield begin, begin + len(tokens)
            begin += len(tokens)


class HiddenStates:
    """Hidden states [n_rows, n_embd] float32, in memory or in a file of `directory` without a name."""

    def __init__(self, n_rows: int, n_embd: int, directory: Path | None = None) -> None:
        """Makes room for them; raises UsageError or DoesNotFitError where the file cannot be made."""
        if directory is None:
            self.rows = torch.empty(n_rows, n_embd)
            return
        try:
            with tempfile.TemporaryFile(dir=directory) as file:
                # Whoever writes to a mapped file that finds the disk full is killed: the room is taken before.
                os.posix_fallocate(file.fileno(), 0, 4 * n_rows * n_embd)
                self.rows = torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(n_rows, n_embd)))
        except OSError as error:
            raise write_error(directory, error) from None

    def close(self) -> None:
        """Deletes them."""
        self.rows = torch.empty(0, 0)


class Stream:
    """A forward pass between two layers: the residual stream `h` [n_rows, n_embd], and buffers within a layer."""

    def __init__(
        self, source: ModelSource, sequences: Sequences, device: str = "cpu", directory: Path | None = None
    ) -> None:
        self.source, self.sequences, self.device = source, sequences, device
        n_embd, n_latent = source.spec.n_embd, source.spec.experts.n_latent
        lengths = [n_embd] * 3 + [source.spec.n_embd_expert] + [n_latent] * bool(n_latent)
        self._buffers = [HiddenStates(sequences.n_rows, length, directory) for length in lengths]
        self.h, self._middle, self._after, self._x, *others = (buffer.rows for buffer in self._buffers)
        self._latent_sum = others[0] if others else None

    def embed(self) -> None:
        """Fills `h` with the tokens' embeddings; raises ModelFileError."""
        table = read_tensor(self.source, MatrixKey("token_embd.weight")).cpu()
        tokens = [token for one in self.sequences.tokens for token in one]
        torch.index_select(table, 0, torch.tensor(tokens), out=self.h)
        self.h *= self.source.spec.multipliers.embedding

    def pass_layer(self, layer: int, observer: Observer, experts: Callable[[int], Expert] | None = None) -> None:
        """Moves `h` behind a layer; `experts` reads a stored expert, the model's own if None.

        Raises ModelFileError.
        """
        with torch.no_grad():
            self._attention(layer, observer)
            router, block_end = read_router(self.source, layer, self.device), read_end(self.source, layer, self.device)
            if router is not None:
                self._experts(layer, router, observer, experts, block_end)
            elif self.source.layers[layer].has_ffn:
                norm, ffn = read_dense(self.source, layer, self.device)
                self._always(layer, norm, SharedExpert(ffn), observer)
            elif block_end is not None:
                for rows in self._spans():
                    self._after[rows] = block_end.scaled(self._after[rows].to(self.device)).cpu()
        for begin, end in self.sequences.spans():
            observer.block(layer, begin, self.h[begin:end], self._middle[begin:end], self._after[begin:end])
        self.h, self._after = self._after, self.h

    def _normalised(self, rows: slice, norm: Norm) -> Tensor:
        """The input [n, n_embd] of some rows' feed-forward part."""
        return norm(self._middle[rows].to(self.device))

    def _attention(self, layer: int, observer: Observer) -> None:
        block = read_attention(self.source, layer, self.device)
        for begin, end in self.sequences.spans():
            h = self.h[begin:end].to(self.device)
            if block is not None:
                seen = attend(block, self.source.spec, h)
                observer.attention(layer, begin, h, seen)
                h = h + seen.update
            self._middle[begin:end] = self._after[begin:end] = h

    def _spans(self) -> Iterator[slice]:
        """Rows that are computed at once."""
        n_rows = self.sequences.n_rows
        yield from (slice(begin, min(begin + _ROWS_AT_ONCE, n_rows)) for begin in range(0, n_rows, _ROWS_AT_ONCE))

    def _experts(
        self,
        layer: int,
        router: Router,
        observer: Observer,
        read: Callable[[int], Expert] | None,
        block_end: BlockEnd | None,
    ) -> None:
        found, residual, space = (
            [],
            self.source.spec.multipliers.residual,
            read_latent_space(self.source, layer, self.device),
        )
        for begin, end in self.sequences.spans():
            x = self._normalised(slice(begin, end), router.norm)
            read_by_experts = self._x[begin:end] = x if space is None else space.down(x)
            found.append(route(router, self.source.spec, x))
            observer.routed(layer, begin, x, read_by_experts, found[-1])
        shared = read_shared(self.source, layer, self.device)
        sums = self._after if space is None or self._latent_sum is None else self._latent_sum
        if block_end is not None:  # What experts say is gathered alone first.
            sums.zero_()
        elif shared is not None:
            self._always(layer, router.norm, shared, observer)
        parts = zip(*((one.logits, one.probabilities, one.selected, one.weights) for one in found), strict=True)
        routing = Routing(*(torch.cat(part).cpu() for part in parts))
        n_main, aux = self.source.spec.n_expert_used, read_aux_vectors(self.source, layer, self.device)
        others = routing.selected[:, n_main:], routing.weights[:, n_main:]

        def add(rows: Tensor, update: Tensor) -> None:
            """Adds what the main experts say to some rows."""
            gained = update if aux is None else update * aux.gains(*(part[rows] for part in others))
            sums.index_add_(0, rows, (residual * gained).cpu())

        for number, rows, weights in rows_by_expert(self.source.layers[layer].target, routing, n_main):
            if number < 0:
                constant = read_tensor(self.source, constant_key(layer, -1 - number), self.device)
                add(rows, weights[:, None].to(self.device) * constant)
                continue
            expert = read(number) if read else read_expert(self.source, layer, number, self.device)
            for part, of_part in zip(rows.split(_ROWS_AT_ONCE), weights.split(_ROWS_AT_ONCE), strict=True):
                x, weight = self._x[part].to(self.device), of_part.to(self.device)
                hidden = expert.hidden(x)
                other = observer.expert(layer, number, part, x, hidden, weight)
                output = expert.down(hidden) if other is None else other
                observer.output(layer, number, part, weight, output)
                add(part, weight[:, None] * output)
        for every in self._spans() if aux is not None else ():
            assert aux is not None
            sums[every] += (residual * aux.shifts(*(part[every] for part in others))).cpu()
        for every in self._spans() if block_end is not None else ():
            assert block_end is not None
            total, x = sums[every].to(self.device), self._normalised(every, router.norm)
            observer.summed(layer, total)
            total = total if space is None else space.up(total)
            always = None if shared is None else self._passed(layer, x, shared, observer)
            self._after[every] = block_end.after(self._middle[every].to(self.device), total, always).cpu()

    def _always(self, layer: int, norm: Norm, shared: SharedExpert, observer: Observer) -> None:
        """Adds what every token passes: a dense feed-forward part, or the shared expert."""
        for rows in self._spans():
            output = self._passed(layer, self._normalised(rows, norm), shared, observer)
            self._after[rows] += (self.source.spec.multipliers.residual * output).cpu()

    def _passed(self, layer: int, x: Tensor, shared: SharedExpert, observer: Observer) -> Tensor:
        """The output [n, n_embd] of what every token passes, for the normalised input of experts."""
        read = shared.reads(x)
        hidden = shared.expert.hidden(read)
        observer.always(layer, read, hidden)
        return shared.output(read, shared.expert.down(hidden))

    def close(self) -> None:
        """Deletes the buffers."""
        for buffer in self._buffers:
            buffer.close()


def rows_by_expert(
    target: Sequence[int], routing: Routing, n_main: int | None = None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Every expert among a token's first `n_main` selected ones (all if None), or -1 - n for constant n; the rows that
    select it, and its weights for them.
    """
    meant = torch.tensor(target, device=routing.selected.device)[routing.selected[:, :n_main]]
    for expert in meant.unique().tolist():
        rows, ranks = torch.nonzero(meant == expert, as_tuple=True)
        yield expert, rows, routing.weights[rows, ranks]


def final_logits(source: ModelSource, h: Tensor) -> Tensor:
    """Logits [n, n_vocab] of hidden states [n, n_embd] behind the last layer; raises ModelFileError."""
    return read_head(source)(h)


def run(source: ModelSource, sequences: Sequences, observer: Observer | None = None) -> Tensor:
    """The hidden states behind the last layer [n_rows, n_embd], in one go; raises ModelFileError."""
    stream = Stream(source, sequences)
    stream.embed()
    for layer in range(source.spec.n_layer):
        stream.pass_layer(layer, observer or Observer())
    return stream.h
