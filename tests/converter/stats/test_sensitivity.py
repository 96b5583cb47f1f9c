"""Squared gradients against autograd through transformers' own model, and against the divergence that they foretell."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from slimoe.converter.forward.attention_pass import AttentionPass
from slimoe.converter.forward.block import attend, read_attention, read_expert
from slimoe.converter.forward.head import read_head
from slimoe.converter.forward.norms import rms_norm
from slimoe.converter.forward.stream import Observer, Sequences, run
from slimoe.converter.source.model_source import MatrixKey, SourceLayer, block_key, constant_key, expert_key
from slimoe.converter.source.stored_rows import rotation_order
from slimoe.converter.stats.backward_pass import draw_labels
from slimoe.converter.stats.sensitivity import ModelSensitivity, measure_sensitivity
from slimoe.converter.stats.statistics import Sensitivity
from slimoe.offload.errors import BadLogitsError
from tests.models.held_model import HeldModel, hold, random_mixtral
from tests.models.tiny_checkpoint import TinyConfig

SIZES = TinyConfig(n_layer=3, n_embd=32, n_ff=48, n_vocab=200, n_expert=5, n_expert_used=2)
SEED = 7
Array = NDArray[np.float64]


def texts(sizes: TinyConfig, *lengths: int) -> Sequences:
    numbers = np.random.default_rng(3)
    return Sequences(tuple(tuple(numbers.integers(0, sizes.n_vocab, n).tolist()) for n in lengths))


class Watch:
    """Keeps the outputs of all products with a weight while it is on, with their gradients."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.outputs: dict[int, torch.Tensor] = {}
        plain: Callable[..., torch.Tensor] = torch.nn.functional.linear

        def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            output = plain(x, weight, bias)
            if output.requires_grad:
                output.retain_grad()
            self.outputs[weight.data_ptr()] = output
            return output

        monkeypatch.setattr(torch.nn.functional, "linear", linear)

    def squares(self, weight: torch.Tensor) -> Array:
        """Sums over rows of squared gradients [n_out]."""
        output = self.outputs.get(weight.data_ptr())
        gradient = None if output is None else output.grad
        return np.zeros(weight.shape[0]) if gradient is None else square(gradient)


def square(gradient: torch.Tensor) -> Array:
    found: Array = gradient.detach().double().square().flatten(0, -2).sum(0).numpy()
    return found


