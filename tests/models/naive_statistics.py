"""What a calibration must find, from transformers' own forward in double precision and a loop over tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass
class SeenLayer:
    """Rows of all sequences: streams before the block, after attention and after it; inputs; attention received."""

    h: list[Array] = field(default_factory=list)
    attention_input: list[Array] = field(default_factory=list)
    mixed: list[Array] = field(default_factory=list)
    received: list[Array] = field(default_factory=list)
    middle: list[Array] = field(default_factory=list)
    x: list[Array] = field(default_factory=list)
    after: list[Array] = field(default_factory=list)


class NaiveModel:
    """A checkpoint in transformers, and everything its layers saw of some sequences."""

    def __init__(self, path: Path, tokens: Sequence[Sequence[int]]) -> None:
        kind = transformers.MixtralForCausalLM
        implementations = {"attn_implementation": "eager", "experts_implementation": "eager"}
        self.model = kind.from_pretrained(path, dtype=torch.float64, **implementations)
        self.n_used = self.model.config.num_experts_per_tok
        self.layers = [SeenLayer() for _ in self.model.model.layers]
        self.lengths = [len(one) for one in tokens]
        self.last: list[Array] = []
        self._watch()
        with torch.no_grad():
            for one in tokens:
                self.model(torch.tensor([one]))

    def _watch(self) -> None:
        self.model.lm_head.register_forward_pre_hook(lambda _, inputs: self.last.append(inputs[0][0].numpy()))
        for seen, layer in zip(self.layers, self.model.model.layers, strict=True):
            layer.register_forward_pre_hook(_keep_input(seen.h))
            layer.self_attn.o_proj.register_forward_pre_hook(_keep_input(seen.mixed))
            layer.self_attn.register_forward_hook(_keep_weights(seen.received))
            layer.input_layernorm.register_forward_hook(_keep_output(seen.attention_input))
            layer.post_attention_layernorm.register_forward_pre_hook(_keep_input(seen.middle))
            layer.post_attention_layernorm.register_forward_hook(_keep_output(seen.x))
            layer.register_forward_hook(_keep_output(seen.after))

    def router(self, layer: int) -> Array:
        """The router's matrix [R, n_embd]."""
        weight: Array = self.model.model.layers[layer].mlp.gate.weight.detach().numpy()
        return weight

    def matrices(self, layer: int, expert: int) -> tuple[Array, Array, Array]:
        """gate, up and down of an expert."""
        experts = self.model.model.layers[layer].mlp.experts
        gate, up = experts.gate_up_proj[expert].detach().chunk(2)
        return gate.numpy(), up.numpy(), experts.down_proj[expert].detach().numpy()

    def select(self, layer: int, x: Array) -> tuple[Array, Array, Array, Array]:
        """(logits, probabilities, selected experts, expert weights) of one token."""
        logits = self.router(layer) @ x
        exponentials = np.exp(logits - logits.max())
        probabilities = exponentials / exponentials.sum()
        order = np.argsort(-probabilities)[: self.n_used]
        return logits, probabilities, order, probabilities[order] / probabilities[order].sum()


