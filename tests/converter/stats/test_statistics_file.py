"""Statistics in a file: all of it comes back, and what is no such file is told in a sentence."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_origin, get_type_hints

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.statistics import (
    GramSample,
    InputSums,
    LayerStatistics,
    MatrixCosts,
    OutputSums,
    Removals,
    RouterSums,
    Sensitivity,
    SimilaritySums,
    Statistics,
    TokenTrace,
    TypeErrors,
    WidthErrors,
)
from slimoe.converter.stats.statistics_file import (
    OtherSourceError,
    StatisticsError,
    content_checksum,
    load_statistics,
    save_statistics,
    to_arrays,
)
from slimoe.offload.errors import UsageError
from slimoe.server.cli import run
from tests.models.compress_plans import learnt


def made(kind: type[Any], random: np.random.Generator) -> Any:
    """An instance with other numbers in every field."""
    values: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        dtype = str(hint)
        if hint is float:
            values[name] = random.random()
        elif get_origin(hint) is tuple:
            values[name] = ("Q2_K", "IQ3_S")
        else:
            wanted = next(t for t in ("float16", "float32", "float64", "uint16", "int64") if t in dtype)
            array = (100 * random.random((2, 3))).astype(wanted)
            values[name] = {"ffn_down_shexp": array} if get_origin(hint) is Mapping else array
    return kind(**values)


@pytest.fixture
def statistics() -> Statistics:
    random = np.random.default_rng(0)
    groups = {
        "router": RouterSums,
        "outputs": OutputSums,
        "trace": TokenTrace,
        "type_errors": TypeErrors,
        "sketch": GramSample,
        "sensitivity": Sensitivity,
        "removals": Removals,
        "widths": WidthErrors,
    }
    full = LayerStatistics(
        made(SimilaritySums, random), made(InputSums, random), **{n: made(kind, random) for n, kind in groups.items()}
    )
    assert all(getattr(full, field.name) is not None for field in fields(full))
    return Statistics(
        source_hash="abc",
        text_hash="def",
        tokens=((1, 2, 3), (4,), (70000, 5)),
        domains=("prose", "código", "prose"),
        layers=(full, LayerStatistics(made(SimilaritySums, random), made(InputSums, random)), full),
        output_input=np.ones(4, np.float32),
        token_count=np.arange(9),
        output_gradient=np.zeros(9, np.float32),
        matrix_costs=made(MatrixCosts, random),
        notes={"coverage": "5 of 6"},
    )


@pytest.fixture
def saved(statistics: Statistics, tmp_path: Path) -> Path:
    save_statistics(statistics, tmp_path / "a.stats")
    return tmp_path / "a.stats"


def test_everything_comes_back(statistics: Statistics, saved: Path) -> None:
    loaded = load_statistics(saved)
    plain = ("source_hash", "text_hash", "tokens", "domains", "notes", "n_tokens")
    assert [getattr(loaded, name) for name in plain] == [getattr(statistics, name) for name in plain]
    assert loaded.token_gradient is None
    for name in ("output_input", "token_count", "output_gradient"):
        assert np.array_equal(getattr(loaded, name), getattr(statistics, name))
    assert statistics.matrix_costs is not None
    assert loaded.matrix_costs is not None
    pairs = [(statistics.matrix_costs, loaded.matrix_costs), *zip(statistics.layers, loaded.layers, strict=True)]
    for one, other in pairs:
        first, second = to_arrays(one), to_arrays(other)
        assert set(first) == set(second)
        for name, values in first.items():
            assert values.dtype == second[name].dtype
            assert np.array_equal(values, second[name])
    assert loaded.layers[1].router is None
    assert loaded.layers[0].type_errors is not None
    assert loaded.layers[0].type_errors.types == ("Q2_K", "IQ3_S")


def test_no_text_at_all(statistics: Statistics, tmp_path: Path) -> None:
    save_statistics(replace(statistics, tokens=(), domains=(), layers=()), tmp_path / "a.stats")
    assert load_statistics(tmp_path / "a.stats").tokens == ()


def test_writing_is_whole_or_not_at_all(statistics: Statistics, saved: Path, tmp_path: Path) -> None:
    assert [path.name for path in tmp_path.iterdir()] == ["a.stats"]
    save_statistics(replace(statistics, source_hash="xyz"), saved)
    assert load_statistics(saved).source_hash == "xyz"
    with pytest.raises(UsageError, match="no directory"):
        save_statistics(statistics, tmp_path / "nowhere" / "a.stats")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="is a directory"):
        save_statistics(statistics, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.stats", "folder"]


def test_statistics_of_another_checkpoint(saved: Path) -> None:
    other = cast(ModelSource, SimpleNamespace(source_hash="fed", path=Path("/models/mine")))
    with pytest.raises(OtherSourceError, match=r"another checkpoint than /models/mine\..*slimoe calibrate"):
        load_statistics(saved, other)


def rewritten(path: Path, change: Any) -> Path:
    with safe_open(path, "numpy") as file:
        metadata = dict(file.metadata())
    arrays = dict(load_file(path))
    change(arrays, metadata)
    if "statistics" in metadata:
        metadata["checksum"] = content_checksum(arrays, metadata["statistics"])
    save_file(arrays, path, metadata)
    return path


def about(**changes: Any) -> Any:
    def change(_arrays: Any, metadata: dict[str, str]) -> None:
        metadata["statistics"] = json.dumps(json.loads(metadata["statistics"]) | changes)

    return change


def set_array(name: str, values: Any) -> Any:
    return lambda arrays, metadata: arrays.update({name: np.asarray(values)})


DAMAGES = {
    "no format": (lambda arrays, metadata: metadata.pop("format"), "not a statistics file"),
    "no text": (lambda arrays, metadata: metadata.pop("statistics"), "damaged"),
    "no json": (lambda arrays, metadata: metadata.update(statistics="{"), "damaged"),
    "a later version": (about(version=99), "version 99; this program reads 3"),
    "more layers": (about(n_layer=4), "layers.3.* damaged|damaged.*layers.3"),
    "an array less": (lambda arrays, metadata: arrays.pop("layers.0.router.share"), "layers.0.router.share"),
    "no tokens": (lambda arrays, metadata: arrays.pop("tokens"), "damaged"),
    "a version before checksums": (about(version=2), "version 2; this program reads 3. Make it again with `slimoe cal"),
    "no digest": (lambda arrays, metadata: about(source_hash=None)(arrays, metadata), "source_hash: expected str"),
    "domains of anything": (about(domains=[{"a": 1}, 2, 3]), "domains"),
    "fewer domains": (about(domains=["prose"]), "do not belong together"),
    "no number": (set_array("layers.0.router.share", np.full(3, np.nan)), "share holds NaN or infinity"),
    "infinite": (set_array("output_input", np.full(3, np.inf, np.float32)), "output_input holds NaN or infinity"),
    "nats of nothing": (set_array("matrix_costs.nats", np.full(3, np.nan)), "nats holds NaN or infinity"),
    "no dimension": (set_array("layers.0.similarity.ffn_cosine", np.float64(1)), "ffn_cosine is of shape"),
    "another type": (
        set_array("layers.0.router.share", np.zeros(3, "i8")),
        "share has numbers of type int64",
    ),
    "negative lengths": (set_array("lengths", np.array([-1, 3, 4])), "do not belong together"),
    "no names": (lambda arrays, metadata: arrays.update({"layers.2.type_errors.types": np.zeros(3, "u1")}), "damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_named(saved: Path, name: str) -> None:
    change, words = DAMAGES[name]
    with pytest.raises(StatisticsError, match=words) as caught:
        load_statistics(rewritten(saved, change))
    assert str(caught.value).startswith(f"{saved}: ")
    assert caught.value.exit_code == 3


@pytest.fixture(scope="module")
def measured(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of all that is measured of a model."""
    folder = tmp_path_factory.mktemp("measured")
    save_statistics(learnt(source, folder, 3, 32), folder / "whole.stats")
    return folder / "whole.stats"


