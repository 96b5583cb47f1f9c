import json
import os
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimoe.converter.convert import ConvertOptions, convert
from slimoe.offload.errors import DoesNotFitError, ModelFileError, SlimoeError, UnsupportedModelError, UsageError
from slimoe.server.cli import run

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Spoil = Callable[[Path], object]


def edit_config(**changes: Any) -> Spoil:
    def spoil(path: Path) -> None:
        config = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(config))

    return spoil


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS)

    return spoil


def edit_header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(path: Path) -> None:
        data = (path / WEIGHTS).read_bytes()
        n_header = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + n_header])
        change(header)
        packed = json.dumps(header).encode()
        (path / WEIGHTS).write_bytes(len(packed).to_bytes(8, "little") + packed + data[8 + n_header :])

    return spoil


def write(name: str, data: str | bytes) -> Spoil:
    return lambda path: (path / name).write_bytes(data.encode() if isinstance(data, str) else data)


def truncate(name: str, n_bytes: int) -> Spoil:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:n_bytes])


def only_index(path: Path) -> None:
    (path / WEIGHTS).unlink()
    (path / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))


def index_of_too_much(path: Path) -> None:
    (path / WEIGHTS).rename(path / "all.safetensors")
    (path / INDEX).write_text(json.dumps({"weight_map": {"model.absent.weight": "all.safetensors"}}))


def index_without_map(path: Path) -> None:
    (path / WEIGHTS).unlink()
    (path / INDEX).write_text("{}")


def pickles(path: Path) -> None:
    (path / WEIGHTS).rename(path / "pytorch_model.bin")


def index_of(path: Path, owners: dict[str, str]) -> None:
    (path / WEIGHTS).rename(path / "all.safetensors")
    (path / INDEX).write_text(json.dumps({"weight_map": owners}))


def shards_of(*names: str) -> Spoil:
    """The weights under each of these names, without an index."""

    def spoil(path: Path) -> None:
        for name in names:
            shutil.copy(path / WEIGHTS, path / name)
        (path / WEIGHTS).unlink()

    return spoil


def append(path: Path) -> None:
    with (path / WEIGHTS).open("ab") as weights:
        weights.write(b"12345678")


def move_first(header: dict[str, Any]) -> None:
    next(value for value in header.values() if value.get("data_offsets", [1])[0] == 0)["data_offsets"][0] = 8


def cut_expert(tensors: dict[str, torch.Tensor]) -> None:
    tensors[W2] = tensors[W2][:, :32].contiguous()


def many_tokens(path: Path) -> None:
    tokens = {f"<{n}>": 512 + n for n in range(100)}
    (path / "added_tokens.json").write_text(json.dumps(tokens))


def put_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.block_sparse_moe.experts.5.w2.weight"][3, 3] = torch.nan


def put_infinity(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = -torch.inf


def drop(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda entries: entries.pop(name)


def empty(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.zeros(0)})


def add(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.zeros(3, 4)})


