"""Heals a written file: the entry point, which trains its small tensors, and puts them into it if that helped."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.forward.head import read_head
from slimoe.converter.forward.stream import Observer, Sequences, Stream
from slimoe.converter.forward.tensor_source import TensorSource
from slimoe.converter.gguf.late_keys import add_late_keys
from slimoe.converter.heal.cost import MAX_STATE_BYTES, heal_cost, memory_of
from slimoe.converter.heal.layers import heal_layers
from slimoe.converter.heal.lesson import HealSettings, HealTexts, Lesson, Progress
from slimoe.converter.heal.saved import Saved, SavedState, restore_trained, trained_arrays
from slimoe.converter.heal.trained import trained_keys
from slimoe.converter.heal.whole import WholeTraining
from slimoe.converter.report.evaluation import check_alike, divergences
from slimoe.converter.source.gguf_source import gguf_source
from slimoe.converter.source.model_source import MatrixKey, ModelSource
from slimoe.offload.errors import ModelFileError
from slimoe.offload.files.regular_file import reason
from slimoe.offload.gguf import keys

LAYER_SHARE = 0.4
"""The part of the time for training layer by layer, where the whole model can be trained after that."""


@dataclass(frozen=True, slots=True)
class Divergences:
    """KL(source, file) in nats per token: the mean of each held-out sequence of the calibration, and of other texts."""

    held_each: NDArray[np.float64]
    other_each: NDArray[np.float64]

    @property
    def held(self) -> float:
        """The mean of the held-out sequences."""
        return float(self.held_each.mean())

    @property
    def other(self) -> float:
        """The mean of other texts' sequences, 0 without any."""
        return float(self.other_each.mean()) if len(self.other_each) else 0.0

    def is_below(self, before: "Divergences") -> bool:
        """Whether it is less on held-out sequences, by more than the standard error, and no more on other texts."""
        less = before.held_each - self.held_each
        error = less.std(ddof=1) / math.sqrt(len(less)) if len(less) > 1 else 0.0
        return bool(less.mean() > error) and self.other <= before.other


@dataclass(frozen=True, slots=True)
class HealReport:
    """What healing reached, or would have: `values` are the trained tensors, none if the file stays as it was."""

    values: Mapping[MatrixKey, NDArray[np.float32]]
    before: Divergences
    after: Divergences
    seconds: float
    n_tokens: int
    is_whole: bool

    @property
    def is_kept(self) -> bool:
        """Whether the file is changed."""
        return bool(self.values)

    @property
    def text(self) -> str:
        """The result in a line."""
        how = "layer by layer and as a whole" if self.is_whole else "layer by layer"
        found = f"KL {self.before.held:.5f} before and {self.after.held:.5f} after, on held-out calibration text"
        if self.before.other:
            found += f"; {self.before.other:.5f} and {self.after.other:.5f} on the evaluation's"
        if self.is_kept:
            return f"healed {how}: {found}"
        return f"Healing is undone, as it did not help: {found}."


def heal(
    source: ModelSource,
    file: Path,
    texts: HealTexts,
    settings: HealSettings,
    blocks: Sequence[int] = (),
    folder: Path | None = None,
    on_progress: Progress = lambda _what, _done, _total: None,
) -> HealReport:
    """Trains the small tensors of a GGUF file against the source, and writes nothing into the file.

    `blocks` are the source's blocks that the file's are of, one to one without any. What is done is saved in `folder`,
    if one is given, and a run of the same goes on there. Raises ModelFileError and UnsupportedModelError for a file
    that cannot be read, UsageError for one of another model, and DoesNotFitError if memory does not suffice.
    """
    opened = gguf_source(file)
    check_alike(opened, source)
    sizes = ((key.name, math.prod(shape)) for key, shape in opened.shapes.items())
    cost = heal_cost(source, opened.spec, sizes, texts)
    available = memory_of(settings.device) if settings.memory is None else settings.memory
    is_whole = cost.is_whole(available)
    model = TensorSource(opened, settings.device)
    model.train(trained_keys(opened))
    lesson = Lesson(source, model, tuple(blocks) or tuple(range(source.spec.n_layer)), texts, settings)
    directory = folder if cost.state_bytes > MAX_STATE_BYTES else None
    state = SavedState(folder, _run_key(source, opened.source_hash, texts, settings))
    return _Healing(lesson, state, directory, is_whole=is_whole).run(on_progress)


