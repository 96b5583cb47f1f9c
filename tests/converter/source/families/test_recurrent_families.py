"""Checkpoints of models with recurrent layers: what stands beside the language model, and what is wrong with them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from slimoe.converter.budget.compress import plan_removal
from slimoe.converter.convert import ConvertOptions, plan
from slimoe.converter.hf.export import lay_out_checkpoint
from slimoe.converter.recipe.recipe import Recipe
from slimoe.converter.source.inventory import take_inventory
from slimoe.converter.source.model_source import Blocks
from slimoe.converter.source.open_source import open_source
from slimoe.converter.source.picked_rows import PickedRows, picked_columns
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf.header import read_gguf
from tests.converter.source.families.test_checkpoints import TOKENS, assert_all_alike, converted, engines, llama_cpps
from tests.converter.source.families.tiny_families import save_family
from tests.models.gguf_content import Array
from tests.models.tiny_checkpoint import CHATML, byte_level, logits

NAMES = ("Qwen3Next", "Qwen3_5Moe", "Lfm2Moe")
MAMBA = ("GraniteMoeHybrid", "NemotronH")
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}


def with_tensors(source: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    tensors = load_file(source / "model.safetensors")
    save_file({name: one.contiguous() for name, one in change(tensors).items()}, source / "model.safetensors")
    return source


def with_config(source: Path, **settings: Any) -> Path:
    config = json.loads((source / "config.json").read_text())
    kept = {name: value for name, value in (config | settings).items() if value is not None}
    (source / "config.json").write_text(json.dumps(kept))
    return source


def save_with_images(path: Path, **config: Any) -> Path:
    """The language model of a `save_family` in one that reads images too."""
    text = save_family(path.parent / "text", "Qwen3_5Moe")
    language = json.loads((text / "config.json").read_text())
    whole = transformers.Qwen3_5MoeConfig(text_config=language, vision_config=VISION, **config)
    model = transformers.Qwen3_5MoeForConditionalGeneration(whole)
    theirs = transformers.Qwen3_5MoeForCausalLM.from_pretrained(text)
    model.model.language_model.load_state_dict(theirs.model.state_dict())
    model.lm_head.load_state_dict(theirs.lm_head.state_dict())
    if config.get("tie_word_embeddings"):
        model.tie_weights()
    model.save_pretrained(path)
    byte_level("qwen").save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": CHATML}))
    return path


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_language_model_of_one_that_reads_images(tmp_path: Path, is_tied: bool) -> None:
    source = save_with_images(tmp_path / "c", tie_word_embeddings=is_tied)
    names = load_file(source / "model.safetensors").keys()
    assert "model.language_model.layers.0.linear_attn.A_log" in names
    assert any(name.startswith("model.visual.") for name in names)
    assert_all_alike(source, tmp_path / "m.gguf")
    assert ("output.weight" in read_gguf(tmp_path / "m.gguf").tensors) is not is_tied
    assert take_inventory(source).sizes["n_expert"] == 8


def test_ends_of_answers_that_the_language_models_part_of_the_settings_names(tmp_path: Path) -> None:
    """As transformers reads them where no file for generation says other."""
    source = save_with_images(tmp_path / "c")
    language = json.loads((source / "config.json").read_text())["text_config"]
    with_config(source, text_config=language | {"eos_token_id": [501, 502], "bos_token_id": 500})
    (source / "generation_config.json").unlink()
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    theirs = transformers.Qwen3_5MoeForConditionalGeneration.from_pretrained(source).generation_config
    found = open_source(source).metadata
    assert [found[f"tokenizer.ggml.{role}_token_id"] for role in ("eos", "eot")] == theirs.eos_token_id == [501, 502]
    assert found["tokenizer.ggml.bos_token_id"] == theirs.bos_token_id


def test_a_language_model_that_was_saved_without_what_reads_images(tmp_path: Path) -> None:
    whole, source = save_with_images(tmp_path / "c"), tmp_path / "d"
    transformers.Qwen3_5MoeForCausalLM.from_pretrained(whole).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(whole / name, source)
    assert "model.language_model.norm.weight" in load_file(source / "model.safetensors")
    assert json.loads((source / "config.json").read_text())["architectures"] == ["Qwen3_5MoeForCausalLM"]
    assert_all_alike(source, tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["Qwen3Next", "Lfm2Moe", *MAMBA])
def test_an_inventory_tells_the_parts(tmp_path: Path, name: str) -> None:
    source = save_family(tmp_path / "c", name, **({"moe_latent_size": 32} if name == "NemotronH" else {}))
    found, file = take_inventory(source), take_inventory(converted(source, tmp_path / "m.gguf"))
    weights = [{one.kind: 0 for one in of.counts} for of in (found, file)]
    for of, sums in zip((found, file), weights, strict=True):
        for one in of.counts:
            sums[one.kind] += one.n_weights
    assert "other" not in weights[0]
    assert weights[0] == weights[1]
    if name in MAMBA:
        return
    n_layer = found.sizes["n_layer"] - (name == "Lfm2Moe")
    assert weights[0]["experts"] == n_layer * 8 * 3 * 64 * 96
    assert weights[0]["router"] == n_layer * (8 * 64 + 8 * (name == "Lfm2Moe"))


def test_an_image_encoder_and_what_predicts_further_tokens_are_told_apart(tmp_path: Path) -> None:
    source = with_tensors(
        save_with_images(tmp_path / "c"), lambda tensors: tensors | {"mtp.fc.weight": torch.ones(64, 2)}
    )
    weights = {one.kind: one.n_weights for one in take_inventory(source).counts}
    assert weights["MTP blocks"] == 128
    encoder = [one.numel() for key, one in load_file(source / "model.safetensors").items() if ".visual." in key]
    assert weights["image encoder"] == sum(encoder)
    notes = plan(ConvertOptions(source, tmp_path / "m.gguf", "F16")).notes
    assert notes[:2] == (
        "What predicts further tokens (MTP) is left out: --mtp keeps it.",
        "What reads images is left out: the language model is what is converted.",
    )


def test_a_nemotron_has_an_output_matrix_whatever_it_says(tmp_path: Path) -> None:
    assert_all_alike(save_family(tmp_path / "c", "NemotronH", tie_word_embeddings=True), tmp_path / "m.gguf")
    assert "output.weight" in read_gguf(tmp_path / "m.gguf").tensors


@pytest.mark.parametrize("n_latent", [32, 96])
def test_experts_that_read_and_write_other_values_than_the_stream_has(tmp_path: Path, n_latent: int) -> None:
    assert_all_alike(save_family(tmp_path / "c", "NemotronH", moe_latent_size=n_latent), tmp_path / "m.gguf")
    file = read_gguf(tmp_path / "m.gguf")
    assert file.metadata["nemotron_h_moe.moe_latent_size"] == n_latent
    assert file.tensors["blk.1.ffn_up_exps.weight"].ne[0] == n_latent


def test_a_nemotrons_settings_by_their_older_names(tmp_path: Path) -> None:
    source = save_family(tmp_path / "c", "NemotronH", n_groups=3, conv_kernel=3)
    expected = open_source(source).spec
    older = {"mamba_n_groups": 3, "mamba_d_conv": 3, "mamba_dt_min": 1e-9, "mamba_conv_bias": True}
    gone = {"n_groups": None, "conv_kernel": None, "time_step_min": None, "use_conv_bias": None}
    assert open_source(with_config(source, **older, **gone)).spec == expected
    assert_all_alike(source, tmp_path / "m.gguf")


def test_steps_that_transformers_raises_are_told(tmp_path: Path) -> None:
    source = save_family(tmp_path / "c", "NemotronH")
    with_config(source, time_step_min=0.0)
    assert_all_alike(source, tmp_path / "m.gguf")
    said = "Reading a prompt, transformers raises steps of Mamba-2 layers to 0.5 (time_step_min)"
    options = ConvertOptions(source, tmp_path / "q.gguf", "F16")
    assert not any("time_step_min" in note for note in plan(options).notes)
    with_config(source, time_step_min=0.5)
    assert sum(note.startswith(said) for note in plan(options).notes) == 1
    assert np.abs(logits(source, TOKENS).numpy() - engines(tmp_path / "m.gguf")).max() > 0.1


@pytest.mark.parametrize("name", MAMBA)
def test_steps_without_limits_by_either_word_for_infinity(tmp_path: Path, name: str) -> None:
    source = save_family(tmp_path / "c", name)
    shapes = open_source(source).shapes
    assert '"__float__": "Infinity"' in (source / "config.json").read_text()
    with_config(source, time_step_limit=[0.0, float("inf")])
    assert "[0.0, Infinity]" in (source / "config.json").read_text()
    assert open_source(source).shapes == shapes


@pytest.mark.parametrize("name", [*NAMES, "GraniteMoeHybrid"])
def test_a_table_that_is_the_output_too(tmp_path: Path, name: str) -> None:
    source = save_family(tmp_path / "c", name, tie_word_embeddings=True)
    assert_all_alike(source, tmp_path / "m.gguf")
    assert "output.weight" not in read_gguf(tmp_path / "m.gguf").tensors


def test_an_older_name_of_a_tied_table_counts(tmp_path: Path) -> None:
    source = with_config(save_family(tmp_path / "c", "Lfm2Moe", tie_word_embeddings=True), tie_word_embeddings=None)
    assert open_source(with_config(source, tie_embedding=True)).is_tied
    with pytest.raises(ModelFileError, match=r"lm_head\.weight is missing"):
        open_source(with_config(source, tie_embedding=False))


@pytest.mark.parametrize(("n_keys", "n_values"), [(1, 4), (4, 4), (2, 8)])
@pytest.mark.parametrize("name", ["Qwen3Next", "Qwen3_5Moe"])
def test_as_many_value_heads_of_a_key_head_as_one_likes(tmp_path: Path, name: str, n_keys: int, n_values: int) -> None:
    heads = {"linear_num_key_heads": n_keys, "linear_num_value_heads": n_values}
    source = save_family(tmp_path / "c", name, **heads)
    assert_all_alike(source, tmp_path / "m.gguf")


def test_settings_as_older_files_have_them(tmp_path: Path) -> None:
    """Which layers have attention is said by an interval, and the rotation's settings stand by themselves."""
    kinds = ["linear_attention", "full_attention"] * 2
    source = save_family(tmp_path / "c", "Qwen3Next", num_hidden_layers=4, layer_types=kinds)
    expected = open_source(source).spec
    assert expected.attention_layers == (1, 3)
    rotation = {"rope_parameters": None, "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    older = with_config(source, layer_types=None, full_attention_interval=2, **rotation)
    assert open_source(older).spec == expected
    assert expected.rope.n_rot == 8


@pytest.mark.parametrize("name", NAMES)
def test_experts_that_are_stacked_make_the_same_tensors(tmp_path: Path, name: str) -> None:
    source = save_family(tmp_path / "c", name)
    parts = ("w1", "w3", "w2") if name == "Lfm2Moe" else ("gate_proj", "up_proj", "down_proj")

    def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {key: value for key, value in tensors.items() if ".experts." not in key}
        for stem in {key.split(".experts.")[0] for key in tensors if ".experts." in key}:
            gate, up, down = (
                torch.stack([tensors[f"{stem}.experts.{number}.{part}.weight"] for number in range(8)])
                for part in parts
            )
            found |= {f"{stem}.experts.gate_up_proj": torch.cat((gate, up), 1), f"{stem}.experts.down_proj": down}
        return found

    other = open_source(with_tensors(shutil.copytree(source, tmp_path / "d"), stacked))
    separate = open_source(source)
    assert list(other.shapes) == list(separate.shapes)
    for key in separate.shapes:
        np.testing.assert_array_equal(other.read(key), separate.read(key))


def test_what_predicts_further_tokens_is_left_out(tmp_path: Path) -> None:
    source = save_family(tmp_path / "c", "Qwen3_5Moe")
    expected = open_source(source).shapes
    ahead = {"mtp.fc.weight": torch.ones(64, 128), "mtp.layers.0.self_attn.q_proj.weight": torch.ones(256, 64)}
    assert open_source(with_tensors(source, lambda tensors: tensors | ahead)).shapes == expected


BROKEN: list[tuple[str, str, tuple[int, ...] | None, str]] = [
    ("Qwen3Next", "linear_attn.in_proj_qkvz", (640, 64), "has 640 rows, not the 512 of its heads"),
    ("Qwen3Next", "linear_attn.in_proj_ba", (8, 64), r"tensor blk\.0\.ssm_ba\.weight has the shape \(64, 8\), but"),
    ("Qwen3Next", "linear_attn.in_proj_qkvz", None, r"tensor blk\.0\.attn_qkv\.weight is missing"),
    ("Qwen3_5Moe", "linear_attn.in_proj_qkv", (300, 64), r"tensor blk\.0\.attn_qkv\.weight has the shape \(64, 300\)"),
    ("Qwen3_5Moe", "linear_attn.conv1d", (320, 2, 4), r"tensor blk\.0\.ssm_conv1d\.weight has the shape \(4, 2, 320\)"),
    ("Qwen3_5Moe", "linear_attn.out_proj", (64, 96), r"tensor blk\.0\.ssm_out\.weight has the shape \(96, 64\), but"),
    ("Qwen3_5Moe", "linear_attn.norm", None, r"tensor blk\.0\.ssm_norm\.weight is missing"),
    ("Lfm2Moe", "conv.conv", (64, 1, 4), r"tensor blk\.0\.shortconv\.conv\.weight has the shape \(4, 64\), but"),
    ("Lfm2Moe", "conv.in_proj", None, r"tensor blk\.0\.shortconv\.in_proj\.weight is missing"),
    ("GraniteMoeHybrid", "mamba.in_proj", (300, 64), r"tensor blk\.0\.ssm_in\.weight has the shape \(64, 300\), but"),
    ("GraniteMoeHybrid", "mamba.norm", (120,), r"tensor blk\.0\.ssm_norm\.weight has the shape \(120, 1\), but"),
]


@pytest.mark.parametrize(("name", "tensor", "shape", "problem"), BROKEN, ids=str)
def test_tensors_that_are_missing_or_of_another_shape(
    tmp_path: Path, name: str, tensor: str, shape: tuple[int, ...] | None, problem: str
) -> None:
    key = f"model.layers.0.{tensor}.weight"

    def broken(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {name: value for name, value in tensors.items() if name != key}
        return kept if shape is None else kept | {key: torch.zeros(shape)}

    source = with_tensors(save_family(tmp_path / "c", name), broken)
    with pytest.raises(ModelFileError, match=problem):
        open_source(source)


def test_a_granite_that_rotates(tmp_path: Path) -> None:
    source = save_family(tmp_path / "c", "GraniteMoeHybrid", position_embedding_type="rope")
    assert_all_alike(source, tmp_path / "m.gguf")
    assert read_gguf(tmp_path / "m.gguf").metadata["granitehybrid.rope.scaling.finetuned"] is True


def test_layers_in_older_words(tmp_path: Path) -> None:
    granite, nemotron = (save_family(tmp_path / name, name) for name in MAMBA)
    for source, settings in (
        (granite, {"layer_types": ["mamba", "attention", "mamba"]}),
        (granite, {"layer_types": None, "layers_block_type": ["mamba", "attention", "mamba"]}),
        (nemotron, {"layers_block_type": ["mamba", "moe", "attention", "mamba", "moe"]}),
        (nemotron, {"layers_block_type": None, "hybrid_override_pattern": "ME*ME", "num_hidden_layers": 5}),
    ):
        expected = open_source(source).spec
        older = with_config(shutil.copytree(source, tmp_path / "older", dirs_exist_ok=True), **settings)
        assert open_source(older).spec == expected


def test_names_of_tensors_as_transformers_has_them_in_memory(tmp_path: Path) -> None:
    """What it saves, and NVIDIA's files have, begins with another word."""
    source = save_family(tmp_path / "c", "NemotronH")
    expected = open_source(source).shapes
    assert any(name.startswith("backbone.layers.") for name in load_file(source / "model.safetensors"))

    def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace("backbone.", "model."): one for name, one in tensors.items()}

    assert open_source(with_tensors(source, renamed)).shapes == expected


@pytest.mark.parametrize(
    ("name", "settings", "problem"),
    [
        ("GraniteMoeHybrid", {"mamba_conv_bias": False}, "mamba_conv_bias is false and mamba_proj_bias false"),
        ("GraniteMoeHybrid", {"layer_types": ["linear_attention"] * 3}, "no layer has attention"),
        ("GraniteMoeHybrid", {"layer_types": ["full_attention"] * 3}, "no layer has Mamba-2"),
        ("GraniteMoeHybrid", {"layer_types": ["mamba"]}, "layer_types has not one of"),
        ("GraniteMoeHybrid", {"mamba_d_head": 9}, "mamba_expand times hidden_size is 128"),
        ("GraniteMoeHybrid", {"mamba_n_groups": 3}, "8 heads of Mamba-2 layers do not divide into 3 groups"),
        (
            "GraniteMoeHybrid",
            {"time_step_limit": [0.0, 0.1]},
            "time_step_limit is 0 to 0.1, but steps of Mamba-2 layers",
        ),
        ("GraniteMoeHybrid", {"time_step_limit": [0.5, float("inf")]}, "time_step_limit is 0.5 to Infinity"),
        ("NemotronH", {"layers_block_type": ["linear_attention", "mlp"]}, "layers_block_type has 'mlp'"),
        ("NemotronH", {"layers_block_type": ["moe", "mamba"]}, "no layer is full_attention"),
        ("NemotronH", {"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu', but nemotron_h_moe files have relu2"),
        ("NemotronH", {"use_bias": True}, "use_bias is true"),
        ("NemotronH", {"use_conv_bias": False}, "use_conv_bias is false"),
        ("NemotronH", {"sliding_window": 17}, "sliding_window is 17"),
    ],
)
def test_settings_that_no_file_can_say_are_refused(
    tmp_path: Path, name: str, settings: dict[str, Any], problem: str
) -> None:
    source = with_config(save_family(tmp_path / "c", name), **settings)
    with pytest.raises(UnsupportedModelError, match=problem):
        open_source(source)


def test_no_checkpoint_is_written_of_layers_of_one_part(tmp_path: Path) -> None:
    source = open_source(save_family(tmp_path / "c", "NemotronH"))
    with pytest.raises(
        UnsupportedModelError, match=r"no checkpoint of a NemotronHForCausalLM is written\. Write a GGUF"
    ):
        lay_out_checkpoint(source, plan_removal(source, None, Recipe()))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("Qwen3_5Moe", "linear_attn.conv1d.bias"),
        ("Lfm2Moe", "conv.in_proj.bias"),
        ("GraniteMoeHybrid", "mamba.in_proj.bias"),
    ],
)
def test_biases_that_no_file_has_are_refused(tmp_path: Path, name: str, tensor: str) -> None:
    bias = {f"model.layers.0.{tensor}": torch.ones(320)}
    source = with_tensors(save_family(tmp_path / "c", name), lambda tensors: tensors | bias)
    with pytest.raises(UnsupportedModelError, match=r"is a bias, but config\.json has no biases for"):
        open_source(source)


