"""Hostile requests to an OpenAI-compatible server: a case's number and a seed give always the same bytes.

The content is a sound body with something wrong in it, or no body at all; it is carried as a client would, or in one
of the ways in which clients, proxies and attackers break HTTP.
"""

import functools
import gzip
import json
import random
import zlib
from dataclasses import dataclass
from typing import Any

from bench.attacks.hostile_values import TEXTS, UNSPEAKABLE, changed, dumps, nested, paths, value, without

PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/apply-template")
_FIELDS: dict[str, tuple[Any, ...]] = {
    **{name: (0, 0.5, 1, 2, -1, 1e9, "1", None, [], 2**63, True) for name in ("temperature", "top_p", "min_p", "seed")},
    **{name: (0, 1, 16, 17, 2**31, -1, 1.5, "2", None, {}) for name in ("n", "top_k", "logprobs", "top_logprobs")},
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), (0, 1, 3, -1, 2**31, 2**70, 1.0, "9", None)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), (-2, 2, 2.1, 0, 1e300, "a", None)),
    **dict.fromkeys(("repeat_penalty", "repetition_penalty", "repeat_last_n"), (1, 0, -1, 1e-300, 10000000.0, None)),
    "stream": (True, False, "true", 1, None),
    "stream_options": ({"include_usage": True}, {"include_usage": 1}, [], None, {"continuous_usage_stats": True}),
    "stop": ("", "a", ["a"] * 64, ["a"] * 65, [""], [1], {"a": 1}, ["\ud800"], "x" * 9999),
    "logit_bias": ({}, {"5": 1}, {"5": -100}, {"x": 1}, {"999999999": 1}, {"-1": 0}, {"5": True}, {"²": 1}, [5]),
    "response_format": ({"type": "text"}, {"type": "json_object"}, {"type": "x"}, {}, "text", {"type": 1}),
    "tools": ([], [{"type": "function", "function": {"name": "f"}}], [1], {}, "x"),
    "tool_choice": ("none", "auto", {"type": "function"}, 1),
    "grammar": ('root ::= "a"', "", 1),
    "json_schema": ({"type": "object"}, {}, "x"),
    "guided_json": ({}, None),
    "chat_template_kwargs": ({}, {"messages": []}, {"bos_token": 1}, {"a": 2**70}, [], {"a": "\ud800"}),
    "chat_template": ("{{ x }}",),
    "prompt": ("", "a", [], [1, 2], [[1], [2]], ["a", 1], [2**40], [-1], [True], {}, [[[]]], ["a"] * 30, None),
    "echo": (True, False, 1),
    "best_of": (1, 2, -1),
    "suffix": ("", "x"),
    "model": ("demo", "", 5, None, "x" * 5000),
    "content": ("x", "", "\ud800", 7, None, ["x"]),
    "tokens": ([], [1, 2], [-1], [2**31], [2**80], ["1"], 5, [1.5], [True]),
    "add_special": (True, "x"),
    "with_pieces": (True, None),
    "keep_alive": ("5m",),
    "user": ("u", 1),
    "n_predict": (5, -1),
    "cache_prompt": (True,),
    "ignore_eos": (True, 1),
}


@dataclass(frozen=True, slots=True)
class HostileRequest:
    """The bytes of a request, in pieces to send one after the other with `pause` seconds between.

    `n_replies` complete requests are in it. A request that is not `is_whole` need not be answered, and one that is
    `is_abandoned` has its connection closed when the answer begins.
    """

    pieces: tuple[bytes, ...]
    pause: float = 0.0
    n_replies: int = 1
    is_whole: bool = True
    is_abandoned: bool = False
    method: str = "POST"

    @property
    def bytes(self) -> bytes:
        """All pieces together."""
        return b"".join(self.pieces)


def hostile_request(seed: int, case: int) -> HostileRequest:
    """The request of a seed and a case's number, always the same."""
    rng = random.Random(f"{seed}/{case}")
    path = rng.choice(PATHS)
    content = _content(rng, path)
    carrier = rng.choices(_CARRIERS, _WEIGHTS)[0]
    request: HostileRequest = carrier(rng, path, content)
    return request


def sound_body(rng: random.Random, path: str) -> dict[str, Any]:
    """A body that a client might send to a path, with nothing wrong in it."""
    if path == "/tokenize":
        return {"content": _text(rng), "add_special": True, "with_pieces": rng.random() < 0.5}
    if path == "/detokenize":
        return {"tokens": [rng.randrange(300) for _ in range(rng.randrange(12))]}
    body: dict[str, Any] = {"model": "demo", "max_tokens": rng.randrange(6), "temperature": rng.choice((0, 0.7, 1))}
    body["stream"] = rng.random() < 0.4
    if path == "/v1/completions":
        return {**body, "prompt": rng.choice((_text(rng), [5, 6, 7], ["a", "b"]))}
    turns = [{"role": ("user", "assistant")[n % 2], "content": _text(rng)} for n in range(rng.choice((1, 1, 3)))]
    return {**body, "messages": turns}


