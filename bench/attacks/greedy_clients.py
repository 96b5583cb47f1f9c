"""Clients that take more than is fair of a server's memory, connections and patience."""

import asyncio
import contextlib
import gzip
import json
import socket
import struct
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field

from bench.attacks.bodies import head, plain
from bench.attacks.http_reply import BadReplyError, split_replies

_MIB = 1 << 20
_REPLY_SECONDS = 120.0
_PAUSE = 0.2
_ESTABLISHED = 1  # the kernel's TCP_ESTABLISHED
Place = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Greed:
    """The sizes of prompts and texts in bytes, and how many of each kind of client there are."""

    prompt_bytes: int = 60 * _MIB
    text_bytes: int = 20 * _MIB
    n_halves: int = 40
    n_biases: int = 3_000_000
    n_prompts: int = 60
    n_idle: int = 50


@dataclass(slots=True)
class Answers:
    """The statuses that each kind of client was answered with; 0 for a connection that was closed."""

    statuses: dict[str, Counter[int]] = field(default_factory=dict)

    def note(self, name: str, status: int) -> None:
        """Counts one answer to the kind of client named."""
        self.statuses.setdefault(name, Counter())[status] += 1


def greedy_clients(place: Place, greed: Greed, answers: Answers) -> Iterator[Coroutine[None, None, None]]:
    """Yields all clients, to run at once; each begins anew until it is cancelled."""
    words = "the river " * (greed.prompt_bytes // 10)
    biases = "{" + ",".join(f'"{n}":1' for n in range(greed.n_biases)) + "}"
    chat = json.dumps({"messages": [{"role": "user", "content": words}], "max_tokens": 1}).encode()
    bomb = gzip.compress(b'{"content": "' + b" " * (20 * greed.text_bytes) + b'"}', 1)
    large = {
        "a large prompt": plain("/v1/completions", json.dumps({"prompt": words, "max_tokens": 1}).encode()),
        "a large chat": plain("/v1/chat/completions", chat),
        "a large text": plain("/tokenize", json.dumps({"content": "é" * (greed.text_bytes // 2)}).encode()),
        "many biases": plain("/v1/completions", b'{"prompt":"a","max_tokens":1,"logit_bias":' + biases.encode() + b"}"),
        "many ids": plain("/detokenize", json.dumps({"tokens": [5] * (greed.text_bytes // 4)}).encode()),
        "a gzip bomb": plain("/tokenize", bomb, "Content-Encoding: gzip"),
    }
    for name, request in large.items():
        yield _again(answers, name, place, request)
    prompt = plain("/v1/completions", json.dumps({"prompt": "a b " * 50_000, "max_tokens": 1}).encode())
    for _ in range(greed.n_prompts):
        yield _again(answers, "prompts of 200 kB", place, prompt)
    half = b'{"content": "' + b"a " * (greed.text_bytes // 2)
    begin = head("/tokenize", "Content-Type: application/json", f"Content-Length: {len(half) + 1000}")
    for _ in range(greed.n_halves):
        yield _held(answers, "half bodies", place, begin + half)
    for _ in range(greed.n_idle):
        yield _held(answers, "half headers", place, b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ")
    stream = json.dumps({"prompt": "a", "max_tokens": 200, "stream": True, "ignore_eos": True, "logprobs": 20}).encode()
    for _ in range(4):
        yield _held(answers, "streams that nobody reads", place, plain("/v1/completions", stream))


async def _again(answers: Answers, name: str, place: Place, request: bytes) -> None:
    while True:
        answers.note(name, await status_of(place, request))
        await asyncio.sleep(_PAUSE)


async def status_of(place: Place, request: bytes) -> int:
    """The status of the answer to a request, 0 where there is none."""
    try:
        async with asyncio.timeout(_REPLY_SECONDS):
            reader, writer = await asyncio.open_connection(*place)
            try:
                with contextlib.suppress(ConnectionError):  # refused already; the answer is there to read
                    writer.write(request)
                    await writer.drain()
                data = await reader.read()
            finally:
                writer.transport.abort()
    except (OSError, TimeoutError):
        return 0
    try:
        replies = split_replies(data)
    except BadReplyError:
        return 0
    return replies[-1].status if replies else 0


async def _held(answers: Answers, name: str, place: Place, data: bytes) -> None:
    """Again and again sends and then neither reads nor goes, until the server closes the connection."""
    loop = asyncio.get_running_loop()
    while True:
        with contextlib.suppress(OSError), socket.socket() as connection:
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await loop.sock_connect(connection, place)
            await loop.sock_sendall(connection, data)
            # Nothing is read, so that only the kernel knows whether the server has reset or ended the connection.
            while connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _ESTABLISHED:
                await asyncio.sleep(_PAUSE)
        answers.note(name, 0)
        await asyncio.sleep(_PAUSE)
