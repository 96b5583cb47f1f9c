"""Ling 2's checkpoints, which transformers has no class for: a file made of one has the tensors that it was made of."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from slimoe.converter.convert import ConvertOptions, convert, plan
from slimoe.converter.source.checkpoint import Checkpoint
from slimoe.converter.source.checkpoint_source import read_model_config
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.imatrix_file import Imatrix, InputSquares, write_imatrix
from slimoe.offload.errors import UnsupportedModelError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.spec import ModelSpec
from tests.converter.source.families.test_checkpoints import converted, engines, llama_cpps, torchs
from tests.models.gguf_content import file_tensors, read_content
from tests.models.tiny_checkpoint import byte_level
from tests.models.tiny_gguf import FineShape, write_family

SHAPE = FineShape(n_layer=2, n_embd_head=64, n_ff=64, n_expert=16, n_expert_used=4, n_vocab=520)
CONFIG: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "vocab_size": 520,
    "hidden_size": 256,
    "intermediate_size": 448,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 1e6,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_shared_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
}
NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_qkv.weight": "attention.query_key_value.weight",
    "attn_q_norm.weight": "attention.query_layernorm.weight",
    "attn_k_norm.weight": "attention.key_layernorm.weight",
    "attn_output.weight": "attention.dense.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.expert_bias",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate_shexp.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_experts.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_experts.down_proj.weight",
}
EXPERTS = {f"ffn_{part}_exps.weight": f"mlp.experts.*.{part}_proj.weight" for part in ("gate", "up", "down")}
WHOLE = {
    "token_embd.weight": "model.word_embeddings.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("ling") / "stock.gguf", "bailingmoe2", shape=SHAPE)


@pytest.fixture(scope="module")
def checkpoint(stock: Path) -> Path:
    """The tensors of a file under the names of Ling's own code, and a block that predicts further tokens."""
    tensors: dict[str, torch.Tensor] = {"model.layers.2.eh_proj.weight": torch.ones(2, 2)}
    for name, stored in read_content(stock).tensors.items():
        values = torch.from_numpy(stored.data.copy())
        if name in WHOLE:
            tensors[WHOLE[name]] = values
            continue
        _, layer, inner = name.split(".", 2)
        if inner in NAMES:
            tensors[f"model.layers.{layer}.{NAMES[inner]}"] = values
        else:
            for expert, one in enumerate(values):
                tensors[f"model.layers.{layer}.{EXPERTS[inner].replace('*', str(expert))}"] = one.clone()
    path = stock.parent / "checkpoint"
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    byte_level("qwen").save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return path


def test_a_file_of_a_checkpoint_has_its_tensors_and_computes_what_llama_cpp_does(
    checkpoint: Path, stock: Path, tmp_path: Path
) -> None:
    path = converted(checkpoint, tmp_path / "m.gguf")
    expected, found = file_tensors(stock), file_tensors(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].data, tensor.data, err_msg=name)
    assert ModelSpec.from_gguf(read_gguf(path)) == ModelSpec.from_gguf(read_gguf(stock))
    np.testing.assert_allclose(torchs(checkpoint), llama_cpps(path), atol=1e-3)
    np.testing.assert_allclose(engines(path), llama_cpps(path), atol=1e-3)


def test_an_imatrix_names_the_joined_input_of_attention(stock: Path, tmp_path: Path) -> None:
    """By the names of the file's own matrices, as llama.cpp measures it."""
    rng = np.random.default_rng(3)
    entries = {}
    for name, tensor in file_tensors(stock).items():
        if len(tensor.shape) > 1 and name not in ("token_embd.weight", "blk.1.ffn_gate_inp.weight"):
            n = tensor.data.shape[0] if tensor.data.ndim == 3 else 1
            entries[name] = InputSquares(rng.random((n, tensor.data.shape[-1]), np.float32), np.full(n, 4, np.float32))
    imatrix = Imatrix(entries)
    write_imatrix(imatrix, tmp_path / "imatrix.gguf")
    options = ConvertOptions(stock, tmp_path / "m.gguf", "Q4_0", n_threads=1, imatrix=tmp_path / "imatrix.gguf")
    fitted = plan(options).fitted
    assert fitted is not None
    # All but the token table.
    assert fitted.n_fitted == fitted.n_matrices - 1
    plain = convert(replace(options, imatrix=None, target=tmp_path / "plain.gguf")).path
    written = (file_tensors(one)["blk.0.attn_qkv.weight"].data for one in (convert(options).path, plain))
    assert not np.array_equal(*written)
    assert imatrix.apart(()).joined().entries.keys() == entries.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score_function": "softmax"}, "score_function is 'softmax'"),
        ({"use_qk_norm": False}, "bailingmoe2 files have norms of queries and keys"),
        ({"use_qkv_bias": True}, "no biases of attention"),
        ({"n_group": 3}, "n_group is 3 and topk_group 2"),
    ],
)
def test_what_a_gguf_file_cannot_express_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | settings))
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=message):
        read_model_config(Checkpoint.open(tmp_path))


def test_rows_that_are_no_queries_keys_and_values_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({"model.layers.0.attention.query_key_value.weight": torch.ones(9, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"query_key_value\.weight has no place"):
        open_source(tmp_path)
