"""`slimoe convert --imatrix`: llama.cpp's bytes, every form of the file, and imatrices that are of no use."""

import json
import shutil
import struct
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import LlamaFileType
from numpy.typing import NDArray

from bench.baselines.llama_cpp import llama_quantize
from slimoe.converter.convert import ConvertOptions, convert, plan
from slimoe.converter.quant.mixes import FOR_IMPORTANCE
from slimoe.offload.errors import ModelFileError, SlimoeError, UsageError
from slimoe.server.cli import run
from tests.models.gguf_content import file_tensors, finish
from tests.models.tiny_checkpoint import TinyConfig, save_checkpoint
from tests.models.tiny_gguf import FineShape, write_family

Means = dict[str, NDArray[np.float32]]
SIZES = TinyConfig(n_layer=1, n_embd=256, n_ff=256, n_head=4, n_expert=3, n_expert_used=2)
UNMET = 1
COUNT = 4
FILE_TYPES = {
    "Q4_K": LlamaFileType.MOSTLY_Q4_K_S,
    "Q2_K_PURE": LlamaFileType.MOSTLY_Q2_K_S,
    "IQ2_XXS": LlamaFileType.MOSTLY_IQ2_XXS,
}
EXPERTS = "blk.0.ffn_{}_exps.weight"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("imatrix")


@pytest.fixture(scope="module")
def checkpoint(directory: Path, sentencepiece_path: Path) -> Path:
    return save_checkpoint(directory / "checkpoint", sentencepiece_path, SIZES)


@pytest.fixture(scope="module")
def exact(directory: Path, checkpoint: Path) -> Path:
    return convert(ConvertOptions(checkpoint, directory / "f32.gguf", "F32", n_threads=1)).path


@pytest.fixture(scope="module")
def means(exact: Path) -> Means:
    """[matrices, n_per_row] of every matrix; one expert was never met and has the mean of the others."""
    rng = np.random.default_rng(8)
    made = {}
    for name, tensor in file_tensors(exact).items():
        if tensor.data.ndim > 1:
            experts = tensor.data.shape[0] if tensor.data.ndim == 3 else 1
            made[name] = np.square(rng.random((experts, tensor.data.shape[-1]), np.float32)) + np.float32(0.01)
            if experts > 1:
                made[name][UNMET] = (made[name][0] + made[name][2]) / 2
    return made


@pytest.fixture(scope="module")
def imatrix(directory: Path, means: Means) -> Path:
    return write(directory / "calibration.imatrix", means)


@pytest.fixture(scope="module")
def fitted(directory: Path, checkpoint: Path, imatrix: Path) -> dict[str, Path]:
    """Files of each type."""
    options = ConvertOptions(checkpoint, directory, n_threads=2, imatrix=imatrix)
    return {kind: convert(replace(options, target=directory / f"{kind}.gguf", type=kind)).path for kind in FILE_TYPES}


