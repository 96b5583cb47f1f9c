"""`slimoe convert --two-copies`: both copies are what a stock conversion to their type has."""

import json
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from slimoe.converter.convert import ConvertOptions, convert, plan
from slimoe.converter.layout.offsets import lay_out
from slimoe.offload.engine import Engine
from slimoe.offload.errors import ModelFileError, UnsupportedModelError, UsageError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.experts import expert_layers
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensor_list import check_tensors
from slimoe.offload.model.tensors import WeightSource
from slimoe.offload.model.weight_reader import model_sources
from slimoe.offload.text.tokenizer import Tokenizer
from slimoe.server.cli import run
from tests.models.configs import engine_config
from tests.models.gguf_content import Array, file_tensors

TOKENS = [1, 17, 305, 4, 99, 306, 211, 42, 7, 500, 333, 12]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def pair(directory: Path, k_quant_checkpoint: Path) -> Path:
    """Three layers of 6 experts, top 3, n_embd 256, n_ff 512."""
    options = ConvertOptions(k_quant_checkpoint, directory / "pair.gguf", n_threads=1, pair="Q4_K,Q2_K")
    return convert(options).path


@pytest.fixture(scope="module")
def stock(directory: Path, k_quant_checkpoint: Path) -> dict[str, Path]:
    """Stock files by type."""
    kinds = ("Q4_K", "Q2_K")
    options = [ConvertOptions(k_quant_checkpoint, directory / f"{kind}.gguf", kind, n_threads=1) for kind in kinds]
    return {kind: convert(option).path for kind, option in zip(kinds, options, strict=True)}


@pytest.mark.parametrize(("bucket", "kind"), [(0, "Q4_K"), (1, "Q2_K")])
def test_a_copy_is_what_the_stock_file_of_its_type_has(
    pair: Path, stock: dict[str, Path], bucket: int, kind: str
) -> None:
    ours, theirs = file_tensors(pair), file_tensors(stock[kind])
    names = [name for name in theirs if "_exps." in name]
    assert len(names) == 3 * 3
    for name in names:
        mine = ours[name.replace("_exps.", f"_exps.b{bucket}.")]
        assert mine.tensor_type is theirs[name].tensor_type
        np.testing.assert_array_equal(mine.data, theirs[name].data)
    assert len(ours) == len(theirs) + 3 * 3


def test_everything_else_is_what_the_first_types_file_has(pair: Path, stock: dict[str, Path]) -> None:
    ours, theirs = file_tensors(pair), file_tensors(stock["Q4_K"])
    for name in (name for name in theirs if "_exps." not in name):
        assert ours[name].tensor_type is theirs[name].tensor_type
        np.testing.assert_array_equal(ours[name].data, theirs[name].data)
    assert Tokenizer.open(read_gguf(pair)).encode("hello") == Tokenizer.open(read_gguf(stock["Q4_K"])).encode("hello")


def scores(path: Path, weights: str) -> Array:
    with closing(Engine.open(engine_config(path, n_ctx=256, n_threads=1, weights=weights))) as engine:
        return engine.read(TOKENS, len(TOKENS)).copy()


@pytest.mark.parametrize("weights", ["mapped", "repacked"])
def test_the_high_copy_computes_what_the_stock_file_does(pair: Path, stock: dict[str, Path], weights: str) -> None:
    np.testing.assert_array_equal(scores(pair, weights), scores(stock["Q4_K"], weights))


def test_each_expert_has_its_two_copies(pair: Path, stock: dict[str, Path]) -> None:
    file = read_gguf(pair)
    spec = ModelSpec.from_gguf(file)
    check_tensors(file, spec)
    raw = pair.read_bytes()

    def stored(source: WeightSource) -> bytes:
        return b"".join(raw[span.offset : span.offset + span.n_bytes] for span in source.spans)

    expected = [file_tensors(stock[kind]) for kind in ("Q4_K", "Q2_K")]
    for index, layer in enumerate(expert_layers(model_sources(file, spec), spec)):
        assert layer is not None
        assert layer.target == tuple(range(6))
        for expert, copies in enumerate(layer.experts):
            for copy, theirs in zip(copies, expected, strict=True):
                for part, source in zip(("gate", "up", "down"), copy.matrices, strict=True):
                    assert stored(source) == theirs[f"blk.{index}.ffn_{part}_exps.weight"].data[expert].tobytes()


def test_the_plan_is_exact_and_tensors_are_aligned(tmp_path: Path, pair: Path, k_quant_checkpoint: Path) -> None:
    planned = plan(ConvertOptions(k_quant_checkpoint, tmp_path / "m.gguf", pair="q4_k, q2_k"))
    assert planned.layout.n_bytes == pair.stat().st_size
    file = read_gguf(pair)
    assert file.metadata["slimoe.recipe"] == planned.plan.recipe == "Q4_K,Q2_K"
    assert {tensor.offset % 4096 for tensor in file.tensors.values()} == {0}


