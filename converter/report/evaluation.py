"""Evaluates any model against another, the reference: both predict the same texts, block by block, so that
neither is in memory.

Weights are compared, in float32: what a backend's kernels round on top is not seen here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slimoe.converter.forward.block import Head, Routing, read_head
from slimoe.converter.forward.layer_states import Progress
from slimoe.converter.forward.stream import HiddenStates, Observer, Stream
from slimoe.converter.forward.windows import Windows, cut_windows
from slimoe.converter.report.alignment import LayerMap, likely_layer_map
from slimoe.converter.report.quality import Comparison, Floats, Quality, TokenScores, summarise
from slimoe.converter.source.model_source import ModelSource
from slimoe.offload.errors import BadLogitsError, UsageError

TRACED_TOKENS = 4096
"""So many tokens' streams are kept behind every block of the reference."""


class _Picks(Observer):
    """Keeps which rows of the router tokens picked, [n_rows, n_used] by layer."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self.by_layer: dict[int, Tensor] = {}

    def routed(self, layer: int, first_row: int, x: Tensor, routing: Routing) -> None:
        """Adds a sequence."""
        n, n_used = routing.selected.shape
        picks = self.by_layer.setdefault(layer, torch.empty(self.n_rows, n_used, dtype=torch.int16))
        picks[first_row : first_row + n] = routing.selected


class Reference:
    """A model's own answers, computed once and compared with those of any number of others.

    Kept are the last streams of scored tokens, all picks, and the streams of `n_traced` tokens, whole windows evenly
    spread, behind all blocks: in memory, or in files of `directory` that closing deletes.
    """

    def __init__(
        self,
        source: ModelSource,
        windows: Windows,
        *,
        device: str = "cpu",
        directory: Path | None = None,
        n_traced: int = TRACED_TOKENS,
        on_progress: Progress = lambda _done, _total: None,
    ) -> None:
        """Runs the texts through the model; raises ModelFileError, and BadLogitsError for a model without numbers."""
        self.source, self.windows, self.device, self.directory = source, windows, device, directory
        self._rows = torch.from_numpy(windows.rows)
        self._traced = _spread(windows, n_traced)
        n_layer, n_embd = source.spec.n_layer, source.spec.n_embd
        self._behind = [HiddenStates(len(self._traced), n_embd, directory) for _ in range(n_layer)]
        self._last = HiddenStates(windows.n_scored, n_embd, directory)
        self._picks = _Picks(windows.sequences.n_rows)
        stream = Stream(source, windows.sequences, device, directory)
        try:
            stream.embed()
            for layer in range(n_layer):
                stream.pass_layer(layer, self._picks)
                torch.index_select(stream.h, 0, self._traced, out=self._behind[layer].rows)
                on_progress(layer + 1, n_layer)
            torch.index_select(stream.h, 0, self._rows, out=self._last.rows)
        except BaseException:
            self.close()
            raise
        finally:
            stream.close()
        self.scores = token_scores(read_head(source, device), self._last.rows, windows.targets)

    def compare(
        self,
        model: ModelSource,
        layer_map: LayerMap | None = None,
        on_progress: Progress = lambda _done, _total: None,
    ) -> Comparison:
        """The model beside the reference. Without `layer_map` it is `likely_layer_map`'s.

        Raises UsageError for a model of other sizes, ModelFileError, and BadLogitsError for one without numbers.
        """
        check_alike(model, self.source)
        layer_map = layer_map or likely_layer_map(model, self.source)
        picks = _Picks(self.windows.sequences.n_rows)
        stream = Stream(model, self.windows.sequences, self.device, self.directory)
        try:
            errors = self._pass(stream, picks, layer_map, on_progress)
            last = stream.h[self._rows]
        finally:
            stream.close()
        head = read_head(model, self.device)
        scores = token_scores(head, last, self.windows.targets)
        divergence = divergences(read_head(self.source, self.device), self._last.rows, head, last)
        flips, n_vocab = self._flips(picks, layer_map), self.source.spec.n_vocab
        return Comparison(self.windows, self.scores, scores, divergence, flips, errors, n_vocab)

    def close(self) -> None:
        """Deletes what lies on disk."""
        for states in (*self._behind, self._last):
            states.close()

    def _pass(
        self, stream: Stream, picks: _Picks, layer_map: LayerMap | None, on_progress: Progress
    ) -> tuple[float | None, ...]:
        """Moves a model's stream behind its last block; the errors behind each of the reference's."""
        n_layer = len(stream.source.layers)
        assert layer_map is None or len(layer_map.blocks) == n_layer
        stream.embed()
        layers = iter(range(n_layer))
        errors: list[float | None] = []
        for block in range(len(self.source.layers)):
            if layer_map is not None and block in layer_map.blocks:
                layer = next(layers)
                stream.pass_layer(layer, picks)
                on_progress(layer + 1, n_layer)
            errors.append(None if layer_map is None else self._error(block, stream.h))
        for layer in layers:
            stream.pass_layer(layer, picks)
            on_progress(layer + 1, n_layer)
        return tuple(errors)

    def _error(self, block: int, h: Tensor) -> float:
        expected = self._behind[block].rows.double()
        off = (h[self._traced].double() - expected).square().sum(-1)
        return float((off / expected.square().sum(-1).clamp(min=1e-30)).mean().sqrt())

    def _flips(self, picks: _Picks, layer_map: LayerMap | None) -> tuple[float | None, ...]:
        flips: list[float | None] = [None] * len(self.source.layers)
        for layer, found in picks.by_layer.items():
            block = layer_map.blocks[layer] if layer_map is not None else -1
            rows = layer_map.rows[layer] if layer_map is not None else ()
            if rows and block in self._picks.by_layer:
                flips[block] = flip_rate(self._picks.by_layer[block], torch.tensor(rows)[found.long()])
        return tuple(flips)


def evaluate(
    model: ModelSource,
    reference: ModelSource,
    texts: Mapping[str, Sequence[int]],
    *,
    layer_map: LayerMap | None = None,
    length: int = 512,
    device: str = "cpu",
    directory: Path | None = None,
) -> Quality:
    """What a model lost against the reference, on texts given as tokens by domain.

    Raises UsageError for texts too short and models of other sizes, ModelFileError and BadLogitsError.
    """
    answers = Reference(reference, cut_windows(texts, length), device=device, directory=directory)
    try:
        return summarise(answers.compare(model, layer_map))
    finally:
        answers.close()


def check_alike(model: ModelSource, reference: ModelSource) -> None:
    """Raises UsageError unless two models have the same tokens and the same width."""
    sizes = [(one.spec.n_vocab, one.spec.n_embd) for one in (model, reference)]
    if sizes[0] != sizes[1]:
        shapes = " and ".join(f"{n_vocab} tokens and a stream of {n_embd}" for n_vocab, n_embd in sizes)
        raise UsageError(f"{model.path} was not made of {reference.path}: they have {shapes}. Name the model it is of.")


def token_scores(head: Head, h: Tensor, targets: np.ndarray[tuple[int], np.dtype[np.int64]]) -> TokenScores:
    """How streams behind the last layer predict the targets; raises BadLogitsError for what is no number."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for rows in head.spans(len(h)):
            logs = head(h[rows].to(head.weight.device)).log_softmax(-1)
            aims = torch.from_numpy(targets[rows])[:, None].to(logs.device)
            found = logs.gather(1, aims)
            if not bool(found.isfinite().all()):
                raise BadLogitsError
            parts.append((found[:, 0].cpu(), (logs > found).sum(-1).int().cpu(), logs.argmax(-1).int().cpu()))
    return TokenScores(*(torch.cat(part).numpy() for part in zip(*parts, strict=True)))


