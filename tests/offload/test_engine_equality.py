"""The engine computes what transformers and llama.cpp compute, whatever the file's types and layout."""

import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.stepping import kl_divergence, random_tokens
from slimoe.converter.convert import ConvertOptions, convert
from slimoe.offload.engine import Engine
from slimoe.offload.errors import UsageError
from slimoe.offload.ggml.cpu_backend import can_repack
from slimoe.offload.plan.engine_config import EngineConfig
from tests.models.configs import engine_config
from tests.models.gguf_content import Array, GGUFContent, StoredTensor, read_content, write_content, write_shards
from tests.models.tiny_checkpoint import TinyConfig, logits, save_checkpoint
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf

DEMO = Path(__file__).parents[2] / "server" / "demo" / "demo.gguf"
TOKENS = random_tokens(24, 500)
FAST_TYPES = ["F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4"]
FAST_TYPES += ["IQ4_NL", "IQ4_XS", "TQ2_0", "TQ1_0", "NVFP4"]
SLOW_TYPES = ["IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"]


YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}


def config(path: Path, **changed: Any) -> EngineConfig:
    return engine_config(path, **{"n_ctx": 256, "n_threads": 1} | changed)


def scores(path: Path, tokens: Sequence[int] = TOKENS, *, n_batch: int = 512, **changed: Any) -> Array:
    """Logits of every token, read in batches."""
    with closing(Engine.open(config(path, **changed))) as engine:
        begins = range(0, len(tokens), n_batch)
        batches = [tokens[begin : begin + n_batch] for begin in begins]
        return np.concatenate([engine.read(batch, len(batch)).copy() for batch in batches])


def single_scores(path: Path, tokens: Sequence[int] = TOKENS, **changed: Any) -> Array:
    return scores(path, tokens, n_batch=1, **changed)


def llama_scores(path: Path, tokens: Sequence[int] = TOKENS, *, single: bool = False, repack: bool = False) -> Array:
    with closing(LlamaCpp(LlamaCppConfig(path, 256, 1, extra_buffers=repack))) as baseline:
        return np.concatenate([baseline.score([token]) for token in tokens]) if single else baseline.score(tokens)


def assert_same_distributions(ours: Array, theirs: Array) -> None:
    assert theirs.std() > 0.5, "logits that are all alike show nothing"
    assert np.mean([kl_divergence(a, b) for a, b in zip(ours, theirs, strict=True)]) < 1e-4


def converted(source: Path, target: Path, kind: str = "F32") -> Path:
    return convert(ConvertOptions(source, target, kind, n_threads=1)).path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("equality")


@pytest.fixture(scope="module")
def moe(directory: Path, moe_checkpoint: Path) -> Path:
    """6 experts, top 3, two key heads for four query heads; F32."""
    return converted(moe_checkpoint, directory / "moe.gguf")


@pytest.fixture(scope="module")
def content(moe: Path) -> GGUFContent:
    return read_content(moe)


@pytest.fixture(scope="module")
def wide_checkpoint(directory: Path, sentencepiece_path: Path) -> Path:
    """3 experts, top 2, in sizes that fit every type, its logits about as spread as a real model's."""
    sizes = TinyConfig(n_layer=2, n_embd=256, n_ff=256, n_head=4, n_head_kv=1, n_expert=3, n_expert_used=2)
    return save_checkpoint(directory / "wide", sentencepiece_path, sizes, initializer_range=0.06)


@pytest.fixture(scope="module")
def wide(directory: Path, wide_checkpoint: Path) -> GGUFContent:
    return read_content(converted(wide_checkpoint, directory / "wide.gguf"))


# --- transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", ["moe_checkpoint", "dense_checkpoint"])
def test_logits_and_greedy_tokens_are_transformers(
    tmp_path: Path, checkpoint: str, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(checkpoint)
    path = converted(source, tmp_path / "m.gguf")
    np.testing.assert_allclose(scores(path, kv_type="f32"), logits(source, TOKENS).numpy(), atol=1e-3)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    prompt = TOKENS[:8]
    expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=96)[0, 8:].tolist()
    with closing(Engine.open(config(path, kv_type="f32"))) as engine:
        tokens = [int(engine.prefill(prompt).argmax())]
        while len(tokens) < 96:
            tokens.append(int(engine.decode(tokens[-1]).argmax()))
    assert tokens == expected
    assert len(set(tokens)) > 5, "a model that repeats one token shows nothing"


# --- llama.cpp, on the same file ---------------------------------------------------------------------------


