import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from slimoe.converter.convert import ConvertOptions, convert
from slimoe.converter.source.inventory import take_inventory
from slimoe.offload.errors import ModelFileError
from slimoe.server.cli import run
from tests.models.gguf_content import finish, read_content, with_prediction_block, write_content
from tests.models.tiny_gguf import FineShape, write_family


def test_a_converted_file(tmp_path: Path, k_quant_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = convert(ConvertOptions(k_quant_checkpoint, tmp_path / "m.gguf", "Q4_K_M")).path
    assert run(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["architecture"] == "llama"
    assert found["sizes"] | {"n_layer": 3, "n_expert": 6, "n_expert_used": 3, "n_ff": 512} == found["sizes"]
    stored = gguf.GGUFReader(path).tensors
    assert found["n_weights"] == sum(int(tensor.n_elements) for tensor in stored)
    assert sum(row["n_bytes"] for row in found["tensors"]) == sum(int(tensor.n_bytes) for tensor in stored)
    kinds = {row["kind"] for row in found["tensors"]}
    assert kinds == {"experts", "attention", "router", "norms", "embeddings", "output"}
    experts = sum(row["n_weights"] for row in found["tensors"] if row["kind"] == "experts")
    assert experts == 3 * 6 * 3 * 256 * 512
    assert found["tokenizer"]["n_tokens"] == 520
    assert found["provenance"]["slimoe.recipe"] == "Q4_K_M"


def test_a_checkpoint(moe_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inventory = take_inventory(moe_checkpoint)
    assert (inventory.architecture, inventory.bits_per_weight) == ("MixtralForCausalLM", 32.0)
    weights = {count.kind: count.n_weights for count in inventory.counts}
    assert weights["experts"] == 2 * 6 * 3 * 64 * 96
    assert weights["router"] == 2 * 6 * 64
    assert inventory.tokenizer == {"files": ["tokenizer.model"]}
    assert run(["inspect", str(moe_checkpoint)]) == 0
    assert "MixtralForCausalLM" in capsys.readouterr().out


def test_any_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "unheard-of")
    writer.add_block_count(7)
    writer.add_array("unheard-of.feed_forward_length", [1, 2, 3])
    writer.add_string("unheard-of.expert_count", "a" * 100_000)
    writer.add_tensor("v.strange.0", np.zeros((2, 32), np.float16))
    writer.add_tensor("blk.0.ffn_down_shexp.weight", np.zeros((2, 32), np.float32))
    finish(writer)
    assert run(["inspect", str(tmp_path / "m.gguf")]) == 0
    text = capsys.readouterr().out
    assert "unheard-of" in text
    assert "n_layer 7" in text
    assert "1, 2, 3" in text
    assert max(map(len, text.splitlines())) < 2000
    assert [line.split()[:2] for line in text.splitlines() if "64" in line and "." in line][:1]
    assert {c.kind for c in take_inventory(tmp_path / "m.gguf").counts} == {"other", "shared experts"}


def test_how_tokens_select_experts_and_what_stands_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_family(tmp_path / "whole.gguf", "glm4moe", shape=FineShape(n_layer=2, n_expert=8, n_expert_used=4))
    groups = {"glm4moe.expert_group_count": 4, "glm4moe.expert_group_used_count": 2}
    path = write_content(tmp_path / "m.gguf", with_prediction_block(read_content(whole).with_keys(groups), 2))
    inventory = take_inventory(path)
    assert inventory.routing == {
        "score": "sigmoid",
        "choice_bias": True,
        "groups": "2 of 4",
        "renormalised": True,
        "scale": 1.0,
        "shared_width": 256,
        "shared_gate": False,
        "dense_layers": 1,
        "dense_width": 7 * 256,
        "mtp_blocks": 1,
        "recurrent_layers": 0,
    }
    n_weights = {count.kind: count.n_weights for count in inventory.counts}
    assert n_weights["router"] == 256 * 8 + 8
    assert n_weights["MTP blocks"] > n_weights["experts"] == 3 * 8 * 256 * 256
    assert run(["inspect", str(path)]) == 0
    assert "routing     score sigmoid  choice_bias yes  groups 2 of 4  renormalised yes" in capsys.readouterr().out


def test_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no model at all, but more than 24 bytes")
    with pytest.raises(ModelFileError, match="not a GGUF file"):
        take_inventory(tmp_path / "x.gguf")
    assert run(["inspect", str(tmp_path)]) == 3
    assert run(["inspect", str(tmp_path / "absent")]) == 3
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_vocabulary_that_is_no_list_is_not_counted(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_uint32("tokenizer.ggml.tokens", 5)
    finish(writer)
    assert take_inventory(tmp_path / "m.gguf").tokenizer == {"model": "llama", "chat_template": False}


def test_a_recipe_is_shown_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "unheard-of")
    writer.add_string("slimoe.version", "0.1.0")
    writer.add_string("slimoe.recipe", 'name = "mine"\n\n[fit]\nrefit = true\n')
    finish(writer)
    assert run(["inspect", str(tmp_path / "m.gguf")]) == 0
    origin = capsys.readouterr().out.split("origin      ")[1].splitlines()
    assert [line.strip() for line in origin] == [
        "slimoe.version 0.1.0",
        "slimoe.recipe",
        'name = "mine"',
        "[fit]",
        "refit = true",
    ]


def test_text_that_is_no_utf_8_is_shown_as_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "unheard-of")
    writer.add_string("slimoe.version", "0.1.0 XX")
    writer.add_array("general.license", ["XX"])
    writer.add_tokenizer_model("XX")
    finish(writer)
    path.write_bytes(path.read_bytes().replace(b"XX", b"\xed\xa0"))
    assert run(["inspect", str(path)]) == 0
    assert r"slimoe.version 0.1.0 \udced\udca0" in capsys.readouterr().out
    assert run(["inspect", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["provenance"] == {"license": [r"\udced\udca0"], "slimoe.version": r"0.1.0 \udced\udca0"}
    assert shown["tokenizer"]["model"] == r"\udced\udca0"


def test_quality_is_shown_field_by_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "unheard-of")
    writer.add_string("slimoe.quality", '{"kl":0.25,"domains":{"prose":0.5},"note":"short"}')
    finish(writer)
    assert run(["inspect", str(tmp_path / "m.gguf")]) == 0
    origin = capsys.readouterr().out.split("origin      ")[1].splitlines()
    assert [line.strip() for line in origin] == ["slimoe.quality", "kl 0.25", 'domains {"prose":0.5}', "note short"]
