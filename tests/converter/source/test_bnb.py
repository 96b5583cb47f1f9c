"""Checkpoints that bitsandbytes quantised: their weights are those that bitsandbytes itself decodes."""

import builtins
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from slimoe.converter.convert import ConvertOptions, convert
from slimoe.converter.source.inventory import take_inventory
from slimoe.converter.source.model_source import MatrixKey, block_key, expert_key
from slimoe.converter.source.open_source import open_source
from slimoe.converter.source.stored_rows import rotation_order
from slimoe.offload.errors import LibraryError, ModelFileError, SlimoeError, UnsupportedModelError
from tests.converter.test_convert import PROMPT
from tests.models.gguf_content import Array
from tests.models.tiny_checkpoint import TinyConfig, llama_logits, save_checkpoint


@cache
def functional() -> Any:
    """Takes seconds to load, which processes that run other tests do without."""
    from bitsandbytes import functional

    return functional


WEIGHTS = "model.safetensors"
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
SIZES = TinyConfig(n_layer=1, n_embd=128, n_ff=192, n_head=4, n_head_kv=2, n_expert=0)


def quantise(source: Path, target: Path, kind: str) -> Any:
    """Has transformers quantise and save a checkpoint; the quantised model."""
    settings = transformers.BitsAndBytesConfig(**KINDS[kind])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(target)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(source / name, target)
    return model


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, sentencepiece_path: Path) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("bnb") / "dense", sentencepiece_path, SIZES, torch.bfloat16)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> dict[str, tuple[Path, Any]]:
    """By kind: the checkpoint, and transformers' model of it."""
    directory = tmp_path_factory.mktemp("bnb")
    return {kind: (directory / kind, quantise(dense, directory / kind, kind)) for kind in KINDS}


def decoded(linear: Any) -> Array:
    """The weights of one of transformers' quantised layers, by bitsandbytes."""
    weight = linear.weight
    if weight.dtype is torch.int8:
        return np.asarray(functional().int8_vectorwise_dequant(weight.data, weight.SCB))
    return np.asarray(functional().dequantize_4bit(weight.data, weight.quant_state).float())


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_those_that_bitsandbytes_decodes(quantised: dict[str, tuple[Path, Any]], kind: str) -> None:
    path, model = quantised[kind]
    source, layer = open_source(path), model.model.layers[0]
    np.testing.assert_array_equal(source.read(block_key(0, "ffn_down")), decoded(layer.mlp.down_proj))
    np.testing.assert_array_equal(source.read(block_key(0, "ffn_up")), decoded(layer.mlp.up_proj))
    queries = rotation_order(decoded(layer.self_attn.q_proj), 32)
    np.testing.assert_array_equal(source.read(block_key(0, "attn_q")), queries)
    output = model.lm_head.weight.detach().float().numpy()
    np.testing.assert_array_equal(source.read(MatrixKey("output.weight")), output)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_has_the_quantised_weights(tmp_path: Path, quantised: dict[str, tuple[Path, Any]], kind: str) -> None:
    path, model = quantised[kind]
    target = convert(ConvertOptions(path, tmp_path / "m.gguf", "F32", n_threads=2)).path
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(target).tensors}
    np.testing.assert_array_equal(stored["blk.0.ffn_gate.weight"], decoded(model.model.layers[0].mlp.gate_proj))
    assert len(stored) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_any_rows_can_be_read(quantised: dict[str, tuple[Path, Any]], kind: str) -> None:
    rows = open_source(quantised[kind][0]).matrices[block_key(0, "ffn_down")].rows
    whole = rows.read(0, 128)
    for first, n_rows in ((1, 1), (5, 40), (127, 1), (0, 2)):
        np.testing.assert_array_equal(rows.read(first, n_rows), whole[first : first + n_rows])


