"""Every token that a checkpoint says ends an answer does so, in files of all kinds."""

import json
import shutil
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from slimoe.converter.convert import ConvertOptions, convert
from slimoe.offload.engine import Engine
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.gguf.keys import END_TOKEN_IDS
from slimoe.offload.text.generation import Finished, GenerationRequest, SamplingParams, TokenStep
from slimoe.offload.text.tokenizer import Tokenizer
from tests.models.configs import engine_config
from tests.models.tokenizer_files import read_files, write_files

PROMPT = (1, 300, 301)


def checkpoint(source: Path, path: Path, **files: dict[str, Any]) -> Path:
    """A copy of a checkpoint in which JSON files have further fields."""
    shutil.copytree(source, path)
    for name, values in files.items():
        file = path / f"{name}.json"
        old = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(old | values))
    return path


def answer(model: Path, **values: Any) -> tuple[list[int], str, str]:
    """The tokens, the text and why it ended."""
    engine = Engine.open(engine_config(model, n_ctx=64, n_threads=1))
    try:
        greedy = SamplingParams(temperature=0)
        events = list(engine.generate(GenerationRequest(PROMPT, max_tokens=12, sampling=greedy, **values)))
    finally:
        engine.close()
    steps = [event for event in events if isinstance(event, TokenStep)]
    last = events[-1]
    assert isinstance(last, Finished)
    return [step.token for step in steps], "".join(step.text for step in steps) + last.text, last.reason


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory, moe_checkpoint: Path) -> list[int]:
    """What the model answers when nothing ends it."""
    model = tmp_path_factory.mktemp("usual") / "m.gguf"
    convert(ConvertOptions(moe_checkpoint, model, "F32"))
    tokens, _text, reason = answer(model, ignore_eos=True)
    assert (len(tokens), reason) == (12, "length")
    return tokens


@pytest.mark.parametrize("file", ["generation_config", "config"])
@pytest.mark.parametrize("place", [0, 1, 2, 3, 4])
def test_each_end_of_a_list_ends_an_answer(
    tmp_path: Path, moe_checkpoint: Path, usual: list[int], place: int, file: str
) -> None:
    end = next(token for token in usual[2:] if token not in usual[:2])
    others = [token for token in range(100, 200) if token not in usual][:4]
    ends = [*others[:place], end, *others[place:]]
    source = checkpoint(moe_checkpoint, tmp_path / "c", **{file: {"eos_token_id": ends}})
    model, again, pair = (tmp_path / name for name in ("m.gguf", "again.gguf", "pair.gguf"))
    convert(ConvertOptions(source, model, "F32"))
    convert(ConvertOptions(model, again, "F16"))
    convert(ConvertOptions(again, pair, pair="F32,Q8_0"))
    tokenizer = Tokenizer.open(read_gguf(model))
    text = b"".join(tokenizer.piece(token) for token in usual[: usual.index(end)]).decode("utf-8", "replace")
    tokenizer.close()
    assert answer(model) == (usual[: usual.index(end)], text, "stop")
    assert answer(model, ignore_eos=True)[0] == usual
    for path in (again, pair):
        tokenizer = Tokenizer.open(read_gguf(path))
        assert tokenizer.eog == {2, *ends}
        tokenizer.close()


def test_the_first_three_are_llama_cpps_too(tmp_path: Path, moe_checkpoint: Path) -> None:
    source = checkpoint(moe_checkpoint, tmp_path / "c", generation_config={"eos_token_id": [2, 300, 301, 302, 303]})
    convert(ConvertOptions(source, tmp_path / "m.gguf", "Q8_0"))
    assert llamas_ends(tmp_path / "m.gguf") == {2, 300, 301}
    gguf = read_gguf(tmp_path / "m.gguf")
    assert gguf.metadata[END_TOKEN_IDS].tolist() == [302, 303]
    tokenizer = Tokenizer.open(gguf)
    assert tokenizer.eog == {2, 300, 301, 302, 303}


def llamas_ends(path: Path) -> set[int]:
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    return {token for token in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, token)}


def test_names_end_an_answer_as_in_llama_cpp(tmp_path: Path, moe_checkpoint: Path) -> None:
    """Special or not."""
    names = ["<|im_end|>", "<|call|>", "<eos>", "<turn|>", "[e~[", "<tool>", "<|endoftext|>", "<end_of_turn>"]
    added = {str(512 + n): {"content": name, "special": n % 2 == 0} for n, name in enumerate(names)}
    source = checkpoint(moe_checkpoint, tmp_path / "c", tokenizer_config={"added_tokens_decoder": added})
    convert(ConvertOptions(source, tmp_path / "m.gguf", "Q8_0"))
    tokenizer = Tokenizer.open(read_gguf(tmp_path / "m.gguf"))
    assert tokenizer.eog == llamas_ends(tmp_path / "m.gguf") == {2, *range(512, 520)} - {517}


@pytest.mark.parametrize(
    "others", [("<|return|>", "<|call|>"), ("<|return|>",), ("<|call|>",), ("<|flush|>", "<|calls|>")]
)
def test_ends_of_parts_are_those_of_llama_cpp(tmp_path: Path, moe_checkpoint: Path, others: tuple[str, ...]) -> None:
    added = {str(512 + n): {"content": name, "special": True} for n, name in enumerate(("<|end|>", *others))}
    source = checkpoint(moe_checkpoint, tmp_path / "c", tokenizer_config={"added_tokens_decoder": added})
    convert(ConvertOptions(source, tmp_path / "m.gguf", "Q8_0"))
    tokenizer = Tokenizer.open(read_gguf(tmp_path / "m.gguf"))
    assert tokenizer.eog == llamas_ends(tmp_path / "m.gguf")
    assert (512 in tokenizer.eog) == (len(others) == 1)
    tokenizer.close()


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, {2}),
        ({"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": 7}}, {2, 7}),
        ({"generation_config": {"eos_token_id": [-1, 9000, 5]}}, {2, 5}),
        ({"tokenizer_config": {"eos_token": {"content": "<0x0A>"}}}, {13, 2}),
        ({"tokenizer_config": {"eot_token": "<0x00>", "eom_token": {"content": "<0x01>"}}}, {2, 3, 4}),
        ({"special_tokens_map": {"eos_token": "<0x02>"}}, {2, 5}),
    ],
)
def test_where_ends_are_told(
    tmp_path: Path, sentencepiece_path: Path, files: dict[str, dict[str, Any]], ends: set[int]
) -> None:
    named = {f"{name}.json": values for name, values in files.items()}
    path = write_files(tmp_path / "c", {"tokenizer.model": sentencepiece_path.read_bytes(), **named})
    tokenizer = read_files(path)
    assert tokenizer.eog == ends
    tokenizer.close()