def _keep_input(into: list[Array]) -> Any:
    def keep(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        into.append(inputs[0][0].numpy())

    return keep


def _keep_output(into: list[Array]) -> Any:
    def keep(_module: object, _inputs: object, output: Any) -> None:
        into.append((output[0] if output.ndim == 3 else output).numpy())

    return keep


def _keep_weights(into: list[Array]) -> Any:
    def keep(_module: object, _inputs: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        into.append(output[1][0].sum((0, 1)).numpy())

    return keep


def hidden_and_output(matrices: tuple[Array, Array, Array], x: Array) -> tuple[Array, Array]:
    """An expert's activations and answer for one token."""
    gate, up, down = matrices
    z = gate @ x
    hidden = z / (1 + np.exp(-z)) * (up @ x)
    return hidden, down @ hidden


def cosine(a: Array, b: Array) -> float:
    """The cosine between two vectors."""
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def expected_sums(naive: NaiveModel, layer: int) -> dict[str, Any]:
    """Everything of `LayerStatistics` but samples and sensitivity, by the names of its arrays."""
    seen, n_used, n_layer = naive.layers[layer], naive.n_used, len(naive.layers)
    h, middle, x, after = (np.concatenate(part) for part in (seen.h, seen.middle, seen.x, seen.after))
    n_tokens, n_embd = x.shape
    n_expert, n_ff = len(naive.router(layer)), naive.matrices(layer, 0)[0].shape[0]
    one = {name: np.zeros(n_expert) for name in ("probability", "share", "share_square", "picked_probability", "logit")}
    router: dict[str, Any] = one | {
        "rank_count": np.zeros((n_expert, n_used)),
        "ratio_bins": np.zeros(1024),
        "top_bins": np.zeros(1024),
        "together": np.zeros((n_expert, n_expert)),
        "logit_product": np.zeros((n_expert, n_expert)),
        "ahead_hits": np.zeros((3, n_used, n_used)),
        "to_next": np.zeros((n_expert, n_expert if layer + 1 < n_layer else 0)),
        "to_next_token": np.zeros((n_expert, n_expert)),
    }
    scalars = ("n_pick", "norm", "norm_square", "share_norm", "share_square_norm_square", "largest", "share_square")
    outputs: dict[str, Any] = {name: np.zeros(n_expert) for name in scalars}
    vectors = ("output", "output_square", "share_output", "share_square_output")
    outputs |= {name: np.zeros((n_expert, n_embd)) for name in vectors}
    inputs = {
        "expert": np.zeros((n_expert, n_embd)),
        "hidden": np.zeros((n_expert, n_ff)),
        "attention": (np.concatenate(seen.attention_input) ** 2).sum(0),
        "mixed": (np.concatenate(seen.mixed) ** 2).sum(0),
        "router": (x**2).sum(0),
    }
    similarity = dict.fromkeys(("block", "attention", "ffn", "input_output"), 0.0)
    update = 0.0
    trace: dict[str, Any] = {"picks": [], "shares": []}
    ends = set(np.cumsum(naive.lengths) - 1)
    for t in range(n_tokens):
        y = after[t] - middle[t]
        similarity["block"] += cosine(h[t], after[t])
        similarity["attention"] += cosine(h[t], middle[t])
        similarity["ffn"] += cosine(middle[t], after[t])
        similarity["input_output"] += cosine(x[t], y)
        update += (y @ y) / (middle[t] @ middle[t])
        logits, probabilities, selected, weights = naive.select(layer, x[t])
        trace["picks"].append(selected)
        trace["shares"].append(weights)
        router["probability"] += probabilities
        router["logit"] += logits
        router["logit_product"] += np.outer(logits, logits)
        router["top_bins"][min(int(weights[0] * 1024), 1023)] += 1
        if n_used > 1:
            router["ratio_bins"][min(int(weights[1] / weights[0] * 1024), 1023)] += 1
        for rank, (expert, weight) in enumerate(zip(selected, weights, strict=True)):
            router["rank_count"][expert, rank] += 1
            router["share"][expert] += weight
            router["share_square"][expert] += weight**2
            router["picked_probability"][expert] += probabilities[expert]
            for other in selected:
                router["together"][expert, other] += 1
            hidden, f = hidden_and_output(naive.matrices(layer, expert), x[t])
            norm = np.linalg.norm(f)
            values = (1, norm, norm**2, weight * norm, weight**2 * norm**2)
            for name, value in zip(scalars, values, strict=False):
                outputs[name][expert] += value
            outputs["largest"][expert] = max(outputs["largest"][expert], abs(f).max())
            outputs["share_square"][expert] += weight**2
            for name, value in zip(vectors, (f, f**2, weight * f, weight**2 * f), strict=True):
                outputs[name][expert] += value
            inputs["expert"][expert] += x[t] ** 2
            inputs["hidden"][expert] += hidden**2
            if t not in ends:
                for other in naive.select(layer, x[t + 1])[2]:
                    router["to_next_token"][expert, other] += 1
        for ahead, later in enumerate(range(layer + 1, min(n_layer, layer + 4))):
            actual = naive.select(later, np.concatenate(naive.layers[later].x)[t])[2]
            predicted = naive.select(later, x[t])[2]
            router["ahead_hits"][ahead] += actual[:, None] == predicted[None, :]
            if ahead == 0:
                for here in selected:
                    for there in actual:
                        router["to_next"][here, there] += 1
    trace |= {"received": np.concatenate(seen.received), "norm": abs(x).sum(1)}
    similarity_names = {f"similarity.{name}_cosine": value for name, value in similarity.items()}
    groups = {"router": router, "outputs": outputs, "inputs": inputs, "trace": trace}
    named = {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}
    return named | similarity_names | {"similarity.relative_update": update}
