"""The space before a text, and behind special tokens: as transformers puts it, whatever the files say of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from llama_cpp import Llama
from transformers import LlamaTokenizer

from slimoe.converter.convert import ConvertOptions, convert, plan
from slimoe.converter.source.tokenizer.check import HARD_TEXTS
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.text.tokenizer import Tokenizer
from slimoe.server.chat.chat import Chat
from slimoe.server.chat.prompts import Prompts
from slimoe.server.chat.text_encoder import TokenizerEncoder
from slimoe.server.messages import ChatPrompt, TextPrompt, Turn
from tests.models.tiny_gguf import MIXTRAL_TEMPLATE
from tests.models.tokenizer_files import as_json, llama_2, read_files, transformers_reading, write_files

CHAT = "<s>[INST] hello  world [/INST] tell me</s>[INST]a lazy dog [/INST]"
TEXTS = (*HARD_TEXTS, CHAT, "<s>", "<s> a", "</s>  b", "[INST]<s>[INST]", " <s> ")
SETTINGS: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, parse_special=True)


def lone_model(path: Path, sentencepiece_path: Path, settings: dict[str, Any], model_type: str = "mixtral") -> Path:
    """A directory whose tokenizer is tokenizer.model alone."""
    files = {"config.json": {"model_type": model_type}, "tokenizer.model": sentencepiece_path.read_bytes()}
    return write_files(path, files | {"tokenizer_config.json": SETTINGS | settings})


@pytest.mark.parametrize("settings", [{"legacy": True}, {"legacy": False}, {}, {"legacy": None}])
def test_a_lone_model_is_read_as_transformers_reads_it(
    tmp_path: Path, sentencepiece_path: Path, settings: dict[str, Any]
) -> None:
    tokenizer = read_files(lone_model(tmp_path / "c", sentencepiece_path, settings))
    reference = transformers_reading(sentencepiece_path, legacy=settings.get("legacy") is not False)
    for text in TEXTS:
        assert ids(tokenizer, text) == reference.encode(text, add_special_tokens=False).ids
    bracket = tokenizer.token_text(ids(tokenizer, "<s>[INST]")[1])
    assert bracket.startswith("[" if settings.get("legacy") is False else "▁[")
    tokenizer.close()


@pytest.mark.parametrize("settings", [{"legacy": True}, {"legacy": False}, {}, {"add_prefix_space": False}])
@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_llamas_own_class_has_its_own_rule(
    tmp_path: Path, sentencepiece_path: Path, settings: dict[str, Any], file: str
) -> None:
    """Whatever tokenizer.json says of spaces."""
    path = lone_model(tmp_path / "c", sentencepiece_path, settings | {"tokenizer_class": "LlamaTokenizer"}, "llama")
    json_file = llama_2(sentencepiece_path, legacy=True)
    if file == "tokenizer.json":
        (path / "tokenizer.model").unlink()
        (path / file).write_text(json_file.to_str())
    tokenizer = read_files(path)
    model = as_json(json_file)["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    reference: Any = LlamaTokenizer(vocab=model["vocab"], merges=merges, **SETTINGS | settings)
    for text in TEXTS:
        assert ids(tokenizer, text) == reference(text, add_special_tokens=False)["input_ids"]
    tokenizer.close()


@pytest.mark.parametrize("legacy", [True, False])
def test_transformers_newer_tokenizer_json(tmp_path: Path, sentencepiece_path: Path, legacy: bool) -> None:
    """Since version 5 it doubles a space at the beginning, for which Metaspace alone adds none."""
    reference = transformers_reading(sentencepiece_path, legacy=legacy)
    tokenizer = read_files(write_files(tmp_path / "c", {"tokenizer.json": reference.to_str()}))
    for text in TEXTS:
        assert ids(tokenizer, text) == reference.encode(text, add_special_tokens=False).ids
    tokenizer.close()


@pytest.mark.parametrize("legacy", [True, False])
def test_chats_texts_and_prompts_have_transformers_ids(
    tmp_path: Path, moe_checkpoint: Path, sentencepiece_path: Path, legacy: bool
) -> None:
    """In the server, in calibration, and, where it can, in llama.cpp too."""
    source = shutil.copytree(moe_checkpoint, tmp_path / "c")
    settings = SETTINGS | {"legacy": legacy, "chat_template": MIXTRAL_TEMPLATE}
    lone_model(tmp_path / "t", sentencepiece_path, settings)
    shutil.copy(tmp_path / "t" / "tokenizer_config.json", source)
    convert(ConvertOptions(source, tmp_path / "m.gguf", "Q8_0"))
    convert(ConvertOptions(tmp_path / "m.gguf", tmp_path / "again.gguf", "F16"))
    reference = transformers_reading(sentencepiece_path, legacy=legacy)
    messages = ("hello  world", "tell me", "a lazy dog")
    rendered = "<s>[INST] hello  world [/INST] tell me</s>[INST] a lazy dog [/INST]"
    expected = reference.encode(rendered, add_special_tokens=False).ids
    llama = Llama(str(tmp_path / "again.gguf"), vocab_only=True, verbose=False)
    for path in (tmp_path / "m.gguf", tmp_path / "again.gguf"):
        gguf = read_gguf(path)
        tokenizer = Tokenizer.open(gguf)
        turns = tuple(Turn(("user", "assistant")[n % 2], text) for n, text in enumerate(messages))
        assert list(Chat(tokenizer).prompt(ChatPrompt(turns)).ids) == expected
        encoder = TokenizerEncoder(path, gguf.metadata)
        chat = [{"role": turn.role, "content": turn.content} for turn in turns]
        assert encoder.chat(chat) == expected
        prompts = Prompts(tokenizer, tokenizer.n_vocab, 1000)
        for text in ("hello world", " hello", "</span> x"):
            with_bos = [1, *reference.encode(text, add_special_tokens=False).ids]
            assert encoder.text(text, at_start=True) == with_bos
            assert list(prompts.prompt(TextPrompt(text)).ids) == with_bos
            if legacy or not text.startswith(" "):
                assert llama.tokenize(text.encode(), add_bos=True) == with_bos
        encoder.close()
        tokenizer.close()
    if legacy:
        assert llama.tokenize(rendered.encode(), add_bos=False, special=True) == expected


def test_what_llama_cpp_reads_otherwise_is_said(tmp_path: Path, moe_checkpoint: Path) -> None:
    source = shutil.copytree(moe_checkpoint, tmp_path / "c")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    assert plan(ConvertOptions(source, tmp_path / "m.gguf", "Q8_0")).notes == ()
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": False}))
    (note,) = plan(ConvertOptions(source, tmp_path / "m.gguf", "Q8_0")).notes
    assert "llama.cpp will read a space behind each control token" in note
    assert plan(ConvertOptions(source, tmp_path / "m.gguf", pair="F16,Q8_0")).notes == ()


def test_a_chat_without_a_template_is_a_text_behind_a_bos(tmp_path: Path, sentencepiece_path: Path) -> None:
    tokenizer = read_files(lone_model(tmp_path / "c", sentencepiece_path, {"legacy": False}))
    reference = transformers_reading(sentencepiece_path, legacy=False)
    prompt = Chat(tokenizer).prompt(ChatPrompt((Turn("user", "hello"),)))
    assert list(prompt.ids) == [1, *reference.encode("User: hello\n\nAssistant:", add_special_tokens=False).ids]
    tokenizer.close()
