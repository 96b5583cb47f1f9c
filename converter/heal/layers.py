"""Healing layer by layer: each is trained to put out what its source's layer does, whatever those before it changed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slimoe.converter.forward.stream import Observer, Stream
from slimoe.converter.forward.whole_block import pass_block
from slimoe.converter.heal.lesson import N_BATCH, Lesson, Progress
from slimoe.converter.heal.saved import Saved, SavedState, restore_trained, trained_arrays
from slimoe.converter.heal.trained import SLOWER, Adam, of_layer

LAYERS = "healing layer by layer"
RATE = 0.01
_ROUNDS = 2
"""Parts of a layer's time, after each of which it is measured."""


@dataclass(frozen=True, slots=True)
class LayerStreams:
    """Hidden states [n_rows, n_embd] behind the last layer, of the source and of the model with healed layers."""

    source: Tensor
    model: Tensor


def heal_layers(
    lesson: Lesson,
    seconds: float,
    state: SavedState,
    on_progress: Progress = lambda _what, _done, _total: None,
    directory: Path | None = None,
) -> LayerStreams:
    """Trains all layers, each for its part of the time, and keeps what lowers its error on held-out sequences.

    Goes on behind the last layer that `state` has. Both models' streams lie in `directory`, or in memory without one.
    Raises ModelFileError.
    """
    source, model, n_layer = lesson.source, lesson.model, lesson.model.spec.n_layer
    sequences, device = lesson.texts.sequences, lesson.settings.device
    streams = Stream(source, sequences, device, directory), Stream(model, sequences, device, directory)
    names = ("source", "model")
    try:
        found = state.load("layers")
        if found is None:
            for stream in streams:
                stream.embed()
        else:
            for stream, name in zip(streams, names, strict=True):
                stream.h.copy_(torch.from_numpy(found.arrays[name]))
            restore_trained(model.trained, found.arrays)
        n_done, rate = (0, RATE) if found is None else (int(found.numbers["n_done"]), found.numbers["rate"])
        for layer in range(n_done, n_layer):
            # What parts of the source are missing behind a layer it is to make up for as well.
            begin = lesson.blocks[layer] if layer else 0
            end = lesson.blocks[layer + 1] if layer + 1 < n_layer else source.spec.n_layer
            for block in range(begin, end):
                streams[0].pass_layer(block, Observer())
            rate = _heal_layer(lesson, layer, streams[1].h, streams[0].h, seconds / n_layer, rate)
            streams[1].pass_layer(layer, Observer())
            model.release()
            arrays = {name: stream.h.numpy() for name, stream in zip(names, streams, strict=True)}
            state.save("layers", Saved(arrays | trained_arrays(model.trained), {"n_done": layer + 1, "rate": rate}))
            on_progress(LAYERS, layer + 1, n_layer)
        return LayerStreams(*(stream.h.clone() for stream in streams))
    finally:
        for stream in streams:
            stream.close()


def _heal_layer(lesson: Lesson, layer: int, h: Tensor, wanted: Tensor, seconds: float, rate: float) -> float:
    """Trains one layer, whose input is `h` [n_rows, n_embd], towards the output `wanted` [n_rows, n_embd].

    Returns the rate for the next layer, which is less than the given one if that led to nothing better.
    """
    tensors = [lesson.model.trained[key] for key in of_layer(tuple(lesson.model.trained), layer)]
    if not tensors:
        return rate
    device, clock = lesson.settings.device, lesson.settings.clock
    spans, n_train = list(lesson.texts.sequences.spans()), len(lesson.texts.train)
    held = range(n_train, n_train + len(lesson.texts.held))

    def error(chosen: "list[int] | np.ndarray") -> Tensor:
        """The sum of the squared errors behind the layer, of some sequences."""
        rows = torch.cat([torch.arange(*spans[index]) for index in chosen])
        lengths = [spans[index][1] - spans[index][0] for index in chosen]
        after = pass_block(lesson.model, layer, h[rows].to(device), lengths)
        return (after - wanted[rows].to(device)).square().sum()

    def held_error() -> float:
        with torch.no_grad():
            return sum(float(error([index])) for index in held)

    best, draw = held_error(), np.random.default_rng(layer)
    for _ in range(_ROUNDS):
        copies = [one.detach().clone() for one in tensors]
        adam, begin = Adam(tensors, rate), clock()
        while (part := _ROUNDS * (clock() - begin) / seconds) < 1:
            adam.step(error(draw.choice(n_train, min(N_BATCH, n_train), replace=False)), 1 - part)
        found = held_error()
        if found < best:
            best = found
            continue
        rate /= SLOWER
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)
    return rate
