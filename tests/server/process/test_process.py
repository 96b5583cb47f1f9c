"""`slimoe serve` from start to end, as a person or a desktop app runs it, over the real engine."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import psutil
import pytest

from slimoe.server.cli import run
from tests.models.live_server import DEADLINE, serving, slimoe
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf

LONG = TinyShape(n_ctx=100_000)


@pytest.fixture(scope="module")
def model(sentencepiece_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", sentencepiece_path, shape=LONG)


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with serving(model) as (_, url):
        yield url


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def children(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return list(psutil.Process(process.pid).children(recursive=True))


def gone(processes: list[psutil.Process]) -> bool:
    """Waits for the end of processes; one has ended though nobody has yet asked how, as for an orphan init does."""
    end = time.monotonic() + DEADLINE
    while any(map(runs, processes)) and time.monotonic() < end:
        time.sleep(0.01)
    return not any(map(runs, processes))


def runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_streamed_and_whole_answers_are_those_of_run(url: str, model: Path) -> None:
    messages = [{"role": "user", "content": "hello </s> world"}]
    arguments = {"model": "", "messages": messages, "temperature": 0, "max_tokens": 12}
    with client_of(url) as client:
        whole = client.chat.completions.create(**arguments)  # type: ignore[call-overload]
        chunks = list(client.chat.completions.create(**arguments, stream=True))  # type: ignore[call-overload]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    flags = ("--chat", "-p", "hello </s> world", "--temp", "0", "-n", "12", "--threads", "1", "--json")
    report = json.loads(slimoe("run", model, *flags).communicate()[0])
    assert whole.choices[0].message.content == text == report["text"]
    assert whole.usage.completion_tokens == report["timings"]["predicted_n"]
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == report["finish_reason"]


def test_a_file_that_is_written_to_is_told_of_before_anybody_asks(model: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(model, tmp_path / "m.gguf"))
    whole = path.read_bytes()
    with serving(path) as (_, url):
        path.write_bytes(whole[: len(whole) // 2])
        until_health(url, lambda status, text: status != 200 and ("was changed" in text or "m.gguf" in text))
        path.write_bytes(whole)
        until_health(url, lambda status, text: status == 200)
        with client_of(url) as client:
            assert client.completions.create(model="", prompt="hello", max_tokens=3, temperature=0).choices[0].text


def until_health(url: str, is_so: Callable[[int, str], bool]) -> None:
    """Waits until /health says something; fails when it never does."""
    end = time.monotonic() + DEADLINE
    while not is_so(*health(url)):
        assert time.monotonic() < end
        time.sleep(0.05)


def health(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=DEADLINE) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_next_turn_reads_only_what_is_new(url: str) -> None:
    turns = [{"role": "user", "content": "hello world " * 20}]
    with client_of(url) as client:
        first = client.chat.completions.create(model="", messages=turns, max_tokens=4)  # type: ignore[arg-type]
        turns += [{"role": "assistant", "content": "so"}, {"role": "user", "content": "tell me"}]
        second = client.chat.completions.create(model="", messages=turns, max_tokens=4)  # type: ignore[arg-type]
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens


def test_same_seed_same_text(url: str) -> None:
    with client_of(url) as client:
        texts = [
            client.completions.create(model="", prompt="hello", seed=seed, temperature=1.5, max_tokens=12)
            .choices[0]
            .text
            for seed in (7, 7, 8)
        ]
    assert texts[0] == texts[1] != texts[2]


def test_greedy_scores_say_so(url: str) -> None:
    """What evaluation harnesses rely on: the greedy token's score is the best of its place."""
    with client_of(url) as client:
        answer = client.completions.create(model="", prompt="hello", temperature=0, max_tokens=6, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    for value, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert value == max(top.values())


@pytest.mark.parametrize(("number", "flags"), [(signal.SIGINT, ("--grace", "0")), (signal.SIGTERM, ("--grace", "0.5"))])
def test_a_signal_ends_server_and_engine(model: Path, number: signal.Signals, flags: tuple[str, ...]) -> None:
    with serving(model, *flags) as (process, url), client_of(url) as client:
        engine = children(process)
        assert len(engine) == 2, "the engine, and what its chat template runs in"
        stream = client.completions.create(
            model="", prompt="hello", max_tokens=90_000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        begin = time.monotonic()
        process.send_signal(number)
        with pytest.raises(openai.APIError) as failure:
            list(stream)
        assert failure.value.code == "shutting_down"
        out, err = process.communicate(timeout=DEADLINE)
        assert time.monotonic() - begin < 5
        assert process.returncode == 0
        assert out == ""
        assert "Traceback" not in err
        assert gone(engine)


def test_a_second_signal_is_obeyed_at_once(model: Path) -> None:
    with serving(model) as (process, url), client_of(url) as client:
        engine = children(process)
        stream = client.completions.create(
            model="", prompt="hello", max_tokens=90_000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        with pytest.raises(psutil.TimeoutExpired):
            psutil.Process(process.pid).wait(0.2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE)
        assert process.returncode == 128 + signal.SIGTERM
        assert gone(engine)


def test_no_orphan_when_the_server_is_killed(model: Path) -> None:
    with serving(model) as (process, _):
        engine = children(process)
        process.kill()
        process.wait()
        assert engine
        assert gone(engine)


def test_the_end_of_the_parent_is_the_end(model: Path) -> None:
    with serving(model, "--exit-with-parent", stdin=subprocess.PIPE) as (process, _):
        engine = children(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(DEADLINE) == 0
        assert gone(engine)


def test_memory_goes_back_when_the_engine_is_gone(model: Path) -> None:
    """The server's own process never loads a tensor library."""
    with serving(model) as (process, _):
        maps = {Path(entry.path).name for entry in psutil.Process(process.pid).memory_maps()}
        (engine,) = psutil.Process(process.pid).children()
        assert any("libggml" in Path(entry.path).name for entry in engine.memory_maps())
    assert not [name for name in maps if "libggml" in name or "libllama" in name]


def test_a_port_in_use(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        process = slimoe("serve", model, "--port", str(port))
        out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (69, "")
    assert err.count("\n") == 1
    assert str(port) in err


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["missing.gguf"], 3, "there is no such file"),
        (["."], 3, "directory"),
        (["MODEL", "--ctx", "0"], 2, "--ctx"),
        (["MODEL", "--kv-type", "f15"], 2, "--kv-type"),
        (["MODEL", "--ctx", "2000000000"], 4, "GiB"),
        (["MODEL", "--api-key-env", "NO_SUCH_VARIABLE"], 2, "NO_SUCH_VARIABLE"),
        (["MODEL", "--api-key-file", "missing.txt"], 2, "missing.txt"),
        (["MODEL", "--host", "no.such.host.invalid"], 69, "no.such.host.invalid"),
        (["MODEL", "--host", "0.0.0.0"], 2, "--no-key"),
        (["MODEL", "--host", "::"], 2, "--no-key"),
        (["MODEL", "--host", ""], 2, "--no-key"),
        (["MODEL", "--no-key", "--api-key-file", __file__], 2, "--no-key"),
    ],
)
def test_what_cannot_be_served(
    model: Path, arguments: list[str], status: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    named = [str(model) if name == "MODEL" else name for name in arguments]
    assert run(["serve", "--port", "0", "--threads", "1", *named]) == status
    out, err = capfd.readouterr()
    assert out == ""
    assert words in err
    assert "Traceback" not in err


def test_a_ggml_that_cannot_be_loaded_is_told_with_its_own_status(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("SLIMOE_LIBRARY", "llama-cpp-python")
    process = slimoe("serve", model, "--port", "0")
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (5, "")
    assert err.count("\n") == 1
    assert "libggml-base" in err


def test_the_key_is_asked_for(model: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sesame\n")
    with serving(model, "--api-key-file", key, "--alias", "mine") as (_, url):
        with client_of(url) as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="sesame") as client:
            assert [model.id for model in client.models.list()] == ["mine"]


def test_the_key_does_not_go_to_the_engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMOE_TEST_KEY", "sesame")
    with serving(model, "--host", "0.0.0.0", "--api-key-env", "SLIMOE_TEST_KEY") as (process, url):
        found = [child.environ() for child in children(process)]
        assert found
        assert all("PATH" in environment and "SLIMOE_TEST_KEY" not in environment for environment in found)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="sesame") as client:
            assert [model.id for model in client.models.list()] == ["tiny"]


def test_other_machines_are_let_in_when_that_is_wanted(model: Path) -> None:
    with serving(model, "--host", "0.0.0.0", "--no-key") as (_, url), client_of(url) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "ids.gguf", None)
    with serving(path) as (_, url), client_of(url) as client:
        answer = client.completions.create(model="", prompt=[5, 6, 7], max_tokens=3)
        assert answer.usage is not None
        assert (answer.choices[0].text, answer.usage.completion_tokens) == ("", 3)
        with pytest.raises(openai.BadRequestError, match="no tokenizer") as failure:
            client.completions.create(model="", prompt="hello")
        assert failure.value.param == "prompt"
        with pytest.raises(openai.BadRequestError, match="no tokenizer") as failure:
            client.chat.completions.create(model="", messages=[{"role": "user", "content": "x"}])
        assert failure.value.param == "messages"


def test_the_demo_is_served_when_no_model_is_named() -> None:
    with serving() as (process, url), client_of(url) as client:
        question = 'Define the noun "river".'
        answer = client.chat.completions.create(
            model="", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=8
        )
        assert answer.model == "demo"
        assert answer.choices[0].message.content
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=DEADLINE)[1]
    assert "demo" in err.splitlines()[0]
