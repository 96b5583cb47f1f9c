"""The page's files over HTTP: what they are sent with, what is not there, and what stays closed beside them."""

import re
from pathlib import Path

import aiohttp
import pytest
from yarl import URL

from slimoe.server.commands.serve import command
from slimoe.server.http.access import AccessRules
from slimoe.server.page.page import CONTENT_TYPES, FILES
from tests.models.live_server import LiveOptions, LiveServer, live_server

pytestmark = pytest.mark.asyncio(loop_scope="module")
NAMES = sorted(path.name for path in FILES.iterdir())
OTHER_PATHS = ["/page/nothing.js", "/page/", "/page", "/page/index.html/", "/index.html", "/page.py"]
OTHER_PATHS += ["/page/../app.py", "/page/..%2Fpage.py", "/page/%2e%2e/page.py", "/page/..%5Cpage.py"]
OTHER_PATHS += ["/page//etc/passwd", "/page/%00"]
KEY = "a-secret"


async def test_the_page_comes_to_every_client_under_a_strict_policy(server: LiveServer) -> None:
    async with aiohttp.ClientSession() as http, http.get(f"{server.url}/", headers={"Accept": "*/*"}) as response:
        assert response.status == 200
        assert response.content_type == "text/html"
        policy = dict(one.split(" ", 1) for one in response.headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert {policy[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "no-referrer"
        assert "<title>slimoe</title>" in await response.text()


async def test_head_has_the_headers_alone(server: LiveServer) -> None:
    async with aiohttp.ClientSession() as http, http.head(f"{server.url}/") as response:
        assert response.status == 200
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert await response.read() == b""


@pytest.mark.parametrize("name", NAMES)
async def test_files_are_sent_as_they_are_with_their_type(server: LiveServer, name: str) -> None:
    async with aiohttp.ClientSession() as http, http.get(f"{server.url}/page/{name}") as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == CONTENT_TYPES[Path(name).suffix]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert await response.read() == (FILES / name).read_bytes()


@pytest.mark.parametrize(
    "path",
    OTHER_PATHS,
)
async def test_what_the_page_does_not_have_is_not_found(server: LiveServer, path: str) -> None:
    async with aiohttp.ClientSession() as http, http.get(URL(server.url + path, encoded=True)) as response:
        assert response.status == 404
        assert (await response.json())["error"]["message"]


async def test_with_a_key_the_page_is_open_and_the_api_is_not(model: Path) -> None:
    rules = AccessRules(key=KEY)
    async with live_server(model, LiveOptions(rules=rules)) as server, aiohttp.ClientSession(server.url) as http:
        for path in ("/", "/page/app.js"):
            async with http.get(path) as response:
                assert response.status == 200
                assert KEY not in await response.text()
        for path in ("/v1/models", "/props", "/metrics", "/page"):
            async with http.get(path) as response:
                assert response.status == 401, path
        for name in ("key", "api_key"):
            async with http.get("/v1/models", params={name: KEY}) as response:
                assert response.status in (400, 401)
        async with http.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"}) as response:
            assert response.status == 200


async def test_without_the_page_there_is_nothing(model: Path) -> None:
    async with live_server(model, LiveOptions(has_page=False)) as server, aiohttp.ClientSession(server.url) as http:
        for path in ("/", "/page/app.js"):
            async with http.get(path) as response:
                assert response.status == 404
    assert "--no-page" in {flag for one in command.params for flag in one.opts}


async def test_pages_of_others_get_no_answer(server: LiveServer) -> None:
    foreign = {"Origin": "https://elsewhere.example"}
    async with aiohttp.ClientSession(server.url, headers=foreign) as http:
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/")):
            async with http.request(method, path) as response:
                assert response.status == 403
                assert "Access-Control-Allow-Origin" not in response.headers


async def test_nothing_in_the_files_is_inline_or_comes_from_elsewhere() -> None:
    """The policy would stop it; a reader of the files should not have to try."""
    for name in NAMES:
        text = (FILES / name).read_text(encoding="utf-8")
        assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|new Function)\b", text), (
            name
        )
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}", text))
        assert addresses <= {"http://www.w3.org"}, name
        if name.endswith(".html"):
            assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", text)
            assert all("src=" in script for script in re.findall(r"<script[^>]*>", text))
        assert len(text.splitlines()) <= 400, name
