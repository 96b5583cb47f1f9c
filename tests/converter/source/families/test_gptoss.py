"""gpt-oss's checkpoints with experts in MXFP4: their codes and scales are kept, and compute what transformers does."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from safetensors.torch import load_file, save_file

from slimoe.converter.convert import ConvertOptions, convert
from slimoe.converter.source.inventory import take_inventory
from slimoe.converter.source.model_source import expert_key
from slimoe.converter.source.open_source import open_source
from slimoe.converter.source.rotation import read_rotation
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.model.architectures import GPT_OSS
from tests.converter.source.families.test_checkpoints import TOKENS, engines, llama_cpps, torchs
from tests.converter.source.families.test_config import ours, theirs
from tests.converter.source.families.tiny_families import save_family
from tests.models.gguf_content import file_tensors
from tests.models.tiny_checkpoint import logits

LAYER = "model.layers.1.mlp.experts."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random codes and scales in place of the experts' matrices, as OpenAI's own checkpoint has them."""
    path = save_family(tmp_path_factory.mktemp("gptoss") / "c", "GptOss")
    tensors, rng = load_file(path / "model.safetensors"), np.random.default_rng(7)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        n_expert, n_per_row, n_rows = tensors.pop(name).shape
        shape = n_expert, n_rows, n_per_row // 32
        tensors[f"{name}_blocks"] = torch.from_numpy(rng.integers(0, 256, (*shape, 16), np.uint8))
        tensors[f"{name}_scales"] = torch.from_numpy(rng.integers(122, 126, shape, np.uint8))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = (path / "config.json").read_text().rstrip().removesuffix("}")
    (path / "config.json").write_text(f'{config}, "quantization_config": {{"quant_method": "mxfp4"}}}}')
    return path


def test_torch_the_engine_and_llama_cpp_compute_what_transformers_does(checkpoint: Path, tmp_path: Path) -> None:
    expected = logits(checkpoint, TOKENS).numpy()
    assert expected.std() > 0.5, "logits that are all alike show nothing"
    np.testing.assert_allclose(torchs(checkpoint), expected, atol=1e-3)
    path = convert(ConvertOptions(checkpoint, tmp_path / "m.gguf", "F32", n_threads=1)).path
    np.testing.assert_allclose(engines(path), expected, atol=1e-3)
    np.testing.assert_allclose(llama_cpps(path), expected, atol=1e-3)


def test_stacks_of_bf16_are_transposed(tmp_path: Path) -> None:
    """As transformers saves a model that it has trained."""
    source = save_family(tmp_path / "c", "GptOss")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    path = convert(ConvertOptions(source, tmp_path / "m.gguf", "BF16", n_threads=1)).path
    written = file_tensors(path)
    stack = tensors[f"{LAYER}gate_up_proj"].float().numpy()
    for role, first in [("gate", 0), ("up", 1)]:
        found = written[f"blk.1.ffn_{role}_exps.weight"]
        values = quants.dequantize(found.data, found.tensor_type)
        np.testing.assert_array_equal(values, stack[:, :, first::2].swapaxes(1, 2))
    np.testing.assert_allclose(torchs(source), logits(source, TOKENS).numpy(), atol=1e-3)


@pytest.mark.parametrize("kind", ["MXFP4_MOE", None])
def test_codes_and_scales_are_kept(checkpoint: Path, tmp_path: Path, kind: str | None) -> None:
    """Without a type too: a smaller file of them would be a worse one."""
    stored = load_file(checkpoint / "model.safetensors")
    written = file_tensors(convert(ConvertOptions(checkpoint, tmp_path / "m.gguf", kind, n_threads=1)).path)
    for role, name, rows in [
        ("gate", "gate_up_proj", slice(0, None, 2)),
        ("up", "gate_up_proj", slice(1, None, 2)),
        ("down", "down_proj", slice(None)),
    ]:
        found = written[f"blk.1.ffn_{role}_exps.weight"]
        assert found.tensor_type is GGMLQuantizationType.MXFP4
        blocks = found.data.reshape(*found.data.shape[:2], -1, 17)
        np.testing.assert_array_equal(blocks[..., 0], stored[f"{LAYER}{name}_scales"][:, rows].numpy())
        pairs = stored[f"{LAYER}{name}_blocks"][:, rows].numpy()
        codes = np.stack((pairs & 15, pairs >> 4), -1).reshape(*blocks.shape[:-1], 32)
        np.testing.assert_array_equal(blocks[..., 1:] & 15, codes[..., :16])
        np.testing.assert_array_equal(blocks[..., 1:] >> 4, codes[..., 16:])
        bias = stored[f"{LAYER}{name}_bias"][:, rows].numpy()
        np.testing.assert_array_equal(written[f"blk.1.ffn_{role}_exps.bias"].data, bias)
        values = quants.dequantize(found.data, found.tensor_type)
        matrix = open_source(checkpoint).matrices[expert_key(1, role, 5)].rows
        np.testing.assert_array_equal(matrix.read(3, 20), values[5, 3:23])
        assert matrix.blocks is not None
        np.testing.assert_array_equal(matrix.blocks.read(51, 170), found.data[5].reshape(-1)[51:221])
    assert written["blk.0.attn_q.weight"].tensor_type is GGMLQuantizationType.Q8_0


def test_the_bounds_of_yarn_are_rounded_as_llama_cpp_does() -> None:
    """By default they are not: a file has no word for that."""
    config = ours("GptOssForCausalLM", {})
    assert theirs("GptOssForCausalLM", {}).rope_parameters["truncate"] is False
    rotation = read_rotation(Path("config.json"), config, GPT_OSS)
    assert not rotation.divisors
    spec = rotation.spec
    assert (spec.scaling, spec.factor, spec.n_ctx_orig, spec.freq_base) == ("yarn", 32.0, 4096, 150000.0)


def test_an_inventory_tells_their_types(checkpoint: Path) -> None:
    counts = {(count.kind, count.type): (count.n_weights, count.n_bytes) for count in take_inventory(checkpoint).counts}
    n_weights = 2 * 8 * 3 * 64 * 128
    assert counts["experts", "MXFP4"] == (n_weights, n_weights // 32 * 17)
    assert counts["router", "F32"][0] == 2 * (8 * 64 + 8)


@pytest.mark.parametrize(
    ("name", "kind", "problem"),
    [
        ("down_proj_scales", ModelFileError, r"tensor model\.layers\.1\.mlp\.experts\.down_proj_scales is missing"),
        ("down_proj_blocks", UnsupportedModelError, "down_proj_scales is stored as U8, but nothing says how"),
        ("down_proj_bias", ModelFileError, r"blk\.1\.ffn_down_exps\.bias is missing"),
    ],
)
def test_parts_that_are_missing(
    checkpoint: Path, tmp_path: Path, name: str, kind: type[Exception], problem: str
) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "c")
    tensors = load_file(source / "model.safetensors")
    del tensors[LAYER + name]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(kind, match=problem):
        open_source(source)


def test_scales_of_another_shape_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "c")
    tensors = load_file(source / "model.safetensors")
    name = f"{LAYER}gate_up_proj_scales"
    save_file(tensors | {name: tensors[name][:, ::2].contiguous()}, source / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"gate_up_proj_scales \[8, 128, 2\] do not belong together"):
        open_source(source)
