"""Calibration, plans and compressed files of architectures that have more than experts behind a softmax."""

import functools
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.stepping import random_tokens
from slimoe.converter.budget.compress import plan_compression
from slimoe.converter.convert import ConvertOptions
from slimoe.converter.convert import plan as plan_conversion
from slimoe.converter.forward.block import (
    Attention,
    attend,
    read_attention,
    read_dense,
    read_expert,
    read_router,
    read_shared,
)
from slimoe.converter.forward.head import read_head
from slimoe.converter.forward.routing import route
from slimoe.converter.forward.stream import Sequences, final_logits, run
from slimoe.converter.forward.texts import CalibrationText
from slimoe.converter.layout.layer import is_attention
from slimoe.converter.layout.plan import Format
from slimoe.converter.quant.mixes import layer_and_role
from slimoe.converter.quant.quantize import dequantize_rows, quantize_rows
from slimoe.converter.recipe.fields import SourceSizes
from slimoe.converter.recipe.recipe import ExpertRecipe, FitRecipe, Recipe, StorageRecipe
from slimoe.converter.recipe.toml_file import parse_recipe
from slimoe.converter.source.gguf_source import gguf_source
from slimoe.converter.source.held_source import FittedSource
from slimoe.converter.source.model_source import MatrixKey, ModelSource
from slimoe.converter.stats.backward_pass import draw_labels
from slimoe.converter.stats.forward_pass import CalibrationSettings, calibrate
from slimoe.converter.stats.imatrix_file import imatrix_of, write_imatrix
from slimoe.converter.stats.observer import Samples
from slimoe.converter.stats.sensitivity import measure_sensitivity
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.statistics_file import load_statistics, save_statistics
from slimoe.converter.stats.type_costs import measure_type_costs
from slimoe.converter.write.error_feedback import FeedbackQuantiser
from slimoe.converter.write.writer import chosen_quantiser, write_planned
from slimoe.offload.engine import Engine
from slimoe.offload.errors import SlimoeError, UnsupportedModelError, UsageError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.native_format import read_layout
from slimoe.offload.model.spec import ModelSpec
from tests.models.configs import engine_config
from tests.models.gguf_content import Array, read_content, write_content
from tests.models.tiny_gguf import FAMILIES, FineShape, write_family

ROWS = ("qwen2moe", "granitemoe", "glm4moe", "phimoe", "gpt-oss", "bailingmoe2", "gemma4")
"""A gated shared expert; multipliers; a dense layer, a sigmoid with a bias, no weights of sum 1; norms with biases;
biases of experts, windows and sinks; joined queries, keys and values; norms behind parts, a dense one beside experts,
and heads of windows.
"""
LATENT = ("deepseek2", "deepseek2-old", "mistral4")
RECURRENT = ("qwen3next", "qwen35moe", "lfm2moe", "granitehybrid", "nemotron_h_moe", "nemotron_h_moe-latent")
SHAPE = FineShape(n_layer=2, n_embd=128, n_ff=256, n_head=2, n_embd_head=64, n_expert=8, n_expert_used=2)
TOKENS = random_tokens(40, SHAPE.n_vocab)
SEED = 3


def of(path: Path, name: str) -> ModelSource:
    """A model of an architecture; that of queries, keys and values in one has four experts in each of four groups."""
    shape = replace(SHAPE, n_expert=16) if name == "bailingmoe2" else SHAPE
    shape = replace(SHAPE, n_layer=4) if name in RECURRENT else shape
    shape = replace(SHAPE, n_head=4, n_head_kv=1, n_embd_head=128) if name == "gemma4" else shape
    # llama.cpp knows Granite's Mamba-2 layers with twice as many values as the stream only.
    shape = replace(shape, n_embd=256) if name == "granitehybrid" else shape
    return gguf_source(write_family(path, name, shape=shape))