@pytest.mark.parametrize("repack", [False, True])
def test_the_demo_is_llama_cpps(repack: bool) -> None:
    with closing(Engine.open(config(DEMO))) as engine:
        assert engine.tokenizer
        tokens = engine.tokenizer.encode("The river is a stream of water.\ndef main():\n    return 0\n", add_bos=True)
    mode = "repacked" if repack else "mapped"
    assert_same_distributions(scores(DEMO, tokens, weights=mode), llama_scores(DEMO, tokens, repack=repack))
    expected = llama_scores(DEMO, tokens, single=True, repack=repack)
    assert_same_distributions(single_scores(DEMO, tokens, weights="both" if repack else "copied"), expected)


def assert_llama_cpps(path: Path) -> None:
    assert_same_distributions(scores(path, weights="copied"), llama_scores(path))
    assert_same_distributions(single_scores(path, weights="both"), llama_scores(path, single=True, repack=True))


@pytest.mark.parametrize("kind", FAST_TYPES)
def test_every_type_is_llama_cpps(tmp_path: Path, wide: GGUFContent, kind: str) -> None:
    assert_llama_cpps(write_content(tmp_path / "m.gguf", wide.quantised(Type[kind])))


@pytest.mark.parametrize("kind", SLOW_TYPES)
def test_types_that_are_slow_to_make_are_llama_cpps(tmp_path: Path, wide: GGUFContent, kind: str) -> None:
    """Their quantisers take seconds to start, but any bytes are a tensor of theirs."""
    names = ("blk.1.ffn_down_exps.weight", "blk.0.attn_q.weight")
    random = {name: random_blocks(wide.values(name).shape, Type[kind]) for name in names}
    content = GGUFContent(wide.keys, wide.tensors | random)
    assert_llama_cpps(write_content(tmp_path / "m.gguf", content))


def random_blocks(shape: tuple[int, ...], kind: Type) -> StoredTensor:
    """Random blocks with a scale of 0.01, which most types keep in front and IQ1_M in the ends of its last words."""
    _, n_bytes = GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (*shape[:-1], shape[-1] // 256, n_bytes)).astype(np.uint8)
    scale = int(np.float16(0.01).view(np.uint16))
    if kind is Type.IQ1_M:
        words = blocks[..., -8:].view(np.uint16)
        words[...] = words & 0x0FFF | [(scale >> shift & 15) << 12 for shift in (0, 4, 8, 12)]
    else:
        blocks[..., :2] = np.frombuffer(scale.to_bytes(2, "little"), np.uint8)
    return StoredTensor(blocks.reshape(*shape[:-1], -1), kind)


@pytest.mark.parametrize("recipe", ["Q4_K_M", "Q3_K_M", "Q2_K"])
def test_mixes_of_types_are_llama_cpps(tmp_path: Path, wide_checkpoint: Path, recipe: str) -> None:
    assert_llama_cpps(converted(wide_checkpoint, tmp_path / "m.gguf", recipe))


def test_a_prompt_read_for_its_last_token_is_llama_cpps(tmp_path: Path, wide: GGUFContent) -> None:
    tokens = random_tokens(230, 500)
    for kind in (Type.F16, Type.Q4_K):
        path = write_content(tmp_path / "m.gguf", wide.quantised(kind))
        with (
            closing(Engine.open(config(path, weights="mapped"))) as engine,
            closing(LlamaCpp(LlamaCppConfig(path, 256, 1, extra_buffers=False))) as baseline,
        ):
            np.testing.assert_array_equal(engine.prefill(tokens), baseline.prefill(tokens))
            for token in TOKENS[:20]:
                assert kl_divergence(engine.decode(token), baseline.decode(token)) < 1e-6


# --- with itself -------------------------------------------------------------------------------------------


def test_batches_of_any_size_agree(moe: Path) -> None:
    whole = scores(moe)
    for n_batch in (7, 1, 23):
        np.testing.assert_allclose(scores(moe, n_batch=n_batch), whole, atol=2e-3)
    with closing(Engine.open(config(moe))) as engine, closing(Engine.open(config(moe, n_batch=7))) as small:
        np.testing.assert_allclose(engine.prefill(TOKENS), whole[-1], atol=2e-3)
        np.testing.assert_allclose(small.prefill(TOKENS), whole[-1], atol=2e-3)


def test_one_thread_and_two_agree(tmp_path: Path, wide: GGUFContent) -> None:
    path = write_content(tmp_path / "m.gguf", wide.quantised(Type.Q4_K))
    np.testing.assert_allclose(scores(path, n_threads=2), scores(path), atol=1e-4)
    np.testing.assert_allclose(single_scores(path, TOKENS[:8], n_threads=2), single_scores(path, TOKENS[:8]), atol=1e-4)


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_K"])
def test_weights_may_lie_anyhow(tmp_path: Path, wide: GGUFContent, kind: str) -> None:
    path = write_content(tmp_path / "m.gguf", wide.quantised(Type[kind]) if kind != "F32" else wide)
    mapped, single = scores(path, weights="mapped"), single_scores(path, weights="mapped")
    for mode in ("copied", "both", "auto"):
        np.testing.assert_array_equal(scores(path, weights=mode), mapped)
    np.testing.assert_array_equal(single_scores(path, weights="copied"), single)
    for repacked in (scores(path, weights="repacked"), single_scores(path, weights="both")):
        expected = mapped if repacked is not single else single
        assert np.mean([kl_divergence(a, b) for a, b in zip(repacked, expected, strict=True)]) < 2e-3


@pytest.mark.parametrize(("kind", "bound"), [("f16", 1e-5), ("q8_0", 1e-2)])
def test_smaller_caches_are_close(tmp_path: Path, wide: GGUFContent, kind: str, bound: float) -> None:
    path = write_content(tmp_path / "m.gguf", wide)
    exact, close = scores(path, kv_type="f32"), scores(path, kv_type=kind)
    divergence = np.mean([kl_divergence(a, b) for a, b in zip(close, exact, strict=True)])
    assert 0 < divergence < bound


def test_a_cache_type_that_does_not_divide_the_heads(moe: Path) -> None:
    with pytest.raises(UsageError, match="Heads of 16 do not divide into Q8_0"):
        Engine.open(config(moe, kv_type="q8_0"))


# --- layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"rope.scale_linear": 2.0},
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        YARN_KEYS,
        {"rope.freq_base": 500.0},
        {"rope.scaling.attn_factor": 1.3},
        YARN_KEYS | {"rope.scaling.attn_factor": 0.9, "rope.scaling.yarn_log_multiplier": 0.7},
        YARN_KEYS | {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_attn_factor": 2.0},
        YARN_KEYS | {"rope.scaling.yarn_ext_factor": 0.5, "rope.scaling.factor": 0.5},
    ],
    ids=str,
)
def test_keys_change_the_computation_as_they_change_llama_cpps(
    tmp_path: Path, moe: Path, content: GGUFContent, keys: dict[str, int | float | str]
) -> None:
    path = write_content(tmp_path / "m.gguf", content.with_keys({f"llama.{key}": value for key, value in keys.items()}))
    ours = scores(path)
    assert_same_distributions(ours, llama_scores(path))
    if keys.get("rope.scaling.type") != "none":
        assert abs(ours - scores(moe)).max() > 0.01


