"""What one layer of a model computes, token by token and expert by expert; and models with experts taken away."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from slimoe.converter.forward.block import read_expert
from slimoe.converter.forward.routing import Routing
from slimoe.converter.forward.stream import Observer, Sequences, final_logits, run
from slimoe.converter.forward.texts import CalibrationText
from slimoe.converter.methods.expert_drop import Survivors
from slimoe.converter.source.model_source import SourceLayer, block_key, constant_key, expert_key
from slimoe.converter.stats.forward_pass import CalibrationSettings, calibrate
from slimoe.converter.stats.observer import Samples
from slimoe.converter.stats.statistics import Statistics
from tests.models.held_model import HeldModel, hold, random_mixtral
from tests.models.tiny_checkpoint import TinyConfig

Array = NDArray[np.float64]

SIZES = TinyConfig(n_layer=3, n_embd=32, n_ff=40, n_head=4, n_head_kv=2, n_vocab=64, n_expert=5, n_expert_used=2)
BIAS = 1000.0


def random_texts(n_vocab: int, *lengths: int) -> Sequences:
    rng = np.random.default_rng(7)
    return Sequences(tuple(tuple(rng.integers(0, n_vocab, length).tolist()) for length in lengths))


TEXTS = random_texts(SIZES.n_vocab, 40, 25, 31)


def biased_model(sizes: TinyConfig = SIZES, seed: int = 0) -> HeldModel:
    """A random model whose embeddings' first component is so large that it stays the same for every token.

    Norms make it a constant of the size of the others; so experts have a bias, and routers can have one.
    """
    model = hold(random_mixtral(sizes, spread=0.2, seed=seed))
    changed = {}
    for key, matrix in model.matrices.items():
        new = matrix.copy()
        if key.name.endswith("norm.weight"):
            new[1:] *= BIAS / np.sqrt(sizes.n_embd)
            new[0] = 0.0 if key.name.startswith("output") else 1 / np.sqrt(sizes.n_embd)
        elif key.name == "token_embd.weight":
            new[:, 0] = BIAS
        elif "attn_output" in key.name or "ffn_down" in key.name:
            new[0] = 0.0
        elif "gate_inp" in key.name:
            new[:, 0] = 0.0
        changed[key] = new
    return model.changed(changed)


def learn(model: HeldModel, directory: Path, texts: Sequences = TEXTS, n_sensitivity: int = 0) -> Statistics:
    """Statistics of texts; Gram matrices have all tokens, sensitivities are of the first `n_sensitivity`."""
    text = CalibrationText(texts.tokens, ("text",) * len(texts.tokens))
    samples = Samples(types=(), n_gram=texts.n_rows)
    return calibrate(model, text, CalibrationSettings(samples, n_sensitivity), directory)


def logits(model: HeldModel, texts: Sequences = TEXTS) -> torch.Tensor:
    return final_logits(model, run(model, texts))


def divergence(model: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL divergence in nats of the other's predictions from the model's, both as logits [T, n_vocab]."""
    one, two = (part.double().log_softmax(-1) for part in (model, other))
    return float((one.exp() * (one - two)).sum(-1).mean())


@dataclass(frozen=True, slots=True)
class NaiveLayer:
    """What a layer of experts computes for T tokens.

    It reads `x` [T, d] and adds to `middle` [T, d]. `logits` [T, R], `selected` experts and their `weights` [T, k],
    `outputs` [T, E, d] of all experts for all tokens, `y` [T, d] their weighted sum.
    """

    x: Array
    middle: Array
    logits: Array
    selected: NDArray[np.int64]
    weights: Array
    outputs: Array
    y: Array

    def mixed(self, weights: Array) -> Array:
        """The sum [T, d] for other weights [T, E] of all experts."""
        return np.stack([weight @ outputs for weight, outputs in zip(weights, self.outputs, strict=True)])

    def by_expert(self) -> Array:
        """The weights [T, E] of all experts, 0 where one is not selected, where row and expert are the same."""
        result = np.zeros(self.logits.shape)
        for token, (selected, weights) in enumerate(zip(self.selected, self.weights, strict=True)):
            for expert, weight in zip(selected, weights, strict=True):
                result[token, expert] += weight
        return result


class _Watch(Observer):
    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.seen: list[tuple[torch.Tensor, Routing]] = []
        self.streams: list[tuple[torch.Tensor, torch.Tensor]] = []

    def routed(self, layer: int, first_row: int, x: torch.Tensor, read: torch.Tensor, routing: Routing) -> None:
        if layer == self.layer:
            self.seen.append((x.clone(), routing))

    def block(self, layer: int, first_row: int, h: torch.Tensor, middle: torch.Tensor, after: torch.Tensor) -> None:
        if layer == self.layer:
            self.streams.append((middle.clone(), after.clone()))


def naive_layer(model: HeldModel, layer: int, texts: Sequences = TEXTS) -> NaiveLayer:
    watch = _Watch(layer)
    run(model, texts, watch)
    x = torch.cat([one for one, _ in watch.seen])
    middle, after = (torch.cat(part).double().numpy() for part in zip(*watch.streams, strict=True))
    outputs = [read_expert(model, layer, expert)(x).double() for expert in range(model.layers[layer].n_stored)]
    routing = [torch.cat([getattr(one, name) for _, one in watch.seen]) for name in ("logits", "selected", "weights")]
    return NaiveLayer(
        x.double().numpy(),
        middle,
        routing[0].double().numpy(),
        routing[1].numpy(),
        routing[2].double().numpy(),
        torch.stack(outputs, 1).numpy(),
        after - middle,
    )


def without_experts(
    model: HeldModel, layer: int, survivors: Survivors, constants: NDArray[np.float32] | None = None
) -> HeldModel:
    """The model with one layer's experts as `survivors` says, and `constants` [n, d] in place of others."""
    router = block_key(layer, "ffn_gate_inp")
    changed = {router: model.matrices[router][list(survivors.rows)]}
    for new, old in enumerate(survivors.experts):
        for name in ("gate", "up", "down"):
            changed[expert_key(layer, name, new)] = model.matrices[expert_key(layer, name, old)]
    for index, constant in enumerate(() if constants is None else constants):
        changed[constant_key(layer, index)] = constant
    held = replace(model.layers[layer], n_stored=len(survivors.experts), target=survivors.target)
    return model.changed(changed).with_layer(layer, held)


def with_aliases(model: HeldModel, layer: int, target: Sequence[int]) -> HeldModel:
    """The model with one layer's router rows meaning other experts."""
    return model.with_layer(layer, SourceLayer(max(target) + 1, tuple(target)))
