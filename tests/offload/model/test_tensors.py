from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.regrouped import join_layers, join_rows
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import LinearSource, ModelSources, Span, WeightSource
from slimoe.offload.model.weight_reader import model_sources
from tests.models.gguf_content import Array, GGUFContent, StoredTensor, quantise, read_content, write_content
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf

SHAPE = TinyShape(n_layer=2, n_embd=32, n_ff=32, n_expert=3, n_expert_used=2)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> GGUFContent:
    return read_content(write_tiny_gguf(tmp_path_factory.mktemp("sources") / "m.gguf", None, shape=SHAPE))


def sources_of(tmp_path: Path, content: GGUFContent) -> ModelSources:
    gguf = read_gguf(write_content(tmp_path / "m.gguf", content))
    return model_sources(gguf, ModelSpec.from_gguf(gguf))


def bytes_of(tmp_path: Path, source: WeightSource) -> bytes:
    raw = (tmp_path / "m.gguf").read_bytes()
    assert source.n_bytes == sum(span.n_bytes for span in source.spans)
    return b"".join(raw[span.offset : span.offset + span.n_bytes] for span in source.spans)


def floats(tmp_path: Path, source: WeightSource) -> Array:
    assert source.type is Type.F32
    return np.frombuffer(bytes_of(tmp_path, source), np.float32).reshape(source.ne[::-1])


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.attn_k.weight", "blk.0.ffn_up_exps.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, content: GGUFContent, name: str) -> None:
    kept = {key: tensor for key, tensor in content.tensors.items() if key != name}
    gguf = read_gguf(write_content(tmp_path / "whole.gguf", content))
    spec = ModelSpec.from_gguf(gguf)
    damaged = read_gguf(write_content(tmp_path / "m.gguf", GGUFContent(content.keys, kept)))
    with pytest.raises(ModelFileError, match=f"tensor {name} is missing"):
        model_sources(damaged, spec)


@pytest.mark.parametrize("name", ["blk.0.attn_q_norm.weight", "blk.0.ffn_gate_inp.bias", "blk.2.attn_q.weight", "x"])
def test_a_tensor_that_nobody_reads_is_refused(tmp_path: Path, content: GGUFContent, name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"tensor {name} has no place"):
        sources_of(tmp_path, content.with_values({name: np.ones(32, np.float32)}))


def test_tables_of_rotations_may_go_unread(tmp_path: Path, content: GGUFContent) -> None:
    names = ("blk.0.attn_rot_embd", "blk.1.attn.rotary_emb.inv_freq")
    assert sources_of(tmp_path, content.with_values(dict.fromkeys(names, np.ones(4, np.float32))))


@pytest.mark.parametrize("kind", [Type.F16, Type.Q8_0])
@pytest.mark.parametrize("name", ["output_norm.weight", "blk.1.ffn_norm.weight"])
def test_vectors_are_f32(tmp_path: Path, content: GGUFContent, name: str, kind: Type) -> None:
    ones = np.ones((1, 32), np.float32)
    stored = StoredTensor(ones[0].astype(np.float16), kind) if kind is Type.F16 else quantise(ones, kind)
    flat = StoredTensor(stored.data.reshape(-1), kind)
    with pytest.raises(UnsupportedModelError, match=f"vector {name} has type {kind.name}"):
        sources_of(tmp_path, GGUFContent(content.keys, content.tensors | {name: flat}))


@pytest.mark.parametrize(("dtype", "kind"), [(np.int8, "I8"), (np.int32, "I32"), (np.float64, "F64")])
def test_matrices_that_ggml_cannot_multiply(
    tmp_path: Path, content: GGUFContent, dtype: type[np.generic], kind: str
) -> None:
    name = "blk.0.attn_q.weight"
    tensor = StoredTensor(np.ones((32, 32), dtype), Type[kind])
    with pytest.raises(UnsupportedModelError, match=f"matrix {name} has type {kind}"):
        sources_of(tmp_path, GGUFContent(content.keys, content.tensors | {name: tensor}))


@pytest.mark.parametrize("shape", [(5,), (32, 32)])
def test_a_bias_of_another_shape(tmp_path: Path, content: GGUFContent, shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelFileError, match=r"tensor blk\.0\.attn_q\.bias has the shape"):
        sources_of(tmp_path, content.with_values({"blk.0.attn_q.bias": np.ones(shape, np.float32)}))


def test_experts_that_differ_in_type(tmp_path: Path, content: GGUFContent) -> None:
    stack = content.values("blk.0.ffn_up_exps.weight")
    tensors = {name: tensor for name, tensor in content.tensors.items() if name != "blk.0.ffn_up_exps.weight"}
    tensors |= {f"blk.0.ffn_up.{e}.weight": quantise(stack[e], Type.Q8_0) for e in (0, 1)}
    tensors["blk.0.ffn_up.2.weight"] = quantise(stack[2], Type.Q4_0)
    with pytest.raises(UnsupportedModelError, match="differ in shape or type"):
        sources_of(tmp_path, GGUFContent(content.keys, tensors))


def test_joined_rows_are_the_matrices_below_each_other(tmp_path: Path, content: GGUFContent) -> None:
    first, last = join_layers(sources_of(tmp_path, content)).layers
    (qkv,), (gate_up,) = first.qkv, first.gate_up
    expected = np.concatenate([content.values(f"blk.0.attn_{name}.weight") for name in "qkv"])
    np.testing.assert_array_equal(floats(tmp_path, qkv.weight), expected)
    stacks = [content.values(f"blk.0.ffn_{name}_exps.weight") for name in ("gate", "up")]
    np.testing.assert_array_equal(floats(tmp_path, gate_up.weight), np.concatenate(stacks, axis=1))
    assert len(last.qkv) == 3, "the last layer's queries stand alone"
    assert len(last.gate_up) == 1


def linear(name: str, *, n_rows: int = 8, kind: Type = Type.F32, bias: bool = False) -> LinearSource:
    weight = WeightSource(name, (32, n_rows), kind, (Span(0, 0, n_rows * 128),))
    return LinearSource(weight, WeightSource(f"{name}.bias", (n_rows,), Type.F32, ()) if bias else None)


def test_what_does_not_fit_together_stays_apart() -> None:
    assert len(join_rows([linear("a"), linear("b", n_rows=16)])) == 1
    assert len(join_rows([linear("a"), linear("b", kind=Type.F16)])) == 2
    assert len(join_rows([linear("a"), linear("b", bias=True)])) == 2
    assert len(join_rows([linear("a")])) == 1


def test_a_tied_output_is_the_token_table(tmp_path: Path, content: GGUFContent) -> None:
    sources = sources_of(tmp_path, content.with_values({"output.weight": None}))
    assert sources.output.weight is sources.token_embd