def test_rope_factors(tmp_path: Path, moe: Path, content: GGUFContent) -> None:
    factors = np.linspace(1, 6, 8, dtype=np.float32)
    path = write_content(tmp_path / "m.gguf", content.with_values({"rope_freqs.weight": factors}))
    assert_same_distributions(scores(path), llama_scores(path))
    assert abs(scores(path) - scores(moe)).max() > 0.01


def test_tied_output(tmp_path: Path, content: GGUFContent) -> None:
    path = write_content(tmp_path / "m.gguf", content.with_values({"output.weight": None}))
    for mode in ("mapped", "copied"):
        assert_same_distributions(scores(path, weights=mode), llama_scores(path))


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_K])
def test_tied_output_in_a_type_that_is_rearranged(tmp_path: Path, kind: Type) -> None:
    """Rows of a rearranged matrix are no embeddings."""
    shape, n_vocab = TinyShape(n_embd=256, n_ff=256), 296
    content = read_content(write_tiny_gguf(tmp_path / "f32.gguf", None, shape=shape))
    table = content.tensors["token_embd.weight"].data[:n_vocab]
    content = content.with_values({"token_embd.weight": table, "output.weight": None})
    keys: dict[str, int | float | str | bool | None] = {"llama.vocab_size": n_vocab, "tokenizer.ggml.model": "none"}
    content = content.with_keys(keys).quantised(kind, "token_embd.weight".__eq__)
    path, tokens = write_content(tmp_path / "m.gguf", content), random_tokens(24, n_vocab)
    assert can_repack(kind, shape.n_embd, n_vocab)
    for mode in ("repacked", "both"):
        assert_same_distributions(single_scores(path, tokens, weights=mode), llama_scores(path, tokens, single=True))


def test_biases(tmp_path: Path, moe: Path, content: GGUFContent) -> None:
    rng = np.random.default_rng(0)
    sizes = {"attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": 64}
    biases = {
        f"blk.{layer}.{name}.bias": rng.standard_normal(size, np.float32)
        for layer in (0, 1)
        for name, size in sizes.items()
    }
    path = write_content(tmp_path / "m.gguf", content.with_values(biases))
    assert_same_distributions(scores(path), llama_scores(path))
    assert abs(scores(path) - scores(moe)).max() > 0.01


