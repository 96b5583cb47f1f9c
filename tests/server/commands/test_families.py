"""A checkpoint of many small experts: calibrated, compressed, evaluated, run under any budget, and served."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.rpc_server import rpc_server
from bench.baselines.stepping import random_tokens
from slimoe.converter.forward.stream import Sequences, final_logits
from slimoe.converter.forward.stream import run as forward
from slimoe.converter.source.gguf_source import gguf_source
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.statistics_file import load_statistics, save_statistics
from slimoe.offload.engine import Engine
from slimoe.offload.ggml.devices import available_devices
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.text.tokenizer import Tokenizer
from slimoe.server.cli import run
from tests.models.compress_plans import few_prices
from tests.models.configs import engine_config
from tests.models.conversation import apart
from tests.models.gguf_content import Array
from tests.models.live_server import serving
from tests.models.tiered import device_engine, resident_engine, tiered_engine
from tests.models.tiny_checkpoint import FINE, TinyConfig, save_fine

SIZES = TinyConfig(n_layer=2, n_embd=256, n_ff=256, n_expert=8, n_expert_used=3)
TOKENS = random_tokens(32, 500)
COMPRESSED = {
    "size": ["--target-size", "1900KB"],
    "stock size": ["--target-size", "1900KB", "--stock"],
    "hobbit": ["--recipe", "hobbit"],
    "constants": ["--keep-experts", "5", "--constants", "--type", "Q8_0"],
    "pruned": ["--keep-experts", "6", "--type", "Q6_K", "--stock"],
    "merged": ["--merge", "hc-smoe", "--keep-experts", "5", "--type", "Q8_0"],
    "narrow": ["--width", "128", "--type", "Q8_0"],
    "without a layer's experts": ["--drop-layers", "1", "--type", "Q8_0"],
    "feedback and refit": ["--type", "Q6_K", "--feedback", "--refit", "--stock"],
}
LOSSY = {
    "size": ["skip", "adap:0.005", "skip:0.3"],
    "hobbit": ["low", "gate", "gate:0.6,0.9", "rule:100", "elastic:0.5"],
}


@pytest.fixture(scope="module", params=FINE)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fine(
        tmp_path_factory.mktemp(request.param) / request.param, request.param, SIZES, initializer_range=0.06
    )


@pytest.fixture(scope="module")
def stats(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stats")
    save_statistics(few_prices(open_source(checkpoint), directory), directory / "fine.stats")
    return directory / "fine.stats"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with rpc_server() as server:
        yield server.endpoint


def config(path: Path, **changed: Any) -> EngineConfig:
    return engine_config(path, **{"n_ctx": 256, "n_threads": 1, "kv_type": "f32"} | changed)


def told(engine: Engine) -> Array:
    """The logits of a prompt, and of the tokens behind it one by one."""
    with closing(engine):
        parts = [TOKENS[:20], *([token] for token in TOKENS[20:])]
        return np.concatenate([engine.read(part, len(part)).copy() for part in parts])


def convert(checkpoint: Path, target: Path, *flags: str | Path) -> None:
    assert run(["convert", *map(str, [checkpoint, target, *flags]), "--threads", "1"]) == 0


@pytest.mark.parametrize("which", COMPRESSED)
def test_compressed_files_run_under_any_budget(
    checkpoint: Path, stats: Path, tmp_path: Path, endpoint: str, which: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.gguf"
    convert(checkpoint, path, "--stats", stats, "--no-report", *COMPRESSED[which])
    metadata = read_gguf(path).metadata
    name = metadata["general.architecture"]
    assert checkpoint.name == (metadata["slimoe.base_architecture"] if name == "slimoe" else name)
    source = gguf_source(path)
    expected = final_logits(source, forward(source, Sequences((tuple(TOKENS),)))).numpy()
    whole = told(resident_engine(config(path)))
    assert apart(whole, expected) < 5e-3
    in_memory = told(tiered_engine(config(path), 1.0))
    for share in (0.0, 0.5):
        np.testing.assert_array_equal(told(tiered_engine(config(path), share)), in_memory)
    on_device = config(path, kv_type="f16", device=available_devices((endpoint,))[-1].name, rpc=(endpoint,))
    expected = told(resident_engine(config(path, kv_type="f16")))
    assert apart(told(device_engine(on_device, 0.3, 0.5)), expected) < 1e-4
    if name != "slimoe":
        with closing(LlamaCpp(LlamaCppConfig(path, 256, 1, extra_buffers=False))) as baseline:
            theirs = baseline.score(TOKENS)
        with closing(Engine.open(config(path, kv_type="f16", weights="copied"))) as engine:
            np.testing.assert_array_equal(engine.read(TOKENS, len(TOKENS)), theirs)
    for mode in LOSSY.get(which, []):
        status = run(["run", str(path), "-p", "hello", "-n", "4", "--ctx", "64", "--threads", "1", "--lossy", mode])
        assert (status, mode) == (0, mode), capsys.readouterr().err


def test_a_text_is_calibrated_on_and_another_evaluated(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, other = tmp_path / "words.txt", tmp_path / "other.txt"
    words.write_text("the quick brown fox jumps over a lazy dog while hello world naïve café\n" * 100)
    other.write_text("return a lazy value for each key in the list, and 1234 more\n" * 20)
    stats, path = tmp_path / "fine.stats", tmp_path / "m.gguf"
    flags = ["--text", str(words), "--tokens", "2048", "--types", "none", "--no-sensitivity"]
    assert run(["calibrate", str(checkpoint), "-o", str(stats), *flags]) == 0
    assert load_statistics(stats).n_tokens == 2048
    flags = ["--keep-experts", "6", "--type", "Q8_0", "--eval-text", str(other), "--eval-tokens", "256", "--json"]
    capsys.readouterr()
    convert(checkpoint, path, "--stats", stats, *flags)
    report = json.loads(capsys.readouterr().out)
    assert 0 < report["quality"]["kl"] < 10
    exact = tmp_path / "exact.gguf"
    convert(checkpoint, exact, "--type", "F32")
    capsys.readouterr()
    evaluated = ["--eval-text", str(other), "--eval-tokens", "256", "--json"]
    assert run(["report", str(checkpoint), str(exact), *evaluated]) == 0
    assert abs(json.loads(capsys.readouterr().out)["kl"]) < 1e-6


def test_it_is_served(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    convert(checkpoint, path, "--type", "Q8_0")
    tokenizer = Tokenizer.open(read_gguf(path))
    with closing(resident_engine(config(path, kv_type="f16"))) as engine, closing(tokenizer):
        prompt = tokenizer.encode("<|im_start|>user\ncafe\u0301<|im_end|>\n<|im_start|>assistant\n", parse_special=True)
        expected = [int(engine.prefill(prompt).argmax())]
        while len(expected) < 8:
            expected.append(int(engine.decode(expected[-1]).argmax()))
        text = tokenizer.decode(expected)
    with serving(path, "--ctx", "128", "--weights", "copied", "--device", "none") as (_, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
        answer = client.chat.completions.create(
            model="",
            messages=[{"role": "user", "content": "café"}],
            max_tokens=8,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 8)
        assert answer.choices[0].message.content == text
