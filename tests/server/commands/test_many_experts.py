"""Checkpoints of 64 experts, of which a token selects 6, and of fewer key heads: calibrated, compressed and run."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.stepping import random_tokens
from slimoe.converter.forward.stream import Sequences, final_logits
from slimoe.converter.forward.stream import run as forward
from slimoe.converter.source.gguf_source import gguf_source
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.statistics_file import load_statistics, save_statistics
from slimoe.offload.engine import Engine
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.spec import ModelSpec
from slimoe.server.cli import run
from tests.converter.source.families.tiny_families import save_family
from tests.models.compress_plans import few_prices
from tests.models.configs import engine_config
from tests.models.conversation import apart
from tests.models.gguf_content import Array
from tests.models.tiered import tiered_engine
from tests.models.tiny_checkpoint import TinyConfig, save_fine

N_EXPERT, N_USED = 64, 6
TOKENS = random_tokens(32, 500)
OLMOE = TinyConfig(n_layer=2, n_embd=64, n_ff=64, n_expert=N_EXPERT, n_expert_used=N_USED)
SHARED = {"num_experts": N_EXPERT, "num_experts_per_tok": N_USED, "moe_intermediate_size": 64}
COMPRESSED = {
    "size": ["--target-bpw", "6"],
    "stock size": ["--target-bpw", "6", "--stock"],
    "pruned": ["--keep-experts", "40", "--score", "reap", "--type", "F16"],
    "merged": ["--merge", "hc-smoe", "--keep-experts", "40", "--type", "F16", "--stock"],
}


@pytest.fixture(scope="module", params=["olmoe", "qwen2moe"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with norms over all heads, and one with a shared expert behind a gate; both have half as many key heads."""
    path: Path = tmp_path_factory.mktemp("many") / request.param
    if request.param == "olmoe":
        return save_fine(path, "olmoe", OLMOE, num_key_value_heads=2)
    return save_family(path, "Qwen2Moe", **SHARED)


def test_a_text_is_calibrated_on(checkpoint: Path, tmp_path: Path) -> None:
    words, stats = tmp_path / "words.txt", tmp_path / "many.stats"
    words.write_text("the quick brown fox jumps over a lazy dog while hello world naïve café\n" * 100)
    flags = ["--text", str(words), "--tokens", "2048", "--length", "256", "--types", "none", "--no-sensitivity"]
    assert run(["calibrate", str(checkpoint), "-o", str(stats), *flags]) == 0
    for layer in load_statistics(stats, open_source(checkpoint)).layers:
        assert layer.router is not None
        assert layer.router.together.shape == (N_EXPERT, N_EXPERT)
        assert layer.router.together.diagonal().sum() == 2048 * N_USED


@pytest.fixture(scope="module")
def stats(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stats")
    save_statistics(few_prices(open_source(checkpoint), directory, ("Q4_0", "Q8_0")), directory / "many.stats")
    return directory / "many.stats"


def read_whole(engine: Engine) -> Array:
    with closing(engine):
        return engine.read(TOKENS, len(TOKENS)).copy()


@pytest.mark.parametrize("which", COMPRESSED)
def test_compressed_files_compute_what_they_should(
    checkpoint: Path, stats: Path, tmp_path: Path, which: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.gguf"
    flags = ["--stats", str(stats), "--no-report", "--threads", "1", *COMPRESSED[which]]
    if checkpoint.name == "olmoe" and "--stock" in flags:
        assert run(["convert", str(checkpoint), str(path), *flags]) == 3
        assert "llama.cpp loads no OLMoE model with fewer heads of keys" in capsys.readouterr().err
        flags.remove("--stock")
    assert run(["convert", str(checkpoint), str(path), *flags]) == 0
    gguf, source = read_gguf(path), gguf_source(path)
    spec = ModelSpec.from_gguf(gguf)
    assert (spec.architecture.name, spec.n_expert_used) == (checkpoint.name, N_USED)
    assert (spec.n_head, spec.n_head_kv) == (4, 2)
    assert spec.n_expert == (40 if which == "pruned" or (which == "merged" and not spec.is_native) else N_EXPERT)
    assert ("blk.1.ffn_down_shexp.weight" in gguf.tensors) is (checkpoint.name == "qwen2moe")
    config = engine_config(path, n_ctx=256, n_threads=1, kv_type="f32", weights="copied")
    expected = final_logits(source, forward(source, Sequences((tuple(TOKENS),)))).numpy()
    whole = read_whole(tiered_engine(config, 1.0))
    # Where weights are quantised, so is what they are multiplied with, but not in torch: llama.cpp is 0.022 apart.
    assert apart(whole, expected) < 3e-2
    np.testing.assert_array_equal(read_whole(tiered_engine(config, 0.3)), whole)
    if not spec.is_native:
        with closing(LlamaCpp(LlamaCppConfig(path, 256, 1, extra_buffers=False))) as baseline:
            theirs = baseline.score(TOKENS)
        with closing(Engine.open(engine_config(path, n_ctx=256, n_threads=1, weights="copied"))) as engine:
            np.testing.assert_array_equal(engine.read(TOKENS, len(TOKENS)), theirs)
