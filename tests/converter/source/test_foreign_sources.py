"""What is named in place of a checkpoint or a GGUF file is called what it is, with what to do."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from slimoe.server.cli import run
from tests.models.gguf_content import finish

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


def written(path: Path, architecture: str | None, kind: str | None, tensor: str, tokens: bool = False) -> Path:
    """A GGUF file of little more than what says its kind, with one tensor unless its name is empty."""
    writer = gguf.GGUFWriter(path, architecture or "none")
    if architecture is None:
        writer.kv_data[0].pop("general.architecture")
    if kind is not None:
        writer.add_type(kind)
    if tokens:
        writer.add_token_list(["a", "b"])
    if tensor:
        writer.add_tensor(tensor, np.zeros((1, 4), np.float32))
    finish(writer)
    return path


Written = tuple[str | None, str | None, str, bool]
KINDS: dict[str, tuple[Written, str, str]] = {
    "mmproj": (("clip", None, "v.patch_embd.weight", False), "a projector for images or sound", "the model's own file"),
    "mmproj by type": (("llama", "mmproj", "a.conv.weight", False), "a projector for images", "the model's own file"),
    "adapter": (("llama", "adapter", "blk.0.attn_q.weight.lora_a", False), "a LoRA adapter", "Merge it into its model"),
    "imatrix": ((None, "imatrix", "blk.0.attn_q.weight.in_sum2", False), "an importance matrix", "with --imatrix"),
    "vocabulary": (("llama", "model", "", True), "a vocabulary without weights", "Name the model's own file"),
}
COMMANDS = ("run", "serve", "plan", "bench", "convert", "calibrate", "report")


def command_line(command: str, path: Path) -> list[str]:
    """A command with the file where its model belongs, and with what else it asks for."""
    rest = {
        "run": ["-p", "x"],
        "serve": ["--port", "0"],
        "convert": [str(path.with_name("out.gguf"))],
        "calibrate": ["-o", str(path.with_name("out.stats"))],
        "report": [str(path)],
    }
    return [command, str(path), *rest.get(command, [])]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", KINDS)
def test_gguf_files_that_hold_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, command: str
) -> None:
    content, what, hint = KINDS[case]
    path = written(tmp_path / "x.gguf", *content)
    assert run(command_line(command, path)) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"slimoe: {path}: this is {what}")
    assert hint in line
    assert sorted(one.name for one in tmp_path.iterdir()) == ["x.gguf"]


@pytest.mark.parametrize("case", KINDS)
def test_inspect_says_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    content, what, hint = KINDS[case]
    path = written(tmp_path / "x.gguf", *content)
    assert run(["inspect", str(path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"note        this is {what}")
    assert hint in last
    assert run(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["note"] in last


@pytest.mark.parametrize("command", [*COMMANDS, "inspect"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m-00002-of-00003.gguf", "shard m-00001-of-00003.gguf is missing. Put all shards into one directory."),
        (
            "second.gguf",
            "and its name does not say so. Name the shards second-0000N-of-00003.gguf",
        ),
    ],
)
def test_a_later_shard_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, name: str, message: str
) -> None:
    writer = gguf.GGUFWriter(tmp_path / name, "none")
    writer.kv_data[0].pop("general.architecture")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 3)
    writer.add_tensor("blk.1.attn_q.weight", np.zeros((1, 4), np.float32))
    finish(writer)
    assert run(command_line(command, tmp_path / name)) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_plan_of_a_checkpoint_asks_what_to_make_of_it(moe_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(moe_checkpoint)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{moe_checkpoint} is a checkpoint. Say what to make of it: --target-size or --recipe" in line


def test_a_checkpoint_in_place_of_a_file_names_the_command(
    moe_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("run", "serve", "bench"):
        assert run(command_line(command, moe_checkpoint)) == 3
        assert f"Convert it first: slimoe convert {moe_checkpoint} model.gguf." in capsys.readouterr().err
