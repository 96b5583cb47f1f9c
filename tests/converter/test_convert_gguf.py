"""GGUF to GGUF: what has the right type is copied byte for byte, the rest is what gguf decodes, quantised again."""

import json
from collections.abc import Sequence
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.converter.convert import ConvertOptions, ConvertReport, convert, plan
from slimoe.converter.quant.quantize import quantize_rows
from slimoe.offload.errors import ModelFileError, UnsupportedModelError, UsageError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.spec import ModelSpec
from slimoe.server.cli import run
from tests.models.gguf_content import (
    Array,
    GGUFContent,
    StoredTensor,
    file_tensors,
    read_content,
    write_content,
    write_shards,
)
from tests.models.native_files import NativeFfn, StoredExpert, plain_ffn, write_native

PROMPT = [1, 300, 301, 302, 17, 305, 306, 307, 400, 401]


def converted(source: Path, target: Path, kind: str) -> ConvertReport:
    return convert(ConvertOptions(source, target, kind, n_threads=2))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def f32(directory: Path, k_quant_checkpoint: Path) -> Path:
    return converted(k_quant_checkpoint, directory / "f32.gguf", "F32").path


@pytest.fixture(scope="module")
def small(directory: Path, moe_checkpoint: Path) -> GGUFContent:
    """6 experts, top 3, whose sizes fit no K-quant, in F32."""
    return read_content(converted(moe_checkpoint, directory / "small.gguf", "F32").path)


@pytest.fixture(scope="module")
def mixed(directory: Path, f32: Path) -> Path:
    return converted(f32, directory / "mixed.gguf", "Q4_K_M").path


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_a_file_of_all_weights_gives_what_the_checkpoint_does(
    tmp_path: Path, k_quant_checkpoint: Path, f32: Path, kind: str
) -> None:
    ours = file_tensors(converted(f32, tmp_path / "a.gguf", kind).path)
    theirs = file_tensors(converted(k_quant_checkpoint, tmp_path / "b.gguf", kind).path)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.tensor_type is theirs[name].tensor_type
        np.testing.assert_array_equal(tensor.data, theirs[name].data)


def test_the_same_type_again_copies_everything(tmp_path: Path, mixed: Path) -> None:
    report = converted(mixed, tmp_path / "m.gguf", "Q4_K_M")
    assert report.n_copied_bytes == sum(report.bytes_by_type.values())
    assert read_content(report.path).keys.keys() == read_content(mixed).keys.keys()
    ours, theirs = file_tensors(report.path), file_tensors(mixed)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.data, theirs[name].data)


def test_other_types_are_made_of_what_gguf_decodes(tmp_path: Path, mixed: Path) -> None:
    report = converted(mixed, tmp_path / "m.gguf", "Q4_K")
    source, copied = file_tensors(mixed), 0
    for name, tensor in file_tensors(report.path).items():
        before = source[name]
        if before.tensor_type is tensor.tensor_type:
            copied += tensor.n_bytes
            np.testing.assert_array_equal(tensor.data, before.data)
            continue
        values = gguf.quants.dequantize(before.data, before.tensor_type).astype(np.float32)
        expected = quantize_rows(values.reshape(-1, values.shape[-1]), tensor.tensor_type)
        np.testing.assert_array_equal(tensor.data.reshape(-1), expected)
    assert 0 < copied == report.n_copied_bytes < sum(report.bytes_by_type.values())


def test_a_checkpoint_copies_nothing(tmp_path: Path, moe_checkpoint: Path) -> None:
    assert plan(ConvertOptions(moe_checkpoint, tmp_path / "m.gguf", "F32")).n_copied_bytes == 0


def test_keys_carry_over(tmp_path: Path, small: GGUFContent) -> None:
    extra: dict[str, int | str] = {"general.quantized_by": "someone", "general.description": "small", "general.big": 7}
    tags = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING
    content = small.with_keys(extra)
    content.keys["general.tags"] = type(content.keys["general.big"])(["a", "b"], *tags)
    content.keys["general.big"] = type(content.keys["general.big"])(1 << 40, gguf.GGUFValueType.UINT64)
    source = write_content(tmp_path / "source.gguf", content)
    made = read_content(converted(source, tmp_path / "m.gguf", "Q8_0").path).keys
    kept = [name for name in content.keys if name.startswith(("tokenizer.", "llama."))]
    kept += ["general.name", "general.quantized_by", "general.description", "general.tags", "general.big"]
    assert len(kept) > 25
    for name in kept:
        assert made[name] == content.keys[name], name
    assert made["slimoe.recipe"].value == "Q8_0"
    assert made["general.file_type"].value == gguf.LlamaFileType.MOSTLY_Q8_0
    assert made["slimoe.source.sha256"].value != content.keys["slimoe.source.sha256"].value


def test_llama_cpp_computes_the_same_of_the_copy(tmp_path: Path, small: GGUFContent) -> None:
    source = write_shards(tmp_path, small, 2)
    paths = [source, converted(source, tmp_path / "m.gguf", "F32").path]
    ours, theirs = (logits(path) for path in paths)
    np.testing.assert_array_equal(ours, theirs)


def logits(path: Path) -> Array:
    model = llama_cpp.Llama(str(path), logits_all=True, verbose=False, n_threads=1, n_ctx=64)
    model.eval(PROMPT)
    scores = np.array(model.scores[: len(PROMPT)])
    model.close()
    return scores


