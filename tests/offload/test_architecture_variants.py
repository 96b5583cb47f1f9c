"""What files of one architecture may have or lack computes what llama.cpp does of it, to the last bit."""

import functools
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.stepping import random_tokens
from slimoe.converter.convert import ConvertOptions, convert
from slimoe.offload.engine import Engine
from slimoe.offload.errors import ModelFileError, SlimoeError, UnsupportedModelError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.model_file import ModelFile
from slimoe.offload.plan.engine_plan import plan_engine
from tests.models.configs import engine_config
from tests.models.gguf_content import (
    Array,
    GGUFContent,
    StoredKey,
    StoredTensor,
    read_content,
    with_prediction_block,
    write_content,
)
from tests.models.tiny_gguf import FineShape, write_family

TOKENS = random_tokens(20, 300)
N_LAYER, N_EXPERT = 2, 8
HEADS = {"qwen2moe": (4, 64), "bailingmoe2": (2, 64), "phimoe": (2, 64), "dots1": (4, 128)}
Tensors = dict[str, Array | None]
Content = Callable[[str], GGUFContent]


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Content:
    """What is in a small file of an architecture, by its name."""
    directory = tmp_path_factory.mktemp("variants")

    @functools.cache
    def read(name: str) -> GGUFContent:
        n_head_kv, n_embd_head = HEADS.get(name, (2, 128))
        shape = FineShape(
            n_layer=N_LAYER, n_head_kv=n_head_kv, n_embd_head=n_embd_head, n_expert=N_EXPERT, n_expert_used=4
        )
        return read_content(write_family(directory / f"{name}.gguf", name, shape=shape))

    return read


def changed(content: GGUFContent, keys: Mapping[str, Any], tensors: Mapping[str, Array | None]) -> GGUFContent:
    """The content with other keys, by their names without prefix, and other tensors; a list is an array of integers."""
    prefix = f"{content.keys['general.architecture'].value}."
    arrays = {
        prefix + name: StoredKey(value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32)
        for name, value in keys.items()
        if isinstance(value, list)
    }
    scalars = {prefix + name: value for name, value in keys.items() if not isinstance(value, list)}
    result = content.with_keys(scalars).with_values(tensors)
    return GGUFContent(result.keys | arrays, result.tensors)


def assert_computes_what_llama_cpp_does(path: Path) -> None:
    with closing(LlamaCpp(LlamaCppConfig(path, 256, 1, extra_buffers=False))) as baseline:
        expected = baseline.score(TOKENS)
    assert expected.std() > 0.5, "logits that are all alike show nothing"
    with closing(Engine.open(engine_config(path, n_ctx=256, n_threads=1, weights="copied"))) as engine:
        np.testing.assert_array_equal(engine.read(TOKENS, len(TOKENS)), expected)


@pytest.mark.parametrize("name", ["qwen2moe", "qwen35moe"])
def test_a_vector_may_be_a_matrix_of_one_row(content: Content, tmp_path: Path, name: str) -> None:
    """As llama.cpp's converter writes the gates of shared experts."""
    gates = [f"blk.{layer}.ffn_gate_inp_shexp.weight" for layer in range(N_LAYER)]
    rows = {gate: content(name).values(gate)[None] for gate in gates}
    path = write_content(tmp_path / "m.gguf", content(name).with_values(rows))
    assert {tuple(read_gguf(path).tensors[gate].ne) for gate in gates} == {(256, 1)}
    assert_computes_what_llama_cpp_does(path)
    vectors = convert(ConvertOptions(path, tmp_path / "q8.gguf", "Q8_0", n_threads=1)).path
    assert {tuple(read_gguf(vectors).tensors[gate].ne) for gate in gates} == {(256,)}
    assert_computes_what_llama_cpp_does(vectors)


def divisors(n: int) -> Array:
    return np.linspace(0.5, 1.5, n, dtype=np.float32)


def none_of(*names: str) -> Tensors:
    """No tensors of these names in any layer."""
    return {f"blk.{layer}.{name}": None for layer in range(N_LAYER) for name in names}