def feed_forward(source: ModelSource, layer: int, h: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the part puts out, every expert computed for every token; and the shared expert's products by role."""
    router = read_router(source, layer)
    if not source.layers[layer].has_ffn:
        return 0 * h, {}
    if router is None:
        norm, dense = read_dense(source, layer)
        return dense(norm(h)), {}
    x = router.norm(h)
    routing = route(router, source.spec, x)
    if source.spec.architecture.name == "gemma4":
        read = normed(source, layer, "ffn_norm", h)
        gate, up = (read @ vector(source, layer, f"ffn_{name}").T for name in ("gate", "up"))
        activated = torch.nn.functional.gelu(gate, approximate="tanh") * up
        products = {"ffn_gate": gate, "ffn_up": up, "ffn_down": activated @ vector(source, layer, "ffn_down").T}
        plain = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + source.spec.rms_eps)
        logits = plain * vector(source, layer, "ffn_gate_inp", "scale") / math.sqrt(source.spec.n_embd)
        torch.testing.assert_close(routing.logits, logits @ vector(source, layer, "ffn_gate_inp").T)
    is_latent = MatrixKey(f"blk.{layer}.ffn_latent_up.weight") in source.shapes
    read = x @ vector(source, layer, "ffn_latent_down").T if is_latent else x
    weights = torch.zeros_like(routing.logits).scatter(1, routing.selected, routing.weights)
    experts = torch.stack([read_expert(source, layer, expert)(read) for expert in range(source.spec.n_expert)], 1)
    y = (weights[:, :, None] * experts).sum(1)
    shared = read_shared(source, layer)
    if source.spec.architecture.name == "gemma4":
        return y, products
    if shared is None:
        return y, {}
    inner = [linear(x) for linear in shared.expert.inner]
    gated = torch.nn.functional.silu(inner[0]) if len(inner) > 1 else inner[0].relu()
    down = shared.expert.down(gated * inner[-1])
    scale = 1.0 if shared.gate is None else (x @ shared.gate).sigmoid()[:, None]
    names = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")[-1 - len(inner) :]
    found = dict(zip(names, (*inner, down), strict=True))
    if is_latent:
        return y, found | {"ffn_latent_down": read, "ffn_latent_up": y @ vector(source, layer, "ffn_latent_up").T}
    return y + scale * down, found


def vector(source: ModelSource, layer: int, role: str, kind: str = "weight") -> torch.Tensor:
    return torch.from_numpy(source.read(MatrixKey(f"blk.{layer}.{role}.{kind}")))


def normed(source: ModelSource, layer: int, role: str, rows: torch.Tensor) -> torch.Tensor:
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + source.spec.rms_eps) * vector(source, layer, role)


def scale_of(source: ModelSource, layer: int) -> torch.Tensor | float:
    if source.spec.architecture.name != "gemma4":
        return 1.0
    return vector(source, layer, "layer_output_scale")


