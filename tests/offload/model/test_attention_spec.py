"""Keys of latent attention: what is written is read, and keys that contradict each other or the tensors are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.converter.source.gguf_source import gguf_source
from slimoe.offload.errors import ModelFileError, UnsupportedModelError, UsageError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.memory.kv_cache import kv_bytes
from slimoe.offload.model.attention_spec import Temperature
from slimoe.offload.model.model_file import ModelFile
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.plan.engine_plan import plan_engine
from tests.models.configs import engine_config
from tests.models.gguf_content import read_content, write_content
from tests.models.tiny_gguf import FineShape, write_family

SHAPE = FineShape(n_expert=16, n_layer=2)
NAMES = ("deepseek2", "deepseek2-old", "mistral4", "glm-dsa")


def spec_of(path: Path) -> ModelSpec:
    return ModelFile.of(read_gguf(path)).spec


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    path = write_family(tmp_path / "m.gguf", name, shape=SHAPE)
    spec, content = spec_of(path), read_content(path)
    old = {key: None for key in content.keys if key.startswith(f"{spec.architecture.name}.")}
    written = {key: value for key, value in spec.metadata().items() if not isinstance(value, list)}
    assert spec_of(write_content(tmp_path / "again.gguf", content.with_keys(old | written))) == spec


@pytest.mark.parametrize(("name", "row"), [("deepseek2", 256 + 32), ("deepseek2-old", 4 * (64 + 32 + 64))])
def test_the_cache_has_a_row_of_low_rank_or_one_of_each_head(tmp_path: Path, name: str, row: int) -> None:
    spec = spec_of(write_family(tmp_path / "m.gguf", name, shape=SHAPE))
    assert kv_bytes(spec, 512, Type.F16) == SHAPE.n_layer * 512 * row * 2
    assert kv_bytes(spec, 512, Type.Q8_0, layers=[1]) == 512 * row * 34 // 32


@pytest.mark.parametrize(
    ("name", "keys", "renamed", "message"),
    [
        ("deepseek2", {"attention.key_length_mla": None}, {}, "key_length_mla is missing"),
        ("deepseek2", {"attention.key_length": 256}, {}, "key_length is 256, not 288, with a kv_lora_rank of 256, 32"),
        ("deepseek2", {"attention.value_length": 64}, {}, "contradict each other: value_length is 64, not 256"),
        ("deepseek2", {"attention.head_count_kv": 4}, {}, "contradict each other: head_count_kv is 4, not 1"),
        ("deepseek2-old", {"attention.head_count_kv": 2}, {}, "contradict each other: head_count_kv is 2, not 4"),
        ("deepseek2", {"attention.key_length_mla": 32}, {}, "rotates 32 of 32 values"),
        ("deepseek2", {"attention.key_length_mla": 64}, {}, r"tensor blk.0.attn_q_b.weight has the shape"),
        ("deepseek2", {"attention.q_lora_rank": None}, {}, "has the tensor attn_q_a of MLA, but not its key"),
        ("deepseek2", {"attention.kv_lora_rank": None}, {}, "kv_lora_rank is missing"),
        (
            "deepseek2",
            {"attention.key_length_mla": None, "attention.value_length_mla": None, "attention.head_count_kv": 4},
            {},
            "attn_k_b and attn_v_b of MLA, but not its keys",
        ),
        ("deepseek2", {}, {"attn_k_b": "attn_kv_b", "attn_v_b": "attn_x"}, "absorbed, but .* one tensor attn_kv_b"),
        ("mistral4", {"attention.temperature_length": None}, {}, "temperature_length is missing"),
        ("mistral4", {"rope.scaling.yarn_log_multiplier": -1.0}, {}, "yarn_log_multiplier is -1.0"),
    ],
)
def test_contradictions_are_refused(
    tmp_path: Path, name: str, keys: dict[str, Any], renamed: dict[str, str], message: str
) -> None:
    content = read_content(write_family(tmp_path / "whole.gguf", name, shape=SHAPE))
    prefix = name.split("-")[0]
    values: dict[str, Any] = {}
    for old, new in renamed.items():
        values |= {f"blk.0.{new}.weight": content.values(f"blk.0.{old}.weight"), f"blk.0.{old}.weight": None}
    changed = content.with_keys({f"{prefix}.{key}": value for key, value in keys.items()}).with_values(values)
    with pytest.raises(ModelFileError, match=message):
        spec_of(write_content(tmp_path / "m.gguf", changed))


@pytest.mark.parametrize(
    ("n_layer", "n_vocab", "func", "score"),
    [
        (47, 154880, None, "sigmoid"),
        (48, 154880, 1, "softmax"),
        (47, 129280, None, "softmax"),
        (27, 154880, 2, "sigmoid"),
    ],
)
def test_a_missing_score_is_the_sigmoid_in_the_sizes_of_glm_4_7_flash(
    tmp_path: Path, n_layer: int, n_vocab: int, func: int | None, score: str
) -> None:
    content = read_content(write_family(tmp_path / "whole.gguf", "deepseek2", shape=SHAPE))
    sizes = {"deepseek2.block_count": n_layer, "deepseek2.vocab_size": n_vocab, "deepseek2.expert_gating_func": func}
    changed = content.with_keys(sizes).with_values({"token_embd.weight": None})
    gguf = read_gguf(write_content(tmp_path / "m.gguf", changed))
    assert ModelSpec.from_gguf(gguf).router_score == score


def test_a_context_beyond_an_indexers_reach_is_refused(tmp_path: Path) -> None:
    path = write_family(tmp_path / "m.gguf", "glm-dsa", shape=SHAPE)
    assert plan_engine(engine_config(path)).n_ctx == 256
    with pytest.raises(UsageError, match=r"window of 257 .* 'glm-dsa': beyond 256 tokens .* Use --ctx 256 or less"):
        plan_engine(engine_config(path, n_ctx=257))
    with pytest.raises(UnsupportedModelError, match="is run, but not converted: its indexer would be lost"):
        gguf_source(path)
    content = read_content(path).with_keys({"glm-dsa.attention.indexer.top_k": None})
    with pytest.raises(ModelFileError, match=r"indexer.top_k is missing"):
        spec_of(write_content(tmp_path / "m.gguf", content))


def test_temperatures_grow_by_steps() -> None:
    factors = Temperature(0.1, 8192).factors(np.array([0, 8191, 8192, 3 * 8192], np.int32))
    np.testing.assert_allclose(factors, [1.0, 1.0, 1.0 + 0.1 * np.log(2), 1.0 + 0.1 * np.log(4)], rtol=1e-6)
