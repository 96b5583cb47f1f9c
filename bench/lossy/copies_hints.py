"""Measures what saving on each expert of a file of two copies costs, and writes that into a copy of the file.

For each expert the texts are read once with its low-bit copy wherever it is selected, and once without it; the rise of
the KL divergence from the file's best copies is the hint. So many readings suit small models only.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.baselines.stepping import kl_divergence
from bench.lossy.copies_scores import Text, tiers_within
from slimoe.converter.gguf.header import HeaderTensor, pack_header
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.slots import LowSlots
from slimoe.offload.engine import Engine
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.lossy.decision import Choice, Decision, Memory, unchanged, without
from slimoe.offload.lossy.loss import LossTable, loss_tables
from slimoe.offload.lossy.modes import Lossy
from slimoe.offload.model.experts import ExpertLayer
from slimoe.offload.model.native_format import layout_metadata, read_layout
from slimoe.offload.model.native_layout import LayerHints
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.plan.engine_config import ContextConfig, DeviceConfig, EngineConfig
from slimoe.offload.plan.engine_plan import plan_engine

Array = np.ndarray[Any, Any]
_ROOM = 1 << 40


class Probe:
    """A lossy mode that saves on one expert, `key`, by its low-bit copy, or by leaving it out if it `skips`.

    Meanwhile it sums up how often each expert is selected, and the squares of its weights, by layer.
    """

    low_slots: LowSlots = "first"
    invests = False
    is_steady = True

    def __init__(self, layers: Sequence[ExpertLayer | None]) -> None:
        self.key: Key = (-1, -1)
        self.skips = False
        self.uses = [np.zeros(0 if layer is None else len(layer.experts)) for layer in layers]
        self.squares = [counts.copy() for counts in self.uses]

    def choose(self, choice: Choice, memory: Memory) -> Decision:
        """Every expert's best copy, but for the one expert."""
        index, stored = choice.index, choice.stored
        np.add.at(self.uses[index], stored[stored >= 0], 1)
        np.add.at(self.squares[index], stored[stored >= 0], choice.weights[stored >= 0].astype(np.float64) ** 2)
        if index != self.key[0]:
            return unchanged(choice)
        is_chosen = stored == self.key[1]
        if self.skips:
            return without(choice, is_chosen, np.zeros_like(stored), constants=False)
        return Decision(np.where(is_chosen, choice.table.last_copy[self.key[1]], 0), stored)

    def prefetch_copy(self, key: Key, table: LossTable, memory: Memory) -> int:
        """The best copy: everything is in memory."""
        return 0


def measure_hints(model: Path, texts: Sequence[Text], n_threads: int, say: Callable[[str], None]) -> list[LayerHints]:
    """Hints of every layer from texts whose references do not matter; the model must fit into memory in both copies."""
    n_ctx = max(256, max(len(text.tokens) for text in texts))
    plan = plan_engine(
        EngineConfig(
            model,
            n_threads=n_threads,
            context=ContextConfig(n_ctx=n_ctx, n_batch=n_ctx),
            devices=DeviceConfig(device="none"),
        )
    )
    probe = Probe(plan.layers)
    plan = replace(plan, lossy=Lossy(probe, loss_tables(plan.layers), ""))
    plan = replace(plan, tiers=tiers_within(plan, _ROOM), n_batch=n_ctx)
    with closing(Engine(EngineConfig(model, n_threads=n_threads), plan, lambda done, total: None)) as engine:

        def read() -> Array:
            rows = []
            for text in texts:
                engine.truncate(0)
                rows.append(engine.read(text.tokens, len(text.tokens)).copy())
            return np.concatenate(rows)

        expected = read()
        n_tokens = sum(len(text.tokens) for text in texts)
        uses, squares = ([one / n_tokens for one in counts] for counts in (probe.uses, probe.squares))
        hints = []
        for index, layer in enumerate(plan.layers):
            say(f"hints of layer {index}")
            rises: dict[bool, list[float]] = {False: [], True: []}
            for expert in range(0 if layer is None else len(layer.experts)):
                for probe.skips, found in rises.items():
                    probe.key = (index, expert)
                    pairs = zip(read(), expected, strict=True)
                    found.append(float(np.mean([max(0.0, kl_divergence(*pair)) for pair in pairs])))
            use, square = uses[index], squares[index]
            hints.append(
                LayerHints(
                    use=tuple(use.tolist()),
                    share_square=tuple((square / np.maximum(use, 1e-9)).tolist()),
                    error=tuple((0.0, rise) for rise in rises[False]),
                    skip_error=tuple(rises[True]),
                    sensitivity=float(sum(rises[True]) / square.sum()) if square.sum() else 0.0,
                )
            )
    return hints


def write_hints(model: Path, target: Path, hints: Sequence[LayerHints]) -> None:
    """A copy of a native file with other hints."""
    gguf = read_gguf(model)
    layout = read_layout(gguf, ModelSpec.from_gguf(gguf))
    pairs = zip(layout.layers, hints, strict=True)
    layout = replace(layout, layers=tuple(replace(layer, hints=hint) for layer, hint in pairs))
    metadata = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in gguf.metadata.items()}
    begin = min(tensor.offset for tensor in gguf.tensors.values())
    tensors = [HeaderTensor(one.name, one.ne, one.type, one.offset - begin) for one in gguf.tensors.values()]
    with model.open("rb") as source, target.open("wb") as copy:
        copy.write(pack_header(metadata | layout_metadata(layout), tensors))
        source.seek(begin)
        while data := source.read(1 << 24):
            copy.write(data)