def test_old_layouts_become_the_newest(tmp_path: Path, small: GGUFContent) -> None:
    """Experts one by one, and queries, keys and values in one tensor."""
    old: dict[str, StoredTensor] = {}
    for name, tensor in small.tensors.items():
        if "_exps" in name:
            old |= {name.replace("_exps", f".{e}"): StoredTensor(one, Type.F32) for e, one in enumerate(tensor.data)}
        elif name.endswith("attn_q.weight"):
            parts = [small.values(name.replace("attn_q", f"attn_{part}")) for part in "qkv"]
            old[name.replace("attn_q", "attn_qkv")] = StoredTensor(np.concatenate(parts), Type.F32)
        elif not name.endswith(("attn_k.weight", "attn_v.weight")):
            old[name] = tensor
    source = write_content(tmp_path / "old.gguf", GGUFContent(small.keys, old))
    report = converted(source, tmp_path / "m.gguf", "F32")
    made = file_tensors(report.path)
    assert made.keys() == small.tensors.keys()
    for name, tensor in made.items():
        np.testing.assert_array_equal(tensor.data, small.values(name))
    assert report.n_copied_bytes == sum(report.bytes_by_type.values())


def test_two_copies_of_every_expert_from_a_file(tmp_path: Path, mixed: Path) -> None:
    options = ConvertOptions(mixed, tmp_path / "pair.gguf", n_threads=2, pair="Q4_K_M,Q2_K")
    report = convert(options)
    made, source = file_tensors(report.path), file_tensors(mixed)
    best = {name.replace(".b0.", "."): tensor for name, tensor in made.items() if ".b1." not in name}
    assert best.keys() == source.keys()
    for name, tensor in best.items():
        np.testing.assert_array_equal(tensor.data, source[name].data)
    assert report.n_copied_bytes == sum(tensor.n_bytes for tensor in source.values())


# --- native files ------------------------------------------------------------------------------------------


def test_a_native_file_that_stock_can_hold_becomes_one(tmp_path: Path, small: GGUFContent) -> None:
    experts = tuple(StoredExpert(e, (Type.F32, Type.Q8_0)) for e in range(6))
    two_copies = NativeFfn(experts, tuple(range(6)))
    source = write_native(tmp_path / "n.gguf", small, [two_copies, plain_ffn(6)])
    path = converted(source, tmp_path / "m.gguf", "F32").path
    for name, tensor in file_tensors(path).items():
        np.testing.assert_array_equal(tensor.data, small.values(name))
    assert ModelSpec.from_gguf(read_gguf(path)).architecture.name == "llama"
    assert np.isfinite(logits(path)).all()


COMPRESSED: dict[str, tuple[Sequence[NativeFfn | None], int]] = {
    "fewer experts in a layer": ([plain_ffn(6), plain_ffn(4)], 1),
    "an alias": ([NativeFfn(plain_ffn(5).experts, (0, 1, 2, 3, 4, 4)), plain_ffn(6)], 0),
    "another order": ([plain_ffn(6), NativeFfn(plain_ffn(6).experts, (1, 0, 2, 3, 4, 5))], 1),
    "a constant expert": (
        [NativeFfn(plain_ffn(5).experts, (0, 1, 2, 3, 4, -1), np.ones((1, 64), np.float32)), plain_ffn(6)],
        0,
    ),
    "a narrow expert": (
        [plain_ffn(6), NativeFfn((StoredExpert(0, width=32), *plain_ffn(6).experts[1:]), tuple(range(6)))],
        1,
    ),
    "no experts": ([plain_ffn(6), None], 1),
}


@pytest.mark.parametrize("case", COMPRESSED)
def test_what_a_stock_file_cannot_hold_is_refused(tmp_path: Path, small: GGUFContent, case: str) -> None:
    layers, at_fault = COMPRESSED[case]
    source = write_native(tmp_path / "n.gguf", small, layers)
    with pytest.raises(UnsupportedModelError, match=f"layer {at_fault} would .*, which the stock format cannot hold"):
        plan(ConvertOptions(source, tmp_path / "m.gguf", "F32"))


# --- bad files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "asked"), [("F32", "F32"), ("F32", "Q8_0"), ("F16", "F16"), ("Q8_0", "Q8_0")])
def test_weights_that_are_no_numbers(tmp_path: Path, small: GGUFContent, stored: str, asked: str) -> None:
    content = small.quantised(Type[stored])
    data = content.tensors["blk.1.ffn_down_exps.weight"].data.copy()
    # Of Q8_0 it is a scale: a float16 that begins each block of 34 bytes.
    bad = data.view(np.float32 if stored == "F32" else np.float16)
    bad[4, 63, 0] = np.nan
    content.tensors["blk.1.ffn_down_exps.weight"] = StoredTensor(data, Type[stored])
    source = write_content(tmp_path / "bad.gguf", content)
    with pytest.raises(ModelFileError, match=r"blk\.1\.ffn_down_exps\.weight\[4\] holds NaN or infinity"):
        converted(source, tmp_path / "m.gguf", asked)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]


def test_a_file_cannot_become_itself(tmp_path: Path, small: GGUFContent) -> None:
    source = write_content(tmp_path / "m.gguf", small)
    with pytest.raises(UsageError, match="is a file of the model that is read"):
        convert(ConvertOptions(source, source, "Q8_0", force=True))
    shard = write_shards(tmp_path, small, 2)
    with pytest.raises(UsageError, match="is a file of the model that is read"):
        convert(ConvertOptions(shard, tmp_path / "m-00002-of-00002.gguf", "Q8_0", force=True))


def test_the_command_says_what_is_copied(tmp_path: Path, mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "m.gguf"
    assert run(["convert", str(mixed), str(target), "--type", "Q4_K", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert 0 < report["n_copied_bytes"] < sum(report["bytes_by_type"].values())
    assert f"{report['n_copied_bytes']:,} of them copied" in captured.err
