"""`slimoe eval`: scores as the checkpoint's own library has them, one JSON that can be repeated, and what ends it."""

import asyncio
import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import click
import psutil
import pytest
import torch
import transformers
import yaml
from aiohttp import web

from slimoe.converter.convert import ConvertOptions, convert
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.gguf.header import read_gguf
from slimoe.server import evaluating
from slimoe.server.api.backends import Backend, Backends
from slimoe.server.api.served_model import ServedModel
from slimoe.server.app import AppConfig, init_app
from slimoe.server.cli import run
from slimoe.server.commands import eval as eval_command
from slimoe.server.http.connection import ApiRunner
from slimoe.server.jobs.remote_tokens import RemoteTokens, counted_timings
from slimoe.server.options.engine_options import DEMO
from slimoe.server.process.supervisor import Supervisor
from tests.models.configs import engine_config
from tests.models.live_server import DEADLINE

SCRIPTED = (sys.executable, str(Path(__file__).with_name("scripted_harness.py")))
HARNESSES = [SCRIPTED, *([evaluating.HARNESS] if importlib.util.find_spec("lm_eval") else [])]
"""lm-eval itself is asked where it is installed: it brings some forty packages along."""
TEXTS = ("the quick brown fox jumps over a lazy dog", "tell me", "def value for key", "naïve café 1234")


def evaluated(*arguments: str | Path, harness: tuple[str, ...] = SCRIPTED) -> None:
    context = eval_command.command.make_context("eval", [*map(str, arguments), "--threads", "1"])
    eval_command.carry_out(context.params, harness)


