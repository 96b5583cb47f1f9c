"""Evaluates a model against another one, the reference: both predict the same texts, block after block.

Neither model has to fit in memory. Everything is computed in float32, without what a backend's kernels round.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slimoe.converter.forward.head import Head, read_head
from slimoe.converter.forward.layer_states import Progress
from slimoe.converter.forward.routing import Routing
from slimoe.converter.forward.stream import HiddenStates, Observer, Stream
from slimoe.converter.forward.windows import Windows, cut_windows
from slimoe.converter.report.alignment import LayerMap, likely_layer_map
from slimoe.converter.report.quality import Comparison, Floats, Quality, TokenScores, summarise
from slimoe.converter.source.model_source import ModelSource
from slimoe.offload.errors import BadLogitsError, UsageError

TRACED_TOKENS = 4096
"""The number of tokens whose residual streams are kept behind every block of the reference."""


class _SelectedRows(Observer):
    """Keeps the rows of the router that tokens selected, [n_rows, n_used] by layer."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self.by_layer: dict[int, Tensor] = {}

    def routed(self, layer: int, first_row: int, x: Tensor, read: Tensor, routing: Routing) -> None:
        """Adds the routing of a sequence."""
        n, n_used = routing.selected.shape
        selected = self.by_layer.setdefault(layer, torch.empty(self.n_rows, n_used, dtype=torch.int16))
        selected[first_row : first_row + n] = routing.selected


class Reference:
    """The predictions of a model, computed once and compared with those of any number of other models.

    It keeps the last residual stream of scored tokens, the selected experts of all tokens, and the streams of about
    `n_traced` tokens behind all blocks, those of whole windows evenly spread. They lie in memory, or in files of
    `directory`, which `close` deletes.
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
        """Runs the texts through the model; raises ModelFileError, and BadLogitsError for NaN or infinity."""
        self.source, self.windows, self.device, self.directory = source, windows, device, directory
        self._rows = torch.from_numpy(windows.rows)
        spans = list(windows.sequences.spans())
        mean = windows.sequences.n_rows / len(spans)
        n_chosen = min(len(spans), max(1, round(n_traced / mean)))
        chosen = np.unique(np.linspace(0, len(spans) - 1, n_chosen).round().astype(int))
        self._traced = torch.cat([torch.arange(*spans[index]) for index in chosen])
        n_layer, n_embd = source.spec.n_layer, source.spec.n_embd
        self._behind = [HiddenStates(len(self._traced), n_embd, directory) for _ in range(n_layer)]
        self._last = HiddenStates(windows.n_scored, n_embd, directory)
        self._selected = _SelectedRows(windows.sequences.n_rows)
        stream = Stream(source, windows.sequences, device, directory)
        try:
            stream.embed()
            for layer in range(n_layer):
                stream.pass_layer(layer, self._selected)
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
        """Compares a model with the reference. Without `layer_map` it is `likely_layer_map`'s.

        Raises UsageError for a model of other sizes, ModelFileError, and BadLogitsError for NaN or infinity.
        """
        check_alike(model, self.source)
        layer_map = layer_map or likely_layer_map(model, self.source)
        selected = _SelectedRows(self.windows.sequences.n_rows)
        stream = Stream(model, self.windows.sequences, self.device, self.directory)
        try:
            errors = self._pass(stream, selected, layer_map, on_progress)
            last = stream.h[self._rows]
        finally:
            stream.close()
        head = read_head(model, self.device)
        scores = token_scores(head, last, self.windows.targets)
        divergence = divergences(read_head(self.source, self.device), self._last.rows, head, last)
        flips: list[float | None] = [None] * len(self.source.layers)
        for layer, found in selected.by_layer.items():
            block = layer_map.blocks[layer] if layer_map is not None else -1
            rows = layer_map.rows[layer] if layer_map is not None else ()
            if rows and block in self._selected.by_layer:
                flips[block] = flip_rate(self._selected.by_layer[block], torch.tensor(rows)[found.long()])
        n_vocab = self.source.spec.n_vocab
        return Comparison(self.windows, self.scores, scores, divergence, tuple(flips), errors, n_vocab)

    def close(self) -> None:
        """Deletes the files on disk."""
        for states in (*self._behind, self._last):
            states.close()

    def _pass(
        self, stream: Stream, selected: _SelectedRows, layer_map: LayerMap | None, on_progress: Progress
    ) -> tuple[float | None, ...]:
        """Runs a model's stream through all blocks; returns its error behind each block of the reference."""
        n_layer = len(stream.source.layers)
        assert layer_map is None or len(layer_map.blocks) == n_layer
        stream.embed()
        layers = iter(range(n_layer))
        errors: list[float | None] = []
        for block in range(len(self.source.layers)):
            if layer_map is not None and block in layer_map.blocks:
                layer = next(layers)
                stream.pass_layer(layer, selected)
                on_progress(layer + 1, n_layer)
            error = None
            if layer_map is not None:
                expected = self._behind[block].rows.double()
                off = (stream.h[self._traced].double() - expected).square().sum(-1)
                error = float((off / expected.square().sum(-1).clamp(min=1e-30)).mean().sqrt())
            errors.append(error)
        for layer in layers:
            stream.pass_layer(layer, selected)
            on_progress(layer + 1, n_layer)
        return tuple(errors)


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
    """Evaluates a model against the reference, on texts given as tokens by domain.

    Raises UsageError for texts too short and models of other sizes, ModelFileError and BadLogitsError.
    """
    predictions = Reference(reference, cut_windows(texts, length), device=device, directory=directory)
    try:
        return summarise(predictions.compare(model, layer_map))
    finally:
        predictions.close()