@pytest.mark.parametrize("kind", ["nested", "int8"])
def test_llama_cpp_computes_what_transformers_does_of_these_weights(
    tmp_path: Path, quantised: dict[str, tuple[Path, Any]], dense: Path, kind: str
) -> None:
    path, model = quantised[kind]
    target = convert(ConvertOptions(path, tmp_path / "m.gguf", "F32", n_threads=2)).path
    exact = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    for ours, theirs in zip(exact.model.layers, model.model.layers, strict=True):
        for name, linear in theirs.named_modules():
            if name.endswith("_proj"):
                ours.get_submodule(name).weight.data = torch.from_numpy(decoded(linear))
    with torch.no_grad():
        expected = exact(torch.tensor([PROMPT])).logits[0].numpy()
    np.testing.assert_allclose(llama_logits(target, PROMPT), expected, atol=2e-3 * expected.std())


def naively_decoded(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """What the 4 bits mean: bitsandbytes' own CPU kernel is wrong for rows that are no multiples of its blocks."""
    scales = functional().dequantize_blockwise(state.absmax, state.state2) + state.offset
    numbers = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    return (state.code[numbers] * scales.repeat_interleave(state.blocksize)[: len(numbers)]).view(state.shape)


def quantise_experts(source: Path, target: Path, kind: str) -> None:
    """The layout of older transformers, whose experts, and whose router, bitsandbytes quantises one by one."""
    shutil.copytree(source, target)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(source / WEIGHTS).items():
        if ".experts." not in name and not name.endswith("block_sparse_moe.gate.weight"):
            tensors[name] = value
        elif kind == "int8":
            tensors[name], tensors[name.replace(".weight", ".SCB")], _ = functional().int8_vectorwise_quant(
                value.half()
            )
        else:
            packed, state = functional().quantize_4bit(value, quant_type=kind, compress_statistics=True)
            tensors[name] = packed
            tensors |= {f"{name}.{part}": one for part, one in state.as_dict(packed=True).items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, target / WEIGHTS)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"load_in_8bit" if kind == "int8" else "load_in_4bit": True}
    (target / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_experts_and_routers_one_by_one(tmp_path: Path, moe_checkpoint: Path, kind: str) -> None:
    quantise_experts(moe_checkpoint, tmp_path / "c", kind)
    source, original = open_source(tmp_path / "c"), load_file(moe_checkpoint / WEIGHTS)
    assert source.source_hash != open_source(moe_checkpoint).source_hash
    for expert in (0, 5):
        value = original[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"]
        if kind == "int8":
            expected = functional().int8_vectorwise_dequant(*functional().int8_vectorwise_quant(value.half())[:2])
        else:
            expected = naively_decoded(*functional().quantize_4bit(value, quant_type=kind, compress_statistics=True))
        np.testing.assert_array_equal(source.read(expert_key(1, "down", expert)), np.asarray(expected))
    router = original["model.layers.0.block_sparse_moe.gate.weight"].numpy()
    np.testing.assert_allclose(source.read(block_key(0, "ffn_gate_inp")), router, atol=0.2 * abs(router).max())
    assert convert(ConvertOptions(tmp_path / "c", tmp_path / "m.gguf", "Q8_0", n_threads=2)).n_bytes > 0


def test_what_transformers_leaves_alone_is_read_as_it_is(tmp_path: Path, moe_checkpoint: Path) -> None:
    """Newer transformers keep experts in stacks, which bitsandbytes does not quantise."""
    quantise(moe_checkpoint, tmp_path / "c", "nf4")
    source, original = open_source(tmp_path / "c"), open_source(moe_checkpoint)
    key = expert_key(1, "up", 3)
    expected = torch.from_numpy(original.read(key)).bfloat16().float().numpy()
    np.testing.assert_array_equal(source.read(key), expected)
    assert not np.array_equal(source.read(block_key(1, "attn_v")), original.read(block_key(1, "attn_v")))


def test_the_inventory_counts_weights_and_not_bytes(quantised: dict[str, tuple[Path, Any]], dense: Path) -> None:
    whole = take_inventory(dense)
    for kind, name in {"nested": "NF4", "fp4": "FP4", "int8": "INT8"}.items():
        found = take_inventory(quantised[kind][0])
        assert found.n_weights == whole.n_weights
        n_quantised = sum(count.n_weights for count in found.counts if count.type == name)
        assert n_quantised == 128 * (2 * 128 + 2 * 64 + 3 * 192)
        stored = load_file(quantised[kind][0] / WEIGHTS)
        n_bytes = sum(tensor.nbytes for part, tensor in stored.items() if "weight_format" not in part)
        assert sum(count.n_bytes for count in found.counts) == n_bytes


# --- bad checkpoints ---------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj.weight"
Tensors = dict[str, torch.Tensor]


def halve(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name].flatten()[: tensors[name].numel() // 2].clone()})


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def replace_with(name: str, value: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: value})


STATE = f"{Q}.quant_state.bitsandbytes__nf4"
BAD: dict[str, tuple[str, Callable[[Tensors], object], type[SlimoeError], str]] = {
    "no scales": ("nested", drop(f"{Q}.absmax"), ModelFileError, r"q_proj\.weight\.absmax is missing"),
    "no weights": ("nested", drop(Q), ModelFileError, r"q_proj\.weight is missing"),
    "no nested scales": ("nested", drop(f"{Q}.nested_absmax"), ModelFileError, r"nested_absmax is missing"),
    "too few scales": ("nf4", halve(f"{Q}.absmax"), ModelFileError, r"do not belong to its shape \[128, 128\]"),
    "too few weights": ("nf4", halve(Q), ModelFileError, r"do not belong to its shape"),
    "short code": ("nf4", halve(f"{Q}.quant_map"), ModelFileError, r"do not belong to its shape"),
    "damaged state": ("nf4", halve(STATE), ModelFileError, r"bitsandbytes__nf4 is damaged"),
    "no state": ("nf4", drop(STATE), UnsupportedModelError, r"stored as U8, but nothing says how"),
    "no row scales": ("int8", drop(Q.replace("weight", "SCB")), UnsupportedModelError, r"stored as I8, but nothing"),
    "few row scales": ("int8", halve(Q.replace("weight", "SCB")), ModelFileError, r"do not belong together"),
    "a GPU's order": (
        "int8",
        replace_with(Q.replace("weight", "weight_format"), torch.tensor(2, dtype=torch.uint8)),
        UnsupportedModelError,
        r"arrangement of a GPU",
    ),
    "a type of its own": (
        "nf4",
        lambda tensors: tensors.update({STATE.replace("nf4", "af4"): tensors.pop(STATE)}),
        UnsupportedModelError,
        r"neither as nf4 nor as fp4",
    ),
    "infinite scale": (
        "nf4",
        lambda tensors: tensors[f"{Q}.absmax"].fill_(torch.inf),
        ModelFileError,
        r"q_proj\.weight holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints(tmp_path: Path, quantised: dict[str, tuple[Path, Any]], case: str) -> None:
    kind, spoil, error, message = BAD[case]
    source = shutil.copytree(quantised[kind][0], tmp_path / "c")
    tensors = load_file(source / WEIGHTS)
    spoil(tensors)
    save_file(tensors, source / WEIGHTS)
    with pytest.raises(error, match=message) as caught:
        convert(ConvertOptions(source, tmp_path / "m.gguf", "F32", n_threads=1))
    assert caught.type is error
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_without_bitsandbytes_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, quantised: dict[str, tuple[Path, Any]], dense: Path
) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "bitsandbytes":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        LibraryError, match=r"not installed\. Install it: scripts/install convert, or pip install \"slimoe\[convert\]\""
    ):
        open_source(quantised["nf4"][0])
    assert open_source(dense).spec.n_layer == 1
