"""The models of a folder: which files they are, what is known of them before any is loaded, and the real server."""

import json
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from slimoe.offload.errors import UsageError
from slimoe.offload.plan.engine_config import EngineConfig, changed
from slimoe.server.cli import run
from slimoe.server.models.folder import models_in
from slimoe.server.models.plans import plan_models
from tests.models.live_server import DEADLINE, serving


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    """Two models, a file that is none, and things that are not looked at."""
    for name in ("one", "two"):
        shutil.copy(tiny_model, tmp_path / f"{name}.gguf")
    (tmp_path / "damaged.gguf").write_bytes(tiny_model.read_bytes()[:1000])
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / ".hidden.gguf").write_text("no model")
    (tmp_path / "deeper").mkdir()
    shutil.copy(tiny_model, tmp_path / "deeper" / "three.gguf")
    (tmp_path / "folder.gguf").mkdir()
    return tmp_path


def test_models_are_files_by_name_and_size(folder: Path, tiny_model: Path) -> None:
    n_bytes = tiny_model.stat().st_size
    found = [(model.name, model.path, model.n_bytes) for model in models_in(folder)]
    assert found == [
        ("damaged", folder / "damaged.gguf", 1000),
        ("one", folder / "one.gguf", n_bytes),
        ("two", folder / "two.gguf", n_bytes),
    ]


def test_shards_are_one_model(tmp_path: Path) -> None:
    for name in ("big-00001-of-00002.gguf", "big-00002-of-00002.gguf", "big.GGUF", "half-00002-of-00003.gguf"):
        (tmp_path / name).write_bytes(b"12345")
    assert [(model.name, model.path.name, model.n_bytes) for model in models_in(tmp_path)] == [
        ("big", "big-00001-of-00002.gguf", 10),
        ("big.GGUF", "big.GGUF", 5),
        ("half", "half-00002-of-00003.gguf", 5),
    ]


def test_links_that_lead_nowhere_are_models_without_bytes(tmp_path: Path) -> None:
    (tmp_path / "gone.gguf").symlink_to(tmp_path / "nothing")
    assert [(model.name, model.n_bytes) for model in models_in(tmp_path)] == [("gone", 0)]


@pytest.mark.parametrize("name", ["missing", "empty", "a file"])
def test_a_folder_without_models_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").touch()
    with pytest.raises(UsageError, match="--models"):
        models_in(tmp_path / name)


async def test_plans_say_what_fits_and_what_is_wrong(folder: Path) -> None:
    settings = {"n_ctx": 64, "n_threads": 1, "device": "none"}
    config = changed(EngineConfig(folder / "one.gguf"), settings)
    models = [config, changed(config, {"model": folder / "damaged.gguf"}), changed(config, {"n_ctx": 2_000_000_000})]
    good, damaged, large = await plan_models(models)
    assert good is not None
    assert damaged is not None
    assert large is not None
    assert (good.fits, good.n_ctx, good.problem) == (True, 64, None)
    assert 0 < good.required_bytes < good.available_bytes
    assert (damaged.fits, damaged.required_bytes) == (False, 0)
    assert "damaged.gguf" in (damaged.problem or "")
    assert not large.fits
    assert large.required_bytes > large.available_bytes
    assert "GiB" in (large.problem or "")


async def test_plans_that_take_too_long_are_left_out(folder: Path) -> None:
    assert await plan_models([EngineConfig(folder / "one.gguf")], seconds=0.001) == [None]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--models-max", "2"], "--models"),
        (["--models-max", "1"], "--models"),
        (["--models", "FOLDER", "--alias", "x"], "--alias"),
        (["--models", "FOLDER", "--models-max", "2"], "--ram"),
        (["--models", "FOLDER", "--models-max", "2", "--ram", "auto"], "--ram"),
        (["--models", "FOLDER", "--trace", "t"], "--trace"),
        (["--models", "nowhere"], "nowhere"),
    ],
)
def test_what_does_not_go_together(
    folder: Path, flags: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", "--port", "0", *[str(folder) if flag == "FOLDER" else flag for flag in flags]]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert words in err


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data), timeout=DEADLINE) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_real_server_switches_and_ends_without_orphans(folder: Path) -> None:
    flags = ("--models", folder, "--ctx", "64", "--exit-with-parent", "--idle-unload", "1h")
    with serving(*flags, stdin=subprocess.PIPE) as (process, url):
        assert psutil.Process(process.pid).children() == [], "nothing is loaded until it is asked for"
        assert ask(url, "/health") == (200, {"status": "ok", "is_sleeping": True})
        cards = {card["id"]: card for card in ask(url, "/v1/models")[1]["data"]}
        assert {name: card["fits"] for name, card in cards.items()} == {"one": True, "two": True, "damaged": False}
        assert cards["one"]["max_model_len"] == 64
        assert "damaged.gguf" in cards["damaged"]["problem"]
        for name in ("two", "one"):
            status, answer = ask(url, "/v1/completions", {"model": name, "prompt": "hello", "max_tokens": 2})
            assert (status, answer["model"]) == (200, name)
        status, answer = ask(url, "/v1/completions", {"model": "damaged", "prompt": "hello"})
        assert (status, answer["error"]["code"]) == (503, "model_failed")
        (engine,) = psutil.Process(process.pid).children()
        assert ask(url, "/models/unload", {"model": "one"}) == (200, {"success": True})
        assert not engine.is_running()
        assert ask(url, "/models/load", {"model": "two"}) == (200, {"success": True})
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(DEADLINE) == 0
        assert process.stderr is not None
        told = [line for line in process.stderr.read().splitlines() if "cannot be loaded now" in line]
        assert len(told) == 1, "of the one that cannot, and once"
        assert told[0].startswith("damaged cannot be loaded now, and requests for it will fail: ")
        assert not [child for child in psutil.process_iter() if child.ppid() == process.pid]


def test_a_model_beside_a_folder_is_loaded_first(folder: Path, tiny_model: Path) -> None:
    with serving(tiny_model, "--models", folder, "--alias", "mine", "--ctx", "64") as (process, url):
        cards = ask(url, "/v1/models")[1]["data"]
        assert (cards[0]["id"], cards[0]["status"]["value"]) == ("mine", "loaded")
        assert len(cards) == 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