def test_llama_cpp_refuses_the_file(pair: Path) -> None:
    with pytest.raises(ValueError, match="Failed to load model"):
        llama_cpp.Llama(str(pair), verbose=False)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("Q4_K", "takes two types"),
        ("Q4_K,Q2_K,Q2_K", "takes two types"),
        ("", "takes two types"),
        ("Q4_K,Q9_K", "There is no type 'Q9_K'"),
        ("Q2_K,Q4_K", "Q2_K,Q4_K are not smaller than the first in layer 0"),
        ("Q4_K,Q4_K", "not smaller"),
        ("Q4_K,Q4_0", "not smaller"),
    ],
)
def test_pairs_that_are_none(tmp_path: Path, k_quant_checkpoint: Path, names: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(ConvertOptions(k_quant_checkpoint, tmp_path / "m.gguf", pair=names))
    assert list(tmp_path.iterdir()) == []


def test_a_type_that_does_not_fit_the_experts(tmp_path: Path, moe_checkpoint: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="as Q2_K in Q8_0,Q2_K_PURE needs"):
        plan(ConvertOptions(moe_checkpoint, tmp_path / "m.gguf", pair="Q8_0,Q2_K_PURE"))


@pytest.mark.parametrize("names", ["Q4_K,Q2_K", "Q2_K,Q4_K", "Q8_0,Q2_K_PURE", "Q4_0,Q2_K", "IQ4_NL,Q3_K"])
def test_the_copies_that_are_suggested_work(
    tmp_path: Path, moe_checkpoint: Path, capsys: pytest.CaptureFixture[str], names: str
) -> None:
    arguments = ["convert", str(moe_checkpoint), str(tmp_path / "m.gguf"), "--dry-run", "--two-copies"]
    assert run([*arguments, names]) in (2, 3)
    (line,) = capsys.readouterr().err.splitlines()
    suggested = re.search(r" Use --two-copies (\w+,\w+), or a recipe with such types\.$", line)
    assert suggested, line
    assert run([*arguments, suggested[1]]) == 0


def test_a_model_without_experts(tmp_path: Path, dense_checkpoint: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no experts to store twice"):
        plan(ConvertOptions(dense_checkpoint, tmp_path / "m.gguf", pair="Q8_0,Q4_0"))


def test_what_the_loader_would_refuse_is_not_laid_out(tmp_path: Path, k_quant_checkpoint: Path) -> None:
    planned = plan(ConvertOptions(k_quant_checkpoint, tmp_path / "m.gguf", pair="Q4_K,Q2_K"))
    damaged = tuple(replace(layer, hints={"fallback": (0,) * 6}) for layer in planned.plan.layers)
    with pytest.raises(ModelFileError, match=r"layer 0: expert.fallback names constant 0 of 0"):
        lay_out(planned.source, replace(planned.plan, layers=damaged))
    assert list(tmp_path.iterdir()) == []


# --- the commands ------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, moe_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", str(moe_checkpoint), str(tmp_path / "m.gguf"), "--two-copies", "Q8_0,Q4_0", "--json"]
    assert run([*arguments, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    assert run([*arguments, "--threads", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert planned["n_bytes"] == report["n_bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert report["recipe"] == "Q8_0,Q4_0"
    assert run([*arguments, "--type", "Q8_0"]) == 2
    assert "Leave --type out" in capsys.readouterr().err


def test_inspect_counts_the_copies(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(pair), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["architecture"] == "slimoe"
    assert found["sizes"] | {"n_layer": 3, "n_expert": 6, "n_expert_used": 3, "n_ff": 512} == found["sizes"]
    assert found["experts"] | {"stored": 6, "copies": 2, "aliases": 0, "constant_rows": 0} == found["experts"]
    assert set(found["provenance"]) >= {"slimoe.recipe", "slimoe.source.sha256", "slimoe.version"}
    assert not [key for key in found["provenance"] if key.startswith("slimoe.expert")]
    stored = file_tensors(pair)
    for kind, bucket in (("experts", "b0"), ("low-bit copies", "b1")):
        rows = [row for row in found["tensors"] if row["kind"] == kind]
        expected = sum(int(tensor.n_bytes) for name, tensor in stored.items() if f"_exps.{bucket}." in name)
        assert sum(row["n_bytes"] for row in rows) == expected
    assert sum(row["n_bytes"] for row in found["tensors"]) == sum(int(t.n_bytes) for t in stored.values())
    assert run(["inspect", str(pair)]) == 0
    assert "copies 2" in capsys.readouterr().out