class _Healing:
    """The phases of healing, one after the other, and what they need of each other."""

    def __init__(self, lesson: Lesson, state: SavedState, directory: Path | None, *, is_whole: bool) -> None:
        self._lesson, self._state, self._directory, self._is_whole = lesson, state, directory, is_whole
        self._head = read_head(lesson.source, lesson.settings.device)
        self._measured = Sequences(lesson.texts.held + lesson.texts.other)
        self._first = trained_arrays(lesson.model.trained)

    def run(self, on_progress: Progress) -> HealReport:
        """Both phases, the verdict, and what led to it."""
        lesson, settings = self._lesson, self._lesson.settings
        found = self._state.load("whole")
        if found is None:
            before, wanted = self._layers(on_progress)
            arrays = {"wanted": wanted.numpy(), "held": before.held_each, "other": before.other_each}
            self._state.save("whole", Saved(arrays | trained_arrays(lesson.model.trained), {}))
        else:
            restore_trained(lesson.model.trained, found.arrays)
            arrays = {name: found.arrays[name] for name in ("wanted", "held", "other")}
            before, wanted = Divergences(arrays["held"], arrays["other"]), torch.from_numpy(arrays["wanted"])
        if self._is_whole:
            training = WholeTraining(lesson, self._head, wanted, self._state)
            training.run((1 - LAYER_SHARE) * settings.seconds, arrays, on_progress)
        after = self._divergences(wanted, self._states())
        is_kept = after.is_below(before)
        values = {key: one.detach().cpu().numpy() for key, one in lesson.model.trained.items()} if is_kept else {}
        return HealReport(values, before, after, settings.seconds, lesson.texts.n_train, self._is_whole)

    def _layers(self, on_progress: Progress) -> tuple[Divergences, Tensor]:
        """The first phase; returns the divergence before it, and the source's hidden states behind its last layer."""
        lesson, seconds = self._lesson, self._lesson.settings.seconds * (LAYER_SHARE if self._is_whole else 1.0)
        h_before = self._states()
        streams = heal_layers(lesson, seconds, self._state, on_progress, self._directory)
        before = self._divergences(streams.source, h_before, self._first)
        n_measured = self._measured.n_rows
        if not self._divergences(streams.source, streams.model[-n_measured:]).held < before.held:
            restore_trained(lesson.model.trained, self._first)
        return before, streams.source

    def _states(self) -> Tensor:
        """The model's hidden states behind the last layer, of the sequences that are measured on."""
        model = self._lesson.model
        stream = Stream(model, self._measured, model.device, self._directory)
        try:
            stream.embed()
            for layer in range(model.spec.n_layer):
                stream.pass_layer(layer, Observer())
                if not self._is_whole:
                    model.release()
            return stream.h.clone()
        finally:
            stream.close()

    def _divergences(
        self, wanted: Tensor, h: Tensor, trained: Mapping[str, NDArray[np.float32]] | None = None
    ) -> Divergences:
        """KL of the hidden states `h` of what is measured, with the head as it was with the tensors `trained`."""
        lesson, device = self._lesson, self._lesson.settings.device
        now = trained_arrays(lesson.model.trained)
        if trained is not None:
            restore_trained(lesson.model.trained, dict(trained))
        found = divergences(self._head, wanted[-len(h) :], read_head(lesson.model, device), h)
        restore_trained(lesson.model.trained, now)
        each = np.array([found[begin:end].mean(dtype=np.float64) for begin, end in self._measured.spans()])
        n_held = len(lesson.texts.held)
        return Divergences(each[:n_held], each[n_held:])


def _run_key(source: ModelSource, file_hash: str, texts: HealTexts, settings: HealSettings) -> str:
    """What tells a run apart from others whose state could lie in its place."""
    told = [source.source_hash, file_hash, texts.train, texts.held, texts.other, settings.seconds]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def write_healed(file: Path, report: HealReport) -> None:
    """Puts trained tensors into a file, and what healing reached into its header if that has room for late keys.

    The file must be one that nobody reads yet: writing that is interrupted leaves some tensors as they were. Raises
    ModelFileError for a file that cannot be written.
    """
    opened = gguf_source(file)
    try:
        with file.open("r+b") as opened_file:
            for key, values in report.values.items():
                blocks = opened.blocks(key)
                assert blocks is not None
                assert (blocks.n_bytes, blocks.path) == (values.nbytes, file)
                opened_file.seek(blocks.offset)
                opened_file.write(np.ascontiguousarray(values).tobytes())
    except OSError as error:
        raise ModelFileError(file, f"the file cannot be written ({reason(error)}).") from None
    told = {"seconds": round(report.seconds), "tokens": report.n_tokens, "kept": report.is_kept}
    kl = [float(f"{one.held:.5g}") for one in (report.before, report.after)]
    add_late_keys(file, {keys.HEALED: json.dumps({"kl": kl, **told}, separators=(",", ":"))})
