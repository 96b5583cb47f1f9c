"""Compressed checkpoints are what transformers makes of the source with the same experts taken out by hand."""

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from slimoe.converter.budget.compress import plan_removal
from slimoe.converter.budget.structure import whole_layer
from slimoe.converter.hf.export import lay_out_checkpoint, write_checkpoint
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.methods.expert_drop import redirect
from slimoe.converter.recipe.recipe import ExpertRecipe, Recipe
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.open_source import open_source
from slimoe.converter.write.writer import write_planned
from slimoe.offload.errors import ModelFileError, SlimoeError, UnsupportedModelError, UsageError
from slimoe.offload.files.whole_file import Destination
from tests.converter.source.families.test_checkpoints import TOKENS, engines
from tests.converter.source.families.test_recurrent_families import save_with_images
from tests.converter.source.families.tiny_families import save_family
from tests.models.compress_plans import learnt
from tests.models.tiny_checkpoint import TinyConfig, logits, save_checkpoint, save_fine

SIZES = TinyConfig(n_layer=3, n_embd=64, n_ff=96, n_expert=8, n_expert_used=3)
GROUPS = {"n_group": 2, "topk_group": 1}
KEPT = {0: (0, 2, 3, 4, 6, 7), 1: (0, 1, 2, 3, 4, 5), 2: (1, 2, 3, 4, 5, 7)}
"""Experts by the source's layer: three of each half."""
COUNTS = {
    "Mixtral": "num_local_experts",
    "qwen3moe": "num_experts",
    "olmoe": "num_experts",
    "Qwen2Moe": "num_experts",
    "Phimoe": "num_local_experts",
    "GraniteMoeShared": "num_local_experts",
    "Dots1": "n_routed_experts",
    "Ernie4_5_Moe": "moe_num_experts",
    "HunYuanMoEV1": "num_experts",
    "MiniMaxM2": "num_local_experts",
    "Glm4Moe": "n_routed_experts",
    "DeepseekV3": "n_routed_experts",
    "Glm4MoeLite": "n_routed_experts",
    "GptOss": "num_local_experts",
    "Qwen3Next": "num_experts",
    "Qwen3_5Moe": "num_experts",
    "Lfm2Moe": "num_experts",
    "GraniteMoeHybrid": "num_local_experts",
}
"""The field of the number of experts in the configuration of each class."""


DELTA_NETS = ("Qwen3Next", "Qwen3_5Moe")
LAYER_TYPES = {name: ["linear_attention"] * 2 + ["full_attention"] for name in (*DELTA_NETS, "GraniteMoeHybrid")}
LAYER_TYPES["Lfm2Moe"] = ["conv", "conv", "full_attention"]


def save(path: Path, name: str, sentencepiece: Path, **config: Any) -> Path:
    """A checkpoint of three layers, whose values are those of bfloat16."""
    if name == "Mixtral":
        save_checkpoint(path, sentencepiece, SIZES, **config)
    elif name in ("qwen3moe", "olmoe"):
        save_fine(path, name, SIZES, **config)
    else:
        groups = GROUPS if name == "DeepseekV3" else {}
        kinds = {"layer_types": LAYER_TYPES[name]} if name in LAYER_TYPES else {}
        save_family(path, name, **({"num_hidden_layers": 3} | groups | kinds | config))
    file = path / "model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file, {"format": "pt"})
    return path


def plan_of(source: ModelSource, kept: Mapping[int, Sequence[int]]) -> CompressPlan:
    """The blocks that are named, with these experts, where they have any."""
    layers = []
    for block, experts in kept.items():
        target = source.layers[block].target
        layers.append(whole_layer(source, block, redirect(target, experts) if target else None))
    output = Type.F32 if any(key.name == "output.weight" for key in source.shapes) else None
    return CompressPlan("stock", tuple(layers), Type.F32, output, "by hand")


def written(source: ModelSource, plan: CompressPlan, target: Path, **how: Any) -> Path:
    with Destination(target) as destination:
        write_checkpoint(source, lay_out_checkpoint(source, plan, **how), destination, n_threads=2)
    return target


