"""Tokenizer files that are damaged, or made to harm: a right result, or one line that says what is wrong."""

import json
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from slimoe.converter.source.gguf_source import gguf_source
from slimoe.converter.source.tokenizer.check import HARD_TEXTS
from slimoe.converter.source.tokenizer.vocabulary import tokenizer_metadata
from slimoe.offload.errors import ModelFileError, SlimoeError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.text.tokenizer import Tokenizer
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf
from tests.models.tokenizer_files import as_json, byte_level, llama_2, read_files, write_files

DEEP = "[" * 100_000
HUGE = 1 << 40


def refused(path: Path, message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        tokenizer_metadata(path, 600)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def outcome(path: Path) -> Tokenizer | None:
    """The tokenizer, or None where it was refused as it should be."""
    message = ""
    try:
        return read_files(path)
    except SlimoeError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 1500
    return None


def edited(file: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """The document with a value at `place`, such as model.vocab."""
    name, _, rest = place.partition(".")
    return file | {name: edited(file[name], rest, value) if rest else value}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("model", {"type": "BPE", "vocab": {"a": HUGE}, "merges": []}, "model only 600 embeddings"),
        ("model.vocab", ["x"], "model.vocab: expected object, got array"),
        ("model.vocab", {"a": -1}, "the token 'a' has the id -1"),
        ("model.vocab", {"a": HUGE}, "is not of two tokens"),
        ("model.vocab", {"a": 1.5}, r"model.vocab\[...\]: expected int, got float"),
        ("model.vocab", {"a": 0, "b": 0}, "one id to several tokens"),
        ("model.merges", {"a": "b"}, "model.merges: expected array, got object"),
        ("model.merges", ["a"], "merge 'a' is not of two tokens"),
        ("model.merges", ["a b c"], "merge 'a b c' is not of two tokens"),
        ("model.merges", [["a", "b", "c"]], "model.merges"),
        ("model.merges", [["no", "such"]], "is not of two tokens into a third"),
        ("model.merges", [1], "model.merges"),
        ("model.type", 1, "model.type: expected str, got int"),
        ("model", None, "model: expected object, got null"),
        ("added_tokens", [{"id": HUGE, "content": "<x>"}], "model only 600 embeddings"),
        ("added_tokens", [{"id": -1, "content": "<x>"}], "'<x>' cannot have id -1"),
        ("added_tokens", [{"id": 599, "content": "<x>"}, {"id": 599, "content": "<y>"}], "'<y>' cannot have id 599"),
        ("added_tokens", [{"id": 599, "content": "!"}], "'!' cannot have id 599"),
        ("added_tokens", "x", "added_tokens: expected array, got str"),
        ("normalizer", "NFC", "normalizer: expected object . null, got str"),
        ("pre_tokenizer", {"pretokenizers": []}, "pre_tokenizer: object missing required field type"),
        ("post_processor", {"type": "TemplateProcessing", "single": [1]}, "post_processor.single"),
    ],
)
def test_tokenizer_json(tmp_path: Path, place: str, value: Any, message: str) -> None:
    refused(write_files(tmp_path / "c", {"tokenizer.json": edited(as_json(byte_level()), place, value)}), message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": "x"},
            "added_tokens_decoder: expected object . null, got str",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-5": {"content": "a"}}}, "'a' has the id -5"),
        ("tokenizer_config.json", {"added_tokens_decoder": {str(HUGE): {"content": "a"}}}, "only 600 embeddings"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": 5}}, "expected object, got int"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"bos_token": {}}, "bos_token"),
        ("tokenizer_config.json", {"legacy": "no"}, "legacy: expected bool . null, got str"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template"),
        ("tokenizer_config.json", {"split_special_tokens": True}, "split_special_tokens"),
        ("tokenizer_config.json", DEEP, "expected object, got array"),
        ("tokenizer_config.json", '{"a":' * 100_000, "nested too deeply"),
        ("tokenizer_config.json", b"\xff\xfe", "not readable as JSON"),
        ("tokenizer_config.json", [], "expected object, got array"),
        ("special_tokens_map.json", {"eos_token": 3}, "eos_token"),
        ("added_tokens.json", {"a": -7}, "'a' has the id -7"),
        ("added_tokens.json", {"a": HUGE}, "only 600 embeddings"),
        ("added_tokens.json", {"a": []}, "expected int, got array"),
        ("added_tokens.json", '{"a": 1e999}', "added_tokens.json"),
        ("added_tokens.json", DEEP, "expected object, got array"),
        ("generation_config.json", {"eos_token_id": {}}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": ["2"]}, "eos_token_id"),
        ("chat_template.json", {"chat_template": [1]}, "chat_template"),
        ("chat_template.jinja", b"\xff\xff", "not readable as text"),
        ("tokenizer.json", DEEP, "expected object, got array"),
        ("tokenizer.json", "{}", "missing required field model"),
    ],
)
def test_files_beside_it(tmp_path: Path, sentencepiece_path: Path, name: str, content: Any, message: str) -> None:
    files = {"tokenizer.model": sentencepiece_path.read_bytes(), name: content}
    refused(write_files(tmp_path / "c", files), message)


def test_holes_are_unused_tokens(tmp_path: Path) -> None:
    file = as_json(byte_level())
    added = {token["content"]: token["id"] for token in file["added_tokens"]}
    vocabulary = {text: token + 40 for text, token in (file["model"]["vocab"] | added).items()}
    tokens = [token | {"id": token["id"] + 40} for token in file["added_tokens"]]
    holed = edited(file, "model.vocab", vocabulary) | {"added_tokens": tokens}
    tokenizer = read_files(write_files(tmp_path / "c", {"tokenizer.json": holed}))
    assert tokenizer.encode("the") == [token + 40 for token in byte_level().encode("the").ids]
    assert tokenizer.token_text(7) == "[PAD7]"
    tokenizer.close()


def test_added_tokens_keep_off_others_ids(tmp_path: Path) -> None:
    files = {"tokenizer.json": as_json(byte_level()), "added_tokens.json": {"<extra>": 7}}
    refused(write_files(tmp_path / "c", files), "'<extra>' has the id 7, which is '.*' in tokenizer.json")


def piece(model: bytes, text: str) -> slice:
    """Where a piece's message lies in a sentencepiece model."""
    needle = b"\x0a" + bytes([len(text.encode())]) + text.encode()
    at = model.index(needle)
    return slice(at, at + model[at - 1])


@pytest.mark.parametrize(
    ("text", "score", "kind", "message"),
    [
        ("▁the", float("nan"), 1, "has the score nan"),
        ("▁the", float("inf"), 1, "has the score inf"),
        ("▁the", 0.0, 6, "has the type 6"),
        ("▁the", 0.0, 9, "has the type 9"),
        ("▁the", 0.0, 5, "unused pieces"),
        ("<0x41>", 0.0, 1, "has the type 1"),
    ],
)
def test_pieces_that_cannot_be(
    tmp_path: Path, sentencepiece_path: Path, text: str, score: float, kind: int, message: str
) -> None:
    model = bytearray(sentencepiece_path.read_bytes())
    place = piece(bytes(model), text)
    name = b"\x0a" + bytes([len(text.encode())]) + text.encode()
    message_bytes = name + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
    model[place.start - 1 : place.stop] = bytes([len(message_bytes)]) + message_bytes
    refused(write_files(tmp_path / "c", {"tokenizer.model": bytes(model)}), message)


def test_a_piece_twice(tmp_path: Path, sentencepiece_path: Path) -> None:
    model = sentencepiece_path.read_bytes()
    place = piece(model, "▁the")
    again = model[place.start - 2 : place.stop]
    refused(write_files(tmp_path / "c", {"tokenizer.model": again + model}), "'▁the', is empty or there twice")


def test_flipped_bytes(tmp_path: Path, sentencepiece_path: Path) -> None:
    """Every mutant is refused in a line, or is read as sentencepiece reads it."""
    sound = sentencepiece_path.read_bytes()
    chance = random.Random(5)
    path = write_files(tmp_path / "c", {})
    n_read = 0
    for _ in range(150):
        model = bytearray(sound)
        model[chance.randrange(len(model))] ^= 1 << chance.randrange(8)
        (path / "tokenizer.model").write_bytes(model)
        tokenizer = outcome(path)
        if tokenizer is None:
            continue
        n_read += 1
        processor = sentencepiece.SentencePieceProcessor(model_proto=bytes(model))
        for text in HARD_TEXTS:
            assert tokenizer.encode(text) == processor.encode(text)
        tokenizer.close()
    assert n_read


def test_mutants_of_json(tmp_path: Path, sentencepiece_path: Path) -> None:
    """Values of other types, anywhere: refused in a line, or read."""
    chance = random.Random(6)
    path = write_files(tmp_path / "c", {})
    values: tuple[Any, ...] = (None, -1, HUGE, 1.5, "x", [], {}, True, [[]], {"a": {}})
    for file in (as_json(llama_2(sentencepiece_path, legacy=True)), as_json(byte_level())):
        for _ in range(150):
            mutant = json.loads(json.dumps(file))
            inner = mutant
            while True:
                key = chance.choice(list(inner)) if isinstance(inner, dict) else chance.randrange(len(inner))
                if isinstance(inner[key], dict | list) and inner[key] and chance.random() < 0.8:
                    inner = inner[key]
                    continue
                inner[key] = chance.choice(values)
                break
            (path / "tokenizer.json").write_text(json.dumps(mutant))
            tokenizer = outcome(path)
            if tokenizer is not None:
                tokenizer.close()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.eos_token_id", "two", "not all numbers of tokens"),
        ("tokenizer.ggml.eot_token_id", 2.5, "not all numbers of tokens"),
        ("slimoe.tokenizer.end_token_ids", ["x"], "not all numbers of tokens"),
        ("slimoe.tokenizer.end_token_ids", 3, "not all numbers of tokens"),
        ("slimoe.tokenizer.prefix_before_space", 1, "true or false belongs there"),
        ("tokenizer.ggml.add_space_prefix", "no", "true or false belongs there"),
        ("tokenizer.ggml.token_type", [1.5, 2.5], "does not have one entry for each"),
        ("tokenizer.ggml.token_type", "x", "does not have one entry for each"),
        ("tokenizer.ggml.scores", ["a"], "does not have one entry for each"),
        ("tokenizer.ggml.scores", [float("nan")] * 512, "does not have one entry for each"),
        ("tokenizer.ggml.tokens", 5, "no token list"),
        ("tokenizer.ggml.tokens", [1, 2], "no token list"),
        ("tokenizer.ggml.model", 7, "of kind 7"),
    ],
)
def test_keys_of_a_gguf_source(
    tmp_path: Path, sentencepiece_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, message: str
) -> None:
    """Converting refuses what opening refuses."""
    path = write_tiny_gguf(tmp_path / "m.gguf", sentencepiece_path, shape=TinyShape())
    file = gguf_source_file(path, key, value)
    monkeypatch.setattr("slimoe.converter.source.gguf_source.read_gguf", lambda _path: file)
    with pytest.raises(ModelFileError, match=message):
        gguf_source(path)


def gguf_source_file(path: Path, key: str, value: Any) -> Any:
    """The file as read, with another value of a key."""
    file = read_gguf(path)
    numbers = isinstance(value, list) and not isinstance(value[0], str)
    return replace(file, metadata=file.metadata | {key: np.array(value) if numbers else value})
