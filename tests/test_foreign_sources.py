"""What is named in place of a checkpoint or a GGUF file is called what it is, with what to do."""

import json
from pathlib import Path

import pytest

from server.cli import run

DIRECTORIES: dict[str, tuple[dict[str, str], str]] = {
    "empty": ({}, "this directory is empty. Download"),
    "LoRA": ({"adapter_config.json": "{}", "config.json": "{}"}, "a LoRA adapter, a change to another model"),
    "makers' layout": ({"params.json": "{}", "consolidated.00.pth": ""}, "in the layout of its makers"),
    "GGUF files": ({"x.gguf": "GGUF"}, "no config.json, but GGUF files. Name one of them: "),
    "texts": ({"notes.txt": ""}, "no config.json, but notes.txt"),
    "pickles": ({"config.json": "{}", "pytorch_model.bin": ""}, "PyTorch pickles"),
    "shards that lack one": (
        {"config.json": "{}", "model-00001-of-00003.safetensors": "", "model-00003-of-00003.safetensors": ""},
        "shard model-00002-of-00003.safetensors is missing",
    ),
    "weights of other names": ({"config.json": "{}", "w.safetensors": ""}, "holds w.safetensors, but neither"),
    "GPTQ": ({"config.json": '{"quantization_config": {"quant_method": "gptq"}}'}, "quantised by gptq"),
    "AWQ": ({"config.json": '{"quantization_config": {"quant_method": "awq"}}'}, "quantised by awq"),
    "fp8": ({"config.json": '{"quantization_config": {"quant_method": "fp8"}}'}, "quantised by fp8"),
    "pointers": ({"config.json": "version https://git-lfs.github.com/spec/v1\n"}, "a pointer of Git LFS"),
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_directories_that_are_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    files, message = DIRECTORIES[case]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    target = tmp_path.with_name("out.gguf")
    assert run(["convert", str(tmp_path), str(target)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not target.exists()


FILES: dict[str, tuple[str, bytes, str]] = {
    "safetensors": ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "Convert the directory that it lies in"),
    "pickle": ("model.bin", b"PK\x03\x04" + bytes(100), "PyTorch pickles"),
    "old format": ("ggml.gguf", b"tjgg" + bytes(100), "a format that llama.cpp had before GGUF"),
    "web page": ("m.gguf", b"<!DOCTYPE html><html>" + bytes(100), "this is a web page"),
    "pointer": ("m.gguf", b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
    "config": ("config.json", json.dumps({"architectures": ["x"] * 9}).encode(), "this is JSON, not a model"),
    "something": ("m.gguf", b"something else entirely, quite long", "this is not a GGUF file"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    name, data, message = FILES[case]
    (tmp_path / name).write_bytes(data)
    for command in (["run", str(tmp_path / name), "-p", "x"], ["convert", str(tmp_path / name), str(tmp_path / "o")]):
        assert run(command) == 3
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_in_place_of_a_file_names_the_command(
    moe_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["run", str(moe_checkpoint), "-p", "x"], ["serve", str(moe_checkpoint), "--port", "0"]):
        assert run(command) == 3
        assert f"Convert it first: slimoe convert {moe_checkpoint} model.gguf." in capsys.readouterr().err