def test_every_array_is_held_against_the_model(source: ModelSource, measured: Path, tmp_path: Path) -> None:
    whole = load_statistics(measured, source)
    assert whole.matrix_costs is not None
    assert all(layer.sensitivity and layer.sketch and layer.removals for layer in whole.layers)
    arrays = load_file(measured)
    names = [name for name, one in arrays.items() if one.size and one.dtype != np.uint8 and one.shape != (1,)]
    assert len(names) > 40 * source.spec.n_layer
    for name in names:
        copy = Path(shutil.copy(measured, tmp_path / "a.stats"))
        change = set_array(name, arrays[name][:-1])
        with pytest.raises(StatisticsError) as caught:
            load_statistics(rewritten(copy, change), source)
        assert len(str(caught.value).splitlines()) == 1, name


def without(prefix: str) -> Any:
    def change(arrays: dict[str, Any], _metadata: Any) -> None:
        for name in [name for name in arrays if name.startswith(prefix)]:
            del arrays[name]

    return change


STRANGERS = {
    "fewer layers": (about(n_layer=1), "it is of 1 layers, but .*tiny-moe has 2"),
    "more experts": (
        set_array("layers.1.outputs.norm", np.zeros(7)),
        r"layers.1.outputs.norm is of shape \(7,\), but for .*tiny-moe it would be \(6,\)",
    ),
    "no router": (without("layers.0.router."), "layers.0.router is missing"),
    "an expert too many": (
        lambda arrays, _: arrays["layers.0.trace.picks"].fill(6),
        "layers.0.trace.picks has experts that",
    ),
    "a token too many": (lambda arrays, _: arrays["tokens"].fill(520), "tokens has some that"),
    "a row too many": (lambda arrays, _: arrays["layers.0.sketch.rows"].fill(-1), "tokens that were not read"),
    "no type": (
        lambda arrays, _: _rename(arrays, "matrix_costs.types", b"Q8_0", b"Q8_9"),
        "matrix_costs.types has what is no type",
    ),
    "another matrix": (
        lambda arrays, _: _rename(arrays, "matrix_costs.matrices", b"blk.0.attn_q", b"blk.9.attn_q"),
        "matrix_costs.matrices are not those of",
    ),
}