def joined(
    source: ModelSource, layer: int, h: torch.Tensor, y: torch.Tensor, others: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The stream behind a layer, of that before its feed-forward part and of what `feed_forward` makes of it."""
    if "ffn_latent_up" in others:
        return h + others["ffn_latent_up"] + others["ffn_down_shexp"]
    if source.spec.architecture.name != "gemma4":
        return h + source.spec.multipliers.residual * y
    both = normed(source, layer, "post_ffw_norm_1", others["ffn_down"]) + normed(source, layer, "post_ffw_norm_2", y)
    return scale_of(source, layer) * (h + normed(source, layer, "post_ffw_norm", both))


@pytest.mark.parametrize("name", [*ROWS, *LATENT, *RECURRENT])
def test_sensitivities_are_those_of_autograd_through_the_whole_model(tmp_path: Path, name: str) -> None:
    source = of(tmp_path / "m.gguf", name)
    sequences, scales = Sequences((tuple(TOKENS),)), source.spec.multipliers
    measured = measure_sensitivity(source, sequences, seed=SEED)
    head = read_head(source)
    labels = draw_labels(head(run(source, sequences)), torch.Generator().manual_seed(SEED))
    rows = torch.from_numpy(source.read(MatrixKey("token_embd.weight"))[TOKENS]).requires_grad_()
    h, ys, products, updates = scales.embedding * rows, [], [], []
    for layer in range(source.spec.n_layer):
        attention, mixed = read_attention(source, layer), dict[str, torch.Tensor]()
        if attention is not None:
            is_plain = isinstance(attention, Attention) and attention.latent is None
            seen = attend(attention, source.spec, h)
            h, mixed = h + seen.update, {} if is_plain else dict(seen.products)
        y, others = feed_forward(source, layer, h)
        ys.append(y)
        middle = h
        products.append(others | mixed)
        h = joined(source, layer, h, y, others)
        updates.append((middle, h))
    likelihood = head(h).log_softmax(-1).gather(1, labels[:, None]).sum()
    leaves = [rows, *ys, *(one for some in products for one in some.values())]
    by_rows, *by_others = torch.autograd.grad(likelihood, leaves, retain_graph=True)
    by_after = torch.autograd.grad(likelihood, [after for _, after in updates])
    n = len(TOKENS)
    np.testing.assert_allclose(measured.token, by_rows.square().sum(0) / n, rtol=1e-3)
    by_products = iter(by_others[source.spec.n_layer :])
    for layer, (y, by_y) in enumerate(zip(ys, by_others, strict=False)):
        found = measured.layers[layer]
        np.testing.assert_allclose(found.update, by_y.square().sum(0) / n, rtol=1e-3)
        along = by_y * y
        if name == "gemma4" or "ffn_latent_up" in products[layer]:  # The whole part is more than its experts.
            middle, after = updates[layer]
            along = by_after[layer] * (after - scale_of(source, layer) * middle)
        removed = float(along.detach().sum(1).square().sum()) / (2 * n)
        assert measured.removals[layer].ffn == pytest.approx(removed, rel=1e-3)
        for role in products[layer]:
            wanted = next(by_products).square().sum(0) / n
            np.testing.assert_allclose(found.of_role(role), wanted, rtol=1e-3, atol=1e-5 * float(wanted.max()))
        assert found.others.keys() == products[layer].keys() - {"attn_output"}


def calibrated_on(source: ModelSource, directory: Path) -> Statistics:
    tokens = random_tokens(160, 300)
    text = CalibrationText((tuple(tokens[:90]), tuple(tokens[90:])), ("text", "text"))
    settings = CalibrationSettings(Samples(types=(), n_gram=160), n_sensitivity=160)
    return calibrate(source, text, settings, directory)


Calibrated = Callable[[str], tuple[ModelSource, Statistics]]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    """The model of an architecture and its statistics, made once."""
    directory = tmp_path_factory.mktemp("calibrated")

    @functools.cache
    def make(name: str) -> tuple[ModelSource, Statistics]:
        source = of(directory / f"{name}.gguf", name)
        statistics = calibrated_on(source, directory / f"{name}.part")
        save_statistics(statistics, directory / f"{name}.stats")
        return source, load_statistics(directory / f"{name}.stats", source)

    return make


@pytest.mark.parametrize("name", [*ROWS, *LATENT, *RECURRENT])
def test_statistics_know_what_every_matrix_reads(calibrated: Calibrated, name: str) -> None:
    source, statistics = calibrated(name)
    known = set(imatrix_of(statistics, source.spec.architecture.projections).entries)
    unread = ["token_embd.weight", "ffn_gate_inp_shexp.weight", "rope_factors_short.weight", "rope_factors_long.weight"]
    weights = [key.name for key, shape in source.shapes.items() if len(shape) > 1 and key.name.endswith(".weight")]
    unread += ["ssm_conv1d.weight", "shortconv.conv.weight", "ssm_norm.weight"]
    matrices = {name for name in weights if not name.endswith(tuple(unread))}
    # Statistics name what reads attention's input, of which Gemma's layers without a window have no values' matrix.
    assert known - ({"blk.1.attn_v.weight"} if name == "gemma4" else set()) == matrices | {"output.weight"}


@pytest.mark.parametrize("name", ["glm4moe", *RECURRENT])
def test_an_imatrix_reaches_every_matrix(calibrated: Calibrated, tmp_path: Path, name: str) -> None:
    """A delta net's joined input is a matrix of its own, and not that of attention."""
    source, statistics = calibrated(name)
    imatrix = imatrix_of(statistics, source.spec.architecture.projections)
    write_imatrix(imatrix, tmp_path / "imatrix.gguf")
    options = ConvertOptions(source.path, tmp_path / "m.gguf", "Q4_0", imatrix=tmp_path / "imatrix.gguf")
    fitted = plan_conversion(options).fitted
    assert fitted is not None
    is_tied = MatrixKey("output.weight") not in source.shapes
    assert fitted.n_fitted == fitted.n_matrices - (0 if is_tied else 1), "of a token table nothing is known"


def logits(path: Path) -> Array:
    with closing(Engine.open(engine_config(path, n_ctx=64, n_threads=1, kv_type="f32", weights="copied"))) as engine:
        return engine.read(TOKENS, len(TOKENS)).copy()


def in_torch(path: Path) -> Array:
    source = gguf_source(path)
    found: Array = final_logits(source, run(source, Sequences((tuple(TOKENS),)))).numpy()
    return found


def compressed(calibrated: Calibrated, name: str, recipe: Recipe, target: Path) -> Path:
    source, statistics = calibrated(name)
    plan = plan_compression(source, statistics, recipe)
    quantiser = chosen_quantiser(source, plan, statistics, 1)
    write_planned(source, plan, target, statistics, quantiser=quantiser)
    return target


F32 = StorageRecipe("F32", attention="F32", token="F32", output="F32")
STOCK = {
    "a router without a sum": ("qwen2moe", ExpertRecipe(6, "reap"), F32),
    "a bias of the choice": ("glm4moe", ExpertRecipe(5), F32),
    "merged": ("glm4moe", ExpertRecipe(4, merge="hc-smoe"), F32),
    "joined": ("glm4moe", ExpertRecipe(4, merge="neurons"), F32),
    "multipliers": ("granitemoe", ExpertRecipe(6, "reap"), F32),
    "experts' biases": ("gpt-oss", ExpertRecipe(6), F32),
    "types": ("glm4moe", ExpertRecipe(6), StorageRecipe("Q4_K", attention="Q8_0", token="Q8_0", output="Q8_0")),
    "joined queries, keys and values": ("bailingmoe2", ExpertRecipe(8), StorageRecipe("Q4_K", attention="Q8_0")),
    "groups, averaged by outputs": ("bailingmoe2", ExpertRecipe(8, merge="hc-smoe"), F32),
    "groups, averaged by logits": ("bailingmoe2", ExpertRecipe(12, merge="m-smoe"), F32),
    "groups, joined": ("bailingmoe2", ExpertRecipe(8, merge="neurons"), F32),
    "grouped delta nets": ("qwen3next", ExpertRecipe(6, "reap"), F32),
    "delta nets": ("qwen35moe", ExpertRecipe(4, merge="m-smoe"), F32),
    "delta nets' types": ("qwen35moe", ExpertRecipe(6), StorageRecipe("Q4_0", attention="Q8_0")),
    "short convolutions": ("lfm2moe", ExpertRecipe(4, merge="hc-smoe"), F32),
    "Mamba-2": ("granitehybrid", ExpertRecipe(6, "reap"), F32),
    "experts without a gate": ("nemotron_h_moe", ExpertRecipe(6, "reap"), F32),
    "experts without a gate, merged": ("nemotron_h_moe", ExpertRecipe(4, merge="hc-smoe"), F32),
    "their types": ("nemotron_h_moe", ExpertRecipe(6), StorageRecipe("Q4_0", attention="Q8_0")),
    "experts of fewer values": ("nemotron_h_moe-latent", ExpertRecipe(6, "reap"), F32),
    "experts of fewer values, merged": ("nemotron_h_moe-latent", ExpertRecipe(4, merge="hc-smoe"), F32),
    "types of what is around them": ("nemotron_h_moe-latent", ExpertRecipe(6), StorageRecipe("Q4_0", attention="Q8_0")),
    "a dense part beside experts": ("gemma4", ExpertRecipe(6, "reap"), F32),
    "scales of merged experts": ("gemma4", ExpertRecipe(4, merge="hc-smoe"), F32),
    "types beside a dense part": ("gemma4", ExpertRecipe(6), StorageRecipe("Q4_K", attention="Q8_0", token="Q8_0")),
}


def assert_same_logits(found: Array, expected: Array, name: str) -> None:
    """Equal but for rounding. ggml looks Gemma's GELU up: a few inputs round otherwise, and are a step of F16 away."""
    differences = np.abs(found - expected)
    is_looked_up = name == "gemma4"
    assert np.quantile(differences, 0.95 if is_looked_up else 1.0) < 1e-3
    assert differences.max() < 2e-2


@pytest.mark.usefixtures("gelu_of_ggml")
@pytest.mark.parametrize("what", STOCK)
def test_stock_files_with_fewer_experts_are_llama_cpps(calibrated: Calibrated, tmp_path: Path, what: str) -> None:
    name, experts, types = STOCK[what]
    recipe = Recipe(format="stock", experts=experts, types=types, fit=FitRecipe(importance=False))
    path = compressed(calibrated, name, recipe, tmp_path / "m.gguf")
    assert read_gguf(path).metadata[f"{FAMILIES[name].arch or name}.expert_count"] == experts.keep
    with closing(LlamaCpp(LlamaCppConfig(path, 64, 1, extra_buffers=False))) as baseline:
        expected = baseline.score(TOKENS)
    with closing(Engine.open(engine_config(path, n_ctx=64, n_threads=1, weights="copied"))) as engine:
        np.testing.assert_array_equal(engine.read(TOKENS, len(TOKENS)), expected)
    if types is F32:
        assert_same_logits(in_torch(path), logits(path), name)


NATIVE = {
    "constants": ("qwen2moe", Recipe(experts=ExpertRecipe(5, "reap", replacement="constant"), types=F32)),
    "merged": ("granitemoe", Recipe(experts=ExpertRecipe(4, merge="m-smoe"), types=F32)),
    "narrower": ("glm4moe", Recipe(experts=ExpertRecipe(6, width=128), types=F32)),
    "no attention": ("glm4moe", Recipe(drop_attention=1, types=F32)),
    "no feed-forward part": ("granitemoe", Recipe(drop_ffn=1, types=F32)),
    "experts' biases": ("gpt-oss", Recipe(experts=ExpertRecipe(5, merge="hc-smoe"), types=F32)),
    "joined experts' biases": ("gpt-oss", Recipe(experts=ExpertRecipe(5, merge="neurons"), types=F32)),
    "narrower experts with biases": ("gpt-oss", Recipe(experts=ExpertRecipe(6, width=128), types=F32)),
    "a window less": ("gpt-oss", Recipe(experts=ExpertRecipe(6), drop_blocks=1, types=F32)),
    "latent attention": ("deepseek2", Recipe(experts=ExpertRecipe(6, replacement="constant"), types=F32)),
    "merged, with latent attention": ("mistral4", Recipe(experts=ExpertRecipe(4, merge="hc-smoe"), types=F32)),
    "groups": ("bailingmoe2", Recipe(experts=ExpertRecipe(6, replacement="constant"), types=F32)),
    "groups, merged": ("bailingmoe2", Recipe(experts=ExpertRecipe(6, merge="m-smoe"), types=F32)),
    "norms and biases": ("phimoe", Recipe(experts=ExpertRecipe(6), types=F32)),
    "delta nets, constants": ("qwen3next", Recipe(experts=ExpertRecipe(6, replacement="constant"), types=F32)),
    "a block with a delta net less": ("qwen35moe", Recipe(drop_blocks=1, types=F32)),
    "no delta net": ("qwen35moe", Recipe(drop_attention=1, types=F32)),
    "Mamba-2, merged": ("granitehybrid", Recipe(experts=ExpertRecipe(4, merge="neurons"), types=F32)),
    "no Mamba-2": ("granitehybrid", Recipe(drop_attention=1, types=F32)),
    "joined experts without a gate": (
        "nemotron_h_moe",
        Recipe(experts=ExpertRecipe(4, merge="neurons"), types=F32),
    ),
    "narrower ones": ("nemotron_h_moe", Recipe(experts=ExpertRecipe(6, width=128), types=F32)),
    "constants among them": ("nemotron_h_moe", Recipe(experts=ExpertRecipe(6, replacement="constant"), types=F32)),
    "a layer of one part less": ("nemotron_h_moe", Recipe(drop_blocks=1, types=F32)),
    "joined experts of fewer values": (
        "nemotron_h_moe-latent",
        Recipe(experts=ExpertRecipe(4, merge="neurons"), types=F32),
    ),
    "narrower ones of fewer values": ("nemotron_h_moe-latent", Recipe(experts=ExpertRecipe(6, width=128), types=F32)),
    "constants of fewer values": (
        "nemotron_h_moe-latent",
        Recipe(experts=ExpertRecipe(6, replacement="constant"), types=F32),
    ),
    "main experts of fewer values": ("nemotron_h_moe-latent", Recipe(experts=ExpertRecipe(main=1), types=F32)),
    "short convolutions, merged": ("lfm2moe", Recipe(experts=ExpertRecipe(4, merge="neurons"), types=F32)),
    "a dense part beside joined experts": ("gemma4", Recipe(experts=ExpertRecipe(4, merge="neurons"), types=F32)),
    "constants beside a dense part": ("gemma4", Recipe(experts=ExpertRecipe(5, replacement="constant"), types=F32)),
    "narrower beside a dense part": ("gemma4", Recipe(experts=ExpertRecipe(6, width=128), types=F32)),
    "no part that has norms behind it": ("gemma4", Recipe(drop_ffn=1, types=F32)),
    "no attention before norms": ("gemma4", Recipe(drop_attention=1, types=F32)),
    "a block of a window less": ("gemma4", Recipe(experts=ExpertRecipe(6), drop_blocks=1, types=F32)),
}


@pytest.mark.usefixtures("gelu_of_ggml")
@pytest.mark.parametrize("what", NATIVE)
def test_native_files_are_what_torch_makes_of_them(calibrated: Calibrated, tmp_path: Path, what: str) -> None:
    name, recipe = NATIVE[what]
    path = compressed(calibrated, name, recipe, tmp_path / "m.gguf")
    assert read_gguf(path).metadata["slimoe.base_architecture"] == (FAMILIES[name].arch or name)
    assert_same_logits(in_torch(path), logits(path), name)


@pytest.mark.parametrize("name", ["qwen2moe", "glm4moe", "gpt-oss", "gemma4"])
def test_another_order_of_experts_changes_no_bit(calibrated: Calibrated, tmp_path: Path, name: str) -> None:
    types = StorageRecipe("Q8_0", low="Q4_0", attention="Q8_0", token="Q8_0", output="Q8_0")
    kept = ExpertRecipe(6, "reap", replacement="constant")
    paths = [
        compressed(calibrated, name, Recipe(experts=experts, types=types), tmp_path / f"{experts.order}.gguf")
        for experts in (kept, replace(kept, order="co-selection"))
    ]
    np.testing.assert_array_equal(logits(paths[0]), logits(paths[1]))
    layouts = [read_layout(gguf, ModelSpec.from_gguf(gguf)) for gguf in map(read_gguf, paths)]
    routers = [layer.router for layer in calibrated(name)[1].layers]
    neighbours, use = [0, 0], [dict[tuple[int, int], float](), dict[tuple[int, int], float]()]
    for number, layout in enumerate(layouts):
        for index, (layer, router) in enumerate(zip(layout.layers, routers, strict=True)):
            rows = [layer.target.index(expert) for expert in range(len(layer.buckets))]
            assert sorted(rows) == [row for row, expert in enumerate(layer.target) if expert >= 0]
            if router is not None:
                assert layer.hints.use is not None
                neighbours[number] += int(sum(router.together[row, after] for row, after in pairwise(rows)))
                use[number] |= {(index, row): layer.hints.use[expert] for expert, row in enumerate(rows)}
    assert neighbours[1] > neighbours[0]
    assert use[0] == use[1], "hints follow their experts"


@pytest.mark.parametrize(
    ("form", "experts"),
    [
        ("stock", ExpertRecipe(4, merge="hc-smoe")),
        ("native", ExpertRecipe(4, merge="m-smoe")),
        ("native", ExpertRecipe(4, merge="neurons")),
        ("native", ExpertRecipe(6)),
    ],
    ids=str,
)
def test_scales_of_experts_move_and_merge_with_them(tmp_path: Path, experts: ExpertRecipe, form: Format) -> None:
    """The file says what one says that was made alike of the same model with the scales multiplied in."""
    plain = read_content(write_family(tmp_path / "plain.gguf", "qwen3moe", shape=SHAPE))
    rng, scales, folded = np.random.default_rng(3), dict[str, Array](), dict[str, Array]()
    for name in [name for name in plain.tensors if name.endswith("_exps.weight")]:
        own = rng.uniform(0.5, 2.0, SHAPE.n_expert).astype(np.float32)
        scales[name.replace(".weight", ".scale")], folded[name] = own, own[:, None, None] * plain.values(name)
    found = []
    for what, changes in (("scaled", scales), ("folded", folded)):
        source = gguf_source(write_content(tmp_path / f"{what}.gguf", plain.with_values(changes)))
        recipe = Recipe(format=form, experts=experts, types=F32, fit=FitRecipe(feedback=True))
        statistics, path = calibrated_on(source, tmp_path / f"{what}.part"), tmp_path / f"{what}-{form}.gguf"
        plan = plan_compression(source, statistics, recipe)
        quantiser = chosen_quantiser(source, plan, statistics, 1)
        assert isinstance(quantiser, FeedbackQuantiser)
        write_planned(source, plan, path, statistics, quantiser=quantiser)
        np.testing.assert_allclose(quantiser.h, run(gguf_source(path), Sequences(statistics.tokens)), atol=1e-3)
        assert any(".scale" in name for name in read_gguf(path).tensors) == (what == "scaled")
        found += [logits(path), in_torch(path)]
    for one in found[1:]:
        np.testing.assert_allclose(one, found[0], atol=2e-3)


@pytest.mark.parametrize(("name", "role"), [("gpt-oss", "ffn_gate_inp"), ("glm4moe", "exp_probs_b")])
def test_biases_of_a_router_are_averaged_with_its_rows(
    calibrated: Calibrated, tmp_path: Path, name: str, role: str
) -> None:
    source, statistics = calibrated(name)
    recipe = Recipe(format="stock", experts=ExpertRecipe(4, merge="hc-smoe"), types=F32)
    layer = plan_compression(source, statistics, recipe).layers[-1]
    result = gguf_source(compressed(calibrated, name, recipe, tmp_path / "m.gguf"))
    router = statistics.layers[layer.block].router
    assert router is not None
    use, key = router.rank_count.sum(1), MatrixKey(f"blk.{layer.block}.{role}.bias")
    biases, found = source.read(key), result.read(key)
    members = [list(expert.members) for expert in layer.experts]
    assert max(map(len, members)) > 1
    for value, own in zip(found, members, strict=True):
        weights = use[own] if use[own].any() else np.ones(len(own))
        assert value == pytest.approx(np.average(biases[own], weights=weights), rel=1e-5, abs=1e-6)


def test_the_last_layer_with_attention_stays_among_recurrent_ones(calibrated: Calibrated) -> None:
    source, statistics = calibrated("qwen35moe")
    assert source.spec.attention_layers == (1,)
    plan = plan_compression(source, statistics, Recipe(drop_attention=3, types=F32))
    assert [layer.has_attention for layer in plan.layers] == [False, True, False, False]
    plan = plan_compression(source, statistics, Recipe(drop_blocks=3, types=F32))
    assert [layer.block for layer in plan.layers] == [1]
    for recipe in (Recipe(drop_attention=4, types=F32), Recipe(drop_blocks=4, types=F32)):
        with pytest.raises(UsageError, match="Only 3 parts of the model can be removed, not 4"):
            plan_compression(source, statistics, recipe)


def test_an_order_that_cannot_be_is_refused(calibrated: Calibrated) -> None:
    source, _ = calibrated("qwen2moe")
    with pytest.raises(UsageError, match="slimoe calibrate"):
        plan_compression(source, None, Recipe(experts=ExpertRecipe(order="co-selection"), types=F32))
    with pytest.raises(UsageError, match="experts in another order"):
        parse_recipe('format = "stock"\n[experts]\norder = "co-selection"', SourceSizes(2, 8, 256))


@pytest.mark.parametrize("name", ["glm4moe", "bailingmoe2", "gemma4", *LATENT, *RECURRENT])
def test_a_size_is_met_with_all_matrices_priced(calibrated: Calibrated, tmp_path: Path, name: str) -> None:
    source, statistics = calibrated(name)
    types = StorageRecipe(candidates=("Q4_0", "Q8_0"))
    recipe = Recipe(format="stock", target_bpw=6.5, types=types)
    plan = plan_compression(source, statistics, recipe)
    path = tmp_path / "m.gguf"
    report = write_planned(source, plan, path, statistics)
    budget = 6.5 * sum(map(math.prod, source.shapes.values())) / 8
    assert 0.93 * budget < path.stat().st_size == report.n_bytes <= budget
    tensors = read_gguf(path).tensors
    apart = ("_conv1d", "conv.conv", "_gate_inp.", "ssm_norm", "ssm_a", "ssm_d")
    matrices = [key for key, one in tensors.items() if len(one.ne) > 1 and not any(part in key for part in apart)]
    assert {tensors[key].type.name for key in matrices} <= {"Q4_0", "Q8_0"}
    assert any(".attn_output." in key for key in matrices)
    has_shared = any("_shexp" in key or key == "blk.1.ffn_down.weight" for key in matrices)
    assert has_shared == bool(source.spec.experts.n_ff_shared)
    assert {one.type.name for key, one in tensors.items() if "exp_probs_b" in key} <= {"F32"}
    with closing(LlamaCpp(LlamaCppConfig(path, 64, 1, extra_buffers=False))) as baseline:
        assert np.isfinite(baseline.score(TOKENS)).all()


UNEQUAL = (ExpertRecipe(7), ExpertRecipe(7, "reap"), ExpertRecipe(6, "reap", overall=True))


@pytest.mark.parametrize("experts", [*UNEQUAL, ExpertRecipe(4, merge="m-smoe")])
def test_groups_of_experts_stay_alike(calibrated: Calibrated, tmp_path: Path, experts: ExpertRecipe) -> None:
    source, statistics = calibrated("deepseek2")
    with pytest.raises(SlimoeError, match=r"[Tt]he 4 groups"):
        write_planned(
            source,
            plan_compression(source, statistics, Recipe(format="stock", experts=experts, types=F32)),
            tmp_path / "m.gguf",
            statistics,
        )


FEWER = (
    ExpertRecipe(12),
    ExpertRecipe(12, "reap"),
    ExpertRecipe(12, replacement="constant"),
    ExpertRecipe(12, merge="hc-smoe"),
    ExpertRecipe(12, merge="m-smoe"),
    ExpertRecipe(12, merge="neurons"),
    ExpertRecipe(12, width=128),
    ExpertRecipe(main=1),
)


def test_one_token_which_most_experts_never_see_is_enough_to_plan(tmp_path: Path) -> None:
    source, text = of(tmp_path / "m.gguf", "bailingmoe2"), CalibrationText((tuple(TOKENS[:1]),), ("text",))
    settings = CalibrationSettings(Samples(types=(), n_gram=1), n_sensitivity=1)
    statistics = calibrate(source, text, settings, tmp_path / "part")
    for experts in FEWER:
        plan = plan_compression(source, statistics, Recipe(experts=experts, types=F32))
        assert plan.expected_kl is not None
        assert math.isfinite(plan.expected_kl)
        assert len(plan.layers[-1].experts) == (experts.keep or source.spec.n_expert)


def test_rows_of_a_router_among_those_of_another_group_are_refused(calibrated: Calibrated, tmp_path: Path) -> None:
    source, statistics = calibrated("deepseek2")
    plan = plan_compression(source, statistics, Recipe(types=F32, hints=False))
    mixed = replace(plan.layers[1], rows=(2, 1, 0, *range(3, 8)))
    with pytest.raises(UnsupportedModelError, match=r"layer 1 would have rows .* another group\. Merge"):
        write_planned(source, replace(plan, layers=(plan.layers[0], mixed)), tmp_path / "m.gguf", statistics)


@pytest.mark.parametrize("name", ["granitemoe", "glm4moe", "bailingmoe2", "gemma4", *LATENT, *RECURRENT])
def test_feedback_sees_the_stream_of_the_file_that_it_makes(calibrated: Calibrated, tmp_path: Path, name: str) -> None:
    source, statistics = calibrated(name)
    types = StorageRecipe("F16", attention="Q4_0", token="F16", output="F16")
    plan = plan_compression(source, statistics, Recipe(types=types, fit=FitRecipe(feedback=True, refit=True)))
    quantiser = chosen_quantiser(source, plan, statistics, 1)
    assert isinstance(quantiser, FeedbackQuantiser)
    path = tmp_path / "m.gguf"
    write_planned(source, plan, path, statistics, quantiser=quantiser)
    stream = run(gguf_source(path), Sequences(statistics.tokens))
    np.testing.assert_allclose(quantiser.h, stream, atol=1e-3)
    assert float((stream - run(source, Sequences(statistics.tokens))).std()) > 1e-2


def test_a_size_is_met_with_mxfp4_where_matrices_have_it_already(tmp_path: Path) -> None:
    """There it costs nothing, and elsewhere it is not tried."""
    shape = replace(SHAPE, n_embd=64, n_ff=64)
    source = gguf_source(write_family(tmp_path / "m.gguf", "gpt-oss", GGMLQuantizationType.MXFP4, shape))
    text = CalibrationText((tuple(TOKENS),), ("text",))
    settings = CalibrationSettings(Samples(types=(), n_gram=40), n_sensitivity=40, prices=True)
    statistics = calibrate(source, text, settings, tmp_path / "part")
    kept = {key for key in source.shapes if (blocks := source.blocks(key)) and blocks.type.name == "MXFP4"}
    costs = measure_type_costs(source, statistics, n_threads=1)
    assert {key for key in costs.costs if costs.of(key, GGMLQuantizationType.MXFP4) == 0.0} == kept & set(costs.costs)
    assert {key for key in costs.costs if math.isfinite(costs.of(key, GGMLQuantizationType.MXFP4))} <= kept
    plan = plan_compression(source, statistics, Recipe(target_bpw=7.0))
    assert {kind.name for layer in plan.layers for expert in layer.experts for kind in expert.types} == {"MXFP4"}


@pytest.mark.parametrize("name", ["deepseek2-old", "mistral4", "gemma4", *RECURRENT])
def test_prices_of_latent_attention_recurrences_and_what_norms_are_behind_are_what_they_cost(
    tmp_path: Path, name: str
) -> None:
    """Within a factor of two, each matrix quantised alone; tokens select all experts, so that none moves to others."""
    shape = replace(SHAPE, n_layer=3 if name in RECURRENT else 2, n_expert_used=SHAPE.n_expert)
    shape = replace(shape, n_head=4, n_head_kv=1, n_embd_head=128) if name == "gemma4" else shape
    source, kind = gguf_source(write_family(tmp_path / "m.gguf", name, shape=shape)), GGMLQuantizationType.Q8_0
    statistics = calibrated_on(source, tmp_path / "part")
    tokens, costs = Sequences(statistics.tokens), measure_type_costs(source, statistics, types=(kind.name,))
    is_latent = name == "nemotron_h_moe-latent"
    last = f"blk.{1 if is_latent else shape.n_layer - 1}."
    of_layer = [key for key in costs.costs if key.name.startswith(last) and key.expert < 1]
    keys = [key for key in of_layer if name == "gemma4" or is_latent or is_attention(layer_and_role(key.name)[1])]
    assert len(keys) >= (9 if name == "gemma4" else 6 if is_latent else 2)
    for key in keys:
        assert 0.5 < divergence(source, tokens, key, kind) / costs.of(key, kind) < 2, key


def divergence(source: ModelSource, tokens: Sequences, key: MatrixKey, kind: GGMLQuantizationType) -> float:
    """The mean KL divergence in nats per token of the model with one matrix quantised."""
    n_per_row = source.shapes[key][-1]
    rows = np.ascontiguousarray(source.read(key).reshape(-1, n_per_row))
    fitted = FittedSource(source)
    fitted.replace(key, dequantize_rows(quantize_rows(rows, kind), kind, n_per_row))
    wanted, said = (final_logits(one, run(one, tokens)).log_softmax(-1) for one in (source, fitted))
    return float((wanted.exp() * (wanted - said)).sum(-1).mean())


@pytest.mark.parametrize("name", ["granitemoe", "hunyuan-moe", "gemma4", "lfm2moe", "qwen2moe"])
def test_prices_of_token_tables_are_what_they_cost(tmp_path: Path, name: str) -> None:
    """All but the last are the output as well, and some of these cost far more as embeddings."""
    shape = replace(SHAPE, n_layer=3 if name in RECURRENT else 2, n_expert_used=SHAPE.n_expert)
    shape = replace(shape, n_head=4, n_head_kv=1, n_embd_head=128) if name == "gemma4" else shape
    source, kind = gguf_source(write_family(tmp_path / "m.gguf", name, shape=shape)), GGMLQuantizationType.Q8_0
    statistics = calibrated_on(source, tmp_path / "part")
    tokens, costs = Sequences(statistics.tokens), measure_type_costs(source, statistics, types=(kind.name,))
    keys = [key for key in map(MatrixKey, ("token_embd.weight", "output.weight")) if key in source.shapes]
    assert len(keys) == 1 + (name == "qwen2moe")
    for key in keys:
        assert 0.67 < divergence(source, tokens, key, kind) / costs.of(key, kind) < 1.5, key
