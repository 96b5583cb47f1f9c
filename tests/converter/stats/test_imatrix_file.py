"""Importance matrices: the fields that llama.cpp looks for, both forms, and values by hand."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from slimoe.converter.source.model_source import MatrixKey, expert_key
from slimoe.converter.stats.imatrix_file import Imatrix, InputSquares, imatrix_of, read_imatrix, write_imatrix
from slimoe.converter.stats.statistics import InputSums, LayerStatistics, OutputSums, SimilaritySums, Statistics
from slimoe.offload.errors import ModelFileError, UsageError

SUMS = np.arange(12, dtype=np.float32).reshape(3, 4)
UP = expert_key(0, "up", 0).name


@pytest.fixture
def imatrix() -> Imatrix:
    stack = InputSquares(SUMS, np.array([2, 0, 4], np.float32))
    dense = InputSquares(SUMS[1:2], np.array([8], np.float32))
    return Imatrix({UP: stack, "blk.0.attn_q.weight": dense}, ("a.txt", "b.txt"), 5, 512)


def test_a_written_file_has_llama_cpps_fields(tmp_path: Path, imatrix: Imatrix) -> None:
    write_imatrix(imatrix, tmp_path / "im.gguf")
    reader = gguf.GGUFReader(tmp_path / "im.gguf")
    fields = {key: reader.fields[key].contents() for key in reader.fields if not key.startswith("GGUF.")}
    expected = {"imatrix.datasets": ["a.txt", "b.txt"], "imatrix.chunk_count": 5, "imatrix.chunk_size": 512}
    assert fields == expected | {"general.type": "imatrix"}
    for key in ("imatrix.chunk_count", "imatrix.chunk_size"):
        assert reader.fields[key].types == [gguf.GGUFValueType.UINT32]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert np.array_equal(tensors[f"{UP}.in_sum2"].data, SUMS)
    assert tensors[f"{UP}.counts"].data.tolist() == [[2], [0], [4]]
    assert tensors["blk.0.attn_q.weight.counts"].shape.tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["im.gguf"]


def test_what_is_written_is_read(tmp_path: Path, imatrix: Imatrix) -> None:
    write_imatrix(imatrix, tmp_path / "im.gguf")
    again = read_imatrix(tmp_path / "im.gguf")
    assert (again.datasets, again.n_chunks, again.chunk_size) == (("a.txt", "b.txt"), 5, 512)
    for name, entry in imatrix.entries.items():
        assert np.array_equal(again.entries[name].sums, entry.sums)
        assert np.array_equal(again.entries[name].counts, entry.counts)


def test_experts_never_met_count_like_the_others(imatrix: Imatrix) -> None:
    met, unmet = (imatrix.importance(MatrixKey(UP, expert), 4) for expert in (2, 1))
    assert met is not None
    assert unmet is not None
    assert met.tolist() == [2, 2.25, 2.5, 2.75]
    assert unmet.tolist() == pytest.approx([8 / 6, 10 / 6, 12 / 6, 14 / 6])
    assert imatrix.coverage == {UP: (2, 3)}
    assert imatrix.importance(MatrixKey("blk.9.attn_q.weight"), 4) is None
    nothing = InputSquares(np.zeros((2, 4), np.float32), np.zeros(2, np.float32))
    assert nothing.means(1).tolist() == [1, 1, 1, 1]


def test_the_older_form(tmp_path: Path) -> None:
    name = UP.encode()
    data = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 4, 12) + SUMS.tobytes() + struct.pack("<i", 7)
    (tmp_path / "old.dat").write_bytes(data)
    old = read_imatrix(tmp_path / "old.dat")
    importance = old.importance(MatrixKey(UP, 2), 4)
    assert importance is not None
    assert importance.tolist() == [2, 2.25, 2.5, 2.75]
    with pytest.raises(UsageError, match="rows of 12 weights, but the model's have 5"):
        old.importance(MatrixKey(UP, 0), 5)


@pytest.mark.parametrize("data", [b"", b"\x01\0\0\0\xff\xff\xff\x7f", b"hello world, this is text", b"\0" * 64])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(ModelFileError, match="no imatrix file"):
        read_imatrix(tmp_path / "bad")


def test_sums_that_are_none_are_refused(tmp_path: Path) -> None:
    for bad in (-1.0, np.nan):
        entry = InputSquares(np.full((1, 4), bad, np.float32), np.ones(1, np.float32))
        write_imatrix(Imatrix({"x.weight": entry}), tmp_path / "bad.gguf")
        with pytest.raises(ModelFileError, match="weight has values that cannot be sums"):
            read_imatrix(tmp_path / "bad.gguf")


def test_a_calibration_as_an_imatrix() -> None:
    vector = np.arange(1, 5, dtype=np.float32)
    hidden = np.ones((3, 6), np.float32)
    inputs = InputSums(SUMS, hidden, vector, 2 * vector, 3 * vector)
    picks = np.array([2, 0, 4])
    zeros = np.zeros(3)
    outputs = OutputSums(picks, zeros, zeros, zeros, zeros, zeros, zeros, SUMS, SUMS, SUMS, SUMS)
    layer = LayerStatistics(SimilaritySums(0, 0, 0, 0, 0), inputs, outputs=outputs)
    counts = np.zeros(9, np.int64)
    made = imatrix_of(Statistics("s", "t", ((1, 2), (3,)), ("code", "code"), (layer,), 4 * vector, counts))
    down = made.entries[expert_key(0, "down", 0).name]
    assert np.array_equal(down.sums, hidden)
    assert down.counts.tolist() == [2, 0, 4]
    assert np.array_equal(made.entries[UP].sums, SUMS)
    assert made.entries["blk.0.attn_output.weight"].means(0).tolist() == pytest.approx((2 * vector / 3).tolist())
    assert made.entries["output.weight"].means(0).tolist() == pytest.approx((4 * vector / 3).tolist())
    assert (made.datasets, made.n_chunks) == (("code",), 2)