def taken_out(path: Path, kept: Mapping[int, Sequence[int]], count: str) -> torch.Tensor:
    """transformers' logits of the source with the same blocks and experts, taken out of its tensors in memory."""
    name, *_ = json.loads((path / "config.json").read_text())["architectures"]
    model = getattr(transformers, name).from_pretrained(path, dtype=torch.float32)
    config, blocks = copy.deepcopy(model.config), list(kept)
    setattr(config, count, len(kept[blocks[-1]]))
    config.num_hidden_layers = len(blocks)
    for field in ("layer_types", "mlp_layer_types"):
        if getattr(config, field, None):
            setattr(config, field, [getattr(config, field)[block] for block in blocks])
    smaller, tensors = getattr(transformers, name)(config).eval(), model.state_dict()
    found = {}
    for key, wanted in smaller.state_dict().items():
        parts = key.split(".")
        block = blocks[int(parts[2])] if parts[1] == "layers" else -1
        if block >= 0:
            parts[2] = str(block)
        tensor = tensors[".".join(parts)]
        for dim in (dim for dim in range(tensor.ndim) if tensor.shape[dim] != wanted.shape[dim]):
            tensor = tensor.index_select(dim, torch.tensor(kept[block]))
        found[key] = tensor
    smaller.load_state_dict(found)
    with torch.no_grad():
        result: torch.Tensor = smaller.float()(torch.tensor([TOKENS])).logits[0]
    return result


@pytest.mark.parametrize("name", COUNTS)
def test_fewer_experts_and_layers(tmp_path: Path, sentencepiece_path: Path, name: str) -> None:
    path = save(tmp_path / "source", name, sentencepiece_path)
    source = open_source(path)
    blocks = (1, 2) if name == "GptOss" else (0, 2)
    kept = {block: KEPT[block] for block in blocks}
    plan = plan_of(source, kept)
    target = written(source, plan, tmp_path / "target", shard_bytes=100_000)
    expected = taken_out(path, kept, COUNTS[name])
    assert expected.std() > 0.5, "logits that are all alike show nothing"
    assert (expected - logits(path, TOKENS)).abs().max() > 0.1, "what was taken out must have mattered"
    torch.testing.assert_close(logits(target, TOKENS), expected, atol=1e-5, rtol=1e-5)
    if name != "Phimoe":  # Its GGUF file is computed as llama.cpp does, which is another way.
        write_planned(source, plan, tmp_path / "m.gguf")
        np.testing.assert_allclose(engines(tmp_path / "m.gguf"), expected, atol=1e-3)
    # What was written is a source again, of several files.
    again = open_source(target)
    assert (again.spec.n_layer, again.spec.n_expert) == (len(blocks), 6)
    assert len(list(target.glob("*.safetensors"))) > 1


def test_layers_that_an_interval_gave_are_named(tmp_path: Path, sentencepiece_path: Path) -> None:
    path = save(tmp_path / "source", "Qwen3Next", sentencepiece_path)
    config = json.loads((path / "config.json").read_text())
    del config["layer_types"]
    (path / "config.json").write_text(json.dumps(config | {"full_attention_interval": 3}))
    source = open_source(path)
    assert source.spec.attention_layers == (2,)
    target = written(source, plan_of(source, {1: KEPT[1], 2: KEPT[2]}), tmp_path / "target")
    assert json.loads((target / "config.json").read_text())["layer_types"] == ["linear_attention", "full_attention"]
    assert open_source(target).spec.recurrent_layers == (0,)


def test_a_model_for_images_is_not_written(tmp_path: Path) -> None:
    source = open_source(save_with_images(tmp_path / "source"))
    with pytest.raises(UnsupportedModelError, match=r"Qwen3_5MoeForConditionalGeneration .* without --hf"):
        lay_out_checkpoint(source, plan_of(source, {0: KEPT[0], 1: KEPT[1], 2: KEPT[2]}))


