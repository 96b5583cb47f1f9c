"""The attacks themselves: the same seed is the same attack, and what they are to find they do find."""

import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest

from bench.attacks.bodies import hostile_request
from bench.attacks.file_attack import evaluated
from bench.attacks.gguf_mutants import pack_header, read_header
from bench.attacks.http_reply import BadReplyError, HttpReply, fault_of, split_replies
from bench.attacks.mutant_reading import Reading
from bench.attacks.mutants import mutant
from bench.models.random_model import write_random_model
from bench.models.shapes import SHAPES

JSON = {"content-type": "application/json"}


def test_a_seed_and_a_number_give_the_same_request() -> None:
    assert [hostile_request(1, n) for n in range(200)] == [hostile_request(1, n) for n in range(200)]
    assert hostile_request(1, 5) != hostile_request(2, 5)
    assert len({hostile_request(1, n).bytes for n in range(200)}) > 190


@pytest.mark.parametrize(
    ("kind", "name", "data"),
    [
        ("config", "config.json", b'{"hidden_size": 5, "a": [1, {"b": null}]}'),
        ("recipe", "recipe.toml", b'target_bpw = 4.0\n[types]\ncandidates = ["Q4_K"]\n'),
        ("tokenizer", "tokenizer.model", bytes(range(256))),
        ("safetensors", "model.safetensors", b"\x02\0\0\0\0\0\0\0{}" + bytes(64)),
        ("imatrix", "imatrix.dat", bytes(range(256))),
    ],
)
def test_mutants_repeat_and_differ(kind: str, name: str, data: bytes) -> None:
    made = [mutant(kind, name, data, random.Random(f"1/{n}")) for n in range(60)]
    assert made == [mutant(kind, name, data, random.Random(f"1/{n}")) for n in range(60)]
    assert sum(one != data for one in made) > 45


def test_a_gguf_header_survives_reading_and_packing(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_random_model(path, SHAPES["smoke"].spec, vocabulary=True)
    data = path.read_bytes()
    header = read_header(data)
    assert pack_header(header) == data[: header.n_bytes]
    reader = gguf.GGUFReader(path)
    assert [tensor.name.decode() for tensor in header.tensors] == [tensor.name for tensor in reader.tensors]
    assert {key.name.decode() for key in header.keys} <= set(reader.fields)


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (500, JSON, b'{"error":{"message":"x","type":"server_error","param":null,"code":"internal"}}'),
        (503, JSON, b'{"error":{"message":"x","type":"server_error","param":null,"code":null}}'),
        (400, {"content-type": "text/plain"}, b"Bad Request"),
        (400, JSON, b'{"error":"x"}'),
        (400, JSON, b'{"error":{"message":"a\\u001b[31m","type":"x","code":null}}'),
        (200, JSON, b'{"x": NaN}'),
        (200, JSON, b'{"x": "\\ud800"}'),
        (200, {"content-type": "text/event-stream"}, b'data: {"choices":[]}\n\n'),
    ],
)
def test_bad_answers_are_found(status: int, headers: dict[str, str], body: bytes) -> None:
    assert fault_of(HttpReply(status, headers, body)) is not None


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (200, JSON, b'{"status":"ok"}'),
        (400, JSON, b'{"error":{"message":"x","type":"invalid_request_error","param":null,"code":null}}'),
        (503, JSON | {"retry-after": "1"}, b'{"error":{"message":"x","type":"unavailable_error","code":null}}'),
        (200, {"content-type": "text/event-stream"}, b'data: {"choices":[]}\n\ndata: [DONE]\n\n'),
        (200, {"content-type": "text/event-stream"}, b'data: {"error":{"message":"x","type":"y","code":null}}\n\n'),
    ],
)
def test_good_answers_are_not_found(status: int, headers: dict[str, str], body: bytes) -> None:
    assert fault_of(HttpReply(status, headers, body)) is None


def test_answers_on_one_connection_are_told_apart() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
    plain = b"HTTP/1.1 404 No\r\nContent-Length: 3\r\n\r\nxyz"
    replies = split_replies(b"HTTP/1.1 100 Continue\r\n\r\n" + chunked + plain)
    assert [(reply.status, reply.body) for reply in replies] == [(200, b"ab"), (404, b"xyz")]
    for broken in (chunked[:-7], plain[:-1], b"Bad Request"):
        with pytest.raises(BadReplyError):
            split_replies(broken)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"status": 3, "text": "slimoe: x is no model.\n"}, None),
        ({"status": 3, "text": "KeyError\n"}, "refused without a line"),
        ({"status": 3, "text": "slimoe: " + "x" * 5000}, "a message of more than"),
        (
            {"status": 99, "fault": 'File "/x/converter/convert.py", line 3, in plan\nKeyError: 1'},
            "converter/convert.py:plan",
        ),
        ({"status": None, "signal": 11}, "signal 11"),
        ({"status": None, "signal": 24}, "10 s of processor"),
        ({"growth": 600 << 20}, "grows by 600 MiB"),
        ({"text": "name \x1b[31m"}, "raw control characters"),
    ],
)
def test_readings_are_evaluated(change: dict[str, Any], expected: str | None) -> None:
    sound: dict[str, Any] = {
        "case": 1,
        "kind": "config",
        "target": "config.json",
        "status": 0,
        "signal": 0,
        "seconds": 0.1,
    }
    sound |= {"growth": 0, "command": "inspect .", "fault": "", "text": ""}
    kinds = [finding.kind for finding in evaluated(Reading(**sound | change))]
    assert json.dumps(kinds).count("config:") == len(kinds) == (expected is not None)
    assert expected is None or expected in kinds[0]
