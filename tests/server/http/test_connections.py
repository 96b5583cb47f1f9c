"""What reaches the server before any handler: broken HTTP, hostile headers, and what of it is written to the log."""

import asyncio
import gzip
import json
import logging
import zlib
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from slimoe.offload.printable import printable
from slimoe.server.http.access import AccessRules
from slimoe.server.log_format import JOURNAL, JournalHandler
from tests.models.live_server import DEADLINE, LiveOptions, LiveServer, live_server

pytestmark = pytest.mark.asyncio(loop_scope="module")
HOST = b"Host: localhost\r\n"
BODY = b'{"prompt": "hello", "max_tokens": 1}'


async def exchange(server: LiveServer, *parts: bytes) -> tuple[int, dict[str, str], bytes]:
    """Sends `parts` with a pause between, and reads the first answer on the connection."""
    _, _, address = server.url.partition("//")
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    async with asyncio.timeout(DEADLINE):
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    writer.close()
    return int(status.split()[1]), headers, body


def get(*headers: bytes, path: bytes = b"/health") -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"".join(line + b"\r\n" for line in headers) + b"\r\n"


def post(body: bytes, *headers: bytes, path: bytes = b"/v1/completions") -> bytes:
    lines = (*headers, b"Content-Length: %d" % len(body))
    return b"POST " + path + b" HTTP/1.1\r\n" + HOST + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


def chunked(*headers: bytes) -> bytes:
    lines = (*headers, b"Transfer-Encoding: chunked")
    return b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


NOT_HTTP: dict[str, tuple[bytes, ...]] = {
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",),
    "noise": (b"\x00\xff\x1b[31m\r\n\r\n",),
    "no target": (b"GET\r\n\r\n",),
    "unknown method": (b"FETCH /health HTTP/1.1\r\n" + HOST + b"\r\n",),
    "unknown version": (b"GET /health HTTP/9.9\r\n" + HOST + b"\r\n",),
    "long target": (get(path=b"/" + b"a" * 9000),),
    "long header": (get(b"X: " + b"a" * 9000),),
    "many headers": (get(*(b"X-%d: a" % n for n in range(500))),),
    "no colon": (get(b"hello"),),
    "control character": (get(b"X: a\x01b"),),
    "bad address": (b"GET http://[::1 HTTP/1.1\r\n" + HOST + b"\r\n",),
    "bytes in the path": (get(path=b"/\xff"),),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n",),
    "no host in old HTTP": (b"GET /health HTTP/1.0\r\n\r\n",),
    "two hosts": (get(HOST.rstrip()),),
    "negative length": (b"POST /tokenize HTTP/1.1\r\n" + HOST + b"Content-Length: -5\r\n\r\n",),
    "two lengths": (post(BODY, b"Content-Length: 5"),),
    "length and chunks": (post(BODY, b"Transfer-Encoding: chunked"),),
    "bad chunk": (chunked() + b"zz\r\nhi\r\n0\r\n\r\n",),
    "no gzip": (post(BODY, b"Content-Encoding: gzip"),),
    "no gzip later": (chunked(b"Content-Encoding: gzip"), b"24\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "no gzip for nobody": (post(BODY, b"Content-Encoding: gzip", path=b"/nowhere"),),
    "no deflate": (post(BODY, b"Content-Encoding: deflate"),),
    "no brotli": (post(BODY, b"Content-Encoding: br"),),
    "no zstandard": (post(BODY, b"Content-Encoding: zstd"),),
    "half a gzip": (post(gzip.compress(BODY)[:-12], b"Content-Encoding: gzip"),),
    "unknown encoding": (post(BODY, b"Content-Encoding: rot13"),),
    "bad origin": (get(b"Origin: http://[::1"),),
    "two origins": (get(b"Origin: http://localhost", b"Origin: http://localhost"),),
    "another charset": (post(BODY.decode().encode("utf-16"), b"Content-Type: application/json; charset=utf-16"),),
}


@pytest.mark.parametrize("name", NOT_HTTP)
async def test_what_is_no_http_is_told_in_json(server: LiveServer, caplog: Any, name: str) -> None:
    status, headers, body = await exchange(server, *NOT_HTTP[name])
    expected = 404 if name == "no gzip for nobody" else 400
    assert (status, headers["content-type"]) == (expected, "application/json")
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    assert len(error["message"]) < 300
    await asyncio.sleep(0.01)
    assert caplog.records == []
    assert (await exchange(server, get()))[0] == 200


@pytest.mark.parametrize(
    "sent",
    [
        post(BODY, b"Content-Type: application/json; charset=nonsense"),
        post(BODY, b"Content-Type: ;;;=\xff"),
        post(gzip.compress(BODY), b"Content-Encoding: gzip"),
        post(zlib.compress(BODY), b"Content-Encoding: deflate"),
        get(b"Cookie: \xff=;;=;a", b"If-Modified-Since: yesterday", b"Range: bytes=x", b"Accept-Encoding: \xff"),
        get(b"Authorization: \xff\xe9", b"X-Api-Key: \xf0"),
        get(path=b"/health?%ff=%zz&&&=%00"),
    ],
)
async def test_odd_headers_do_no_harm(server: LiveServer, caplog: Any, sent: bytes) -> None:
    assert (await exchange(server, sent))[0] == 200
    assert caplog.records == []


async def test_an_expectation_that_is_not_met(server: LiveServer) -> None:
    status, headers, _ = await exchange(server, post(BODY, b"Expect: miracle"))
    assert (status, headers["content-type"]) == (417, "application/json")


def written(record: logging.LogRecord, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on standard error that a record of the logging library becomes."""
    JOURNAL.flush()
    capsys.readouterr()
    JournalHandler().emit(record)
    return capsys.readouterr().err.removesuffix("\n").split("\n")


class BrokenRules(AccessRules):
    def check(self, request: web.Request) -> None:
        raise ZeroDivisionError("division by zero")


@pytest.mark.parametrize("path", ["/%0aslimoe: all is well", "/v1/models/%0d%0a%1b[2J", "/x\u202etxt", "/%c2%85"])
async def test_a_path_forges_no_line_in_the_log(
    model: Path, caplog: Any, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    """A handler that fails is the one whose path is logged."""
    options = LiveOptions(rules=BrokenRules(), waits=False)
    async with (
        live_server(model, options) as server,
        aiohttp.ClientSession() as session,
        session.get(server.url + path) as response,
    ):
        assert (response.status, (await response.json())["error"]["code"]) == (500, "internal")
    (record,) = caplog.records
    head, *rest = written(record, capsys)
    assert head.startswith("slimoe: GET /")
    assert rest[-1] == "  ZeroDivisionError: division by zero"
    assert all(line.startswith("  ") and line.isprintable() for line in rest)
    assert head.isprintable()


async def test_what_an_error_says_is_indented_and_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("a prompt\nslimoe: all is well\x1b[2J\r")
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "%s failed\n", ("a\x07b",), (type(error), error, None))
    lines = written(record, capsys)
    assert lines[0] == "slimoe: a\\x07b failed\\n"
    assert lines[-2:] == ["  ValueError: a prompt", "  slimoe: all is well\\x1b[2J\\r"]


async def test_what_is_printable() -> None:
    assert printable("naïve 日本 \\ 😀") == "naïve 日本 \\ 😀"
    assert printable("a\r\n\tb\x1b\x9b\u2028\u202e\ud800\x00") == "a\\r\\n\\tb\\x1b\\x9b\\u2028\\u202e\\ud800\\x00"
