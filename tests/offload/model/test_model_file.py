"""NaN and infinity in small tensors: found when a model is opened, and told by the tensor's name and its layer."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.offload.engine import Engine
from slimoe.offload.errors import ModelFileError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.model_file import ModelFile, check_numbers
from slimoe.server.cli import run
from tests.models.configs import engine_config
from tests.models.gguf_content import Array, StoredTensor, read_content, write_content, write_shards
from tests.models.native_files import NativeFfn, StoredExpert, write_native
from tests.models.tiny_gguf import FAMILIES, FineShape, TinyShape, write_family, write_tiny_gguf

SHAPE = FineShape(n_layer=2, n_expert=8, n_expert_used=4)
SHAPES = {
    "deepseek2-lite": FineShape(n_layer=2, n_ff=32, n_expert=6, n_expert_used=2),
    "nemotron_h_moe": FineShape(n_layer=3, n_expert=8, n_expert_used=4),
    "nemotron_h_moe-latent": FineShape(n_layer=3, n_expert=8, n_expert_used=4),
}


def problem_of(file: ModelFile) -> str:
    try:
        check_numbers(file.gguf, file.sources)
    except ModelFileError as error:
        return str(error)
    return ""


def is_small(tensor: gguf.ReaderTensor) -> bool:
    """Whether it is a norm, a bias, a factor, a divisor, a router or a convolution, and is read at all."""
    is_one = len(tensor.shape) == 1 or tensor.name.endswith(".bias")
    is_one = is_one or any(part in tensor.name for part in ("ffn_gate_inp", "conv", "ssm_a", "ssm_d", "ssm_norm"))
    is_one = is_one and not tensor.name.endswith(("ssm_alpha.weight", "conv.in_proj.weight", "conv.out_proj.weight"))
    return is_one and ".indexer." not in tensor.name


@pytest.mark.parametrize("name", FAMILIES)
def test_every_small_tensor_of_a_family_is_looked_at(tmp_path: Path, name: str) -> None:
    """The last value of one tensor after the other is infinite."""
    path = write_family(tmp_path / "m.gguf", name, shape=SHAPES.get(name, SHAPE))
    file, tensors = ModelFile.of(read_gguf(path)), gguf.GGUFReader(path).tensors
    assert problem_of(file) == ""
    with path.open("r+b", buffering=0) as stored:
        for tensor in tensors:
            last = tensor.data_offset + tensor.n_bytes - 4
            stored.seek(last)
            before = stored.read(4)
            stored.seek(last)
            stored.write(struct.pack("<f", -np.inf))
            where = f"layer {tensor.name.split('.')[1]}" if tensor.name.startswith("blk.") else "the model"
            told = f"tensor {tensor.name} of {where} holds NaN or infinity, 1 of {tensor.n_elements} values. Download"
            assert (told in problem_of(file)) is is_small(tensor), tensor.name
            stored.seek(last)
            stored.write(before)
    assert sum(map(is_small, tensors)) > 6


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("exp_probs_b.bias", np.full(8, np.nan, np.float32)),
        ("ffn_up_exps.scale", np.where(np.arange(8) == 5, np.inf, 1).astype(np.float32)),
    ],
)
def test_the_engine_does_not_open_it(tmp_path: Path, tensor: str, value: Array) -> None:
    content = read_content(write_family(tmp_path / "whole.gguf", "glm4moe", shape=SHAPE))
    path = write_content(tmp_path / "m.gguf", content.with_values({f"blk.1.{tensor}": value}))
    with pytest.raises(ModelFileError, match=rf"m\.gguf: tensor blk\.1\.{tensor} of layer 1 holds NaN or in"):
        Engine.open(engine_config(path, n_threads=1))


def test_a_command_tells_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = read_content(write_tiny_gguf(tmp_path / "whole.gguf", None))
    router = content.values("blk.1.ffn_gate_inp.weight").copy()
    router[3, 3] = np.nan
    first = write_shards(tmp_path, content.with_values({"blk.1.ffn_gate_inp.weight": router}), 2)
    assert run(["run", str(first), "-p", "x", "--device", "none"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "of-00002.gguf: tensor blk.1.ffn_gate_inp.weight of layer 1 holds NaN or infinity, 1 of 384 values." in line


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_routers_of_two_bytes_a_value(tmp_path: Path, kind: str) -> None:
    content, name = read_content(write_tiny_gguf(tmp_path / "whole.gguf", None)), "blk.0.ffn_gate_inp.weight"
    router = content.values(name).copy()
    for largest in (60000.0, np.inf):
        router[0, 0] = largest
        stored = StoredTensor(gguf.quants.quantize(router, Type[kind]), Type[kind])
        content.tensors[name] = stored
        file = ModelFile.of(read_gguf(write_content(tmp_path / "m.gguf", content)))
        assert ("ffn_gate_inp.weight of layer 0 holds NaN" in problem_of(file)) is (largest == np.inf)


@pytest.mark.filterwarnings("error")
def test_numbers_whose_squares_are_none_are_numbers(tmp_path: Path) -> None:
    content = read_content(write_tiny_gguf(tmp_path / "whole.gguf", None))
    path = write_content(
        tmp_path / "m.gguf", content.with_values({"output_norm.weight": np.full(64, 3e38, np.float32)})
    )
    assert problem_of(ModelFile.of(read_gguf(path))) == ""


def test_a_file_that_is_gone_by_now(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", None)
    file = ModelFile.of(read_gguf(path))
    path.unlink()
    assert "m.gguf: the file cannot be read (No such file" in problem_of(file)


def test_constant_experts(tmp_path: Path) -> None:
    content = read_content(write_tiny_gguf(tmp_path / "whole.gguf", None, shape=TinyShape(n_layer=1)))
    constants = np.ones((2, 64), np.float32)
    constants[1, 7] = np.nan
    experts = (StoredExpert(4), StoredExpert(1))
    path = write_native(tmp_path / "m.gguf", content, [NativeFfn(experts, (1, -1, 0, -2, 0, 1), constants)])
    assert "of layer 0 holds NaN or infinity, 1 of 128 values" in problem_of(ModelFile.of(read_gguf(path)))