def test_a_short_convolution_beside_heads_of_another_size(tmp_path: Path) -> None:
    """llama.cpp takes as many values of heads as of the stream for granted; the engine does not."""
    source = save_family(tmp_path / "c", "Lfm2Moe", head_dim=32)
    path = converted(source, tmp_path / "m.gguf")
    np.testing.assert_allclose(engines(path), logits(source, TOKENS).numpy(), atol=1e-3)
    with pytest.raises(ValueError, match="Failed to load model"):
        llama_cpps(path)


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Six rows of which two are read at a time."""

    values: Array
    name: str = "m"
    path: Path = Path("c")
    n_rows: int = 6
    n_per_row: int = 4
    step: int = 2
    blocks: Blocks | None = None

    def read(self, first: int, n_rows: int) -> Array:
        assert first % self.step == n_rows % self.step == 0
        return self.values[first : first + n_rows]


def test_rows_and_columns_in_another_order() -> None:
    values = np.arange(24, dtype=np.float32).reshape(6, 4)
    stored = Pairs(values)
    order = np.array([5, 0, 1, 2, 4])
    picked = PickedRows(stored, order)
    for first in range(5):
        for n_rows in range(1, 6 - first):
            np.testing.assert_array_equal(picked.read(first, n_rows), values[order][first : first + n_rows])
    columns = picked_columns(stored, np.array([3, 0, 2, 1]))
    np.testing.assert_array_equal(columns.read(2, 2), values[2:4, [3, 0, 2, 1]])
