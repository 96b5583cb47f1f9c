"""What is copied out of a cache, and into it, lies where whoever looks at the whole tensor sees it."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import CpuBackend
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.memory.contents import read_rows, read_state, row_shape, write_rows, write_state
from slimoe.offload.memory.kv_cache import KVSize
from slimoe.offload.memory.kv_store import HOST, KVPlace, KVStore
from slimoe.offload.model.model_file import ModelFile
from tests.models.gguf_content import Array
from tests.models.tiny_gguf import FineShape, write_family

CELLS = [[0, 1, 2, 3], [7], [9, 8, 7], [250, 251, 3, 4, 5, 100, 0, 255], list(range(0, 256, 2))]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KVStore]:
    path = write_family(
        tmp_path_factory.mktemp("m") / "m.gguf", "qwen3next", shape=FineShape(n_layer=4, n_embd_head=64)
    )
    spec = ModelFile.of(read_gguf(path)).spec
    with closing(CpuBackend(1)) as backend, closing(KVStore(spec, KVSize(Type.Q8_0, 256, 5))) as store:
        store.arrange({HOST: KVPlace(backend, (0, 1, 2, 3))})
        yield store


def whole(tensor: int) -> Array:
    """All that a tensor holds, as it lies in memory."""
    values = np.empty(int(ggml.ggml_nbytes(tensor)), np.uint8)
    ggml_backend.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
    return values


def fill(tensor: int, seed: int) -> Array:
    values = np.random.default_rng(seed).integers(0, 256, int(ggml.ggml_nbytes(tensor)), np.uint8)
    ggml_backend.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)
    return values


@pytest.mark.parametrize("cells", CELLS, ids=str)
def test_rows_of_cells(store: KVStore, cells: list[int]) -> None:
    for seed, tensor in enumerate(store.tensors()):
        n_heads, row_bytes = row_shape(tensor)
        expected = fill(tensor, seed).reshape(n_heads, store.size.n_cells, row_bytes)
        for heads in (range(n_heads), range(1, 2)):
            rows = read_rows(tensor, np.array(cells), heads)
            np.testing.assert_array_equal(rows, expected[heads.start : heads.stop, cells])


@pytest.mark.parametrize("cells", CELLS, ids=str)
def test_rows_are_written_where_they_belong(store: KVStore, cells: list[int]) -> None:
    for seed, tensor in enumerate(store.tensors()):
        n_heads, row_bytes = row_shape(tensor)
        expected = fill(tensor, seed).reshape(n_heads, store.size.n_cells, row_bytes)
        rows = np.random.default_rng(99).integers(0, 256, (n_heads, len(cells) + 3, row_bytes), np.uint8)
        write_rows(tensor, np.array(cells), range(n_heads), rows[:, 3:])
        expected[:, cells] = rows[:, 3:]
        np.testing.assert_array_equal(whole(tensor), expected.reshape(-1))


def test_no_cells(store: KVStore) -> None:
    tensor = store.tensors()[0]
    before = fill(tensor, 1)
    none = np.empty(0, np.int64)
    rows = read_rows(tensor, none, range(row_shape(tensor)[0]))
    write_rows(tensor, none, range(row_shape(tensor)[0]), rows)
    assert rows.size == 0
    np.testing.assert_array_equal(whole(tensor), before)


def test_states(store: KVStore) -> None:
    assert store.state_tensors()
    for seed, tensor in enumerate(store.state_tensors()):
        expected = fill(tensor, seed).reshape(store.size.n_states, -1)
        np.testing.assert_array_equal(read_state(store, tensor, 3), expected[3])
        write_state(store, tensor, 1, read_state(store, tensor, 4))
        expected[1] = expected[4]
        np.testing.assert_array_equal(whole(tensor), expected.reshape(-1))
