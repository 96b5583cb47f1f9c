import contextlib
import random
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.offload.errors import ModelFileError, SlimoeError, UnsupportedModelError
from slimoe.offload.gguf.header import GGUFFile, number_array, read_gguf
from slimoe.offload.gguf.metadata_keys import MetadataKeys
from slimoe.offload.model.model_file import has_tokenizer
from slimoe.offload.plan.engine_plan import plan_engine
from slimoe.offload.text.tokenizer import Tokenizer
from tests.models.configs import engine_config
from tests.models.gguf_content import (
    GGUFContent,
    StoredKey,
    StoredTensor,
    finish,
    quantise,
    read_content,
    stored,
    write_content,
    write_shards,
)
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, sentencepiece_path: Path) -> Path:
    directory = tmp_path_factory.mktemp("gguf")
    return write_tiny_gguf(directory / "tiny.gguf", sentencepiece_path, shape=TinyShape(n_layer=1, n_embd=32, n_ff=32))


@pytest.fixture(scope="module")
def content(tiny: Path) -> GGUFContent:
    return read_content(tiny)


def header_bytes(path: Path) -> int:
    return min(tensor.offset for tensor in read_gguf(path).tensors.values())


def assert_same_as_ggufs_own_reader(file: GGUFFile, path: Path) -> None:
    reader = gguf.GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(file.metadata) == list(fields)
    for name, field in fields.items():
        expected = field.contents()
        value = file.metadata[name]
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected, name
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = file.tensors[tensor.name]
        assert info.ne == tuple(tensor.shape)
        assert (info.type, info.offset, info.n_bytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        assert info.n_elements == tensor.n_elements


def test_a_file_is_what_ggufs_own_reader_sees(tiny: Path) -> None:
    assert_same_as_ggufs_own_reader(read_gguf(tiny), tiny)


def test_every_kind_of_value_and_tensor(tmp_path: Path) -> None:
    kinds = gguf.GGUFValueType
    keys = {
        "u8": StoredKey(200, kinds.UINT8),
        "i8": StoredKey(-100, kinds.INT8),
        "u16": StoredKey(60000, kinds.UINT16),
        "i16": StoredKey(-30000, kinds.INT16),
        "i32": StoredKey(-(2**31), kinds.INT32),
        "u64": StoredKey(2**63 + 1, kinds.UINT64),
        "i64": StoredKey(-(2**63), kinds.INT64),
        "f64": StoredKey(1e300, kinds.FLOAT64),
        "yes": stored(True),
        "text": stored("naïve 日本語"),
        "empty": stored(""),
        "numbers": StoredKey([1, -2, 3], kinds.ARRAY, kinds.INT16),
        "flags": StoredKey([True, False], kinds.ARRAY, kinds.BOOL),
        "texts": StoredKey(["a", "", "ü"], kinds.ARRAY, kinds.STRING),
    }
    values = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    tensors = {kind.name: quantise(values, kind) for kind in (Type.Q4_K, Type.Q8_0, Type.IQ4_XS, Type.MXFP4)}
    tensors["vector"] = StoredTensor(values[0], Type.F32)
    tensors["half"] = StoredTensor(values.reshape(3, 2, 8, 16).astype(np.float16), Type.F16)
    path = write_content(tmp_path / "m.gguf", GGUFContent({"general.architecture": stored("llama")} | keys, tensors))
    assert_same_as_ggufs_own_reader(read_gguf(path), path)


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_alignment(tmp_path: Path, content: GGUFContent, alignment: int) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(alignment)
    for name, tensor in content.tensors.items():
        writer.add_tensor(name, tensor.data)
    finish(writer)
    assert_same_as_ggufs_own_reader(read_gguf(tmp_path / "m.gguf"), tmp_path / "m.gguf")


def test_shards_are_one_file(tmp_path: Path, tiny: Path, content: GGUFContent) -> None:
    first = write_shards(tmp_path, content, 3)
    for path in (first, tmp_path / "m-00003-of-00003.gguf"):
        file = read_gguf(path)
        assert file.path == first
        assert set(file.tensors) == set(content.tensors)
        assert file.metadata["tokenizer.ggml.tokens"] == read_gguf(tiny).metadata["tokenizer.ggml.tokens"]
        for name, tensor in content.tensors.items():
            info = file.tensors[name]
            raw = file.paths[info.shard].read_bytes()[info.offset : info.offset + info.n_bytes]
            assert raw == tensor.data.tobytes()
    assert file.n_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_wrong_shards(tmp_path: Path, content: GGUFContent) -> None:
    first = write_shards(tmp_path, content, 3)
    second = tmp_path / "m-00002-of-00003.gguf"
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(ModelFileError, match=r"shard m-00002-of-00003\.gguf is missing"):
        read_gguf(first)
    second.write_bytes((tmp_path / "m-00003-of-00003.gguf").read_bytes())
    with pytest.raises(ModelFileError, match="occurs twice"):
        read_gguf(first)
    write_content(second, GGUFContent({}, {}).with_values({"other": np.ones((2, 2), np.float32)}))
    with pytest.raises(ModelFileError, match="tensors are declared"):
        read_gguf(first)
    second.write_bytes(kept)
    read_gguf(first)
    shutil.copy(second, tmp_path / "m-00002-of-00002.gguf")
    with pytest.raises(ModelFileError, match="the file says it has 3 shards, its name says 2"):
        read_gguf(shutil.copy(first, tmp_path / "m-00001-of-00002.gguf"))
    alone = first.rename(tmp_path / "alone.gguf")
    with pytest.raises(ModelFileError, match="this is shard 1 of 3, and its name does not say so"):
        read_gguf(alone)


@pytest.mark.parametrize("name", ["m-00001-of-00000.gguf", "m-00000-of-00001.gguf", "m-00003-of-00002.gguf"])
def test_shard_names_that_cannot_be(tmp_path: Path, tiny: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(tiny.read_bytes())
    with pytest.raises(ModelFileError, match="counts its shards wrongly"):
        read_gguf(path)


def test_truncated_anywhere(tmp_path: Path, tiny: Path) -> None:
    whole = tiny.read_bytes()
    header = header_bytes(tiny)
    path = tmp_path / "m.gguf"
    rng = random.Random(0)
    ends = {*range(0, 64), *rng.sample(range(header), 100), header, len(whole) - 40}
    for end in sorted(ends):
        path.write_bytes(whole[:end])
        with pytest.raises(ModelFileError, match=r"ends|truncated|too short"):
            read_gguf(path)


def test_damaged_anywhere(tmp_path: Path, tiny: Path) -> None:
    """Whatever byte of the header is wrong: an error of ours, or a file that still makes sense."""
    whole, header = tiny.read_bytes(), header_bytes(tiny)
    path = tmp_path / "m.gguf"
    rng = random.Random(1)
    # The keys before the vocabulary and the tensors behind it are where numbers stand.
    keys = whole.index(b"tokenizer.ggml.tokens") + 60
    tensors = whole.rindex(b"tokenizer.")
    places = [*range(24, keys), *range(tensors, header)]
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            at = rng.choice(places) if rng.random() < 0.9 else rng.randrange(header)
            damaged[at] = rng.choice((damaged[at] ^ 1 << rng.randrange(8), 0, 255, rng.randrange(256)))
        path.write_bytes(damaged)
        with contextlib.suppress(SlimoeError):
            plan = plan_engine(engine_config(path, n_threads=1))
            if has_tokenizer(plan.gguf):
                Tokenizer.open(plan.gguf).close()


def raw_header(n_tensors: int, n_keys: int, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + body


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def tensor(name: bytes, ne: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return struct.pack(f"<Q{len(name)}sI{len(ne)}QIQ", len(name), name, len(ne), *ne, kind, offset)


@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        (b"", ModelFileError, "too short"),
        (b"no model" * 20, ModelFileError, "not a GGUF file"),
        (b"PK\3\4" + bytes(100), UnsupportedModelError, "PyTorch pickles"),
        (raw_header(0, 0, version=1), UnsupportedModelError, "version 1 is not readable"),
        (raw_header(0, 0, version=4), UnsupportedModelError, "version 4 is not readable"),
        (raw_header(0, 0, version=3 << 24), UnsupportedModelError, "big-endian"),
        (raw_header(2**60, 0), ModelFileError, "ends inside its header"),
        (raw_header(0, 2**60), ModelFileError, "ends inside its header"),
        (raw_header(0, 2**60, bytes(1000)), ModelFileError, "twice"),
        (raw_header(0, 1, struct.pack("<Q", 2**63)), ModelFileError, "a string of"),
        (raw_header(0, 1, key(b"a", 9, struct.pack("<IQ", 8, 2**62))), ModelFileError, "an array of"),
        (raw_header(0, 1, key(b"a", 9, struct.pack("<IQ", 8, 2**20))), ModelFileError, "ends inside its header"),
        (raw_header(0, 1, key(b"a", 9, struct.pack("<IQ", 12, 2**20))), ModelFileError, "ends inside its header"),
        (raw_header(0, 1, key(b"a", 9, struct.pack("<IQ", 9, 1))), UnsupportedModelError, "array of kind 9"),
        (raw_header(0, 1, key(b"a", 13, b"")), ModelFileError, "unknown kind 13"),
        (raw_header(1, 0, tensor(b"t", (4,), kind=99)), UnsupportedModelError, "type 99"),
        (raw_header(1, 0, tensor(b"t", (4,), kind=4)), UnsupportedModelError, "type 4"),
        (raw_header(1, 0, tensor(b"t", (33,), kind=12)), ModelFileError, "do not divide into Q4_K"),
        (raw_header(1, 0, tensor(b"t", (0, 4))), ModelFileError, "empty shape"),
        (raw_header(1, 0, tensor(b"t", (2**63, 2**63, 4))), ModelFileError, "truncated"),
        (raw_header(1, 0, tensor(b"t", (4,) * 5)), ModelFileError, "5 dimensions"),
        (raw_header(1, 0, tensor(b"t", (4,), offset=64) + bytes(200)), ModelFileError, "belongs at"),
        (raw_header(2, 0, tensor(b"t", (4,)) + tensor(b"t", (4,), offset=32) + bytes(99)), ModelFileError, "twice"),
        (raw_header(0, 1, key(b"general.alignment", 4, b"\3\0\0\0")), ModelFileError, "alignment 3"),
        (raw_header(0, 1, key(b"split.count", 8, struct.pack("<Q", 1) + b"x")), ModelFileError, "no count"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_made_up_headers(tmp_path: Path, raw: bytes, error: type[Exception], message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw.ljust(24, b"\0") if raw.startswith(b"GGUF") else raw)
    with pytest.raises(error, match=message):
        read_gguf(path)


@pytest.mark.parametrize("value", [["a", "b"], "ab", 3, None, True, np.zeros((2, 2))])
def test_what_is_no_array_of_numbers(value: Any) -> None:
    assert number_array(value) is None


def test_arrays_of_numbers() -> None:
    for value in ([1, 2], np.array([1, 2], np.int32)):
        array = number_array(value)
        assert array is not None
        assert array.tolist() == [1, 2]


def test_long_texts_in_place_of_numbers_take_no_memory(tmp_path: Path, content: GGUFContent) -> None:
    """numpy would give each of 3,000 texts the room of the longest: gigabytes."""
    texts = StoredKey(["a" * 100_000, *["b"] * 3000], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING)
    path = write_content(tmp_path / "m.gguf", replace(content, keys=content.keys | {"llama.rope.extra": texts}))
    tracemalloc.start()
    with pytest.raises(ModelFileError, match="no array of integers"):
        MetadataKeys(read_gguf(path), "llama.").integers("rope.extra", 3001)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_a_big_endian_file(tmp_path: Path, content: GGUFContent) -> None:
    path = write_content(tmp_path / "m.gguf", content, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(UnsupportedModelError, match="big-endian"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "this is a directory"),
        (lambda path: None, "there is no such file"),
        (lambda path: path.symlink_to(path), "cannot be read"),
    ],
)
def test_paths_that_are_no_files(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "m.gguf"
    make(path)
    with pytest.raises(ModelFileError, match=message):
        read_gguf(path)