def write(path: Path, means: Means, unmet: int | None = UNMET) -> Path:
    """An imatrix as llama.cpp writes it, by gguf's own writer."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["mail.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in means.items():
        counts = np.full((len(values), 1), COUNT, np.float32)
        if len(values) > 1 and unmet is not None:
            counts[unmet] = 0
        writer.add_tensor(f"{name}.in_sum2", values * counts)
        writer.add_tensor(f"{name}.counts", counts)
    finish(writer)
    return path


def write_old(path: Path, means: Means) -> Path:
    """The form of before 2025."""
    data = struct.pack("<i", len(means))
    for name, values in means.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", COUNT, values.size)
        data += (values * np.float32(COUNT)).tobytes()
    path.write_bytes(data + struct.pack("<ii", 7, 8) + b"mail.txt")
    return path


def keys_of(path: Path, start: str) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith(start)}


def same_data(ours: Path, theirs: Path) -> bool:
    left, right = file_tensors(ours), file_tensors(theirs)
    return left.keys() == right.keys() and all(np.array_equal(left[name].data, right[name].data) for name in left)


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_the_bytes_are_llama_cpps(
    tmp_path: Path, exact: Path, means: Means, fitted: dict[str, Path], kind: str
) -> None:
    ours = fitted[kind]
    llama_quantize(exact, tmp_path / "theirs.gguf", FILE_TYPES[kind], 1, means, pure=True)
    left, right = file_tensors(ours), file_tensors(tmp_path / "theirs.gguf")
    assert left.keys() == right.keys()
    alike = {name for name in left if left[name].tensor_type is right[name].tensor_type and left[name].data.ndim > 1}
    assert alike >= {EXPERTS.format(role) for role in ("gate", "up", "down")}
    assert kind == "IQ2_XXS" or alike >= {"blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_output.weight"}
    for name in alike:
        np.testing.assert_array_equal(left[name].data, right[name].data, name)
    assert keys_of(ours, "quantize.imatrix") == {
        "quantize.imatrix.file": "calibration.imatrix",
        "quantize.imatrix.dataset": "mail.txt",
        "quantize.imatrix.entries_count": len(means),
        "quantize.imatrix.chunks_count": 7,
    }


def test_the_older_form_says_the_same(tmp_path: Path, checkpoint: Path, means: Means, imatrix: Path) -> None:
    old = write_old(tmp_path / "old.dat", means)
    options = ConvertOptions(checkpoint, tmp_path / "m.gguf", "Q4_0", n_threads=1, imatrix=imatrix)
    older = convert(replace(options, target=tmp_path / "old.gguf", imatrix=old)).path
    plain = convert(replace(options, target=tmp_path / "plain.gguf", imatrix=None)).path
    assert same_data(older, convert(options).path)
    assert not same_data(older, plain)


def test_both_copies_of_a_pair_are_fitted(
    tmp_path: Path, checkpoint: Path, imatrix: Path, fitted: dict[str, Path]
) -> None:
    names = "Q4_K", "Q2_K_PURE"
    options = ConvertOptions(checkpoint, tmp_path / "m.gguf", n_threads=1, pair=",".join(names), imatrix=imatrix)
    report = convert(options)
    pair = file_tensors(report.path)
    assert report.fitted is not None
    assert report.fitted.n_fitted == report.fitted.n_matrices == 2 * 9 + 6
    for bucket, kind in enumerate(names):
        stock = file_tensors(fitted[kind])
        for role in ("gate", "up", "down"):
            copy = pair[EXPERTS.format(role).replace("_exps.", f"_exps.b{bucket}.")]
            np.testing.assert_array_equal(copy.data, stock[EXPERTS.format(role)].data)


def test_what_calibration_writes_is_read(
    tmp_path: Path, moe_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, stats, made = tmp_path / "prose.txt", tmp_path / "a.stats", tmp_path / "a.imatrix"
    text.write_text("the quick brown fox jumps over a lazy dog " * 400)
    short = ["--tokens", "2048", "--length", "64", "--device", "cpu", "--types", "none", "--no-sensitivity"]
    calibrate = ["calibrate", str(moe_checkpoint), "-o", str(stats), "--text", str(text), *short, "--imatrix"]
    assert run([*calibrate, str(stats)]) == 2
    assert "cannot be both files" in capsys.readouterr().err
    assert run([*calibrate, str(made)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.imatrix", "a.stats", "prose.txt"]
    names = [tensor.name for tensor in gguf.GGUFReader(made).tensors]
    assert {"blk.0.ffn_down_exps.weight.in_sum2", "blk.0.attn_q.weight.counts"} <= set(names)
    for path in (stats, made):
        options = ConvertOptions(moe_checkpoint, tmp_path / f"{path.name}.gguf", "Q4_0", n_threads=1, imatrix=path)
        convert(options)
    plain = convert(ConvertOptions(moe_checkpoint, tmp_path / "plain.gguf", "Q4_0", n_threads=1)).path
    assert same_data(tmp_path / "a.stats.gguf", tmp_path / "a.imatrix.gguf")
    assert not same_data(plain, tmp_path / "a.imatrix.gguf")
    assert keys_of(tmp_path / "a.stats.gguf", "slimoe.calibration.tokens") == {"slimoe.calibration.tokens": 2048}
    assert len(keys_of(tmp_path / "a.stats.gguf", "slimoe.calibration.sha256")["slimoe.calibration.sha256"]) == 64
    assert keys_of(tmp_path / "a.imatrix.gguf", "quantize.imatrix.dataset") == {"quantize.imatrix.dataset": "prose"}
    assert run([*calibrate[:3], str(tmp_path / "c.stats"), *calibrate[4:], str(made)]) == 2
    assert f"{made} exists" in capsys.readouterr().err


def test_a_tied_table_is_the_output_matrix(tmp_path: Path, sentencepiece_path: Path) -> None:
    sizes = TinyConfig(n_layer=1, n_embd=32, n_ff=32, n_expert=0)
    source = save_checkpoint(tmp_path / "c", sentencepiece_path, sizes, tie_word_embeddings=True)
    values = np.square(np.random.default_rng(9).random((1, 32), np.float32))
    options = ConvertOptions(source, tmp_path / "m.gguf", "Q4_0", n_threads=1)
    layer = {"blk.0.attn_q.weight": values}
    fitted = plan(replace(options, imatrix=write(tmp_path / "a.imatrix", {"output.weight": values, **layer})))
    other = plan(replace(options, imatrix=write(tmp_path / "b.imatrix", layer)))
    tables = [planned.layout.tensors[0].matrices[0] for planned in (fitted, other)]
    assert [table.key.name for table in tables] == ["token_embd.weight"] * 2
    importance = fitted.importance(tables[0])
    assert importance is not None
    np.testing.assert_allclose(importance, values[0], rtol=1e-6)
    assert other.importance(tables[1]) is None


def test_blocks_that_are_copied_need_no_importance(tmp_path: Path, fitted: dict[str, Path], imatrix: Path) -> None:
    source = fitted["IQ2_XXS"]
    copied = convert(ConvertOptions(source, tmp_path / "b.gguf", "IQ2_XXS", n_threads=1))
    assert same_data(source, copied.path)
    with pytest.raises(UsageError, match="knows none of the matrices that are quantised"):
        plan(ConvertOptions(source, tmp_path / "c.gguf", "IQ2_XXS", imatrix=imatrix))


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FOR_IMPORTANCE)
def test_types_that_need_importance(tmp_path: Path, checkpoint: Path, imatrix: Path, kind: str) -> None:
    options = ConvertOptions(checkpoint, tmp_path / "m.gguf", kind)
    for one in (options, replace(options, pair=f"Q4_K,{kind}")):
        with pytest.raises(UsageError, match=f"{kind} is only of use .* Give --imatrix, or use IQ3_S"):
            plan(one)
        types = {tensor.type.name for tensor in plan(replace(one, imatrix=imatrix)).layout.tensors}
        assert kind in types
    assert list(tmp_path.iterdir()) == []


def narrower(means: Means) -> Means:
    return {name: np.ascontiguousarray(values[:, :128]) for name, values in means.items()}


def one_expert_more(means: Means) -> Means:
    return {name: np.concatenate([values, values[:1]]) if len(values) > 1 else values for name, values in means.items()}


def one_layer_more(means: Means) -> Means:
    return means | {"blk.1.attn_q.weight": means["blk.0.attn_q.weight"]}


BAD = {
    "narrower": (narrower, "made for rows of 128 weights, but the model's have"),
    "more experts": (one_expert_more, "knows 4 matrices of blk.0.ffn_gate_exps.weight, but the model has 3"),
    "fewer experts": (lambda means: {n: v[:2] for n, v in means.items()}, "knows 2 matrices of blk"),
    "more layers": (one_layer_more, "knows blk.1.attn_q.weight, which the model does not have"),
    "no experts": (
        lambda means: {n: v for n, v in means.items() if "_exps" not in n},
        "knows nothing of blk.0.ffn_gate_exps.weight, which IQ2_XXS needs",
    ),
    "no layers": (lambda means: {"output.weight": means["output.weight"]}, "knows nothing of layer 0"),
    "nothing": (lambda means: {}, "knows none of the matrices|knows nothing of"),
}


@pytest.mark.parametrize("case", BAD)
def test_imatrices_of_other_models(tmp_path: Path, checkpoint: Path, means: Means, case: str) -> None:
    change, words = BAD[case]
    path = write(tmp_path / "other.imatrix", change(means))
    with pytest.raises(UsageError, match=words):
        convert(ConvertOptions(checkpoint, tmp_path / "m.gguf", "IQ2_XXS", imatrix=path))
    assert [left.name for left in tmp_path.iterdir()] == ["other.imatrix"]


def test_files_that_are_no_imatrix(tmp_path: Path, checkpoint: Path, exact: Path, imatrix: Path) -> None:
    (tmp_path / "text").write_text("hello world, this is text")
    (tmp_path / "json").write_text('12345678{"a": 1}')
    shutil.copy(imatrix, tmp_path / "cut")
    with (tmp_path / "cut").open("r+b") as file:
        file.truncate(imatrix.stat().st_size // 2)
    cases: dict[Path, tuple[type[SlimoeError], str]] = {
        tmp_path / "absent": (ModelFileError, "cannot be read"),
        tmp_path: (ModelFileError, "cannot be read"),
        tmp_path / "text": (ModelFileError, "no imatrix file"),
        tmp_path / "json": (SlimoeError, "not a whole statistics file"),
        tmp_path / "cut": (ModelFileError, "truncated"),
        exact: (ModelFileError, "a GGUF file, but no imatrix"),
    }
    for path, (error, words) in cases.items():
        with pytest.raises(error, match=words):
            plan(ConvertOptions(checkpoint, tmp_path / "m.gguf", "Q4_K", imatrix=path))


# --- the command -------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, checkpoint: Path, imatrix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", str(checkpoint), str(tmp_path / "m.gguf"), "--imatrix", str(imatrix)]
    assert run([*arguments, "--type", "IQ1_S", "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["fitted"] == {"n_matrices": 15, "n_fitted": 15, "n_experts": 3, "n_unmet": 1}
    assert "15 of 15 quantised matrices are fitted to it, 1 of 3 experts were never met" in err
    assert run([*arguments, "--type", "F16"]) == 2
    assert "leave it out" in capsys.readouterr().err
    assert run([*arguments, "--target-size", "1MB"]) == 2
    assert "Compressing takes importance from --stats" in capsys.readouterr().err
    assert run([*arguments[:3], "--type", "IQ1_S", "--dry-run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert run(["convert", "--help"]) == 0
    assert f"With --imatrix only: {FOR_IMPORTANCE[0]}" in " ".join(capsys.readouterr().out.split())


# --- latent attention --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deepseek2", "deepseek2-old"])
def test_every_head_of_latent_attention_is_fitted_to_what_it_reads(tmp_path: Path, name: str) -> None:
    """Of all forms of the file: a row for each head, or one for all, as llama.cpp has written it since."""
    source = write_family(tmp_path / "m.gguf", name, shape=FineShape(n_layer=2, n_expert=8, n_expert_used=2))
    rng, made = np.random.default_rng(8), {}
    for tensor in file_tensors(source).values():
        if tensor.data.ndim > 1 and "ffn" not in tensor.name and tensor.name != "token_embd.weight":
            n = tensor.data.shape[0] if tensor.data.ndim == 3 else 1
            made[tensor.name] = np.square(rng.random((n, tensor.data.shape[-1]), np.float32)) + np.float32(0.01)
    llama_quantize(source, tmp_path / "theirs.gguf", FILE_TYPES["Q4_K"], 1, made, pure=True)
    theirs = file_tensors(tmp_path / "theirs.gguf")
    forms = {"rows": made, "row": {name: values.reshape(1, -1) for name, values in made.items()}}
    for form, means in forms.items():
        for write_form in (partial(write, unmet=None), write_old):
            imatrix = write_form(tmp_path / form, means)
            options = ConvertOptions(source, tmp_path / "ours.gguf", "Q4_K", n_threads=2, force=True, imatrix=imatrix)
            ours = file_tensors(convert(options).path)
            for key in made:
                if ours[key].tensor_type is theirs[key].tensor_type:
                    np.testing.assert_array_equal(ours[key].data, theirs[key].data, key)
    alike = {key.split(".")[2] for key in made if ours[key].tensor_type is theirs[key].tensor_type}
    assert alike >= ({"attn_k_b", "attn_v_b"} if name == "deepseek2" else {"attn_kv_b"}) | {"attn_q_b", "attn_kv_a_mqa"}
    plain = file_tensors(convert(replace(options, imatrix=None)).path)
    assert not any(np.array_equal(plain[key].data, ours[key].data) for key in made if "attn_" in key)


def test_a_joint_matrix_of_older_files_is_fitted_as_the_two_that_it_becomes(tmp_path: Path) -> None:
    """llama.cpp names what the joint matrix of a delta net reads by its name."""
    old = write_family(tmp_path / "old.gguf", "qwen3next-old", shape=FineShape(n_expert=8))
    new = convert(ConvertOptions(old, tmp_path / "new.gguf", "F32", n_threads=1)).path
    rng, made = np.random.default_rng(4), Means()
    for name, tensor in file_tensors(old).items():
        if tensor.data.ndim > 1:
            n = tensor.data.shape[0] if tensor.data.ndim == 3 else 1
            made[name] = rng.random((n, tensor.data.shape[-1]), np.float32)
    results = []
    for source in (old, new):
        read = made if source is old else dict(made)
        for layer in (0, 2) if source is new else ():
            read[f"blk.{layer}.attn_qkv.weight"] = read[f"blk.{layer}.attn_gate.weight"] = read.pop(
                f"blk.{layer}.ssm_in.weight"
            )
        given = write(tmp_path / "imatrix.gguf", read, None)
        options = ConvertOptions(source, tmp_path / f"{source.stem}-q.gguf", "Q4_K", n_threads=1, imatrix=given)
        report = convert(options)
        assert report.fitted is not None
        assert report.fitted.n_fitted == report.fitted.n_matrices
        results.append(file_tensors(report.path))
    for name, tensor in results[1].items():
        np.testing.assert_array_equal(results[0][name].data, tensor.data, name)