def _text(rng: random.Random) -> str:
    return rng.choice(("Define the noun river.", "Hello", rng.choice(TEXTS), " ".join(rng.choices(TEXTS, k=4))))


def _content(rng: random.Random, path: str) -> bytes:
    """A body: mostly sound but for one to three things."""
    body: Any = sound_body(rng, path)
    kind = rng.randrange(20)
    if kind == 0:
        return rng.choice(
            (b"", b"{", b"null", b"[]", b"0", b'"x"', b"{}", b"\xff\xfe{}", b"<xml/>", b"a=b&c=d", b"\x00")
        )
    if kind == 1:
        return rng.randbytes(rng.choice((1, 10, 1000, 100_000)))
    if kind == 2:
        depth = rng.choice((100, 2000, 100_000))
        return rng.choice((b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth))
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        body = _worse(rng, body)
    data = dumps(body, rng)
    if kind == 3:
        return _raw_change(rng, data)
    if kind == 4:
        return data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7")))
    if kind == 5:
        return data.replace(b"{", b'{"model":1,"model":"x","stream":"y",', 1)
    return data


def _worse(rng: random.Random, body: Any) -> Any:
    places = list(paths(body))
    kind = rng.randrange(10)
    if kind < 4 and isinstance(body, dict):
        name = rng.choice(tuple(_FIELDS))
        return {**body, name: rng.choice(_FIELDS[name])}
    if kind < 7:
        return changed(body, rng.choice(places), value(rng))
    if kind == 7:
        return without(body, rng.choice(places))
    if kind == 8 and isinstance(body, dict):
        return {**body, rng.choice(TEXTS): value(rng)}
    large = rng.choice(("x" * 200_000, "é" * 100_000, ["a"] * 3000, nested(rng, 300), {str(n): n for n in range(3000)}))
    return changed(body, rng.choice(places), large)


def _raw_change(rng: random.Random, data: bytes) -> bytes:
    changed_bytes = bytearray(data)
    for _ in range(rng.choice((1, 1, 5))):
        at = rng.randrange(len(changed_bytes) or 1)
        kind = rng.randrange(5)
        if kind == 0:
            changed_bytes[at : at + 1] = rng.randbytes(1)
        elif kind == 1:
            del changed_bytes[at:]
        elif kind == 2:
            changed_bytes[at:at] = rng.choice(UNSPEAKABLE).encode()
        elif kind == 3:
            changed_bytes[at:at] = rng.choice(
                (b'"', b"\\", b",", b"}", b"]", b"\\u12", b"\\ud83d", b"\xc0\x80", b"\xed\xa0\x80")
            )
        else:
            del changed_bytes[at : at + rng.randrange(1, 20)]
    return bytes(changed_bytes)


def head(path: str, *lines: str, method: str = "POST", version: str = "1.1") -> bytes:
    """A request's first line and headers, the Host among them unless `lines` have one."""
    given = "\r\n".join(lines)
    host = "" if "host:" in given.lower() else "Host: 127.0.0.1\r\n"
    return f"{method} {path} HTTP/{version}\r\n{host}{given}\r\n\r\n".encode("latin-1", "replace")


def plain(path: str, content: bytes, *lines: str) -> bytes:
    """A request as it should be, the connection to be closed after it."""
    own = ("Content-Type: application/json", "Connection: close", f"Content-Length: {len(content)}")
    return head(path, *own, *lines) + content


def _plain(rng: random.Random, path: str, content: bytes) -> HostileRequest:
    return HostileRequest((plain(path, content),))


def _chunked(rng: random.Random, path: str, content: bytes) -> HostileRequest:
    begin = head(path, "Content-Type: application/json", "Connection: close", "Transfer-Encoding: chunked")
    size = rng.choice((1, 7, 1000, 65536)) if len(content) < 5000 else 65536
    pieces = [content[n : n + size] for n in range(0, len(content), size)]
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    fault = rng.randrange(4)
    if fault == 0:
        bad = rng.choice(
            (b"zz\r\n", b"-1\r\n", b"ffffffffffffffffff\r\n", b"5;" + b"x" * 20000 + b"\r\n", b"3\r\nabcdef\r\n")
        )
        return HostileRequest((begin, body + bad + b"0\r\n\r\n"), is_whole=False)
    return HostileRequest((begin, body + b"0\r\n\r\n"))


def _bad_length(rng: random.Random, path: str, content: bytes) -> HostileRequest:
    length = rng.choice(
        ("-1", "abc", "", "+5", "0x10", "1e3", "5, 5", "5\r\nContent-Length: 6", "9" * 30, "18446744073709551617")
    )
    return HostileRequest((head(path, f"Content-Length: {length}", "Connection: close") + content,), is_whole=False)


@functools.cache
def _blanks(n_bytes: int) -> bytes:
    """A member of a gzip stream that unpacks to `n_bytes` blanks."""
    return gzip.compress(b" " * n_bytes, 1, mtime=0)