def divergences(reference: Head, expected: Tensor, model: Head, h: Tensor) -> Floats:
    """KL(reference, model) in nats of each row, from their streams behind the last layer [n, n_embd]."""
    parts = []
    with torch.no_grad():
        for rows in reference.spans(len(h)):
            wanted = reference(expected[rows].to(reference.weight.device)).log_softmax(-1)
            found = model(h[rows].to(model.weight.device)).log_softmax(-1)
            parts.append((wanted.exp() * (wanted - found)).sum(-1).cpu())
    values: Floats = torch.cat(parts).numpy()
    return values


def flip_rate(wanted: Tensor, found: Tensor) -> float:
    """The share of the picks `wanted` [n, k] that are not among `found` [n, m] of the same token."""
    kept = (wanted[:, :, None] == found[:, None, :]).any(-1)
    return 1.0 - float(kept.double().mean())


def _spread(windows: Windows, n_traced: int) -> Tensor:
    """Rows of whole windows, evenly spread, of at least so many tokens."""
    spans = list(windows.sequences.spans())
    mean = windows.sequences.n_rows / len(spans)
    n_chosen = min(len(spans), max(1, round(n_traced / mean)))
    chosen = np.unique(np.linspace(0, len(spans) - 1, n_chosen).round().astype(int))
    return torch.cat([torch.arange(*spans[index]) for index in chosen])
