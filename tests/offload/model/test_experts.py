from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.experts import ExpertLayer, expert_layers
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import WeightSource
from slimoe.offload.model.weight_reader import model_sources
from tests.models.gguf_content import Array, GGUFContent, StoredTensor, read_content, write_content
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf

SHAPE = TinyShape(n_layer=2, n_embd=32, n_ff=64, n_expert=5, n_expert_used=3)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> GGUFContent:
    return read_content(write_tiny_gguf(tmp_path_factory.mktemp("experts") / "m.gguf", None, shape=SHAPE))


def layers_of(path: Path) -> list[ExpertLayer]:
    gguf = read_gguf(path)
    spec = ModelSpec.from_gguf(gguf)
    layers = expert_layers(model_sources(gguf, spec), spec)
    return [layer for layer in layers if layer is not None]


def bytes_of(path: Path, source: WeightSource) -> bytes:
    raw = path.read_bytes()
    return b"".join(raw[span.offset : span.offset + span.n_bytes] for span in source.spans)


def assert_experts(path: Path, content: GGUFContent) -> None:
    layers = layers_of(path)
    assert len(layers) == SHAPE.n_layer
    for index, layer in enumerate(layers):
        assert (layer.target, layer.constants, layer.n_expert_used) == ((0, 1, 2, 3, 4), None, 3)
        assert layer.router.name == f"blk.{index}.ffn_gate_inp.weight"
        for expert, (copy,) in enumerate(layer.experts):
            assert copy.n_bytes == sum(len(bytes_of(path, part)) for part in copy.matrices)
            for name, part in zip(("gate", "up", "down"), copy.matrices, strict=True):
                stack = content.tensors[f"blk.{index}.ffn_{name}_exps.weight"]
                assert bytes_of(path, part) == stack.data[expert].tobytes()


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0])
def test_an_expert_is_its_slice_of_the_stacks(tmp_path: Path, content: GGUFContent, kind: Type) -> None:
    content = content if kind is Type.F32 else content.quantised(kind)
    assert_experts(write_content(tmp_path / "m.gguf", content), content)


def test_experts_that_are_tensors_of_their_own(tmp_path: Path, content: GGUFContent) -> None:
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in content.tensors.items():
        if "_exps" in name:
            # Backwards, so that the order in the file is not the order of the experts.
            for e in reversed(range(SHAPE.n_expert)):
                tensors[name.replace("_exps", f".{e}")] = StoredTensor(tensor.data[e], tensor.type)
        else:
            tensors[name] = tensor
    assert_experts(write_content(tmp_path / "m.gguf", GGUFContent(content.keys, tensors)), content)


def test_one_expert_is_a_stack_of_one(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", None, shape=TinyShape(n_layer=1, n_expert=1, n_expert_used=1))
    (layer,) = layers_of(path)
    ((copy,),) = layer.experts
    assert [matrix.ne for matrix in copy.matrices] == [(64, 96), (64, 96), (96, 64)]
    assert len({matrix.name for matrix in copy.matrices}) == 3


def test_a_class_is_types_and_shapes(tmp_path: Path, content: GGUFContent) -> None:
    mixed = content.quantised(Type.Q8_0, lambda name: name == "blk.1.ffn_down_exps.weight")
    first, second = layers_of(write_content(tmp_path / "m.gguf", mixed))
    classes = [{copy.slot_class.matrices for (copy,) in layer.experts} for layer in (first, second)]
    f32 = (Type.F32, (32, 64))
    assert classes == [{(f32, f32, (Type.F32, (64, 32)))}, {(f32, f32, (Type.Q8_0, (64, 32)))}]


def test_a_dense_model_has_none(tmp_path: Path, content: GGUFContent) -> None:
    dense: dict[str, Array | None] = {name: None for name in content.tensors if "_exps" in name or "_inp" in name}
    ffn = {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    values = {f"blk.{n}.{name}.weight": np.zeros(dims, np.float32) for n in range(2) for name, dims in ffn.items()}
    keys = {"llama.expert_count": None, "llama.expert_used_count": None}
    assert layers_of(write_content(tmp_path / "m.gguf", content.with_values(dense | values).with_keys(keys))) == []