def _encoded(rng: random.Random, path: str, content: bytes) -> HostileRequest:
    kind = rng.randrange(6)
    if kind == 0:
        return HostileRequest((plain(path, gzip.compress(content, 1, mtime=0), "Content-Encoding: gzip"),))
    if kind == 1:
        return HostileRequest((plain(path, zlib.compress(content, 1), "Content-Encoding: deflate"),))
    if kind == 2:
        bomb = _blanks(rng.choice((1_000_000, 80_000_000))) + gzip.compress(content, 1, mtime=0)
        return HostileRequest((plain(path, bomb, "Content-Encoding: gzip"),))
    name = rng.choice(("gzip", "deflate", "br", "zstd", "identity", "x", "gzip, gzip", "gzip\x00"))
    return HostileRequest((plain(path, content, f"Content-Encoding: {name}"),), is_whole=name != "gzip\x00")


_HEADERS = (
    *(
        "Host: evil.example",
        "Host: [::1].evil.com",
        "Host: localhost:1@evil.com",
        "Host: ",
        "Host: [::1",
        "Host: 127.0.0.1\r\nHost: b",
    ),
    *(
        "Origin: http://[::1",
        "Origin: http://evil.example",
        "Origin: null",
        "Origin: ://",
        "Origin: http://localhost:99999999",
    ),
    *("Expect: 100-continue", "Expect: 200-maybe", "Upgrade: websocket", "Upgrade: h2c", "Connection: upgrade, close"),
    *(
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: identity",
        "X: " + "a" * 9000,
        "X: \x01\x02",
        "X y: z",
        ": z",
    ),
    *(
        "X: a\r\n folded",
        "Content-Type: text/plain; charset=latin-9",
        "Content-Type: multipart/form-data",
        "Content-Type: \xff",
    ),
    *("Authorization: Basic \xff\xfe", "Cookie: " + "a=b;" * 500, "Range: bytes=0-1", "Accept: x/y", "X-Api-Key: \xe9"),
    *("Content-Type: application/json; charset=utf-16", "Accept-Encoding: gzip", "If-Match: *", "Content-Length: 3"),
)


def _bad_header(rng: random.Random, path: str, content: bytes) -> HostileRequest:
    lines = [rng.choice(_HEADERS) for _ in range(rng.choice((1, 1, 2)))]
    if rng.random() < 0.1:
        lines += [f"X-{n}: {n}" for n in range(rng.choice((50, 500, 40_000)))]
    return HostileRequest((plain(path, content, *lines),), is_whole=False)


_METHODS = ("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT", "FOO", "pOsT", "GET\x00", "")
_TARGETS = (
    *("/", "*", "//", "/%00", "/../../etc/passwd", "/v1/models/" + "x" * 7000, "/v1/models/%0a%1b[31m", "/\xff"),
    *("http://evil.example/", "/health?" + "a=1&" * 500, "/v1/models/..%2f", "/metrics", "/props", "/v1/models", "x"),
)


def _bad_line(rng: random.Random, path: str, content: bytes) -> HostileRequest:
    method, target = rng.choice(_METHODS), rng.choice((path, *_TARGETS))
    version = rng.choice(("1.1", "1.0", "0.9", "2.0", "9.9", "x", "1.1.1"))
    is_whole = method in ("GET", "PUT", "DELETE") and target.startswith("/v1/models") and version == "1.1"
    data = head(target, "Connection: close", method=method, version=version)
    return HostileRequest((data,), is_whole=is_whole, method=method)


def _garbage(rng: random.Random, path: str, content: bytes) -> HostileRequest:
    first = rng.choice(
        (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\r\n\r\n\r\n",
            b"\x00" * 50,
        )
    )
    return HostileRequest(
        (rng.choice((first, rng.randbytes(300), b"GET", b"A" * 70_000, b"\n" * 9000)),), is_whole=False
    )


def _half(rng: random.Random, path: str, content: bytes) -> HostileRequest:
    data = plain(path, content)
    return HostileRequest((data[: rng.randrange(len(data))],), is_whole=False)


def _slow(rng: random.Random, path: str, content: bytes) -> HostileRequest:
    data = plain(path, content[:2000])
    size = -(-len(data) // 10)
    return HostileRequest(tuple(data[n : n + size] for n in range(0, len(data), size)), pause=0.03)


def _pipelined(rng: random.Random, path: str, content: bytes) -> HostileRequest:
    n_before = rng.choice((1, 2, 4))
    sound = json.dumps({"content": "a b c"}).encode()
    before = head("/tokenize", "Content-Type: application/json", f"Content-Length: {len(sound)}") + sound
    return HostileRequest((before * n_before + plain(path, content),), n_replies=n_before + 1)


def _abandoned(rng: random.Random, path: str, content: bytes) -> HostileRequest:
    return HostileRequest((plain(path, content),), is_whole=False, is_abandoned=True)


_CARRIERS = (
    _plain,
    _chunked,
    _bad_length,
    _encoded,
    _bad_header,
    _bad_line,
    _garbage,
    _half,
    _slow,
    _pipelined,
    _abandoned,
)
_WEIGHTS = (55, 6, 3, 6, 7, 5, 3, 5, 2, 4, 4)
