"""Conversions with --mtp keep the block that predicts a further token: what it is made of, and that it runs."""

import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Type

from bench.baselines.llama_cpp_mtp import LlamaCppMtp
from slimoe.converter.convert import ConvertOptions, convert, plan
from slimoe.offload.engine import Engine
from slimoe.offload.errors import UnsupportedModelError
from slimoe.offload.plan.engine_plan import plan_engine
from slimoe.server.cli import run as slimoe
from slimoe.server.commands.convert import command
from tests.converter.source.families.test_recurrent_families import with_config, with_tensors
from tests.converter.source.families.tiny_families import save_family
from tests.models.configs import engine_config
from tests.models.gguf_content import file_tensors, read_content, write_content
from tests.models.tiny_gguf import FineShape, write_family
from tests.offload.drafted import answers, with_mtp_block, with_right_block, with_second_block
from tests.offload.test_predicted_drafts import REQUESTS

SHAPE = FineShape(n_layer=3, n_embd_head=64, n_expert=8, n_expert_used=2)
NAMES = ("glm4moe", "qwen3next", "qwen35moe", "deepseek2")


def with_block(path: Path, name: str, *, has_own_ends: bool = True) -> Path:
    content = read_content(write_family(path.with_suffix(".plain"), name, shape=SHAPE))
    return write_content(path, with_mtp_block(content, SHAPE.n_layer, has_own_ends=has_own_ends))


def converted(source: Path, target: Path, kind: str) -> Path:
    return convert(ConvertOptions(source, target, kind, n_threads=1, keeps_mtp=True)).path


