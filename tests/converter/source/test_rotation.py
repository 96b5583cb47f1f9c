"""Every setting of the rotation means what it means to transformers, in libllama, in the engine and in calibration."""

import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from slimoe.converter.convert import ConvertOptions, convert
from slimoe.converter.forward.stream import Sequences, final_logits, run
from slimoe.converter.source.families.llama import MixtralConfig
from slimoe.converter.source.open_source import open_source
from slimoe.converter.source.rotation import Rotation, read_rotation
from slimoe.offload.engine import Engine
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.architectures import LLAMA
from slimoe.offload.model.spec import ModelSpec
from tests.models.configs import engine_config
from tests.models.tiny_checkpoint import TinyConfig, llama_logits, logits, save_checkpoint

TOKENS = [1 + (37 * n) % 500 for n in range(48)]
CONFIG = Path("config.json")
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
OLD_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta outside": {"rope_theta": 123.0},
    "theta inside": {"rope_theta": 123.0, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    "theta of the class beside a scaling": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "default with a factor": {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0, "factor": 3.0}},
    "no type": {"rope_parameters": {"rope_theta": 777.0}},
    "both names": {"rope_parameters": YARN, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5, "attention_factor": 3.0}},
    "both types": {"rope_parameters": {"rope_type": "linear", "type": "yarn", "rope_theta": 1e4, "factor": 2.5}},
    "llama3": {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}},
    "llama3 without a context": {"rope_parameters": LLAMA3},
    "llama3 with the context outside": {"rope_parameters": LLAMA3, "original_max_position_embeddings": 90},
    "yarn": {"rope_parameters": YARN},
    "old yarn": {"rope_scaling": OLD_YARN | {"finetuned": True}, "rope_theta": 5e4},
    "yarn without a context": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    "yarn, context outside": {"rope_parameters": YARN, "original_max_position_embeddings": 100},
    "yarn, factor null": {"rope_parameters": YARN | {"factor": None}},
    "yarn, factor null, context outside": {
        "rope_parameters": YARN | {"factor": None},
        "original_max_position_embeddings": 512,
    },
    "yarn, factor below 1": {"rope_parameters": YARN | {"factor": 0.5}},
    "yarn, mscale alike": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn, mscales apart": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    "yarn, mscale alone": {"rope_parameters": YARN | {"mscale": 0.7}},
    "yarn, mscale zero": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.0}},
    "yarn, mscales and factor null": {
        "rope_parameters": YARN | {"factor": None, "mscale": 0.7, "mscale_all_dim": 1.5},
    },
    "yarn, attention factor": {"rope_parameters": YARN | {"attention_factor": 1.7, "mscale": 1, "mscale_all_dim": 1}},
    "yarn, bounds": {"rope_parameters": YARN | {"beta_fast": 16, "beta_slow": 2.0}},
    "yarn, bounds are the usual ones": {"rope_parameters": YARN | {"beta_fast": 32, "beta_slow": None}},
    "yarn, bounds that cross": {"rope_parameters": YARN | {"beta_fast": 1.0, "beta_slow": 32.0}},
    "yarn, not rounded": {"rope_parameters": YARN | {"truncate": False}},
    "yarn, rounding is null": {"rope_parameters": YARN | {"truncate": None}},
    "yarn, tiny context": {"rope_parameters": YARN | {"original_max_position_embeddings": 3}},
    "yarn, huge context": {"rope_parameters": YARN | {"original_max_position_embeddings": 2**30, "rope_theta": 20.0}},
    "not partial": {"partial_rotary_factor": 1.0, "rope_parameters": YARN | {"partial_rotary_factor": 1.0}},
}


def theirs(settings: dict[str, Any]) -> tuple[NDArray[np.float64], float]:
    """transformers' frequencies and magnitude."""
    config = transformers.MixtralConfig(**json.loads(json.dumps(SIZES | settings)))
    embedding = MixtralRotaryEmbedding(config)
    return embedding.inv_freq.double().numpy(), float(embedding.attention_scaling)