def _rename(arrays: dict[str, Any], name: str, old: bytes, new: bytes) -> None:
    text = arrays[name].tobytes()
    assert old in text
    arrays[name] = np.frombuffer(text.replace(old, new), np.uint8)


@pytest.mark.parametrize("name", STRANGERS)
def test_what_cannot_be_of_the_model_is_told(
    source: ModelSource, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, words = STRANGERS[name]
    copy = rewritten(Path(shutil.copy(measured, tmp_path / "a.stats")), change)
    with pytest.raises(StatisticsError, match=words):
        load_statistics(copy, source)
    command = ["convert", str(source.path), str(tmp_path / "m.gguf"), "--stats", str(copy), "--target-size", "1MB"]
    assert run(command) == 3
    assert "slimoe calibrate" in capsys.readouterr().err.splitlines()[-1]


def test_a_flipped_bit_anywhere_is_found(saved: Path) -> None:
    whole = saved.read_bytes()
    random = np.random.default_rng(3)
    places = random.choice(len(whole), 400, replace=False).tolist()
    for place in [*range(9), *places]:
        changed = bytearray(whole)
        changed[place] ^= 1 << int(random.integers(8))
        saved.write_bytes(changed)
        with pytest.raises(StatisticsError):
            load_statistics(saved)


def test_costs_of_types_that_do_not_fit_are_infinite(statistics: Statistics, tmp_path: Path) -> None:
    costs = MatrixCosts(("Q2_K",), ("a",), np.array([[np.inf]]))
    save_statistics(replace(statistics, matrix_costs=costs), tmp_path / "a.stats")
    loaded = load_statistics(tmp_path / "a.stats").matrix_costs
    assert loaded is not None
    assert np.isinf(loaded.nats).all()


def test_what_is_no_file_of_statistics(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    for content in (b"", b"GGUF" + bytes(100), whole[:20], whole[: len(whole) // 2], whole[:-1]):
        saved.write_bytes(content)
        with pytest.raises(StatisticsError, match="not a whole statistics file"):
            load_statistics(saved)
    with pytest.raises(StatisticsError, match="no such file"):
        load_statistics(tmp_path / "b.stats")
    with pytest.raises(StatisticsError):
        load_statistics(tmp_path)


def test_reading_needs_no_torch(saved: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from slimoe.converter.stats.statistics_file import load_statistics\n"
        "load_statistics(Path(sys.argv[1])); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, saved], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


STRANGE: tuple[Any, ...] = (None, True, -1, 1 << 70, 1e999, "x", "\x1b[31m", [], [[1]], {}, {"a": {}}, ["a", 1])


@pytest.mark.parametrize("seed", range(60))
def test_mutants_with_a_checksum_of_their_own_are_told_in_a_line(saved: Path, seed: int) -> None:
    random = np.random.default_rng(seed)

    def change(arrays: dict[str, Any], metadata: dict[str, str]) -> None:
        told = json.loads(metadata["statistics"])
        key, name = random.choice(sorted(told)), random.choice(sorted(arrays))
        if random.random() < 0.5:
            told[str(key)] = STRANGE[random.integers(len(STRANGE))]
        elif random.random() < 0.3:
            told.pop(str(key))
        else:
            shape = tuple(random.integers(0, 4, random.integers(0, 4)).tolist())
            arrays[str(name)] = np.full(shape, np.nan, random.choice(["f4", "f8", "f2"]))
        metadata["statistics"] = json.dumps(told)

    told = "nothing"
    try:
        load_statistics(rewritten(saved, change))
    except StatisticsError as error:
        told = str(error)
    assert len(told) < 1000 + len(str(saved))
    assert told.isprintable()