@pytest.mark.parametrize("mode", ["mapped", "copied"])
def test_shards(tmp_path: Path, moe: Path, content: GGUFContent, mode: str) -> None:
    first = write_shards(tmp_path, content, 3)
    np.testing.assert_array_equal(scores(first, weights=mode), scores(moe))
    assert_same_distributions(scores(first), llama_scores(first))


@pytest.mark.parametrize("mode", ["mapped", "copied", "both"])
def test_fused_queries_keys_and_values(tmp_path: Path, wide: GGUFContent, mode: str) -> None:
    stock = wide.quantised(Type.Q4_K)
    tensors = dict(stock.tensors)
    for layer in (0, 1):
        parts = [tensors.pop(f"blk.{layer}.attn_{name}.weight") for name in "qkv"]
        fused = np.concatenate([part.data for part in parts])
        tensors[f"blk.{layer}.attn_qkv.weight"] = StoredTensor(fused, Type.Q4_K)
    path = write_content(tmp_path / "m.gguf", GGUFContent(stock.keys, tensors))
    expected = write_content(tmp_path / "stock.gguf", stock)
    np.testing.assert_array_equal(scores(path, weights=mode), scores(expected, weights=mode))
    np.testing.assert_array_equal(single_scores(path, weights=mode), single_scores(expected, weights=mode))


@pytest.mark.parametrize("mode", ["mapped", "copied", "both"])
def test_experts_one_by_one(tmp_path: Path, wide: GGUFContent, mode: str) -> None:
    """The layout of December 2023, which llama.cpp no longer loads."""
    stock = wide.quantised(Type.Q4_0)
    tensors = {}
    for name, tensor in stock.tensors.items():
        if "_exps" not in name:
            tensors[name] = tensor
            continue
        for expert, data in enumerate(tensor.data):
            tensors[name.replace("_exps", f".{expert}")] = StoredTensor(data, tensor.type)
    path = write_content(tmp_path / "m.gguf", GGUFContent(stock.keys, tensors))
    expected = write_content(tmp_path / "stock.gguf", stock)
    np.testing.assert_array_equal(scores(path, weights=mode), scores(expected, weights=mode))
    np.testing.assert_array_equal(single_scores(path, weights=mode), single_scores(expected, weights=mode))


# --- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [
        TinyConfig(n_layer=1),
        TinyConfig(n_embd=160, n_head=2, n_head_kv=1),
        TinyConfig(n_embd=96, n_head=1, n_head_kv=1),
        TinyConfig(n_embd=256, n_head=2, n_head_kv=2, n_layer=1),
        TinyConfig(n_expert=1, n_expert_used=1),
        TinyConfig(n_expert=4, n_expert_used=4),
        TinyConfig(n_expert=33, n_expert_used=9, n_ff=8),
        TinyConfig(n_vocab=513, n_embd=44, n_head=2, n_ff=36),
    ],
    ids=str,
)
def test_odd_sizes(tmp_path: Path, sentencepiece_path: Path, sizes: TinyConfig) -> None:
    source = save_checkpoint(tmp_path / "c", sentencepiece_path, sizes)
    path = converted(source, tmp_path / "m.gguf")
    expected = logits(source, TOKENS).numpy()
    np.testing.assert_allclose(scores(path, kv_type="f32"), expected, atol=1e-3)
    with closing(Engine.open(config(path, kv_type="f32"))) as engine:
        np.testing.assert_allclose(engine.prefill(TOKENS[:-1]), expected[-2], atol=1e-3)
        np.testing.assert_allclose(engine.decode(TOKENS[-1]), expected[-1], atol=1e-3)


@pytest.mark.parametrize(
    ("tokens", "n_out", "problem"),
    [
        ([5] * 33, 1, "A step reads 1 to 32 tokens, not 33. Read more with prefill"),
        ([5] * 300, 1, "A step reads 1 to 32 tokens, not 300"),
        ([], 1, "A step reads 1 to 32 tokens, not 0"),
        ([5, 6], 3, "A step of 2 tokens has the logits of 1 to 2 of them, not of 3"),
        ([5, 6], 0, "not of 0"),
        ([5, 300], 1, "Token 300 is not one of the model's 300"),
        ([-1], 1, "Token -1 is not one"),
    ],
)
def test_a_step_that_cannot_be_is_refused_for_what_it_is(
    tmp_path: Path, tokens: list[int], n_out: int, problem: str
) -> None:
    """Not for a file that changed; and what was read stays."""
    path = write_tiny_gguf(tmp_path / "m.gguf", None)
    with closing(Engine.open(config(path, n_batch=32, device="none"))) as engine:
        engine.prefill([1, 2, 3])
        with pytest.raises(UsageError, match=re.escape(problem)):
            engine.read(tokens, n_out)
        assert engine.n_past == 3
        assert engine.read([5] * 32).shape == (1, 300)
