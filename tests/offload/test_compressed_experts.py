"""Compressed experts in the engine: vectors for selected experts that are not computed, in memory and in tiers."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bench.baselines.stepping import random_tokens
from slimoe.converter.forward.stream import Sequences, final_logits, run
from slimoe.converter.source.gguf_source import gguf_source
from slimoe.offload.engine import Engine
from slimoe.offload.errors import ModelFileError, SlimoeError, UnsupportedModelError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.model_file import ModelFile
from tests.models.configs import engine_config
from tests.models.gguf_content import Array, GGUFContent, read_content, write_content
from tests.models.native_files import native_content, plain_ffn
from tests.models.tiered import tiered_engine
from tests.models.tiny_gguf import FineShape, write_family

TOKENS = random_tokens(24, 300)
PARTS = [TOKENS[:14], *([token] for token in TOKENS[14:])]
SHAPE = FineShape(n_layer=2, n_expert=16, n_expert_used=4)
ROLES = ("ffn_aux_gain", "ffn_aux_shift")


def scores(engine: Engine) -> Array:
    with closing(engine):
        return np.concatenate([engine.read(part, len(part)).copy() for part in PARTS])


def config(path: Path, **settings: Any) -> Any:
    known = {"n_ctx": 256, "n_threads": 1, "weights": "copied", "kv_type": "f32"}
    return engine_config(path, **known | settings)


def compressed(native: GGUFContent, n_main: int, n_selected: int, size: float, seed: int = 4) -> GGUFContent:
    """The model with random vectors of that size."""
    draw, vectors = np.random.default_rng(seed), dict[str, Array]()
    for name, tensor in native.tensors.items():
        if name.endswith("ffn_gate_inp.weight"):
            for role in ROLES:
                drawn = draw.standard_normal(tensor.data.shape)
                vectors[name.replace("ffn_gate_inp", role)] = np.asarray(size * drawn, np.float32)
    keys = {"slimoe.expert_used_count": n_main, "slimoe.expert_selected_count": n_selected}
    return native.with_keys(keys).with_values(vectors)


def family_content(tmp_path: Path, family: str, size: float, n_main: int = 2) -> GGUFContent:
    stock = read_content(write_family(tmp_path / "stock.gguf", family, shape=SHAPE))
    return compressed(native_content(tmp_path / "scratch", stock, [plain_ffn(16)] * 2), n_main, 4, size)


@pytest.mark.parametrize("family", ["olmoe", "qwen3moe"])
def test_vectors_of_zeros_are_plain_routing_to_fewer_experts_to_the_last_bit(tmp_path: Path, family: str) -> None:
    path = write_content(tmp_path / "m.gguf", family_content(tmp_path, family, 0.0))
    stock = read_content(tmp_path / "stock.gguf")
    fewer = write_content(tmp_path / "fewer.gguf", stock.with_keys({f"{family}.expert_used_count": 2}))
    expected = scores(Engine.open(config(fewer)))
    np.testing.assert_array_equal(scores(Engine.open(config(path))), expected)
    np.testing.assert_array_equal(scores(tiered_engine(config(path), 0.3)), expected)
    assert not np.array_equal(scores(Engine.open(config(tmp_path / "stock.gguf"))), expected)


@pytest.mark.parametrize("family", ["olmoe", "qwen3moe", "gpt-oss"])
def test_every_tier_computes_what_torch_does(tmp_path: Path, family: str) -> None:
    path = write_content(tmp_path / "m.gguf", family_content(tmp_path, family, 0.3))
    source = gguf_source(path)
    expected = final_logits(source, run(source, Sequences((tuple(TOKENS),)))).numpy()
    in_memory = scores(Engine.open(config(path)))
    np.testing.assert_allclose(in_memory, expected, atol=2e-3 * np.abs(expected).max())
    np.testing.assert_array_equal(scores(tiered_engine(config(path), 0.3)), in_memory)
    zeros = write_content(tmp_path / "zeros.gguf", family_content(tmp_path, family, 0.0))
    assert np.abs(scores(Engine.open(config(zeros))) - in_memory).max() > 0.05


class _Experts:
    """In place of transformers' experts: the first of those that are selected, and vectors for the others."""

    def __init__(self, experts: Any, n_main: int, gain: Array, shift: Array) -> None:
        self.inner, self.n_main = experts.forward, n_main
        self.gain, self.shift = torch.from_numpy(gain), torch.from_numpy(shift)

    def forward(self, hidden: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        outputs = []
        for x, row, weight in zip(hidden, rows, weights, strict=True):
            order = weight.argsort(descending=True)
            row, weight = row[order], weight[order] / weight[order][: self.n_main].sum()
            main = self.inner(x[None], row[None, : self.n_main], weight[None, : self.n_main])[0]
            others, theirs = row[self.n_main :], weight[self.n_main :]
            theta = 1 + ((theirs / theirs.sum())[:, None] * self.gain[others]).sum(0)
            outputs.append(main * theta + (theirs[:, None] * self.shift[others]).sum(0))
        return torch.stack(outputs)


def test_transformers_with_its_experts_replaced_says_the_same(
    tmp_path: Path, moe_gguf: Path, moe_checkpoint: Path
) -> None:
    native = native_content(tmp_path / "scratch", read_content(moe_gguf), [plain_ffn(6)] * 2)
    content = compressed(native, 1, 3, 0.3)
    path = write_content(tmp_path / "m.gguf", content)
    model = transformers.AutoModelForCausalLM.from_pretrained(moe_checkpoint, dtype=torch.float32)
    for n, block in enumerate(model.model.layers):
        vectors = (content.values(f"blk.{n}.{role}.weight") for role in ROLES)
        block.mlp.experts.forward = _Experts(block.mlp.experts, 1, *vectors).forward
    with torch.no_grad():
        expected = model(torch.tensor([list(TOKENS)])).logits[0].numpy()
    np.testing.assert_allclose(scores(Engine.open(config(path))), expected, atol=2e-2)


def test_the_order_of_experts_does_not_matter(tmp_path: Path) -> None:
    content = family_content(tmp_path, "olmoe", 0.3)
    order = np.random.default_rng(1).permutation(16)
    changed = {
        name: np.ascontiguousarray(content.values(name)[order])
        for name, tensor in content.tensors.items()
        if "_exps.b0" in name or name.endswith(("ffn_gate_inp.weight", *(f"{role}.weight" for role in ROLES)))
    }
    paths = [
        write_content(tmp_path / f"{n}.gguf", one) for n, one in enumerate((content, content.with_values(changed)))
    ]
    one, other = (scores(Engine.open(config(path))) for path in paths)
    np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ({"slimoe.expert_selected_count": 2}, 1, "it computes 2 of 2 selected experts, which are of 16"),
        ({"slimoe.expert_selected_count": 17}, 1, "it computes 2 of 17 selected experts, which are of 16"),
        ({"slimoe.expert_selected_count": None}, 1, "tensor blk.0.ffn_aux_gain.weight has no place"),
        ({}, None, "tensor blk.1.ffn_aux_shift.weight is missing"),
        ({}, np.zeros((15, 4), np.float32), r"blk.1.ffn_aux_shift.weight (is F32|has the shape) \(4, 15\)"),
        ({}, np.full((1, 1), np.nan, np.float32), "blk.1.ffn_aux_shift.weight of layer 1 holds NaN"),
    ],
    ids=["as many", "too many", "no key", "no vectors", "other shape", "NaN"],
)
def test_what_contradicts_itself_is_refused(
    tmp_path: Path, keys: dict[str, int | None], value: Array | int | None, message: str
) -> None:
    content, name = family_content(tmp_path, "olmoe", 0.3), "blk.1.ffn_aux_shift.weight"
    if value is None or isinstance(value, np.ndarray):
        whole = content.values(name)
        filled = np.full_like(whole, np.nan) if value is not None and np.isnan(value).any() else value
        content = content.with_values({name: filled})
    path = write_content(tmp_path / "m.gguf", replace(content.with_keys(keys)))
    with pytest.raises((ModelFileError, UnsupportedModelError), match=message) as error:
        Engine.open(config(path))
    assert isinstance(error.value, SlimoeError)


def test_the_plan_counts_the_vectors(tmp_path: Path) -> None:
    content = family_content(tmp_path, "olmoe", 0.3)
    file = ModelFile.of(read_gguf(write_content(tmp_path / "m.gguf", content)))
    vectors = (one for layer in file.sources.layers for one in layer.vectors if "ffn_aux" in one.name)
    n_bytes = sum(one.n_bytes for one in vectors)
    assert n_bytes == sum(content.values(f"blk.{n}.{role}.weight").nbytes for n in range(2) for role in ROLES)
    assert file.spec.n_expert_used == 2
    assert file.spec.n_expert_aux == 2
