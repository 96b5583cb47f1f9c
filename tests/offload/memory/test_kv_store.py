"""Caches that move: what they hold goes along, whatever their layers' rows are."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import device as ggml_device
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import CpuBackend
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.memory.kv_cache import KVSize, kv_bytes
from slimoe.offload.memory.kv_store import HOST, KVPlace, KVStore
from slimoe.offload.model.model_file import ModelFile
from tests.models.gguf_content import Array
from tests.models.tiny_gguf import FineShape, write_family


def held(tensor: int) -> Array:
    values = np.empty(int(ggml.ggml_nbytes(tensor)), np.uint8)
    ggml_backend.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
    return values


@pytest.mark.parametrize(("name", "n_tensors"), [("deepseek2", 3), ("deepseek2-old", 6), ("qwen3moe", 6)])
def test_what_caches_hold_goes_along(tmp_path: Path, name: str, n_tensors: int) -> None:
    spec = ModelFile.of(read_gguf(write_family(tmp_path / "m.gguf", name, shape=FineShape(n_expert=16)))).spec
    with closing(CpuBackend(1)) as backend, closing(KVStore(spec, KVSize(Type.F16, 512))) as store:
        store.arrange({HOST: KVPlace(backend, (0, 1, 2))})
        before = store.tensors()
        assert len(before) == n_tensors
        assert sum(held(tensor).nbytes for tensor in before) == kv_bytes(spec, 512, Type.F16)
        rng = np.random.default_rng(2)
        expected = [rng.integers(0, 256, held(tensor).nbytes, np.uint8) for tensor in before]
        for tensor, values in zip(before, expected, strict=True):
            ggml_backend.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)
        store.arrange({HOST: KVPlace(backend, (1,)), "other": KVPlace(backend, (0, 2))})
        for tensor, values in zip(store.tensors(), expected, strict=True):
            np.testing.assert_array_equal(held(tensor), values)


@pytest.mark.parametrize("n_rows", [1, 2, 5])
def test_what_is_larger_than_a_device_gives_at_once_lies_in_several_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_rows: int
) -> None:
    spec = ModelFile.of(read_gguf(write_family(tmp_path / "m.gguf", "qwen3moe", shape=FineShape(n_expert=16)))).spec
    most = n_rows * kv_bytes(spec, 512, Type.F16) // 6 + 600  # of three layers' keys and values
    asked = list[int]()

    def allocate(backend: CpuBackend, n_bytes: int) -> int:
        asked.append(n_bytes)
        return original(backend, n_bytes)

    original = CpuBackend.allocate
    monkeypatch.setattr(CpuBackend, "allocate", allocate)
    monkeypatch.setattr(ggml_device, "ggml_backend_buft_get_max_size", lambda buft: most)
    with closing(CpuBackend(1)) as backend, closing(KVStore(spec, KVSize(Type.F16, 512))) as store:
        store.arrange({HOST: KVPlace(backend, (0, 1, 2))})
        assert len(asked) == -(-6 // n_rows)
        assert max(asked) <= most
        for number, tensor in enumerate(store.tensors()):
            values = np.full(held(tensor).nbytes, number, np.uint8)
            ggml_backend.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)
        assert [set(held(tensor)) for tensor in store.tensors()] == [{number} for number in range(6)]
