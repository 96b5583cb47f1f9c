from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf.header import GGUFFile, read_gguf
from slimoe.offload.model.architectures import ARCHITECTURES, COUSINS, LLAMA
from slimoe.offload.model.attention_spec import AttentionSpec
from slimoe.offload.model.expert_spec import ExpertSpec
from slimoe.offload.model.rope import RopeSpec
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensor_list import check_tensors
from tests.models.gguf_content import finish

SPEC = ModelSpec(
    architecture=LLAMA,
    n_layer=2,
    n_embd=32,
    n_ff=48,
    n_vocab=40,
    n_ctx_train=64,
    rms_eps=1e-5,
    attention=AttentionSpec(4, 2, 8),
    experts=ExpertSpec(3, 2),
    rope=RopeSpec(n_rot=8, n_ctx_orig=64, freq_base=1e6),
)


def shapes(spec: ModelSpec, *, legacy: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape in numpy's order, written out independently of the code under test."""
    n_embd, n_ff, n_kv = spec.n_embd, spec.n_ff, spec.n_head_kv * spec.n_embd_head
    out: dict[str, tuple[int, ...]] = {"token_embd.weight": (spec.n_vocab, n_embd), "output_norm.weight": (n_embd,)}
    for i in range(spec.n_layer):
        out |= {f"blk.{i}.{n}.weight": (n_embd,) for n in ("attn_norm", "ffn_norm")}
        out |= {f"blk.{i}.{n}.weight": (n_embd, n_embd) for n in ("attn_q", "attn_output")}
        out |= {f"blk.{i}.{n}.weight": (n_kv, n_embd) for n in ("attn_k", "attn_v")}
        ffn = {"ffn_gate": (n_ff, n_embd), "ffn_up": (n_ff, n_embd), "ffn_down": (n_embd, n_ff)}
        if not spec.n_expert:
            out |= {f"blk.{i}.{n}.weight": shape for n, shape in ffn.items()}
            continue
        out[f"blk.{i}.ffn_gate_inp.weight"] = (spec.n_expert, n_embd)
        for name, shape in ffn.items():
            if legacy:
                out |= {f"blk.{i}.{name}.{e}.weight": shape for e in range(spec.n_expert)}
            else:
                out[f"blk.{i}.{name}_exps.weight"] = (spec.n_expert, *shape)
    return out


def write(path: Path, keys: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> GGUFFile:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    finish(writer)
    return read_gguf(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_written_is_read(tmp_path: Path, legacy: bool) -> None:
    gguf_file = write(tmp_path / "m.gguf", SPEC.metadata(), shapes(SPEC, legacy=legacy))
    spec = ModelSpec.from_gguf(gguf_file)
    assert spec.rms_eps == pytest.approx(1e-5)
    assert (spec.n_head_kv, spec.n_embd_head, spec.n_expert, spec.n_expert_used, spec.n_vocab) == (2, 8, 3, 2, 40)
    assert (spec.attention, spec.experts, spec.rope) == (SPEC.attention, SPEC.experts, SPEC.rope)
    check_tensors(gguf_file, spec)


def test_defaults_of_a_dense_file_with_few_keys(tmp_path: Path) -> None:
    keys = {f"llama.{k}": v for k, v in {"block_count": 1, "embedding_length": 32, "context_length": 64}.items()}
    keys |= {"llama.feed_forward_length": 48, "llama.attention.head_count": 4}
    gguf_file = write(tmp_path / "m.gguf", keys | {"llama.attention.layer_norm_rms_epsilon": 1e-6}, shapes(SPEC))
    spec = ModelSpec.from_gguf(gguf_file)
    assert (spec.n_head_kv, spec.n_embd_head, spec.n_expert, spec.n_vocab) == (4, 8, 0, 40)
    rope = spec.rope
    assert (rope.freq_base, rope.freq_scale, rope.ext_factor, rope.attn_factor) == (10000.0, 1.0, 0.0, 1.0)
    assert (rope.n_rot, rope.n_ctx_orig, rope.beta_fast, rope.beta_slow) == (8, 64, 32.0, 1.0)


def rope_of(tmp_path: Path, keys: dict[str, Any]) -> RopeSpec:
    values = SPEC.metadata() | {f"llama.rope.{key}": value for key, value in keys.items()}
    return ModelSpec.from_gguf(write(tmp_path / "m.gguf", values, shapes(SPEC))).rope


def test_rope_scaling(tmp_path: Path) -> None:
    linear = rope_of(tmp_path, {"scaling.type": "linear", "scaling.factor": 4.0})
    assert (linear.freq_scale, linear.ext_factor, linear.attn_factor) == (0.25, 0.0, 1.0)
    assert rope_of(tmp_path, {"scale_linear": 2.0}).freq_scale == 0.5
    assert rope_of(tmp_path, {"scaling.type": "none", "scaling.factor": 4.0}).freq_scale == 1.0
    keys = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 16}
    yarn = rope_of(tmp_path, keys)
    assert (yarn.freq_scale, yarn.ext_factor, yarn.attn_factor, yarn.n_ctx_orig) == (0.25, 1.0, 1.0, 16)
    assert rope_of(tmp_path, keys | {"scaling.attn_factor": 1.5}).attn_factor == 1.5


def test_architectures_that_are_like_one_of_ours_are_none_of_them() -> None:
    assert not COUSINS.keys() & ARCHITECTURES.keys()
    assert {nearest for nearest, _ in COUSINS.values()} <= ARCHITECTURES.keys()


def test_every_other_layer_behind_the_dense_ones_may_have_experts(tmp_path: Path) -> None:
    """llama.cpp's own key of ERNIE 4.5: layer n has experts where n + 1 is a multiple of the step."""
    ernie = replace(SPEC, architecture=ARCHITECTURES["ernie4_5-moe"], n_layer=6)
    keys = {name.replace("llama.", "ernie4_5-moe."): value for name, value in ernie.metadata().items()}
    keys |= {"ernie4_5-moe.leading_dense_block_count": 2, "ernie4_5-moe.interleave_moe_layer_step": 2}
    gguf_file = write(tmp_path / "m.gguf", keys, {"token_embd.weight": (40, 32)})
    gguf_file.metadata["general.architecture"] = "ernie4_5-moe"
    spec = ModelSpec.from_gguf(gguf_file)
    assert [spec.layer_shape(layer).n_expert for layer in range(6)] == [0, 0, 0, 3, 0, 3]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"general.architecture": "rwkv"}, UnsupportedModelError, r"'rwkv' is not supported\. Those that are: llama, "),
        (
            {"general.architecture": "qwen3vlmoe"},
            UnsupportedModelError,
            r"'qwen3vlmoe' is not supported: it is like qwen3moe, but with positions of images\. Those that are: l",
        ),
        ({"llama.block_count": None}, ModelFileError, "block_count is missing"),
        ({"llama.attention.head_count_kv": 3}, ModelFileError, "do not divide into groups"),
        ({"llama.expert_used_count": 4}, ModelFileError, "4 of 3 experts"),
        ({"llama.expert_used_count": 0}, ModelFileError, "0 of 3 experts"),
        ({"llama.expert_used_count": [2, 1]}, UnsupportedModelError, "differs between layers"),
        ({"llama.embedding_length": 0}, ModelFileError, "no count"),
        ({"llama.embedding_length": "big"}, ModelFileError, "no count"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, ModelFileError, "no positive number"),
        ({"llama.rope.dimension_count": 4}, UnsupportedModelError, "rotates 4 of 8"),
        ({"llama.rope.scaling.type": "dynamic"}, UnsupportedModelError, "dynamic"),
        ({"llama.attention.value_length": 16}, UnsupportedModelError, "different length"),
    ],
)
def test_bad_keys(tmp_path: Path, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    values = {key: value for key, value in (SPEC.metadata() | changed).items() if value is not None}
    values.pop("general.architecture", None)
    gguf_file = write(tmp_path / "m.gguf", values, shapes(SPEC))
    gguf_file.metadata.update({key: value for key, value in changed.items() if key.startswith("general")})
    with pytest.raises(error, match=message):
        ModelSpec.from_gguf(gguf_file)


def test_head_size_that_does_not_divide(tmp_path: Path) -> None:
    values = SPEC.metadata() | {"llama.attention.head_count": 6}
    for key in ("llama.attention.key_length", "llama.attention.value_length"):
        del values[key]
    with pytest.raises(ModelFileError, match="key_length is -1"):
        ModelSpec.from_gguf(write(tmp_path / "m.gguf", values, shapes(SPEC)))


@pytest.mark.parametrize("name", ["token_embd.weight", "output_norm.weight", "blk.1.ffn_down_exps.weight"])
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    tensors = shapes(SPEC)
    del tensors[name]
    with pytest.raises(ModelFileError, match=f"tensor {name} is missing"):
        check_tensors(write(tmp_path / "m.gguf", SPEC.metadata(), tensors), SPEC)


@pytest.mark.parametrize("name", ["blk.0.attn_k.weight", "blk.1.ffn_up_exps.weight", "output.weight"])
def test_wrong_shape(tmp_path: Path, name: str) -> None:
    tensors = shapes(SPEC) | {name: (7, 32)}
    with pytest.raises(ModelFileError, match=f"tensor {name} has the shape"):
        check_tensors(write(tmp_path / "m.gguf", SPEC.metadata(), tensors), SPEC)


def test_missing_expert_of_the_old_layout(tmp_path: Path) -> None:
    tensors = shapes(SPEC, legacy=True)
    del tensors["blk.1.ffn_up.2.weight"]
    with pytest.raises(ModelFileError, match=r"blk\.1\.ffn_up\.2\.weight is missing"):
        check_tensors(write(tmp_path / "m.gguf", SPEC.metadata(), tensors), SPEC)