SHARED = ("ffn_gate_shexp.weight", "ffn_up_shexp.weight", "ffn_down_shexp.weight")
QK_NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")
FACTORS: Tensors = {
    "rope_factors_short.weight": divisors(64),
    "rope_factors_long.weight": 2 * divisors(64),
}
GROUPS = {"expert_group_count": 4, "expert_group_used_count": 2}
VARIANTS: dict[str, tuple[str, dict[str, Any], Tensors]] = {
    "short divisors": ("phimoe", {"rope.scaling.original_context_length": 256}, {}),
    "a factor beside the divisors": ("phimoe", {"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, {}),
    "no divisors": ("phimoe", {}, dict.fromkeys(FACTORS)),
    "no long divisors in a long context": ("phimoe", {}, {"rope_factors_long.weight": None}),
    "no short divisors in a short context": (
        "phimoe",
        {"rope.scaling.original_context_length": 256},
        {"rope_factors_short.weight": None},
    ),
    "rotation that is not finetuned": ("granitemoe", {"rope.scaling.finetuned": False}, {}),
    "Granite's divisors": ("granitemoe", {}, {"rope_freqs.weight": divisors(64)}),
    "Granite's long divisors": (
        "granitemoe",
        {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 128},
        FACTORS,
    ),
    "Llama's short divisors": ("llama", {"rope.scaling.type": "longrope"}, FACTORS),
    "Mamba-2 beside attention that rotates": ("granitehybrid", {"rope.scaling.finetuned": None}, {}),
    "no multipliers but the logits'": (
        "granitemoe",
        dict.fromkeys(("embedding_scale", "residual_scale", "attention.scale")),
        {},
    ),
    "Granite's without a shared expert": (
        "granitemoe",
        {"expert_shared_feed_forward_length": None},
        none_of(*SHARED),
    ),
    "a shared expert of the dense width": (
        "qwen2moe",
        {"expert_shared_feed_forward_length": None, "feed_forward_length": 512},
        {},
    ),
    "no biases": ("qwen2moe", {}, none_of("attn_q.bias", "attn_k.bias", "attn_v.bias")),
    "groups": ("qwen2moe", GROUPS, {}),
    "softmax, neither norm nor scale nor bias": (
        "dots1",
        {"expert_gating_func": 1, "expert_weights_norm": None, "expert_weights_scale": None},
        none_of("exp_probs_b.bias"),
    ),
    "softmax of those selected": ("dots1", {"expert_gating_func": 3}, {}),
    "ERNIE's without a bias and a shared expert": (
        "ernie4_5-moe",
        {"expert_shared_feed_forward_length": None},
        none_of("exp_probs_b.bias", *SHARED),
    ),
    "no scaling, which is named": (
        "hunyuan-moe",
        {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scaling.original_context_length": 4096},
        {},
    ),
    "softmax instead of sigmoid": ("minimax-m2", {"expert_gating_func": 1}, {}),
    "no norms of queries and keys": ("glm4moe", {}, none_of(*QK_NORMS)),
    "no norm of the weights": ("glm4moe", {"expert_weights_norm": None, "expert_weights_scale": 1.5}, {}),
    "sections of the rotation, for images": ("glm4moe", {"rope.dimension_sections": [16, 8, 8, 0]}, {}),
    "shared experts as wide as two": (
        "bailingmoe2",
        {"expert_shared_count": 2, "expert_shared_feed_forward_length": None},
        {},
    ),
    "all of a head rotates, without a bias": (
        "bailingmoe2",
        {"rope.dimension_count": 64, "expert_group_count": None, "expert_group_used_count": None},
        none_of("exp_probs_b.bias"),
    ),
    "groups beside a bias": ("glm4moe", GROUPS, {}),
    "arrays": (
        "glm4moe",
        {
            "attention.head_count": [4, 4],
            "attention.head_count_kv": [2, 2],
            "feed_forward_length": [1792, 1792],
            "expert_feed_forward_length": [256, 256],
            "expert_used_count": [4, 4],
        },
        {},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_file_may_have_or_lack(tmp_path: Path, content: Content, variant: str) -> None:
    name, keys, tensors = VARIANTS[variant]
    assert_computes_what_llama_cpp_does(write_content(tmp_path / "m.gguf", changed(content(name), keys, tensors)))


LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ORIGINAL = {"rope.scaling.original_context_length": 128}


@pytest.mark.parametrize(
    ("keys", "lacking", "n_ctx", "words"),
    [
        (
            ORIGINAL,
            [LONG],
            129,
            rf"lacks {LONG}, .* of 129 tokens, more than the original 128, .* Use --ctx 128, or",
        ),
        (
            ORIGINAL,
            [SHORT],
            128,
            rf"lacks {SHORT}, .* of 128 tokens, no more than the original 128.* Use --ctx 129 or",
        ),
        (
            ORIGINAL | {"rope.scaling.type": "longrope"},
            [LONG, SHORT],
            256,
            rf"lacks {LONG}, .* worse\. Convert",
        ),
        (ORIGINAL, [LONG], 128, ""),
        (ORIGINAL, [SHORT], 129, ""),
        (ORIGINAL, [LONG, SHORT], 256, ""),
        (ORIGINAL, [], 256, ""),
    ],
)
def test_divisors_that_a_context_needs_and_the_file_lacks_are_told(
    tmp_path: Path, content: Content, keys: dict[str, Any], lacking: list[str], n_ctx: int, words: str
) -> None:
    path = write_content(tmp_path / "m.gguf", changed(content("phimoe"), keys, dict.fromkeys(lacking)))
    notes = plan_engine(engine_config(path, n_ctx=n_ctx, n_threads=1)).notes
    assert len(notes) == bool(words)
    assert re.search(words, " ".join(notes))


def test_weights_of_experts_that_only_a_bias_selects_are_divided_by_no_less_than_llama_cpps_bound(
    tmp_path: Path, content: Content
) -> None:
    """The bias selects experts that the router gives next to nothing."""
    whole = content("ernie4_5-moe")
    bias = np.where(np.arange(N_EXPERT) < 4, 3.0, 0.0).astype(np.float32)
    router = "blk.1.ffn_gate_inp.weight"
    tensors = {"blk.1.exp_probs_b.bias": bias, router: 12 * whole.values(router)}
    assert_computes_what_llama_cpp_does(write_content(tmp_path / "m.gguf", changed(whole, {}, tensors)))


@pytest.mark.parametrize(
    ("name", "norm"), [("glm4moe", "nextn.shared_head_norm"), ("bailingmoe2", "layer_output_norm")]
)
def test_blocks_that_predict_further_tokens_are_not_run(tmp_path: Path, content: Content, name: str, norm: str) -> None:
    block = with_prediction_block(content(name), N_LAYER)
    block = block.with_values({f"blk.{N_LAYER}.{norm}.weight": np.ones(256, np.float32)})
    path = write_content(tmp_path / "m.gguf", block)
    model = ModelFile.of(read_gguf(path))
    assert (model.spec.n_layer, model.spec.n_layer_nextn, len(model.sources.layers)) == (N_LAYER, 1, N_LAYER)
    assert_computes_what_llama_cpp_does(path)
    without = write_content(tmp_path / "without.gguf", content(name))
    plans = [plan_engine(engine_config(one, n_ctx=256, n_threads=1)) for one in (path, without)]
    assert len({plan.load_bytes for plan in plans}) == len({str(plan.host_bytes) for plan in plans}) == 1


def test_a_block_of_attention_and_experts_behind_layers_of_one_part_is_not_run(tmp_path: Path) -> None:
    """As llama.cpp's converter writes what predicts a Nemotron's further token, which llama.cpp passes over too."""
    shape = FineShape(n_layer=3, n_embd_head=64, n_expert=N_EXPERT, n_expert_used=2)
    whole = read_content(write_family(tmp_path / "whole.gguf", "nemotron_h_moe-latent", shape=shape))
    attention = {name.replace("blk.2.", "blk.3."): one for name, one in whole.tensors.items() if "blk.2." in name}
    experts = {
        name.replace("blk.1.attn_norm", "blk.3.post_attention_norm").replace("blk.1.", "blk.3."): one
        for name, one in whole.tensors.items()
        if "blk.1." in name
    }
    norms = {f"blk.3.nextn.{name}.weight": np.ones(256, np.float32) for name in ("enorm", "hnorm", "shared_head_norm")}
    own = {name: StoredTensor(one, Type.F32) for name, one in norms.items()}
    own["blk.3.nextn.eh_proj.weight"] = StoredTensor(np.ones((256, 512), np.float32), Type.F32)
    keys = {"block_count": 4, "nextn_predict_layers": 1, "feed_forward_length": [0, 256, 0, 256]}
    more = GGUFContent(whole.keys, whole.tensors | attention | experts | own)
    path = write_content(tmp_path / "m.gguf", changed(more, keys | {"attention.head_count_kv": [0, 0, 2, 2]}, {}))
    spec = ModelFile.of(read_gguf(path)).spec
    assert (spec.n_layer, spec.n_layer_nextn, spec.recurrent_layers, spec.attention_layers) == (3, 1, (0,), (2,))
    assert_computes_what_llama_cpp_does(path)


REFUSED: dict[str, tuple[str, dict[str, Any], Tensors, type[SlimoeError], str]] = {
    "a score": ("glm4moe", {"expert_gating_func": 4}, {}, UnsupportedModelError, "is 4, a router score that is not"),
    "too short": (
        "glm4moe",
        {"attention.head_count": [4]},
        {},
        ModelFileError,
        "has 1 entries, but the model 2 blocks",
    ),
    "too long": ("dots1", {"expert_used_count": [4] * 3}, {}, ModelFileError, "3 entries, but 2 belong to this model"),
    "differing": ("glm4moe", {"expert_used_count": [4, 2]}, {}, UnsupportedModelError, "differs between layers"),
    "uneven groups": ("dots1", {"expert_group_count": 3, "expert_group_used_count": 2}, {}, ModelFileError, "3 groups"),
    "groups too small": (
        "dots1",
        {"expert_group_count": 4, "expert_group_used_count": 1},
        {},
        ModelFileError,
        "8 experts in 4 groups, of which 1 are used, cannot give 4",
    ),
    "no groups used": ("dots1", {"expert_group_count": 4}, {}, ModelFileError, "expert_group_used_count is missing"),
    "wider shared": ("glm4moe", {"expert_shared_count": 2}, {}, ModelFileError, "shexp.weight has the shape"),
    "uncounted shared": ("glm4moe", {"expert_shared_count": 0}, {}, UnsupportedModelError, "shexp.weight has no place"),
    "all dense": ("glm4moe", {"leading_dense_block_count": 2}, {}, ModelFileError, "none of 2 layers with experts"),
    "more dense": ("glm4moe", {"leading_dense_block_count": 3}, {}, ModelFileError, "none of 2 layers with experts"),
    "fewer dense": ("glm4moe", {"leading_dense_block_count": 0}, {}, ModelFileError, "gate_inp.weight is missing"),
    "more used": ("olmoe", {"expert_used_count": 9}, {}, ModelFileError, "uses 9 of 8 experts per token"),
    "none used": ("olmoe", {"expert_used_count": 0}, {}, ModelFileError, "uses 0 of 8 experts per token"),
    "no bias": ("minimax-m2", {}, none_of("exp_probs_b.bias"), ModelFileError, "blk.0.exp_probs_b.bias is missing"),
    "norm's bias": ("phimoe", {}, none_of("ffn_norm.bias"), ModelFileError, "blk.0.ffn_norm.bias is missing"),
    "one divisor": ("phimoe", {}, {"rope_factors_long.weight": divisors(1)}, ModelFileError, "long.weight has the sh"),
    "foreign divisors": ("hunyuan-moe", {}, {"rope_freqs.weight": divisors(64)}, UnsupportedModelError, "has no place"),
    "no truth": (
        "glm4moe",
        {"expert_weights_norm": 3},
        {},
        ModelFileError,
        "weights_norm is 3, which is no truth value",
    ),
    "a score elsewhere": ("qwen2moe", {"expert_gating_func": 9}, {}, UnsupportedModelError, "is 9, a router score"),
    "an unread length": ("qwen3moe", {"feed_forward_length": [64] * 3}, {}, ModelFileError, "has 3 entries, but 2 bel"),
    "many blocks": ("glm4moe", {"block_count": 1 << 31}, {}, ModelFileError, "block_count is 2147483648, which cannot"),
    "no bias of outputs": ("gpt-oss", {}, none_of("attn_output.bias"), ModelFileError, "blk.0.attn_output.bias is mis"),
    "a joint matrix of few rows": (
        "qwen3next-old",
        {},
        {"blk.0.ssm_in.weight": np.ones((767, 256), np.float32)},
        ModelFileError,
        r"blk.0.ssm_in.weight has the shape \(256, 767\), but \(256, 768\) belongs",
    ),
    "a joint matrix beside its parts": (
        "qwen3next",
        {},
        {"blk.0.ssm_in.weight": np.ones((768, 256), np.float32)},
        UnsupportedModelError,
        "ssm_in.weight has no place",
    ),
    "a joint matrix of another model": (
        "qwen35moe",
        {"full_attention_interval": 2},
        {
            "blk.0.attn_qkv.weight": None,
            "blk.0.attn_gate.weight": None,
            "blk.0.ssm_in.weight": np.ones((768, 256), np.float32),
        },
        ModelFileError,
        "blk.0.attn_qkv.weight is missing",
    ),
    "no attention": ("nemotron_h_moe", {}, {}, ModelFileError, "no layer has attention"),
    "no experts": ("nemotron_h_moe", {"feed_forward_length": [0, 0]}, {}, ModelFileError, "no layer has"),
    "no blocks": ("glm4moe", {"nextn_predict_layers": 2}, {}, ModelFileError, "2 of 2 blocks predict further tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_itself_is_refused(tmp_path: Path, content: Content, case: str) -> None:
    name, keys, tensors, error, message = REFUSED[case]
    path = write_content(tmp_path / "m.gguf", changed(content(name), keys, tensors))
    with pytest.raises(error, match=message):
        ModelFile.of(read_gguf(path))