def test_merged_experts_and_narrower_ones(tmp_path: Path, sentencepiece_path: Path) -> None:
    for name, experts in (
        ("Mixtral", ExpertRecipe(4, merge="hc-smoe")),
        ("Mixtral", ExpertRecipe(3, merge="neurons")),
        ("Mixtral", ExpertRecipe(6, width=64)),
        ("GptOss", ExpertRecipe(5, merge="hc-smoe")),
        ("GptOss", ExpertRecipe(6, width=64)),
        ("Glm4Moe", ExpertRecipe(6, width=32)),
    ):
        directory = tmp_path / f"{name}-{experts.keep}"
        path = directory / "source"
        if not path.exists():
            save(path, name, sentencepiece_path)
        source = open_source(path)
        statistics = learnt(source, tmp_path, 2, 32)
        plan = plan_removal(source, statistics, Recipe(experts=experts))
        target = written(source, plan, directory / "target")
        # Merged and fitted values are none of bfloat16's: a GGUF file of the checkpoint has them as they were rounded.
        again, all_left = open_source(target), range(experts.keep or 0)
        rounded = plan_of(again, dict.fromkeys(range(again.spec.n_layer), all_left))
        write_planned(again, rounded, directory / "again.gguf")
        found = logits(target, TOKENS).numpy()
        np.testing.assert_allclose(engines(directory / "again.gguf"), found, atol=1e-3)
        write_planned(source, plan, directory / "m.gguf", statistics)
        exact = engines(directory / "m.gguf")
        assert np.abs(found - exact).mean() < 0.02 * exact.std(), name


def test_a_checkpoint_is_whole(tmp_path: Path, sentencepiece_path: Path) -> None:
    path = save(tmp_path / "source", "Mixtral", sentencepiece_path)
    (path / "LICENSE").write_text("free")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (path / "weights.bin").write_bytes(b"1")
    source = open_source(path)
    target = written(source, plan_of(source, KEPT), tmp_path / "target", shard_bytes=100_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    stored: dict[str, tuple[str, torch.Tensor]] = {}
    for name in sorted(set(index["weight_map"].values())):
        with safe_open(target / name, "pt") as file:
            stored |= {
                key: (name, file.get_tensor(key)) for key in index["weight_map"] if index["weight_map"][key] == name
            }
            assert file.metadata()["slimoe.recipe"] == "by hand"
    assert set(index["weight_map"]) == set(stored)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in stored.values())
    tensors = load_file(path / "model.safetensors")
    key = "model.layers.2.{}.experts.5.w1.weight".format(
        "block_sparse_moe" if any("block_s" in k for k in tensors) else "mlp"
    )
    torch.testing.assert_close(stored[key][1], tensors[key.replace("experts.5", "experts.7")], atol=0, rtol=0)
    assert {"LICENSE", "additional_chat_templates", "tokenizer.model", "tokenizer_config.json"} <= {
        one.name for one in target.iterdir()
    }
    assert not (target / "weights.bin").exists()
    before, after = (json.loads((one / "config.json").read_text()) for one in (path, target))
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed <= {"num_local_experts", "dtype", "torch_dtype", "slimoe"}
    assert after.get("dtype", after.get("torch_dtype")) == "bfloat16"


def unpacked(tensors: Mapping[str, torch.Tensor], name: str, n_bits: int) -> torch.Tensor:
    """A packed matrix, decoded integer by integer."""
    words, scales = tensors[f"{name}_packed"], tensors[f"{name}_scale"].float()
    shifts = torch.arange(0, 32, n_bits)
    values = (words[..., None] >> shifts) & (2**n_bits - 1)
    n_rows, n_per_row = tensors[f"{name}_shape"].tolist()
    integers = values.reshape(n_rows, n_per_row) - 2 ** (n_bits - 1)
    return (integers.reshape(n_rows, -1, 128) * scales[..., None]).reshape(n_rows, n_per_row)


