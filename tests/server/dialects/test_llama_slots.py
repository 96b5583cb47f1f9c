"""`POST /slots/ID`: saved, restored, erased, as llama-server answers; names that lead elsewhere are refused."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from slimoe.offload.plan.engine_config import ContextConfig, EngineConfig
from slimoe.server.options.engine_options import DEMO
from tests.models.live_server import LiveOptions, LiveServer, live_server, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slots")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def saving(model: Path, directory: Path) -> AsyncIterator[LiveServer]:
    engine = EngineConfig(Path(), context=ContextConfig(n_parallel=2))
    async with live_server(model, LiveOptions(slot_directory=directory, engine=engine)) as server:
        yield server


async def post(server: LiveServer, path: str, body: Any = None) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.post(server.url + path, json=body) as response:
        return response.status, await response.json()


async def test_saved_restored_and_erased(saving: LiveServer, directory: Path) -> None:
    assert await post(saving, "/slots/1?action=save", {"filename": "chat.bin"}) == (
        200,
        {"id_slot": 1, "filename": "chat.bin", "n_saved": 11, "n_written": 6, "timings": {"save_ms": 250.0}},
    )
    assert (directory / "chat.bin").read_text() == "slot 1"
    assert await post(saving, "/slots/1?action=restore", {"filename": "chat.bin"}) == (
        200,
        {"id_slot": 1, "filename": "chat.bin", "n_restored": 11, "n_read": 6, "timings": {"restore_ms": 250.0}},
    )
    assert await post(saving, "/slots/0?action=erase") == (200, {"id_slot": 0, "n_erased": 10})


async def test_a_file_that_is_not_right_is_refused(saving: LiveServer, directory: Path) -> None:
    (directory / "wrong.bin").write_text("nonsense")
    status, told = await post(saving, "/slots/0?action=restore", {"filename": "wrong.bin"})
    assert (status, told["error"]["param"]) == (400, "filename")
    assert "damaged" in told["error"]["message"]


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a:b", ".hidden", "x" * 201, "\u00fc" * 101, "a\nb", "a\0b"],
)
async def test_names_that_lead_elsewhere_are_refused(saving: LiveServer, directory: Path, name: str) -> None:
    before = sorted(directory.parent.rglob("*"))
    for action in ("save", "restore"):
        status, told = await post(saving, f"/slots/0?action={action}", {"filename": name})
        assert (status, told["error"]["param"]) == (400, "filename")
    assert sorted(directory.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/slots/2?action=save", {"filename": "a"}, "id_slot"),
        ("/slots/-1?action=save", {"filename": "a"}, "id_slot"),
        ("/slots/x?action=save", {"filename": "a"}, "id_slot"),
        ("/slots/99999999999999999999?action=save", {"filename": "a"}, "id_slot"),
        ("/slots/0", {"filename": "a"}, "action"),
        ("/slots/0?action=delete", {"filename": "a"}, "action"),
        ("/slots/0?action=save", {}, "filename"),
        ("/slots/0?action=save", {"filename": 3}, "filename"),
        ("/slots/0?action=save", [], None),
    ],
)
async def test_what_makes_no_sense_is_refused(saving: LiveServer, path: str, body: Any, param: str | None) -> None:
    status, told = await post(saving, path, body)
    assert status == 400, told
    assert param is None or param in str(told["error"]), told


async def test_without_a_directory_there_is_none_of_this(server: LiveServer) -> None:
    status, told = await post(server, "/slots/0?action=save", {"filename": "a"})
    assert (status, told["error"]["type"]) == (501, "not_supported_error")
    assert "--slot-save-path" in told["error"]["message"]


async def test_the_demo_goes_on_after_a_restart(tmp_path: Path) -> None:
    """As llama-server's own test does it; the second server has never seen the prompt."""
    prompt = {"prompt": "What is the capital of France?", "n_predict": 8, "temperature": 0, "id_slot": 1}
    arguments = (DEMO, "--ctx", "256", "--parallel", "2", "--slot-save-path", tmp_path)
    told = []
    for action in ("save", "restore"):
        with serving(*arguments) as (_, url):
            async with aiohttp.ClientSession() as session:
                if action == "save":
                    async with session.post(f"{url}/completion", json=prompt) as response:
                        first = await response.json()
                async with session.post(f"{url}/slots/1?action={action}", json={"filename": "one.bin"}) as response:
                    assert response.status == 200, await response.text()
                    told.append(await response.json())
                async with session.post(f"{url}/completion", json=prompt) as response:
                    second = await response.json()
    assert first["timings"]["prompt_n"] > 5
    assert told[0]["n_saved"] == told[1]["n_restored"] == first["timings"]["prompt_n"] + 7
    assert told[0]["n_written"] == told[1]["n_read"]
    assert second["timings"]["prompt_n"] == 1
    assert second["content"] == first["content"]