def shift_offsets(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["data_offsets"][1] += 4


W2 = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
BAD: dict[str, tuple[Spoil, type[SlimoeError], str]] = {
    "no config": (lambda path: (path / "config.json").unlink(), ModelFileError, "no checkpoint: it has no config.json"),
    "config is no json": (write("config.json", "{"), ModelFileError, "config.json: this is not readable as JSON"),
    "config is a list": (write("config.json", "[]"), ModelFileError, "expected object, got array"),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), ModelFileError, "holds no weights"),
    "pickles": (pickles, UnsupportedModelError, "PyTorch pickles"),
    "empty weights": (truncate(WEIGHTS, 0), ModelFileError, "not a whole safetensors file"),
    "truncated header": (truncate(WEIGHTS, 100), ModelFileError, "not a whole safetensors file"),
    "truncated data": (truncate(WEIGHTS, 100_000), ModelFileError, "the file is truncated: tensor"),
    "corrupt header": (write(WEIGHTS, b"\x04" + b"\0" * 7 + b"{]}}"), ModelFileError, "header is damaged"),
    "wrong offsets": (edit_header(shift_offsets), ModelFileError, r"norm\.weight (lies at|ends at)"),
    "fp8": (edit_header(lambda h: h["model.norm.weight"].update(dtype="F8_E4M3")), UnsupportedModelError, "F8_E4M3"),
    "missing shard": (only_index, ModelFileError, r"shard model-00001-of-00002\.safetensors is missing"),
    "missing in shard": (index_of_too_much, ModelFileError, r"model\.absent\.weight is missing, the index says"),
    "index without map": (index_without_map, ModelFileError, "missing required field weight_map"),
    "missing expert": (edit_tensors(drop(W2)), ModelFileError, r"expert 2 of blk\.0\.ffn_down_exps\.weight is missing"),
    "missing tensor": (edit_tensors(drop("model.norm.weight")), ModelFileError, r"output_norm\.weight is missing"),
    "missing output": (edit_tensors(drop("lm_head.weight")), ModelFileError, r"lm_head\.weight is missing"),
    "added bytes": (append, ModelFileError, "8 bytes at the file's end belong to no tensor"),
    "moved offset": (edit_header(move_first), ModelFileError, r"lies at 8 to \d+ of the data, but belongs at 0"),
    "damaged entry": (
        edit_header(lambda h: h["model.norm.weight"].update(shape="x")),
        ModelFileError,
        r"entry for tensor model\.norm\.weight is damaged \(",
    ),
    "other shape": (
        edit_header(lambda h: h["model.norm.weight"].update(shape=[3])),
        ModelFileError,
        r"model\.norm\.weight is damaged: \[3\] of \w+ do not take \d+ bytes",
    ),
    "tensors twice": (
        shards_of("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ModelFileError,
        r"00002-of-00002\.safetensors: tensor \S+ is in model-00001-of-00002\.safetensors too",
    ),
    "shards of two counts": (
        shards_of("model-00001-of-00002.safetensors", "model-00001-of-00003.safetensors"),
        ModelFileError,
        f"shards of 2 and of 3 in all, and no {INDEX} says which count",
    ),
    "index of nothing": (lambda path: index_of(path, {}), ModelFileError, "the index has an empty weight_map"),
    "index of another place": (
        lambda path: index_of(path, {"model.norm.weight": "../all.safetensors"}),
        ModelFileError,
        r"the index names '\.\./all\.safetensors', which is no file's name",
    ),
    "experts of two shapes": (
        edit_tensors(cut_expert),
        ModelFileError,
        r"experts\.2\.w2\.weight differs in shape from the same matrix of other experts",
    ),
    "stand-in": (edit_tensors(empty(W2)), ModelFileError, r"experts\.2\.w2\.weight is empty, .* all of its weights"),
    "tensor of no layer": (edit_tensors(add("vision.weight")), UnsupportedModelError, "vision.weight .*has no place"),
    "unknown tensor": (edit_tensors(add("model.layers.0.extra.weight")), UnsupportedModelError, "has no place"),
    "wrong shape": (edit_config(intermediate_size=80), ModelFileError, r"ffn_\w+_exps\.weight has the shape"),
    "no layers": (edit_config(num_hidden_layers=0), ModelFileError, "num_hidden_layers: expected int >= 1"),
    "unknown architecture": (edit_config(architectures=["RwkvForCausalLM"]), UnsupportedModelError, "RwkvForCausalLM"),
    "no architecture": (
        edit_config(architectures=None),
        UnsupportedModelError,
        "the architecture 'unknown' of model_type 'mixtral' is not supported",
    ),
    "quantised": (edit_config(quantization_config={"quant_method": "gptq"}), UnsupportedModelError, "quantised"),
    "activation": (edit_config(hidden_act="gelu"), UnsupportedModelError, "gelu"),
    "rope": (edit_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), UnsupportedModelError, "dynamic"),
    "divisors": (
        edit_config(rope_parameters={"rope_type": "longrope"}),
        ModelFileError,
        "short_factor has 0 entries, not 8",
    ),
    "nan": (edit_tensors(put_nan), ModelFileError, r"experts\.5\.w2\.weight holds NaN or infinity"),
    "infinity": (edit_tensors(put_infinity), ModelFileError, r"q_proj\.weight holds NaN or infinity"),
    "no tokenizer": (lambda path: (path / "tokenizer.model").unlink(), ModelFileError, r"no tokenizer\.model and no"),
    "corrupt tokenizer": (write("tokenizer.model", b"\xff" * 50), ModelFileError, "not a whole sentencepiece model"),
    "truncated tokenizer": (truncate("tokenizer.model", 2000), ModelFileError, "not a whole sentencepiece model"),
    "too many tokens": (many_tokens, ModelFileError, "612 tokens, but the model only 520 embeddings"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints(tmp_path: Path, moe_checkpoint: Path, case: str) -> None:
    spoil, error, message = BAD[case]
    source = shutil.copytree(moe_checkpoint, tmp_path / "c")
    spoil(source)
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(error, match=message) as caught:
        convert(ConvertOptions(source, target / "m.gguf", "F32", n_threads=2))
    assert caught.type is error
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("kind", ["Q4_K", "Q4_K_M", "IQ4_XS", "Q2_K"])
def test_rows_that_no_k_quant_divides(tmp_path: Path, moe_checkpoint: Path, kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no multiple of 256, as \w+ in \w+ needs\. Use --type Q8_0 or"):
        convert(ConvertOptions(moe_checkpoint, tmp_path / "m.gguf", kind))


def test_the_type_that_is_suggested_works(tmp_path: Path, moe_checkpoint: Path) -> None:
    for kind in ("Q8_0", "Q4_0", "IQ4_NL"):
        assert convert(ConvertOptions(moe_checkpoint, tmp_path / f"{kind}.gguf", kind)).n_bytes > 0


def test_weights_too_large_for_f16(tmp_path: Path, moe_checkpoint: Path) -> None:
    source = shutil.copytree(moe_checkpoint, tmp_path / "c")
    edit_tensors(lambda tensors: tensors["model.embed_tokens.weight"].fill_(1e6))(source)
    with pytest.raises(ModelFileError, match="beyond 65504"):
        convert(ConvertOptions(source, tmp_path / "m.gguf", "F16"))
    assert convert(ConvertOptions(source, tmp_path / "m.gguf", "BF16")).path.is_file()


def test_bad_targets(tmp_path: Path, moe_checkpoint: Path) -> None:
    (tmp_path / "there.gguf").write_text("precious")
    for name, message in {"there.gguf": "exists", "": "is a directory", "no/m.gguf": "is no directory"}.items():
        with pytest.raises(UsageError, match=message):
            convert(ConvertOptions(moe_checkpoint, tmp_path / name, "F16"))
    assert (tmp_path / "there.gguf").read_text() == "precious"
    convert(ConvertOptions(moe_checkpoint, tmp_path / "there.gguf", "F16", force=True))
    assert (tmp_path / "there.gguf").read_bytes()[:4] == b"GGUF"


def test_no_space(tmp_path: Path, moe_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = types.SimpleNamespace(total=1000, used=900, free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DoesNotFitError, match="only 100 free") as caught:
        convert(ConvertOptions(moe_checkpoint, tmp_path / "m.gguf", "F16"))
    assert (caught.value.available_bytes, caught.value.required_bytes > 500_000) == (100, True)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile(tmp_path: Path, moe_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DoesNotFitError):
        convert(ConvertOptions(moe_checkpoint, tmp_path / "m.gguf", "F16"))
    assert list(tmp_path.iterdir()) == []


def test_the_command_tells_errors_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", str(tmp_path / "absent"), str(tmp_path / "m.gguf")]) == 3
    assert run(["convert", str(tmp_path), str(tmp_path / "m.gguf"), "--type", "Q9"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "no such directory" in lines[0]
    assert "There is no type 'Q9'. Use one of F32" in lines[1]


def test_the_command_reports(tmp_path: Path, moe_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "m.gguf"
    assert run(["convert", str(moe_checkpoint), str(target), "--type", "q8_0", "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not target.exists()
    assert run(["convert", str(moe_checkpoint), str(target), "--type", "q8_0", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert planned["n_bytes"] == report["n_bytes"] == target.stat().st_size
    assert f"{report['n_bytes']:,} bytes will be written" in captured.err


UNOPENED: dict[str, tuple[dict[str, Any], str]] = {
    "more experts used than there are": ({"num_experts_per_tok": 9}, "selects 9 of 6 experts"),
    "heads that do not group": ({"num_key_value_heads": 3}, "4 attention heads do not divide into groups for 3"),
    "heads that are odd": ({"head_dim": 15}, "rotates 15 of 15 values per head"),
}


@pytest.mark.parametrize("case", UNOPENED)
@pytest.mark.parametrize("settings", [{}, {"pair": "F32,F16"}], ids=["plain", "pair"])
def test_what_would_not_be_opened_is_refused_before_any_work(
    tmp_path: Path, moe_checkpoint: Path, case: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, message = UNOPENED[case]
    source = shutil.copytree(moe_checkpoint, tmp_path / "c")
    edit_config(**changes)(source)
    if "head_dim" in changes:
        edit_tensors(lambda tensors: resize_heads(tensors, changes["head_dim"]))(source)
    elif "num_key_value_heads" in changes:
        edit_tensors(lambda tensors: resize_heads(tensors, 16, n_head_kv=3))(source)
    monkeypatch.setattr("slimoe.converter.source.stored_rows.TensorRows.read", None)
    with pytest.raises(ModelFileError, match=message):
        convert(ConvertOptions(source, tmp_path / "m.gguf", "F16", **settings))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def resize_heads(tensors: dict[str, torch.Tensor], n_embd_head: int, n_head_kv: int = 2) -> None:
    for name in [name for name in tensors if "self_attn" in name]:
        n_head = 4 if "q_proj" in name or "o_proj" in name else n_head_kv
        shape = (n_head * n_embd_head, 64)
        tensors[name] = torch.zeros(shape[::-1] if "o_proj" in name else shape)
