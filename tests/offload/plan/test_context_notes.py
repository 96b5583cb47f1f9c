"""A context window that is longer than what the model was made for is said, once, by every command that opens it."""

import json
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.stepping import kl_divergence, random_tokens
from slimoe.offload.engine import Engine
from slimoe.offload.errors import ModelFileError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.architectures import LLAMA
from slimoe.offload.model.attention_spec import AttentionSpec
from slimoe.offload.model.expert_spec import ExpertSpec
from slimoe.offload.model.rope import RopeSpec
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.plan.context_notes import context_notes
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.engine_plan import plan_engine
from slimoe.server.cli import run
from slimoe.server.options.engine_options import DEMO
from tests.models.configs import engine_config
from tests.models.gguf_content import read_content, write_content
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf

TRAINED = 1024
SPEC = ModelSpec(
    architecture=LLAMA,
    n_layer=2,
    n_embd=32,
    n_ff=48,
    n_vocab=40,
    n_ctx_train=TRAINED,
    rms_eps=1e-5,
    attention=AttentionSpec(4, 2, 8),
    experts=ExpertSpec(3, 2),
    rope=RopeSpec(n_rot=8, n_ctx_orig=TRAINED),
)


@pytest.mark.parametrize(
    ("rope", "reached"),
    [
        (RopeSpec(8, TRAINED), TRAINED),
        (RopeSpec(8, 256, scaling="yarn", factor=4.0), TRAINED),  # the length in the file is the scaled one
        (RopeSpec(8, TRAINED, scaling="yarn", factor=4.0), 4 * TRAINED),  # or the original one
        (RopeSpec(8, 512, scaling="yarn", factor=8.0), 4 * TRAINED),
        (RopeSpec(8, 256, scaling="linear", factor=8.0), 2 * TRAINED),
        (RopeSpec(8, TRAINED, scaling="linear", factor=8.0), TRAINED),
    ],
)
def test_the_length_that_a_model_was_made_for(rope: RopeSpec, reached: int) -> None:
    spec = replace(SPEC, rope=rope)
    assert context_notes(spec, reached) == ()
    (note,) = context_notes(spec, reached + 1)
    assert f"context window of {reached + 1} tokens" in note
    assert f"trained for {reached} tokens" in note
    assert f"Use --ctx {reached}." in note


@pytest.mark.parametrize(("window", "n_ctx"), [(0, TRAINED), (TRAINED, TRAINED), (2 * TRAINED, TRAINED), (64, 64)])
def test_a_window_that_is_never_left_is_not_worth_a_word(window: int, n_ctx: int) -> None:
    assert context_notes(replace(SPEC, n_window=window), n_ctx) == ()


def test_a_window_that_is_left() -> None:
    (note,) = context_notes(replace(SPEC, n_window=64), 65)
    assert "looks back 64 tokens" in note
    assert "full attention is used" in note
    assert "trained for" not in note
    assert note.endswith("Use --ctx 64.")


def test_one_note_for_both() -> None:
    (note,) = context_notes(replace(SPEC, n_window=512), 2 * TRAINED)
    assert f"trained for {TRAINED} tokens" in note
    assert "looks back 512 tokens" in note
    assert note.endswith("Use --ctx 512.")


# --- files and commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory, sentencepiece_path: Path) -> Path:
    directory = tmp_path_factory.mktemp("windowed")
    content = read_content(write_tiny_gguf(directory / "plain.gguf", sentencepiece_path, shape=TinyShape(n_ctx=256)))
    return write_content(directory / "windowed.gguf", content.with_keys({"llama.attention.sliding_window": 32}))


def test_the_window_is_read_and_written(windowed: Path) -> None:
    spec = ModelSpec.from_gguf(read_gguf(windowed))
    assert spec.n_window == 32
    assert spec.metadata()["llama.attention.sliding_window"] == 32
    assert "llama.attention.sliding_window" not in replace(spec, n_window=0).metadata()


def test_a_window_that_is_no_count_is_refused(tmp_path: Path, windowed: Path) -> None:
    content = read_content(windowed).with_keys({"llama.attention.sliding_window": "wide"})
    with pytest.raises(ModelFileError, match=r"attention\.sliding_window is 'wide'"):
        ModelSpec.from_gguf(read_gguf(write_content(tmp_path / "bad.gguf", content)))


def test_full_attention_is_what_llama_computes_too(windowed: Path) -> None:
    tokens = random_tokens(200, 300)
    with closing(Engine.open(engine_config(windowed, n_ctx=256, n_threads=1))) as engine:
        assert "full attention is used" in "".join(engine.notes)
        ours = engine.read(tokens, len(tokens)).copy()
    with closing(LlamaCpp(LlamaCppConfig(windowed, 256, 1, extra_buffers=False))) as baseline:
        theirs = baseline.score(tokens)
    assert max(kl_divergence(*rows) for rows in zip(ours, theirs, strict=True)) < 1e-4
    assert np.ptp(theirs) > 1


def test_a_default_window_is_told_as_well(windowed: Path) -> None:
    (note,) = plan_engine(EngineConfig(windowed)).notes
    assert "context window of 256 tokens" in note


@pytest.mark.parametrize(("window", "n_window"), [(None, 0), ("absent", 0), (48, 48), ("context", 0), (1 << 20, 0)])
@pytest.mark.parametrize("is_dense", [False, True], ids=["moe", "dense"])
def test_converting_says_that_full_attention_is_used(
    tmp_path: Path,
    moe_checkpoint: Path,
    dense_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    window: int | str | None,
    n_window: int,
    is_dense: bool,
) -> None:
    source = shutil.copytree(dense_checkpoint if is_dense else moe_checkpoint, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["sliding_window"]
    if window != "absent":
        config["sliding_window"] = config["max_position_embeddings"] if window == "context" else window
    (source / "config.json").write_text(json.dumps(config))
    target = tmp_path / "m.gguf"
    assert run(["convert", str(source), str(target), "--type", "F16"]) == 0
    assert capsys.readouterr().err.count("full attention is used") == (1 if n_window else 0)
    spec = ModelSpec.from_gguf(read_gguf(target))
    assert spec.n_window == n_window
    assert spec.n_ctx_train == (48 if n_window and is_dense else config["max_position_embeddings"])


@pytest.mark.parametrize("words", [["plan", "--no-measure"], ["run", "-p", "x", "-n", "1"]], ids=["plan", "run"])
def test_commands_say_it_once(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([words[0], str(DEMO), "--ctx", "2100", "--device", "none", *words[1:]]) == 0
    assert capsys.readouterr().err.count("trained for 2048 tokens") == 1
    assert run([words[0], str(DEMO), "--ctx", "2048", "--device", "none", *words[1:]]) == 0
    assert "trained for" not in capsys.readouterr().err


def test_serve_says_it_once() -> None:
    words = ["serve", str(DEMO), "--ctx", "2100", "--device", "none", "--port", "0"]
    command = [sys.executable, "-m", "slimoe.server.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as served:
        assert served.stdout is not None
        served.stdout.readline()
        served.send_signal(signal.SIGTERM)
        assert served.communicate()[1].count("trained for 2048 tokens") == 1