def kept(store: dict[object, torch.Tensor]) -> Callable[[torch.nn.Module, object, torch.Tensor], None]:
    def keep(module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
        output.retain_grad()
        store[module] = output

    return keep


def naive(
    model: transformers.MixtralForCausalLM, tokens: tuple[int, ...], labels: torch.Tensor, watch: Watch
) -> tuple[list[dict[str, Array]], Array]:
    """One sequence's sums, by layer and for the embeddings."""
    watch.outputs.clear()
    outputs: dict[object, torch.Tensor] = {}
    modules = [layer.mlp for layer in model.model.layers]
    hooks = [module.register_forward_hook(kept(outputs)) for module in (*modules, model.model.embed_tokens)]
    logits = model(torch.tensor([tokens])).logits[0]
    logits.log_softmax(-1).gather(1, labels[:, None]).sum().backward()
    for hook in hooks:
        hook.remove()
    layers = []
    for layer in model.model.layers:
        attention, experts = layer.self_attn, layer.mlp.experts
        gate_up = np.stack([watch.squares(weight) for weight in experts.gate_up_proj])
        gate, up = np.split(gate_up, 2, axis=1)
        found = {"gate": gate, "up": up, "down": np.stack([watch.squares(weight) for weight in experts.down_proj])}
        found |= {name: watch.squares(getattr(attention, f"{name}_proj").weight) for name in ("q", "k", "v")}
        found |= {
            "attention": watch.squares(attention.o_proj.weight),
            "update": square(gradient_of(outputs, layer.mlp)),
        }
        for name in ("q", "k"):
            rows = found[name][:, None].astype(np.float32)
            found[name] = rotation_order(rows, SIZES.n_embd // SIZES.n_head)[:, 0].astype(np.float64)
        layers.append(found)
    return layers, square(gradient_of(outputs, model.model.embed_tokens))


def gradient_of(outputs: dict[object, torch.Tensor], module: object) -> torch.Tensor:
    gradient = outputs[module].grad
    assert gradient is not None
    return gradient


def labels_of(model: HeldModel, sequences: Sequences) -> torch.Tensor:
    return draw_labels(read_head(model)(run(model, sequences)), torch.Generator().manual_seed(SEED))


NAMES = ("update", "gate", "up", "down", "q", "k", "v", "attention")


def test_squares_are_those_of_autograd_through_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_mixtral(SIZES, spread=0.2)
    held, sequences = hold(model), texts(SIZES, 23, 1, 40)
    measured = measure_sensitivity(held, sequences, seed=SEED)
    labels = labels_of(held, sequences)
    watch = Watch(monkeypatch)
    sums, token = [dict.fromkeys(NAMES, np.zeros(1)) for _ in range(SIZES.n_layer)], np.zeros(SIZES.n_embd)
    for tokens, (begin, end) in zip(sequences.tokens, sequences.spans(), strict=True):
        layers, of_token = naive(model, tokens, labels[begin:end], watch)
        sums = [{name: old[name] + new[name] for name in NAMES} for old, new in zip(sums, layers, strict=True)]
        token += of_token
    for layer, expected in zip(measured.layers, sums, strict=True):
        for name in NAMES:
            found = getattr(layer, name)
            assert found.dtype == np.float32
            wanted = expected[name] / sequences.n_rows
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * wanted.max(), err_msg=name)
    np.testing.assert_allclose(measured.token, token / sequences.n_rows, rtol=1e-4)
    with torch.no_grad():
        rows = torch.cat([model(torch.tensor([tokens])).logits[0] for tokens in sequences.tokens]).softmax(-1)
    np.testing.assert_allclose(measured.output, (rows * (1 - rows)).mean(0).numpy(), rtol=1e-4)
    assert (measured.n_tokens, measured.n_draws) == (64, 1)


def test_draws_follow_the_models_prediction() -> None:
    chances = torch.tensor([0.5, 0.0, 0.3, 0.2])
    labels = draw_labels(chances.log().expand(20000, 4), torch.Generator().manual_seed(1))
    counts = labels.bincount(minlength=4) / 20000
    assert counts[1] == 0
    torch.testing.assert_close(counts, chances, atol=0.015, rtol=0)


def divergence(model: HeldModel, other: HeldModel, sequences: Sequences) -> float:
    logs = [read_head(one)(run(one, sequences)).double().log_softmax(-1) for one in (model, other)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def scale_of(matrix: NDArray[np.float32], part: float) -> NDArray[np.float32]:
    noise = np.random.default_rng(5).standard_normal(matrix.shape).astype(np.float32)
    changed: NDArray[np.float32] = matrix + noise * matrix.std() * np.float32(part)
    return changed


@pytest.fixture(scope="module")
def measured_model() -> tuple[HeldModel, Sequences, ModelSensitivity]:
    """All experts are used, since a changed choice of experts is no matter of gradients."""
    sizes = replace(SIZES, n_expert_used=SIZES.n_expert)
    held, sequences = hold(random_mixtral(sizes)), texts(sizes, *[48] * 12)
    return held, sequences, measure_sensitivity(held, sequences, n_draws=4)


PARTS = {
    "down": ([expert_key(1, "down", expert) for expert in range(SIZES.n_expert)], 2.0),
    "gate": ([expert_key(1, "gate", expert) for expert in range(SIZES.n_expert)], 2.0),
    "up": ([expert_key(1, "up", expert) for expert in range(SIZES.n_expert)], 2.0),
    "attention": ([block_key(1, "attn_output")], 2.0),
    "v": ([block_key(1, "attn_v")], 4.0),
    "output": ([MatrixKey("output.weight")], 1.2),
    "token": ([MatrixKey("token_embd.weight")], 2.0),
}
"""Matrices to change, and by what factor the foretold divergence may be wrong without the errors' cross terms: those
of values add up in later tokens, which see many of them."""


@pytest.mark.parametrize("part", PARTS)
def test_squared_errors_foretell_the_divergence(
    part: str, measured_model: tuple[HeldModel, Sequences, ModelSensitivity]
) -> None:
    held, sequences, measured = measured_model
    keys, factor = PARTS[part]
    inputs = inputs_of(held, sequences)
    changes = {key: scale_of(held.read(key), 0.02) for key in keys}
    foretold = 0.0
    for key, changed in changes.items():
        change = changed - held.read(key)
        errors = inputs[key] @ (change if part == "token" else change.T)
        weight = getattr(measured if part in ("output", "token") else measured.layers[1], part)
        weight = weight[key.expert] if key.expert >= 0 else weight
        foretold += 0.5 * float((weight * np.square(errors.astype(np.float64)).mean(0)).sum())
    found = divergence(held, held.changed(changes), sequences)
    assert found / factor < foretold < found * factor


class Inputs(Observer):
    """What matrices read."""

    def __init__(self) -> None:
        self.rows: dict[MatrixKey, list[torch.Tensor]] = {}

    def attention(self, layer: int, first_row: int, h: torch.Tensor, seen: AttentionPass) -> None:
        for role in ("attn_v", "attn_output"):
            self.rows.setdefault(block_key(layer, role), []).append(seen.reads[role])

    def expert(
        self, layer: int, expert: int, rows: torch.Tensor, x: torch.Tensor, hidden: torch.Tensor, shares: torch.Tensor
    ) -> None:
        for name, read in (("gate", x), ("up", x), ("down", hidden)):
            self.rows.setdefault(expert_key(layer, name, expert), []).append(read)


def inputs_of(held: HeldModel, sequences: Sequences) -> dict[MatrixKey, NDArray[np.float32]]:
    """What matrices read; of the embeddings that is a 1 in each row."""
    inputs = Inputs()
    h = run(held, sequences, inputs)
    norm = torch.from_numpy(held.read(MatrixKey("output_norm.weight")))
    found = {key: torch.cat(rows).numpy() for key, rows in inputs.rows.items()}
    found[MatrixKey("output.weight")] = rms_norm(h, norm, held.spec.rms_eps).numpy()
    tokens = [token for one in sequences.tokens for token in one]
    found[MatrixKey("token_embd.weight")] = np.eye(SIZES.n_vocab, dtype=np.float32)[tokens]
    return found


def odd_model() -> HeldModel:
    """Blocks without attention, without feed-forward part, and dense; one with a constant and an expert of two rows."""
    numbers = np.random.default_rng(8)
    held = hold(random_mixtral(replace(SIZES, n_layer=4), spread=0.2))
    extra = {constant_key(0, 0): numbers.standard_normal(SIZES.n_embd).astype(np.float32)}
    for name in ("gate", "up", "down"):
        extra[block_key(3, f"ffn_{name}")] = held.read(expert_key(3, name, 0))
        extra[expert_key(0, name, 1)] = narrowed(held.read(expert_key(0, name, 1)), name)
    held = held.changed(extra).with_layer(0, SourceLayer(3, (2, -1, 0, 1, 0)))
    held = held.with_layer(1, replace(held.layers[1], has_attention=False))
    return held.with_layer(2, SourceLayer(has_ffn=False)).with_layer(3, SourceLayer())


def narrowed(matrix: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    return matrix[:, :32] if name == "down" else matrix[:32]


def read(held: HeldModel, key: MatrixKey) -> torch.Tensor:
    return torch.from_numpy(held.read(key))


def naive_ffn(held: HeldModel, layer: int, row: torch.Tensor) -> torch.Tensor:
    """One token's feed-forward part, expert after expert."""
    source = held.layers[layer]
    if not source.has_ffn:
        return 0 * row
    x = rms_norm(row, read(held, block_key(layer, "ffn_norm")), held.spec.rms_eps)
    if not source.target:
        gate, up, down = (read(held, block_key(layer, f"ffn_{name}")) for name in ("gate", "up", "down"))
        return down @ (torch.nn.functional.silu(gate @ x) * (up @ x))
    chances = (read(held, block_key(layer, "ffn_gate_inp")) @ x).softmax(0)
    selected = chances.topk(SIZES.n_expert_used).indices.tolist()
    total = torch.zeros_like(row)
    for row_number in selected:
        meant = source.target[row_number]
        if meant < 0:
            output = read(held, constant_key(layer, -1 - meant))
        else:
            gate, up, down = (read(held, expert_key(layer, name, meant)) for name in ("gate", "up", "down"))
            output = down @ (torch.nn.functional.silu(gate @ x) * (up @ x))
        total = total + chances[row_number] / sum(chances[other] for other in selected) * output
    return total


def test_blocks_may_lack_parts_and_have_constants_and_aliases() -> None:
    """Against autograd through a loop over tokens and selected experts."""
    held, sequences = odd_model(), texts(SIZES, 21, 30)
    measured = measure_sensitivity(held, sequences, seed=SEED)
    labels = labels_of(held, sequences)
    token, updates, removals = np.zeros(SIZES.n_embd), np.zeros((4, SIZES.n_embd)), np.zeros((4, 3))
    for tokens, (begin, end) in zip(sequences.tokens, sequences.spans(), strict=True):
        first = h = read(held, MatrixKey("token_embd.weight"))[list(tokens)].requires_grad_()
        ys, us = [], []
        for layer in range(held.spec.n_layer):
            attention = read_attention(held, layer)
            us.append(0 * h if attention is None else attend(attention, held.spec, h).update)
            h = h + us[-1]
            ys.append(torch.stack([naive_ffn(held, layer, row) for row in h]))
            h = h + ys[-1]
        likelihood = read_head(held)(h).log_softmax(-1).gather(1, labels[begin:end, None]).sum()
        by_first, *by_parts = torch.autograd.grad(
            likelihood, (first, *ys, *us), allow_unused=True, materialize_grads=True
        )
        by_ys, by_us = by_parts[:4], by_parts[4:]
        token += square(by_first)
        updates += np.stack([square(by_y) for by_y in by_ys])
        for layer, (y, u, by_y, by_u) in enumerate(zip(ys, us, by_ys, by_us, strict=True)):
            # Behind the block the gradient is that by the feed-forward part's output.
            pairs = ((by_u, u), (by_y, y), (by_y, u + y))
            removals[layer] += [float((gradient * part).sum(1).square().sum().detach()) for gradient, part in pairs]
    n = sequences.n_rows
    np.testing.assert_allclose(measured.token, token / n, rtol=1e-4)
    for layer, found in enumerate(measured.layers):
        np.testing.assert_allclose(found.update, updates[layer] / n, rtol=1e-4)
        gone = measured.removals[layer]
        np.testing.assert_allclose((gone.attention, gone.ffn, gone.block), removals[layer] / (2 * n), rtol=1e-3)
    assert measured.layers[0].gate.shape == (3, SIZES.n_ff)
    assert measured.layers[0].gate[1, :32].all()
    assert not measured.layers[0].gate[1, 32:].any(), "of a narrower expert"
    assert measured.layers[1].q.shape == (0,)
    assert measured.layers[2].down.shape == (0,)
    assert measured.layers[3].down.shape == (1, SIZES.n_embd)


def test_skipping_experts_costs_half_the_squared_slope_towards_it() -> None:
    """Every selected expert alone, against a loop: skipped, the others renormalised, and replaced by a constant."""
    held, sequences = hold(random_mixtral(SIZES, spread=0.2)), texts(SIZES, 30)
    measured, layer = measure_sensitivity(held, sequences, seed=SEED).removals[1], 1
    x, by_y = inner_gradient(held, sequences, layer)
    chances = (x @ read(held, block_key(layer, "ffn_gate_inp")).T).softmax(-1)
    weights = torch.zeros_like(chances).scatter(1, *chances.topk(SIZES.n_expert_used)[::-1])
    weights /= weights.sum(1, keepdim=True)
    experts = [read_expert(held, layer, number) for number in range(SIZES.n_expert)]
    outputs = torch.stack([expert(x) for expert in experts], 1)
    skip, replaced = np.zeros(SIZES.n_expert), np.zeros(SIZES.n_expert)
    for expert in range(SIZES.n_expert):
        own = weights[:, expert]
        constant = (own.square()[:, None] * outputs[:, expert]).sum(0) / own.square().sum().clamp(min=1e-30)
        changes = own[:, None] * (constant - outputs[:, expert])
        replaced[expert] = (by_y * changes).sum(1).square().sum()
        for token in torch.nonzero(own)[:, 0].tolist():
            left = weights[token].clone()
            left[expert] = 0
            change = (left / left.sum() - weights[token]) @ outputs[token]
            skip[expert] += float(by_y[token] @ change) ** 2
    np.testing.assert_allclose(measured.skipped, skip / 60, rtol=1e-3)
    np.testing.assert_allclose(measured.novice, replaced / 60, rtol=1e-3, atol=1e-9)


def inner_gradient(held: HeldModel, sequences: Sequences, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer's experts read, and the gradient of the labels' likelihood by what they say."""
    labels = labels_of(held, sequences)
    h = read(held, MatrixKey("token_embd.weight"))[list(sequences.tokens[0])]
    for index in range(held.spec.n_layer):
        attention = read_attention(held, index)
        assert attention is not None
        h = h + attend(attention, held.spec, h).update
        y = torch.stack([naive_ffn(held, index, row) for row in h])
        if index == layer:
            x = rms_norm(h, read(held, block_key(index, "ffn_norm")), held.spec.rms_eps)
            y = y.detach().requires_grad_()
            leaf = y
        h = h + y
    likelihood = read_head(held)(h).log_softmax(-1).gather(1, labels[:, None]).sum()
    return x.detach(), torch.autograd.grad(likelihood, leaf)[0]


def test_draws_are_averaged_and_files_deleted(tmp_path: Path) -> None:
    held, sequences = hold(random_mixtral(SIZES)), texts(SIZES, 17, 9)
    steps: list[tuple[int, int]] = []
    both = measure_sensitivity(
        held, sequences, seed=5, n_draws=2, directory=tmp_path, on_progress=lambda *step: steps.append(step)
    )
    apart = [measure_sensitivity(held, sequences, seed=seed) for seed in (5, 6)]
    for layer in range(SIZES.n_layer):
        found: Sensitivity = both.layers[layer]
        for name in NAMES:
            expected = np.mean([getattr(one.layers[layer], name) for one in apart], axis=0)
            np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-5)
    assert list(tmp_path.iterdir()) == []
    assert steps == [(n + 1, 9) for n in range(9)]


def test_a_model_that_computes_no_numbers_is_named() -> None:
    held = hold(random_mixtral(SIZES))
    key = MatrixKey("output.weight")
    with pytest.raises(BadLogitsError):
        measure_sensitivity(held.changed({key: np.full_like(held.read(key), 3e38)}), texts(SIZES, 5))