# --- scores ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def real_server(path: Path) -> AsyncIterator[str]:
    """The application over the real engine."""
    supervisor = Supervisor(engine_config(path, n_ctx=64, n_threads=1, kv_type="f32"))
    runner = ApiRunner(init_app(AppConfig(), Backends([Backend(ServedModel("tiny", path, "1.2.3"), supervisor)])), 0.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    supervisor.start()
    try:
        await asyncio.wait_for(supervisor.wait_ready(), DEADLINE)
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await supervisor.stop()
        await runner.cleanup()


@pytest.mark.parametrize("adds_bos", [True, False])
async def test_scores_are_those_of_transformers(moe_checkpoint: Path, tmp_path: Path, adds_bos: bool) -> None:
    """With the BOS that the model wants, and none where it wants none, token by token."""
    source = tmp_path / "checkpoint"
    source.mkdir()
    for file in moe_checkpoint.iterdir():
        (source / file.name).symlink_to(file)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").unlink()
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": adds_bos}))
    path = convert(ConvertOptions(source, tmp_path / "model.gguf", "F32", n_threads=1)).path
    assert read_gguf(path).metadata["tokenizer.ggml.add_bos_token"] is adds_bos
    reference = transformers.AutoModelForCausalLM.from_pretrained(source)

    def compare(url: str) -> None:
        tokens = RemoteTokens(url, "")
        for text in TEXTS:
            ids = tokens.encode(text, begins=True)
            assert ids == ([tokens.prefix] if adds_bos else []) + tokens.encode(text, begins=False)
            body = {"prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
            answer = tokens.post("/v1/completions", body)
            scores = answer["choices"][0]["logprobs"]["token_logprobs"]
            with torch.no_grad():
                logits = torch.log_softmax(reference(torch.tensor([ids])).logits[0].double(), -1)
            expected = [float(logits[n, token]) for n, token in enumerate(ids[1:])]
            assert scores[1:-1] == pytest.approx(expected, abs=1e-4)

    async with real_server(path) as url:
        await asyncio.to_thread(compare, url)


async def test_a_text_that_brings_its_bos_gets_no_second(tiny_model: Path) -> None:
    def compare(url: str) -> None:
        tokens = RemoteTokens(url, "")
        both = [tokens.encode(f"{start}hello", begins=True) for start in (tokens.bos or "", "")]
        assert [ids.count(tokens.prefix) for ids in both] == [1, 1]
        assert "[INST] hi" in tokens.rendered([{"role": "user", "content": "hi"}], begins_answer=True)

    async with real_server(tiny_model) as url:
        await asyncio.to_thread(compare, url)


# --- the result --------------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task of four questions with two answers each, and one that is to be continued."""
    data, path = tmp_path / "questions.jsonl", tmp_path / "fox.yaml"
    rows = [{"text": text, "choices": ["fox", "dog"], "answer": n % 2} for n, text in enumerate(TEXTS)]
    data.write_text("\n".join(map(json.dumps, rows)))
    described = {
        "task": "fox",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    path.write_text(yaml.safe_dump(described))
    return path


@pytest.mark.parametrize("harness", HARNESSES, ids=["scripted", "lm-eval"][: len(HARNESSES)])
def test_the_result_can_be_repeated(
    harness: tuple[str, ...], tiny_model: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    arguments = (tiny_model, "--tasks", task, "--ctx", "64", "--limit", "3", "-o", out, "--json", "--hash-all")
    evaluated(*arguments, "--ram", "2GiB", harness=harness)
    printed, told = capsys.readouterr()
    report = json.loads(out.read_text())
    assert json.loads(printed) == report
    assert "requests, about" in told
    assert "/v1/completions" not in told, "its own questions are no news"
    (figures,) = report["results"]["results"].values()
    assert any(name.endswith(",none") and isinstance(value, float) for name, value in figures.items())
    assert report["budget"] == {"ram": "2GiB", "vram": [], "n_ctx": 64}
    assert {"server", "engine", "harness", "all_together"} <= report["memory"]["peak_bytes"].keys()
    assert report["memory"]["peak_bytes"]["all_together"] > report["memory"]["peak_bytes"]["engine"] > 1 << 20
    assert report["speed"]["prompt_tokens_per_second"] > 0
    assert report["speed"]["written_tokens_per_second"] is None, "texts were scored only"
    assert report["settings"]["limit"] == 3
    origin = report["provenance"]
    assert origin["model"]["sha256"] == hashlib.sha256(tiny_model.read_bytes()).hexdigest()
    assert origin["model"]["n_bytes"] == tiny_model.stat().st_size
    assert {"lm_eval", "slimoe", "llama-cpp-python", "python"} <= origin["versions"].keys()
    assert origin["command"].split()[0] == "slimoe"


def test_the_header_alone_tells_models_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated("--tasks", "one", "--dry-run", "--json", "--ctx", "64")
    told = json.loads(capsys.readouterr().out)
    gguf = read_gguf(DEMO)
    n_header = min(tensor.offset for tensor in gguf.tensors.values())
    assert told["provenance"]["model"]["header_sha256"] == hashlib.sha256(DEMO.read_bytes()[:n_header]).hexdigest()
    assert told["provenance"]["model"]["sha256"] is None
    assert told["results"] == {}
    assert told["planned"]["requests"] == {"one": 2}


def test_speed_of_writing_is_told_from_written_texts(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin = time.monotonic()
    evaluated(tiny_model, "--tasks", "writes", "--ctx", "64", "--json")
    took = time.monotonic() - begin
    speed = json.loads(capsys.readouterr().out)["speed"]
    assert speed["written_tokens"] == 1 + 9
    assert speed["written_tokens_per_second"] > 8 / took
    answer = {"choices": [{}, {}], "timings": {"predicted_n": 6, "predicted_ms": 20.0, "prompt_ms": None}}
    counted = counted_timings(answer, writes=True)
    assert (counted["decoded_n"], counted["decoded_ms"], counted["prompt_ms"]) == (4, 20.0, 0)
    timings = {"predicted_n": 1, "predicted_ms": 0.1}
    assert counted_timings({"choices": [{}], "timings": timings}, writes=True) == timings


def test_a_person_gets_a_table(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(tiny_model, "--tasks", "one,two", "--ctx", "64")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["one", "logprob"], ["two", "logprob"]]
    assert lines[0].endswith("± 0.2500")
    assert "tokens read" in lines[-1]


# --- what ends it ------------------------------------------------------------------------------------------


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


@contextmanager
def nothing_is_left() -> Iterator[None]:
    """Fails if a process of the block is still there some time after it."""
    before = children()
    yield
    end = time.monotonic() + DEADLINE
    while children() - before and time.monotonic() < end:
        time.sleep(0.02)
    assert children() <= before


@pytest.mark.parametrize(
    ("task", "kind", "words"),
    [
        ("absent", UsageError, "The data of absent"),
        ("fails", SlimoeError, "ZeroDivisionError"),
        ("crashes", SlimoeError, "status 3: the last words"),
    ],
)
def test_failures_are_sentences(tiny_model: Path, task: str, kind: type[Exception], words: str) -> None:
    with nothing_is_left(), pytest.raises(kind, match=words):
        evaluated(tiny_model, "--tasks", task, "--ctx", "64")


def test_a_model_that_cannot_be_opened_ends_it(tmp_path: Path) -> None:
    with nothing_is_left(), pytest.raises(SlimoeError, match="there is no such file"):
        evaluated(tmp_path / "none.gguf", "--tasks", "one")


def test_ctrl_c_ends_everything(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupted(*arguments: Any) -> None:
        async with asyncio.timeout(DEADLINE):
            running = asyncio.create_task(evaluating.evaluate(*arguments))
            while len(children()) < 3:
                await asyncio.sleep(0.02)
            running.cancel()
            await running

    monkeypatch.setattr(eval_command, "evaluate", interrupted)
    with nothing_is_left(), pytest.raises(asyncio.CancelledError):
        evaluated(tiny_model, "--tasks", "forever", "--ctx", "64")


def test_an_output_is_not_overwritten(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.json"
    out.write_text("kept")
    with pytest.raises(UsageError, match="--force"):
        evaluated(tiny_model, "--tasks", "one", "-o", out)
    with pytest.raises(UsageError, match=r"no file no\.yaml"):
        evaluated(tiny_model, "--tasks", "no.yaml")
    with pytest.raises(click.MissingParameter):
        evaluated(tiny_model)
    assert out.read_text() == "kept"


def test_without_lm_eval_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    assert run(["eval", "--tasks", "one"]) == 2
    assert "pip install 'slimoe[eval]'" in capsys.readouterr().err
    assert "OPENAI_API_KEY" not in os.environ