def check_alike(model: ModelSource, reference: ModelSource) -> None:
    """Raises UsageError unless two models have equally many tokens and the same embedding size."""
    sizes = [(one.spec.n_vocab, one.spec.n_embd) for one in (model, reference)]
    if sizes[0] != sizes[1]:
        shapes = " and ".join(f"{n_vocab} tokens and embeddings of {n_embd}" for n_vocab, n_embd in sizes)
        raise UsageError(f"{model.path} was not made of {reference.path}: they have {shapes}. Name the model it is of.")


def token_scores(head: Head, h: Tensor, targets: np.ndarray[tuple[int], np.dtype[np.int64]]) -> TokenScores:
    """Scores the prediction of `targets` [n] by residual streams `h` [n, n_embd] behind the last layer.

    Raises BadLogitsError for NaN or infinity.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for rows in head.spans(len(h)):
            logs = head(h[rows].to(head.weight.device)).log_softmax(-1)
            found = logs.gather(1, torch.from_numpy(targets[rows])[:, None].to(logs.device))
            if not bool(found.isfinite().all()):
                raise BadLogitsError
            parts.append((found[:, 0].cpu(), (logs > found).sum(-1).int().cpu(), logs.argmax(-1).int().cpu()))
    return TokenScores(*(torch.cat(part).numpy() for part in zip(*parts, strict=True)))


def divergences(reference: Head, expected: Tensor, model: Head, h: Tensor) -> Floats:
    """KL(reference, model) [n] in nats, from both models' residual streams behind the last layer [n, n_embd]."""
    parts = []
    with torch.no_grad():
        for rows in reference.spans(len(h)):
            wanted = reference(expected[rows].to(reference.weight.device)).log_softmax(-1)
            found = model(h[rows].to(model.weight.device)).log_softmax(-1)
            parts.append((wanted.exp() * (wanted - found)).sum(-1).cpu())
    values: Floats = torch.cat(parts).numpy()
    return values


def flip_rate(wanted: Tensor, found: Tensor) -> float:
    """The part of the selected rows `wanted` [n, k] that are not among `found` [n, m] of the same token."""
    kept = (wanted[:, :, None] == found[:, None, :]).any(-1)
    return 1.0 - float(kept.double().mean())
