"""Copies to a device: through pinned memory and without, in order, and behind what is demanded."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Event, get_ident

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from bench.baselines.rpc_server import RpcServer, rpc_server
from slimoe.offload.cache.uploads import Uploads, pinned_bytes
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.device_backend import DeviceBackend
from slimoe.offload.ggml.devices import Device, available_devices, choose_devices
from slimoe.offload.model.experts import SlotClass
from tests.offload.devices import KINDS, LOCAL, let_rpc_pin
from tests.offload.ggml.test_devices import tensors_on

PIECE = 1 << 12
N_PIECES = 8


@pytest.fixture(scope="module")
def server() -> Iterator[RpcServer]:
    with rpc_server() as server:
        yield server


@pytest.fixture(params=[*KINDS, "pinned rpc"])
def device(request: pytest.FixtureRequest, server: RpcServer, monkeypatch: pytest.MonkeyPatch) -> Device:
    if request.param in LOCAL:
        return choose_devices(request.param)[0]
    if request.param == "pinned rpc":
        let_rpc_pin(monkeypatch)
    return available_devices([server.endpoint])[-1]


@pytest.fixture
def pinning(server: RpcServer, monkeypatch: pytest.MonkeyPatch) -> Device:
    let_rpc_pin(monkeypatch)
    return available_devices([server.endpoint])[-1]


def room(device: Device) -> int:
    """Pinned memory for pieces of a size, where the device has a use for it."""
    return N_PIECES * PIECE if device.pins_host_memory else 0


@pytest.mark.parametrize("behind", [False, True])
def test_what_is_copied_arrives_whatever_becomes_of_the_memory(device: Device, behind: bool) -> None:
    """Also where it is many times as much as is pinned, at any place, over what was there before."""
    graphs, uploads = DeviceBackend(device), Uploads(device, room(device))
    with closing(graphs), closing(uploads), tensors_on(graphs) as tensors:
        assert uploads.n_bytes == room(device)
        tensor = tensors.new(Type.I8, 60 * PIECE)
        expected = np.zeros(60 * PIECE, np.int8)
        graphs.set(tensor, expected)
        random = np.random.default_rng(1)
        for begin, n in ((0, 60 * PIECE), (5, 1), (PIECE, 3 * PIECE), (PIECE + 8, 19 * PIECE - 3), (100, 0)):
            values = random.integers(-128, 128, n, dtype=np.int8)
            expected[begin : begin + n] = values
            copy = uploads.copy_behind if behind else uploads.copy
            copy(tensor, values.ctypes.data, n, begin)
            if device.pins_host_memory or behind:
                values[:] = 0
        graphs.wait(uploads.mark())
        there = np.empty_like(expected)
        graphs.get(tensor, there)
        np.testing.assert_array_equal(there, expected)
        uploads.settle()


def test_copies_wait_for_graphs_that_read_what_they_overwrite(device: Device) -> None:
    graphs, uploads = DeviceBackend(device), Uploads(device, room(device))
    with closing(graphs), closing(uploads), tensors_on(graphs) as tensors:
        n = 1 << 16
        source = tensors.new(Type.F32, n)
        output = ggml.ggml_add(tensors.ctx, source, source)
        graph, result = tensors.graph(output), np.empty(n, np.float32)
        results, mark = [], 0
        for number in range(1, 50):
            values = np.full(n, number, np.float32)
            uploads.wait(mark)
            uploads.copy(source, values.ctypes.data, values.nbytes, 0)
            graphs.wait(uploads.mark())
            graphs.compute_async(graph)
            mark = graphs.mark()
            if number % 7 == 0:
                graphs.get(output, result)
                results.append((number, result[0], result[-1]))
        assert results == [(number, 2 * number, 2 * number) for number in range(7, 50, 7)]


def test_pinned_memory_is_bounded_and_only_where_it_is_of_use(pinning: Device, server: RpcServer) -> None:
    small = SlotClass.of((Type.F32, (32, 8)), (Type.F32, (32, 8)), (Type.F32, (8, 33)))
    large = SlotClass.of(*[(Type.Q4_K, (4096, 14336))] * 3)
    assert pinned_bytes(pinning, [small]) == N_PIECES * 1280
    assert pinned_bytes(pinning, [small, large]) == 32 << 20
    assert pinned_bytes(pinning, []) == 0


@pytest.mark.parametrize("is_plain", [False, True], ids=["nothing", "plain memory"])
def test_without_pinned_memory_all_goes_on(pinning: Device, is_plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers give nothing, or memory of another type."""
    allocate, freed = ggml_backend.ggml_backend_buft_alloc_buffer, list[int]()
    free = ggml_backend.ggml_backend_buffer_free

    def free_noted(buffer: int) -> None:
        freed.append(buffer)
        free(buffer)

    with monkeypatch.context() as patch:
        if is_plain:
            patch.setattr(ggml_backend, "ggml_backend_buffer_get_type", lambda buffer: 1)
        else:
            patch.setattr(ggml_backend, "ggml_backend_buft_alloc_buffer", lambda buft, n: None)
        patch.setattr(ggml_backend, "ggml_backend_buffer_free", free_noted)
        uploads = Uploads(pinning, room(pinning))
    assert allocate is ggml_backend.ggml_backend_buft_alloc_buffer
    assert len(freed) == is_plain
    with closing(uploads), closing(DeviceBackend(pinning)) as graphs, tensors_on(graphs) as tensors:
        assert uploads.n_bytes == 0
        assert f"gave {pinning.name} no 32.0 KiB of pinned memory" in uploads.note
        tensor, there = tensors.new(Type.I8, 50_000), np.empty(50_000, np.int8)
        values = np.random.default_rng(1).integers(-128, 128, 50_000, dtype=np.int8)
        uploads.copy(tensor, values.ctypes.data, values.nbytes, 0)
        graphs.get(tensor, there)
        np.testing.assert_array_equal(there, values)


def test_what_is_demanded_goes_first(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of something that gives way one piece at most is sent after something that is demanded has begun."""
    sent, begun, send = list[bool](), Event(), DeviceBackend.set_async
    main = get_ident()

    def note_sent(backend: DeviceBackend, *values: object) -> None:
        sent.append(get_ident() == main)
        begun.set()
        send(backend, *values)  # type: ignore[arg-type]

    graphs, uploads = DeviceBackend(device), Uploads(device, room(device))
    values = np.ones(64 << 20, np.int8)
    with closing(graphs), closing(uploads), tensors_on(graphs) as tensors, ThreadPoolExecutor(1) as behind:
        slow, fast = tensors.new(Type.I8, values.nbytes), tensors.new(Type.I8, 20 * PIECE)
        monkeypatch.setattr(DeviceBackend, "set_async", note_sent)
        job = behind.submit(uploads.copy_behind, slow, values.ctypes.data, values.nbytes, 0)
        begun.wait()
        with uploads.demanded():
            n_before = len(sent)
            for _ in range(5):
                uploads.copy(fast, values.ctypes.data, 20 * PIECE, 0)
            during = sent[n_before:]
        job.result()
    assert during.count(False) <= 1
    assert len(sent) - sum(sent) > 100
