"""`slimoe serve` with models that come and go, as a desktop app runs it: no orphan, whatever ends it and when."""

import json
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from slimoe.server.cli import run
from tests.models.live_server import DEADLINE, serving
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf


@pytest.fixture(scope="module")
def model(sentencepiece_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TinyShape(n_ctx=100_000)
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", sentencepiece_path, shape=shape)


def complete(url: str, model: str = "tiny") -> str:
    body = json.dumps({"model": model, "prompt": "hello", "max_tokens": 3, "temperature": 0}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body), timeout=DEADLINE) as response:
        return str(json.load(response)["choices"][0]["text"])


def until(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.01)


def family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return list(psutil.Process(process.pid).children(recursive=True))


def is_gone(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_memory_goes_back_and_answers_stay_the_same(model: Path) -> None:
    with serving(model, "--ctx", "256", "--idle-unload", "300ms") as (process, url):
        text = complete(url)
        until(lambda: not family(process))
        assert complete(url) == text
        assert family(process)


@pytest.mark.parametrize("how", ["signal", "parent"])
@pytest.mark.parametrize("when", ["asleep", "waking"])
def test_it_ends_within_five_seconds(model: Path, how: str, when: str) -> None:
    flags = ("--ctx", "256", "--idle-unload", "200ms", "--exit-with-parent")
    with serving(model, *flags, stdin=subprocess.PIPE) as (process, url):
        until(lambda: not family(process))
        asking = None
        if when == "waking":
            asking = ThreadPoolExecutor(1).submit(complete, url)
            until(lambda: bool(family(process)))
        children, begin = family(process), time.monotonic()
        if how == "signal":
            process.send_signal(signal.SIGTERM)
        else:
            assert process.stdin is not None
            process.stdin.close()
        assert process.wait(5) == 0
        assert time.monotonic() - begin < 5
        until(lambda: all(map(is_gone, children)))
        if asking is not None:
            with pytest.raises(urllib.error.HTTPError) as failure:
                asking.result(DEADLINE)
            assert json.load(failure.value)["error"]["code"] == "shutting_down"


@pytest.mark.parametrize(
    ("flags", "status"), [(["nowhere.gguf"], 3), (["MODEL", "--ctx", "2000000000"], 4), (["MODEL", "--ram", "1MiB"], 4)]
)
def test_a_model_that_cannot_be_opened_at_the_start_ends_the_server(
    model: Path, flags: list[str], status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    named = [str(model) if flag == "MODEL" else flag for flag in flags]
    assert run(["serve", "--port", "0", "--threads", "1", "--idle-unload", "1m", *named]) == status
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_no_orphan_of_several_when_the_server_is_killed(model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copy(model, tmp_path / f"{name}.gguf")
    flags = ("--models", tmp_path, "--models-max", "2", "--ram", "2GiB", "--ctx", "256")
    with serving(*flags) as (process, url):
        assert complete(url, "one") == complete(url, "two")
        engines = psutil.Process(process.pid).children()
        assert len(engines) == 2, "both fit the budget"
        children = family(process)
        process.kill()
        process.wait()
        until(lambda: all(map(is_gone, children)))