@pytest.mark.parametrize(
    ("name", "n_bits", "most"),
    [("Mixtral", 4, 0.12), ("Mixtral", 8, 0.01), ("Glm4Moe", 4, 0.12), ("Qwen3Next", 4, 0.12), ("Lfm2Moe", 4, 0.12)],
)
def test_packed_weights_are_read_by_compressed_tensors(
    tmp_path: Path, sentencepiece_path: Path, name: str, n_bits: int, most: float
) -> None:
    path = tmp_path / "source"
    if name == "Mixtral":
        save_checkpoint(path, sentencepiece_path, replace(SIZES, n_embd=256, n_ff=384))
    else:
        widths = {"moe_intermediate_size": 128}
        widths |= {"shared_expert_intermediate_size": 128} if name == "Qwen3Next" else {}
        save_family(path, name, hidden_size=128, intermediate_size=256, **widths)
    source = open_source(path)
    plan = plan_of(source, {block: KEPT[block] for block in range(source.spec.n_layer)})
    target, plain = (written(source, plan, tmp_path / f"{bits}", n_bits=bits) for bits in (n_bits, 16))
    packed, tensors = load_file(target / "model.safetensors"), load_file(plain / "model.safetensors")
    assert (target / "model.safetensors").stat().st_size < (plain / "model.safetensors").stat().st_size
    decoded = dict(tensors)
    matrices = [name.removesuffix("_packed") for name in packed if name.endswith("_packed")]
    assert any(".experts.5." in name for name in matrices)
    for matrix in matrices:
        values = unpacked(packed, matrix, n_bits)
        # transformers rounds those of experts, which it stacks.
        decoded[matrix] = values.bfloat16() if ".experts." in matrix else values
        error = (decoded[matrix].float() - tensors[matrix].float()).square().mean().sqrt()
        assert error < most * tensors[matrix].float().std(), matrix
    own = shutil.copytree(plain, tmp_path / "decoded")
    save_file(decoded, own / "model.safetensors", {"format": "pt"})
    # transformers keeps unpacked experts in bfloat16, whatever it is asked for: they are computed with in float32 here.
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    torch.nn.Module.float(model)  # which transformers forbids by another name
    with torch.no_grad():
        found = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(found, logits(own, TOKENS), atol=1e-3, rtol=1e-3)


def test_what_no_class_can_hold_is_refused(tmp_path: Path, sentencepiece_path: Path) -> None:
    source = open_source(save(tmp_path / "mixtral", "Mixtral", sentencepiece_path))
    statistics = learnt(source, tmp_path, 2, 32)
    cases: list[tuple[Recipe, str]] = [
        (Recipe(drop_ffn=1), r"layer \d would be without experts, which no MixtralForCausalLM has. Leave whole layers"),
        (Recipe(drop_attention=1), r"layer \d would be without attention, .* --drop-blocks"),
        (Recipe(experts=ExpertRecipe(5, "reap", replacement="constant")), "constants in place of experts"),
    ]
    for recipe, problem in cases:
        with pytest.raises(UnsupportedModelError, match=problem):
            lay_out_checkpoint(source, plan_removal(source, statistics, recipe))
    with pytest.raises(UnsupportedModelError, match=r"layer 2 would have 5 experts and layer 0 6.*--keep-experts 5"):
        lay_out_checkpoint(source, plan_of(source, KEPT | {2: (0, 1, 2, 3, 4)}))
    with pytest.raises(UnsupportedModelError, match="rows of 64, which is no multiple of 128"):
        lay_out_checkpoint(source, plan_of(source, KEPT), n_bits=4)
    oss = open_source(save(tmp_path / "oss", "GptOss", sentencepiece_path))
    with pytest.raises(UnsupportedModelError, match="all layers with a sliding window would be left out, or all with"):
        lay_out_checkpoint(oss, plan_of(oss, {0: KEPT[0], 2: KEPT[2]}))
    with pytest.raises(UnsupportedModelError, match="compressed-tensors has no form"):
        lay_out_checkpoint(oss, plan_of(oss, KEPT), n_bits=8)
    glm = open_source(save(tmp_path / "glm", "Glm4Moe", sentencepiece_path))
    with pytest.raises(UnsupportedModelError, match="a shared expert of 96 neurons"):
        lay_out_checkpoint(
            glm, plan_removal(glm, learnt(glm, tmp_path, 2, 32), Recipe(experts=ExpertRecipe(6, width=64)))
        )
    gguf = tmp_path / "m.gguf"
    write_planned(source, plan_of(source, KEPT), gguf)
    with pytest.raises(UsageError, match="is a GGUF file"):
        lay_out_checkpoint(open_source(gguf), plan_of(open_source(gguf), dict.fromkeys(range(3), range(6))))


def test_a_damaged_source_leaves_nothing(tmp_path: Path, sentencepiece_path: Path) -> None:
    path = save(tmp_path / "source", "Mixtral", sentencepiece_path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 3] = torch.nan
    save_file(tensors, path / "model.safetensors")
    source = open_source(path)
    with pytest.raises(ModelFileError, match=r"q_proj\.weight holds NaN"):
        written(source, plan_of(source, KEPT), tmp_path / "target")
    assert [one.name for one in tmp_path.iterdir()] == ["source"]
    (tmp_path / "target").mkdir()
    with pytest.raises(SlimoeError, match=r"target is a directory"):
        written(source, plan_of(source, KEPT), tmp_path / "target")
