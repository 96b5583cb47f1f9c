"""Runs texts through a model block by block and expert by expert, so that little more than one expert is in memory.

All sequences pass a layer before the next layer is read. What is learnt on the way is an observer's business.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slimoe.converter.forward.block import (
    AttentionPass,
    Expert,
    Router,
    Routing,
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
from slimoe.converter.source.model_source import MatrixKey, ModelSource
from slimoe.offload.files.whole_file import write_error

_ROWS_AT_ONCE = 4096


class Observer:
    """Sees everything of a pass; this one ignores it. Rows of all sequences follow each other, numbered from 0."""

    def attention(self, layer: int, first_row: int, h: Tensor, seen: AttentionPass) -> None:
        """One sequence's stream before attention, and what attention made of it."""

    def routed(self, layer: int, first_row: int, x: Tensor, routing: Routing) -> None:
        """The normalised input of a sequence's router and experts, and the router's answer."""

    def expert(self, layer: int, expert: int, rows: Tensor, x: Tensor, hidden: Tensor, shares: Tensor) -> Tensor | None:
        """Tokens `rows` that chose a stored expert, its input and activations, and what each token's share of it is.

        May return an output in place of the product with `down`, such as that of other weights.
        """

    def output(self, layer: int, expert: int, rows: Tensor, shares: Tensor, output: Tensor) -> None:
        """What the expert answered."""

    def block(self, layer: int, first_row: int, h: Tensor, middle: Tensor, after: Tensor) -> None:
        """A sequence's stream before the block, after its attention, and after its experts."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """The token ids of texts that do not see each other, and the row at which each begins."""

    tokens: tuple[tuple[int, ...], ...]

    @property
    def n_rows(self) -> int:
        """Tokens of all of them."""
        return sum(map(len, self.tokens))

    def spans(self) -> Iterator[tuple[int, int]]:
        """(first row, row after the last) of each."""
        begin = 0
        for tokens in self.tokens:
            yield begin, begin + len(tokens)
            begin += len(tokens)


class HiddenStates:
    """Streams [n_rows, n_embd] float32: in memory, or in a file of `directory` without a name, which leaves nothing."""

    def __init__(self, n_rows: int, n_embd: int, directory: Path | None = None) -> None:
        """Raises UsageError or DoesNotFitError where the file cannot be made."""
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
        """Lets the file go."""
        self.rows = torch.empty(0, 0)


class Stream:
    """The state of a pass between two layers: `h`, and buffers for the stream within a layer."""

    def __init__(
        self, source: ModelSource, sequences: Sequences, device: str = "cpu", directory: Path | None = None
    ) -> None:
        self.source, self.sequences, self.device = source, sequences, device
        self._buffers = [HiddenStates(sequences.n_rows, source.spec.n_embd, directory) for _ in range(4)]
        self.h, self._middle, self._after, self._x = (buffer.rows for buffer in self._buffers)

    def embed(self) -> None:
        """Fills `h` with the tokens' embeddings; raises ModelFileError."""
        table = read_tensor(self.source, MatrixKey("token_embd.weight"))
        tokens = [token for one in self.sequences.tokens for token in one]
        torch.index_select(table, 0, torch.tensor(tokens), out=self.h)

    def pass_layer(self, layer: int, observer: Observer, experts: Callable[[int], Expert] | None = None) -> None:
        """Moves `h` behind a layer. `experts` gives other weights for a stored expert than the model's.

        Raises ModelFileError.
        """
        with torch.no_grad():
            self._attention(layer, observer)
            router = read_router(self.source, layer, self.device)
            if router is not None:
                self._mix(layer, self._route(layer, router, observer), observer, experts or self._reader(layer))
            elif self.source.layers[layer].has_ffn:
                self._dense(layer)
        for begin, end in self.sequences.spans():
            observer.block(layer, begin, self.h[begin:end], self._middle[begin:end], self._after[begin:end])
        self.h, self._after = self._after, self.h

    def _reader(self, layer: int) -> Callable[[int], Expert]:
        return lambda expert: read_expert(self.source, layer, expert, self.device)

    def _attention(self, layer: int, observer: Observer) -> None:
        block = read_attention(self.source, layer, self.device)
        for begin, end in self.sequences.spans():
            h = self.h[begin:end].to(self.device)
            if block is not None:
                seen = attend(block, self.source.spec, h)
                observer.attention(layer, begin, h, seen)
                h = h + seen.update
            self._middle[begin:end] = self._after[begin:end] = h

    def _route(self, layer: int, router: Router, observer: Observer) -> Routing:
        found = []
        for begin, end in self.sequences.spans():
            x = rms_norm(self._middle[begin:end].to(self.device), router.norm, self.source.spec.rms_eps)
            self._x[begin:end] = x
            found.append(route(router.weight, self.source.spec, x))
            observer.routed(layer, begin, x, found[-1])
        parts = zip(*((one.logits, one.probabilities, one.picks, one.shares) for one in found), strict=True)
        return Routing(*(torch.cat(part).cpu() for part in parts))

    def _mix(self, layer: int, routing: Routing, observer: Observer, experts: Callable[[int], Expert]) -> None:
        for expert, rows, shares in picks_by_expert(self.source.layers[layer].target, routing):
            if expert < 0:
                novice = read_tensor(self.source, MatrixKey(f"blk.{layer}.ffn_novice.weight", -1 - expert))
                self._after.index_add_(0, rows, shares[:, None] * novice)
                continue
            weights = experts(expert)
            for part, of_part in zip(rows.split(_ROWS_AT_ONCE), shares.split(_ROWS_AT_ONCE), strict=True):
                x, share = self._x[part].to(self.device), of_part.to(self.device)
                hidden = weights.hidden(x)
                other = observer.expert(layer, expert, part, x, hidden, share)
                output = weights.down(hidden) if other is None else other
                observer.output(layer, expert, part, share, output)
                self._after.index_add_(0, part, (share[:, None] * output).cpu())

    def _dense(self, layer: int) -> None:
        norm, expert = read_dense(self.source, layer, self.device)
        for begin in range(0, self.sequences.n_rows, _ROWS_AT_ONCE):
            rows = slice(begin, begin + _ROWS_AT_ONCE)
            x = rms_norm(self._middle[rows].to(self.device), norm, self.source.spec.rms_eps)
            self._after[rows] += expert(x).cpu()

    def close(self) -> None:
        """Lets go what lies on disk."""
        for buffer in self._buffers:
            buffer.close()


def picks_by_expert(target: Sequence[int], routing: Routing) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, rows that chose it, their shares) of every chosen expert, constant ones as -1 - n."""
    means = torch.tensor(target)[routing.picks]
    for expert in means.unique().tolist():
        rows, ranks = torch.nonzero(means == expert, as_tuple=True)
        yield expert, rows, routing.shares[rows, ranks]


def final_logits(source: ModelSource, h: Tensor) -> Tensor:
    """Logits [n, n_vocab] of streams behind the last layer; raises ModelFileError."""
    return read_head(source)(h)


def run(source: ModelSource, sequences: Sequences, observer: Observer | None = None) -> Tensor:
    """The streams behind the last layer [n_rows, n_embd], in one go; raises ModelFileError."""
    stream = Stream(source, sequences)
    stream.embed()
    for layer in range(source.spec.n_layer):
        stream.pass_layer(layer, observer or Observer())
    return stream.h