@pytest.mark.parametrize("has_own_ends", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_in_its_own_types_is_the_same(tmp_path: Path, name: str, has_own_ends: bool) -> None:
    source = with_block(tmp_path / "m.gguf", name, has_own_ends=has_own_ends)
    whole, kept = read_content(source), read_content(converted(source, tmp_path / "f32.gguf", "F32"))
    assert kept.tensors.keys() == whole.tensors.keys()
    for tensor, one in whole.tensors.items():
        np.testing.assert_array_equal(kept.tensors[tensor].data, one.data)
    for key in ("block_count", "nextn_predict_layers"):
        assert kept.keys[f"{name}.{key}"].value == whole.keys[f"{name}.{key}"].value


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_runs_the_block_of_a_mix_of_types(tmp_path: Path, name: str) -> None:
    result = converted(with_block(tmp_path / "m.gguf", name), tmp_path / "q4.gguf", "Q4_K_M")
    block = f"blk.{SHAPE.n_layer}."
    types = {one: tensor.tensor_type for one, tensor in file_tensors(result).items() if one.startswith(block)}
    assert types[f"{block}nextn.eh_proj.weight"] is Type.Q8_0, "all that the block knows of a text passes it"
    assert types[f"{block}nextn.shared_head_head.weight"] is Type.Q6_K
    assert types[f"{block}ffn_up_exps.weight"] is Type.Q4_K
    assert types[f"{block}ffn_gate_inp.weight"] is types[f"{block}nextn.enorm.weight"] is Type.F32
    with closing(LlamaCppMtp(result)) as theirs:
        hidden = theirs.hidden((5, 9, 30))
        logits, _ = theirs.predict((9, 30, 7), hidden, 1)
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_what_layers_get_does_not_depend_on_the_block(tmp_path: Path, name: str) -> None:
    source = with_block(tmp_path / "m.gguf", name)
    kept = read_content(converted(source, tmp_path / "kept.gguf", "Q4_K_M"))
    left = read_content(convert(ConvertOptions(source, tmp_path / "left.gguf", "Q4_K_M", n_threads=1)).path)
    assert [one for one in kept.tensors if not one.startswith(f"blk.{SHAPE.n_layer}.")] == list(left.tensors)
    for tensor, one in left.tensors.items():
        np.testing.assert_array_equal(kept.tensors[tensor].data, one.data)


@pytest.mark.parametrize("name", ["glm4moe", "deepseek2"])
def test_of_several_blocks_the_first_is_kept(tmp_path: Path, name: str) -> None:
    source = with_block(tmp_path / "m.gguf", name)
    two = write_content(tmp_path / "two.gguf", with_second_block(read_content(source), SHAPE.n_layer))
    planned = plan(ConvertOptions(two, tmp_path / "f32.gguf", "F32", n_threads=1, keeps_mtp=True))
    assert any("several blocks that predict" in note and "the first is kept" in note for note in planned.notes)
    wanted, kept = read_content(source), read_content(converted(two, tmp_path / "f32.gguf", "F32"))
    assert kept.tensors.keys() == wanted.tensors.keys()
    assert kept.keys[f"{name}.nextn_predict_layers"].value == 1
    notes = plan_engine(engine_config(two, n_ctx=256, n_threads=1, draft="mtp", device="none")).notes
    assert [note for note in notes if "predict tokens" in note] == [
        "Of the 2 blocks that predict tokens the first drafts, the others are not used."
    ]


def test_the_kept_block_drafts(tmp_path: Path) -> None:
    content = read_content(write_family(tmp_path / "plain.gguf", "glm4moe", shape=SHAPE))
    source = write_content(tmp_path / "m.gguf", with_right_block(content, SHAPE.n_layer))
    result = tmp_path / "q8.gguf"
    assert slimoe(["convert", str(source), str(result), "--type", "Q8_0", "--threads", "1", "--mtp"]) == 0
    with closing(Engine.open(engine_config(result, n_ctx=256, n_threads=1, draft="mtp", device="none"))) as engine:
        (said,) = answers(engine, REQUESTS["greedy"])
    assert said.finished.timings.draft_n_accepted > 30


OWN = {
    "eh_proj": torch.arange(64 * 128).reshape(64, 128) / 4096,
    "enorm": torch.arange(64) / 64,
    "hnorm": torch.arange(64) / 32,
    "shared_head.norm": torch.arange(64) / 16,
}
QWENS = {"eh_proj": "fc", "enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "shared_head.norm": "norm"}
OF_QWEN = {"layer_types": ["linear_attention", "full_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("name", "n_blocks"), [("Glm4Moe", 1), ("DeepseekV3", 1), ("DeepseekV3", 2), ("Qwen3Next", 1), ("Qwen3_5Moe", 1)]
)
def test_the_block_of_a_checkpoint_is_what_a_layer_of_it_would_be(tmp_path: Path, name: str, n_blocks: int) -> None:
    """Its norms of Qwen are stored less one, as all norms of these models but one. Of several the first is kept."""
    is_qwen = name.startswith("Qwen")
    longer = save_family(tmp_path / "longer", name, num_hidden_layers=3, **(OF_QWEN if is_qwen else {}))
    expected = read_content(convert(ConvertOptions(longer, tmp_path / "longer.gguf", "F32", n_threads=1)).path)

    def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = {f"mtp.{QWENS[one]}.weight" if is_qwen else f"model.layers.2.{one}.weight": OWN[one] for one in OWN}
        block = "mtp.layers.0." if is_qwen else "model.layers.2."
        made = {one.replace("model.layers.2.", block): tensor for one, tensor in tensors.items()} | own
        later = {one.replace(block, "model.layers.3."): 2 * made[one] for one in made if one.startswith(block)}
        return made | (later if n_blocks > 1 else {})

    source = with_tensors(shutil.copytree(longer, tmp_path / "source"), renamed)
    if is_qwen:
        with_config(source, num_hidden_layers=2, layer_types=OF_QWEN["layer_types"][:2])
    else:
        with_config(source, num_hidden_layers=2, num_nextn_predict_layers=n_blocks)
    found = read_content(converted(source, tmp_path / "m.gguf", "F32"))
    own = {one for one in found.tensors if ".nextn." in one}
    assert found.tensors.keys() - own == expected.tensors.keys()
    for tensor, one in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[tensor].data, one.data)
    raised = 1.0 if is_qwen else 0.0
    wanted = {"eh_proj": OWN["eh_proj"], "enorm": OWN["enorm"] + raised, "hnorm": OWN["hnorm"] + raised}
    wanted["shared_head_norm"] = OWN["shared_head.norm"] + raised
    assert own == {f"blk.2.nextn.{one}.weight" for one in wanted}
    for role, values in wanted.items():
        np.testing.assert_array_equal(found.tensors[f"blk.2.nextn.{role}.weight"].data, values.numpy())


def test_a_model_without_such_a_block_is_refused(tmp_path: Path) -> None:
    source = write_family(tmp_path / "m.gguf", "glm4moe", shape=SHAPE)
    checkpoint = save_family(tmp_path / "c", "Qwen3Next")
    other = save_family(tmp_path / "d", "Lfm2Moe")
    for path in (source, checkpoint, other):
        with pytest.raises(UnsupportedModelError, match=r"no block that predicts further tokens .*Leave --mtp out"):
            converted(path, tmp_path / "q8.gguf", "Q8_0")


@pytest.mark.parametrize("flags", [["--two-copies", "Q4_K,Q2_K"], ["--target-size", "1GB"], ["--hf"]])
def test_it_is_for_whole_models(tmp_path: Path, flags: list[str]) -> None:
    source = write_family(tmp_path / "m.gguf", "glm4moe", shape=SHAPE)
    done = CliRunner().invoke(command, [str(source), str(tmp_path / "q.gguf"), "--mtp", *flags])
    assert done.exit_code == 2
    assert "--mtp is for a whole model" in done.output