def ours(settings: dict[str, Any]) -> Rotation:
    return read_rotation(CONFIG, msgspec.json.decode(json.dumps(SIZES | settings), type=MixtralConfig), LLAMA)


SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
SIZES["max_position_embeddings"] = 1024


def as_ggml_computes(rotation: Rotation) -> tuple[NDArray[np.float64], float]:
    """What `ggml_rope_ext` makes of the file's keys in libllama (rope_yarn in ops.cpp, llama-context.cpp)."""
    spec = rotation.spec
    pairs = np.arange(spec.n_rot // 2)
    plain = spec.freq_base ** (-2.0 * pairs / spec.n_rot)
    plain = plain / rotation.divisors.get("rope_freqs", 1.0)
    scale = 1.0 if spec.scaling == "none" else 1.0 / spec.factor
    if spec.scaling != "yarn":
        return scale * plain, spec.attn_multiplier
    log_base = 2 * math.log(spec.freq_base)
    turning = [spec.n_rot * math.log(spec.n_ctx_orig / (beta * 2 * math.pi)) / log_base for beta in (32, 1)]
    low, high = max(0, math.floor(turning[0])), min(spec.n_rot - 1, math.ceil(turning[1]))
    ramp = 1 - np.clip((pairs - low) / max(0.001, high - low), 0, 1)
    growth = 0.1 * math.log(spec.factor) + 1.0 if spec.factor > 1 else 1.0
    return plain * scale * (1 - ramp) + plain * ramp, growth * spec.attn_multiplier


@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_magnitude_are_transformers(case: str) -> None:
    frequencies, magnitude = theirs(CASES[case])
    found, size = as_ggml_computes(ours(CASES[case]))
    np.testing.assert_allclose(found, frequencies, rtol=2e-6)
    assert size == pytest.approx(magnitude, rel=1e-6)


def test_magnitudes_of_the_paper_and_of_mscale() -> None:
    sizes = [as_ggml_computes(ours(CASES[case]))[1] for case in ("yarn", "yarn, mscale alike", "yarn, mscales apart")]
    assert sizes == pytest.approx([1.1386, 1.0, 1.0648], abs=1e-4)


def test_any_yarn_is_transformers() -> None:
    rng = np.random.default_rng(5)
    n_expressed = 0
    for _ in range(300):
        settings: dict[str, Any] = {
            "rope_type": "yarn",
            "rope_theta": float(10 ** rng.uniform(0.5, 7)),
            "factor": float(rng.uniform(0.5, 40)),
            "original_max_position_embeddings": int(10 ** rng.uniform(0.5, 6)),
        }
        choices = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.2}
        settings |= {name: value * float(rng.uniform(0.5, 2)) for name, value in choices.items() if rng.random() < 0.2}
        settings |= {"truncate": bool(rng.random() < 0.8)}
        wanted, magnitude = theirs({"rope_parameters": settings})
        rotation = ours({"rope_parameters": settings})
        n_expressed += rotation.spec.scaling == "yarn"
        found, size = as_ggml_computes(rotation)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=str(settings))
        assert size == pytest.approx(magnitude, rel=1e-5)
    assert 30 < n_expressed < 270


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "longrope": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        "short_factor has 1",
    ),
    "longrope with two sizes": (
        {
            "rope_scaling": {"type": "longrope", "short_mscale": 1.0, "long_mscale": 1.5}
            | {name: [1.0] * 16 for name in ("short_factor", "long_factor")}
        },
        "short_mscale and long_mscale are 1.0 and 1.5, not the same",
    ),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' depends on a text's length"),
    "unknown": ({"rope_parameters": {"rope_type": "mrope"}}, "'mrope' is not supported"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "partial inside": ({"rope_parameters": YARN | {"partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
    "linear without a factor": ({"rope_scaling": {"type": "linear"}}, "'linear' needs factor"),
    "linear with null": ({"rope_scaling": {"type": "linear", "factor": None}}, "'linear' needs factor"),
    "yarn without a factor": ({"rope_scaling": {"type": "yarn"}}, "'yarn' needs factor"),
    "llama3 without bounds": ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "needs low_freq_factor"),
    "llama3 with bounds that cross": ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "4, which is not below"),
    "a magnitude of nothing": ({"rope_scaling": YARN | {"mscale": -9.0, "mscale_all_dim": 1.0}}, "a magnitude of"),
    "a magnitude without end": (
        {"rope_scaling": YARN | {"factor": math.exp(10), "mscale": 1.0, "mscale_all_dim": -1.0}},
        "a magnitude of",
    ),
    "a base of 1": ({"rope_scaling": YARN | {"rope_theta": 1.0}}, "rope_theta 1 means nothing"),
    "negative bounds": ({"rope_scaling": YARN | {"beta_slow": -1.0}}, "beta_slow -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_file_cannot_hold_is_refused_by_name(case: str) -> None:
    settings, message = REFUSED[case]
    with pytest.raises((UnsupportedModelError, ModelFileError), match=message):
        ours(settings)


def torch_logits(path: Path) -> NDArray[np.float32]:
    """As calibration computes them, of a checkpoint or a file."""
    source = open_source(path)
    with torch.no_grad():
        return np.asarray(final_logits(source, run(source, Sequences((tuple(TOKENS),)))))


def engine_logits(path: Path) -> NDArray[np.float32]:
    with closing(Engine.open(engine_config(path, n_ctx=64, n_threads=1, kv_type="f32"))) as engine:
        return np.array(engine.read(TOKENS, len(TOKENS)))


WHOLE_CASES = ["theta of the class beside a scaling", "llama3 with the context outside", "yarn, mscale alike"]
WHOLE_CASES += ["yarn, mscales apart", "yarn, factor null", "yarn, bounds", "yarn, not rounded", "old yarn"]


@pytest.mark.parametrize("case", WHOLE_CASES)
def test_logits_are_transformers_everywhere(tmp_path: Path, sentencepiece_path: Path, case: str) -> None:
    sizes = TinyConfig(n_layer=1, n_embd=64, n_head=2, n_head_kv=1, n_expert=3, n_expert_used=2)
    source = save_checkpoint(tmp_path / "c", sentencepiece_path, sizes, max_position_embeddings=1024, head_dim=32)
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"]
    (source / "config.json").write_text(json.dumps(config | CASES[case]))
    expected = logits(source, TOKENS).numpy()
    (source / "config.json").write_text(json.dumps(config))
    assert np.abs(expected - logits(source, TOKENS).numpy()).max() > 0.1 * expected.std(), "the case changes nothing"
    (source / "config.json").write_text(json.dumps(config | CASES[case]))
    path = convert(ConvertOptions(source, tmp_path / "m.gguf", "F32", n_threads=1)).path
    again = convert(ConvertOptions(path, tmp_path / "again.gguf", "F32", n_threads=1)).path
    native = convert(ConvertOptions(source, tmp_path / "native.gguf", n_threads=1, pair="F32,F16")).path
    found = {f"{one.name} in the engine": engine_logits(one) for one in (path, again, native)}
    found |= {f"{one.name} in torch": torch_logits(one) for one in (source, path, native)}
    found |= {f"{one.name} in libllama": llama_logits(one, TOKENS) for one in (path, again)}
    for name, scores in found.items():
        np.testing.assert_allclose(scores, expected, atol=2e-3 * expected.std(), err_msg=name)


def test_a_magnitude_without_scaling_survives_another_conversion(tmp_path: Path, sentencepiece_path: Path) -> None:
    source = save_checkpoint(tmp_path / "c", sentencepiece_path, TinyConfig(n_layer=1))
    config = json.loads((source / "config.json").read_text()) | {"rope_parameters": YARN | {"truncate": False}}
    (source / "config.json").write_text(json.dumps(config))
    path = convert(ConvertOptions(source, tmp_path / "m.gguf", "F32", n_threads=1)).path
    again = convert(ConvertOptions(path, tmp_path / "again.gguf", "F16", n_threads=1)).path
    for one in (path, again):
        assert ModelSpec.from_gguf(read_gguf(one)).rope.attn_factor == pytest.approx(1.1386, abs=1e-4)
