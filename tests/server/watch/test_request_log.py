"""What the log says of requests: one line each, nothing of what they say, and no line that a client wrote."""

import asyncio
import json
import re
import signal
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from yarl import URL

from slimoe.offload.errors import UsageError
from slimoe.offload.text.generation import Timings
from slimoe.server.cli import run
from slimoe.server.log_format import JOURNAL, MOST_WAITING, Journal
from slimoe.server.messages import Done, Progress, Step
from slimoe.server.process.engine_child import EngineChild
from slimoe.server.telling import tell
from slimoe.server.watch.prompt_log import MOST_BYTES, PromptLog
from slimoe.server.watch.record import RequestRecord
from tests.models.live_server import DEADLINE, LiveOptions, live_server, serving, slimoe, until

SECRET = "hello world"
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": SECRET}]}


class Log:
    """What has been written to standard error so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.text = ""

    async def requests(self, n_lines: int) -> list[str]:
        """The lines about requests, once there are so many."""

        def found() -> list[str]:
            self.text += self._capsys.readouterr().err
            return [line for line in self.text.splitlines() if "req-" in line or "mine" in line]

        await until(lambda: len(found()) >= n_lines)
        lines = found()
        assert len(lines) == n_lines
        return lines


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]) -> Log:
    return Log(capsys)


@pytest.fixture
def as_json() -> Iterator[None]:
    JOURNAL.is_json = True
    yield
    JOURNAL.is_json = False


async def test_a_line_for_each_request_and_none_for_looking(model: Path, log: Log) -> None:
    async with live_server(model) as server, aiohttp.ClientSession(server.url) as session:
        for path in ("/health", "/metrics", "/v1/models"):
            await session.get(path)
        await session.post(CHAT, json=BODY, headers={"X-Request-Id": "mine"})
        await session.get("/nowhere")
        first, second = await log.requests(2)
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d POST /v1/chat/completions 200 tiny: \d+ \(1 known\) \+ \d+ tokens, first after [\d.]+ s, "
        r"[\d.]+ s, 75 % of experts in memory, stop \[mine\]",
        first,
    )
    assert re.search(r"GET /nowhere 404 [\d.]+ s \[req-[0-9a-f]{32}\]$", second)
    assert SECRET not in log.text


@pytest.mark.usefixtures("as_json")
async def test_lines_of_json_have_the_figures(model: Path, log: Log) -> None:
    async with live_server(model) as server, aiohttp.ClientSession(server.url) as session:
        await session.post(CHAT, json=BODY, headers={"X-Request-Id": "mine"})
        (line,) = await log.requests(1)
    assert all(json.loads(other)["time"] for other in log.text.splitlines()), "every line is an object"
    found: dict[str, Any] = json.loads(line)
    names = ("event", "id", "method", "path", "status", "model", "finish_reason", "level")
    assert [found[name] for name in names] == ["request", "mine", "POST", CHAT, 200, "tiny", "stop", "info"]
    assert found["prompt_tokens"] == found["completion_tokens"] + 2
    assert found["tiers"] == {"hits": 3.0, "misses": 1.0, "bytes_read": 100.0}
    assert 0 < found["queue_seconds"] <= found["first_token_seconds"] <= found["total_seconds"]
    assert SECRET not in log.text


@pytest.mark.parametrize("is_json", [False, True])
async def test_a_path_cannot_write_lines_or_steer(model: Path, log: Log, is_json: bool) -> None:
    JOURNAL.is_json = is_json
    try:
        async with live_server(model) as server, aiohttp.ClientSession(server.url) as session:
            path = "/v1/a%0areq-forged%1b%5b2J%7f%c2%85%e2%80%a8" + "x" * 5000
            async with session.get(URL(server.url + path, encoded=True)) as response:
                assert response.status == 404
            (line,) = await log.requests(1)
    finally:
        JOURNAL.is_json = False
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < 1000
    assert not is_json or json.loads(line)["path"].startswith("/v1/a\nreq-forged\x1b[2J\x7f\x85\u2028x")


async def test_keys_in_the_query_are_not_written(model: Path, log: Log) -> None:
    async with live_server(model) as server, aiohttp.ClientSession(server.url) as session:
        await session.get("/nowhere?api_key=sesame&q=open")
        await log.requests(1)
    assert "sesame" not in log.text
    assert "open" not in log.text


def test_an_empty_line_among_text_stays_one(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("a table", "", "its sums"):
        tell(line)
    assert capsys.readouterr().err == "a table\n\nits sums\n"


def test_a_log_that_nobody_reads_holds_up_nobody() -> None:
    """The pipe is full after 64 KiB; what comes then waits, and is left out in the end."""
    code = (
        "from slimoe.server.log_format import Journal\n"
        "journal = Journal()\n"
        f"for n in range({3 * MOST_WAITING}): journal.tell_later('', 'info', 'x' * 1000)\n"
        "print('done', flush=True)\n"
        "journal.flush()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.readline() == "done\n"
    child.kill()
    child.communicate()


def test_tracebacks_are_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal()
    journal.is_json = True
    try:
        raise ValueError("a\nforged line")
    except ValueError as error:
        journal.tell("It failed.", "error", error=error)
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["traceback"].endswith("ValueError: a\nforged line\n")


def test_the_real_server_writes_nothing_but_json(tiny_model: Path) -> None:
    with serving(tiny_model, "--log-format", "json", "--ctx", "64") as (process, url):
        body = json.dumps({"prompt": "hello", "max_tokens": 2}).encode()
        urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body), timeout=DEADLINE).close()
        (engine,) = psutil.Process(process.pid).children()
        engine.send_signal(signal.SIGABRT)
        assert process.stderr is not None
        told: list[str] = []
        while not told or "SIGABRT" not in told[-1]:
            told.append(process.stderr.readline())
            assert told[-1], "the log has ended"
        process.send_signal(signal.SIGTERM)
        told += process.communicate(timeout=DEADLINE)[1].splitlines()
        lines = [json.loads(line) for line in told]
    assert any(line.get("event") == "request" and line["model"] == "tiny" for line in lines)
    assert any("SIGABRT" in line["message"] and line["level"] == "error" for line in lines)


@pytest.mark.usefixtures("as_json")
async def test_the_engines_last_words_are_told_without_a_line_break(capsys: pytest.CaptureFixture[str]) -> None:
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    child = EngineChild(lambda _: None, ended.set_result)
    await child.start([sys.executable, "-c", "import sys; sys.stderr.write('first\\nterminate called')"])
    assert await asyncio.wait_for(ended, DEADLINE) == 0
    JOURNAL.flush()
    assert [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()] == [
        "first",
        "terminate called",
    ]


def test_an_error_that_ends_the_server_is_json_too() -> None:
    process = slimoe("serve", "missing.gguf", "--port", "0", "--log-format", "json")
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (3, "")
    assert json.loads(err.splitlines()[-1])["level"] == "error"


# --- prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_are_written_where_that_is_asked_for(model: Path, tmp_path: Path, stream: bool) -> None:
    folder = tmp_path / "deep" / "prompts"
    options = replace(LiveOptions(), prompt_log=PromptLog(folder))
    async with live_server(model, options) as server, aiohttp.ClientSession(server.url) as session:
        async with session.post(CHAT, json={**BODY, "stream": stream}, headers={"X-Request-Id": "mine"}) as response:
            await response.read()
        await until(lambda: len(list(folder.iterdir())) == 1)
    (path,) = folder.iterdir()
    assert path.name.endswith("-mine.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    found = json.loads(path.read_text())
    assert found["prompts"][0]["messages"][0][:2] == ["user", SECRET]
    assert SECRET in found["answers"][0]["text"]
    assert (found["id"], found["model"], found["path"]) == ("mine", "tiny", CHAT)


def test_old_files_of_prompts_go(tmp_path: Path) -> None:
    log = PromptLog(tmp_path, most_files=3)
    for n in range(5):
        log.write(RequestRecord(f"r{n}"), ["x"], [])
    assert sorted(path.name.split("-")[1] for path in tmp_path.iterdir()) == ["r2.json", "r3.json", "r4.json"]


def test_a_full_folder_harms_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "prompts"
    log = PromptLog(folder)
    folder.rmdir()
    for n in range(2):
        log.write(RequestRecord(f"r{n}"), ["x"], [])
    assert capsys.readouterr().err.count("Prompts cannot be written") == 1


def test_what_is_too_large_is_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PromptLog(tmp_path).write(RequestRecord("large"), ["x" * MOST_BYTES], [])
    assert list(tmp_path.iterdir()) == []
    assert "File too large" in capsys.readouterr().err


def test_a_place_where_nothing_can_be_written_is_refused(
    tmp_path: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--log-prompts"):
        PromptLog(tmp_path / "file" / "below")
    assert run(["serve", str(tiny_model), "--port", "0", "--log-prompts", str(tmp_path / "file" / "below")]) == 2
    assert "--log-prompts" in capfd.readouterr().err


def test_what_has_not_ended_is_counted_as_far_as_it_came() -> None:
    record = RequestRecord("r1", model="m")
    for answer in (
        Progress(1, 30, 60, 10),
        Progress(1, 60, 60, 10),
        Step(1, "a"),
        Progress(2, 20, 60, 0),
        Step(1, "b"),
    ):
        record.note(answer)
    record.note(Done(1, "stop", "", Timings(50, 1.0, 2, 1.0, 10), {}))
    record.note(Progress(3, 60, 60, 50))
    record.note(Step(3, "c"))
    record.end(500)
    assert (record.n_prompt, record.n_cached, record.n_predicted) == (60 + 20 + 60, 10 + 50, 2 + 1)
