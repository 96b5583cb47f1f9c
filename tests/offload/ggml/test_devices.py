"""Devices: finding them, their memory, their graphs against the CPU's, and RPC servers that fail.

Runs on every GPU of the machine, and on an RPC device over the CPU.
"""

import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from bench.baselines.rpc_server import DEADLINE, ROOT, RpcServer, rpc_server
from slimoe.offload.errors import DeviceError, DoesNotFitError, UsageError
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import device as ggml_device
from slimoe.offload.ggml import ggml_rpc, rpc_endpoint
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import Backend, CpuBackend, EngineAbortedError
from slimoe.offload.ggml.device_backend import DeviceBackend
from slimoe.offload.ggml.devices import Device, available_devices, choose_devices
from slimoe.offload.ggml.rpc_endpoint import RpcEndpoint, check_answers, parse_endpoint
from tests.offload.devices import KINDS, LOCAL

VERSION = (7, 0)
ALIGNMENT = 256


@pytest.fixture(scope="module")
def server() -> Iterator[RpcServer]:
    with rpc_server() as server:
        yield server


@pytest.fixture(params=KINDS)
def device(request: pytest.FixtureRequest, server: RpcServer) -> Device:
    name = request.param
    if name == "rpc":
        return available_devices([server.endpoint])[-1]
    return choose_devices(name)[0]


@pytest.fixture
def backend(device: Device) -> Iterator[DeviceBackend]:
    with closing(DeviceBackend(device)) as backend:
        yield backend


# --- a small world of tensors ------------------------------------------------------------------------------


class Tensors:
    """Tensors by type and shape, fastest axis first, in one buffer of a backend, and graphs over them."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.ctx = ggml.ggml_init(ggml.InitParams(1 << 20, None, True))
        self.buffers: list[int] = []

    def new(self, kind: Type, *ne: int) -> int:
        tensor = ggml.ggml_new_tensor_4d(self.ctx, kind, *ne, *[1] * (4 - len(ne)))
        self.place([tensor])
        return int(tensor)

    def place(self, tensors: list[int]) -> None:
        sizes = [ggml_backend.ggml_backend_buft_get_alloc_size(self.backend.buft, tensor) for tensor in tensors]
        spaces = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        buffer = self.backend.allocate(sum(spaces) + ALIGNMENT)
        self.buffers.append(buffer)
        address = -(-ggml_backend.ggml_backend_buffer_get_base(buffer) // ALIGNMENT) * ALIGNMENT
        for tensor, space in zip(tensors, spaces, strict=True):
            ggml_backend.ggml_backend_tensor_alloc(buffer, tensor, address)
            address += space

    def graph(self, *nodes: int) -> int:
        self.place([*nodes])
        graph: int = ggml.ggml_new_graph_custom(self.ctx, 64, False)
        for node in nodes:
            ggml.ggml_build_forward_expand(graph, node)
        return graph

    def close(self) -> None:
        for buffer in self.buffers:
            ggml_backend.ggml_backend_buffer_free(buffer)
        ggml.ggml_free(self.ctx)


@contextmanager
def tensors_on(backend: Backend) -> Iterator[Tensors]:
    with closing(Tensors(backend)) as tensors:
        yield tensors


def quantized(kind: Type, *shape: int) -> NDArray[np.uint8]:
    """Random weights of a shape (fastest axis last) in ggml's own encoding, [rows..., bytes]."""
    values = np.random.default_rng(5).standard_normal(shape, dtype=np.float32)
    row_bytes = gguf.quant_shape_to_byte_shape(shape, kind)[-1]
    out = np.empty((*shape[:-1], row_bytes), np.uint8)
    n_rows = values.size // shape[-1]
    ggml.ggml_quantize_chunk(kind, values.ctypes.data, out.ctypes.data, 0, n_rows, shape[-1], None)
    return out


# --- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q4_K, Type.Q8_0, Type.Q6_K], ids=lambda kind: kind.name)
def test_bytes_come_back_as_they_went(backend: DeviceBackend, kind: Type) -> None:
    with tensors_on(backend) as tensors:
        tensor = tensors.new(kind, 512, 24, 3)
        n_bytes = ggml.ggml_nbytes(tensor)
        sent = np.random.default_rng(1).integers(0, 256, n_bytes, dtype=np.uint8)
        backend.set(tensor, sent)
        seen = np.zeros_like(sent)
        backend.get(tensor, seen)
        np.testing.assert_array_equal(seen, sent)
        third = n_bytes // 3
        backend.set(tensor, sent[:third].copy(), third)
        backend.get(tensor, seen[:third], third)
        np.testing.assert_array_equal(seen[:third], sent[:third])
        backend.get(tensor, seen)
        np.testing.assert_array_equal(seen, np.concatenate([sent[:third], sent[:third], sent[2 * third :]]))


def test_memory_that_the_device_does_not_have(backend: DeviceBackend) -> None:
    for n_bytes in (1 << 50, (1 << 64) - 1):
        with pytest.raises(DoesNotFitError, match=f"{backend.device.name} gave no .*GiB.*Lower --vram") as caught:
            backend.allocate(n_bytes)
        assert caught.value.required_bytes == n_bytes
        assert 0 < caught.value.available_bytes < n_bytes
    buffer = backend.allocate(1 << 20)
    assert ggml_backend.ggml_backend_buffer_get_size(buffer) >= 1 << 20
    ggml_backend.ggml_backend_buffer_free(buffer)


def test_what_ggml_says_of_it(backend: DeviceBackend) -> None:
    assert backend.alignment >= 1
    assert backend.max_buffer_bytes >= 1 << 20
    assert 0 < backend.free_bytes() <= backend.device.total_bytes
    assert backend.is_host == bool(ggml_device.ggml_backend_buft_is_host(backend.buft))


# --- graphs ------------------------------------------------------------------------------------------------


def products(backend: Backend, kind: Type, n_slots: int, order: list[int]) -> NDArray[np.float32]:
    """Rows times experts that were uploaded one by one into slots in an `order`, each row with one slot's matrix."""
    n_embd, n_ff, n_pairs = 512, 40, 9
    experts = quantized(kind, n_slots, n_ff, n_embd)
    rows = np.random.default_rng(2).standard_normal((n_pairs, 1, n_embd), dtype=np.float32)
    ids = np.random.default_rng(3).integers(0, n_slots, (n_pairs, 1)).astype(np.int32)
    with tensors_on(backend) as tensors:
        slots = tensors.new(kind, n_embd, n_ff, n_slots)
        inputs, selected = tensors.new(Type.F32, n_embd, 1, n_pairs), tensors.new(Type.I32, 1, n_pairs)
        for slot in order:
            backend.set(slots, experts[slot], slot * experts[slot].nbytes)
        backend.set(inputs, rows)
        backend.set(selected, ids)
        output = ggml.ggml_mul_mat_id(tensors.ctx, slots, inputs, selected)
        backend.compute(tensors.graph(output))
        result = np.empty((n_pairs, n_ff), np.float32)
        backend.get(output, result)
    return result


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q2_K, Type.Q8_0, Type.F32], ids=lambda kind: kind.name)
def test_experts_in_slots_are_multiplied_as_on_the_cpu(backend: DeviceBackend, kind: Type) -> None:
    with closing(CpuBackend(1)) as cpu:
        expected = products(cpu, kind, 5, [0, 1, 2, 3, 4])
    result = products(backend, kind, 5, [3, 0, 4, 2, 1])
    if backend.device.name in LOCAL:
        np.testing.assert_allclose(result, expected, rtol=0, atol=0.02 * np.abs(expected).max())
    else:
        np.testing.assert_array_equal(result, expected)


def doubling(tensors: Tensors, source: int) -> tuple[int, int]:
    """A graph that adds a tensor to itself, and its output."""
    output = ggml.ggml_add(tensors.ctx, source, source)
    return tensors.graph(output), output


def test_work_is_done_in_the_order_it_was_given(backend: DeviceBackend) -> None:
    with tensors_on(backend) as tensors:
        source = tensors.new(Type.F32, 1 << 16)
        graph, output = doubling(tensors, source)
        assert backend.supports(output)
        values = [np.full(1 << 16, number, np.float32) for number in range(6)]
        for value in values:
            backend.set_async(source, value)
            backend.compute_async(graph)
        result = np.empty(1 << 16, np.float32)
        backend.get(output, result)
        assert (result == 10).all()
        backend.set(source, values[1])
        backend.compute(graph)
        backend.synchronize()
        backend.get(output, result)
        assert (result == 2).all()


def test_a_second_queue_can_wait_for_the_first(device: Device) -> None:
    uploads, graphs = DeviceBackend(device), DeviceBackend(device)
    with closing(uploads), closing(graphs), tensors_on(graphs) as tensors:
        source = tensors.new(Type.F32, 1 << 16)
        graph, output = doubling(tensors, source)
        result = np.empty(1 << 16, np.float32)
        for number in range(1, 40):  # more than there are marks
            value = np.full(1 << 16, number, np.float32)
            uploads.set_async(source, value)
            graphs.wait(uploads.mark())
            graphs.compute_async(graph)
            graphs.get(output, result)
            assert (result == 2 * number).all()


def test_a_graph_that_is_cancelled_before_it_begins(backend: DeviceBackend) -> None:
    with tensors_on(backend) as tensors:
        source = tensors.new(Type.F32, 64)
        graph, output = doubling(tensors, source)
        ones, result = np.ones(64, np.float32), np.empty(64, np.float32)
        backend.set(source, ones)
        backend.compute_until(graph, lambda: False)
        backend.set(source, 3 * ones)
        with pytest.raises(EngineAbortedError):
            backend.compute_until(graph, lambda: True)
        backend.get(output, result)
        assert (result == 2).all()


# --- choosing ----------------------------------------------------------------------------------------------


def card(name: str, **changed: object) -> Device:
    return Device(name, "a card", 1 << 30, 1 << 31, 0, **changed)  # type: ignore[arg-type]


def chosen(wanted: str, *cards: Device) -> list[str]:
    """Names of the devices that are chosen on a machine with these cards."""
    return [device.name for device in choose_devices(wanted, find=lambda rpc: cards)]


def test_auto_takes_all_and_none_takes_none() -> None:
    cards = card("CUDA0"), card("CUDA1"), card("RPC0")
    assert [device.name for device in choose_devices(find=lambda rpc: cards)] == ["CUDA0", "CUDA1", "RPC0"]
    assert chosen("none", *cards) == []
    assert chosen("auto") == []


def test_auto_takes_no_card_twice_and_no_integrated_one_beside_others() -> None:
    cards = (
        card("CUDA0", hardware_id="0000:01:00.0"),
        card("Vulkan0", hardware_id="0000:01:00.0"),
        card("Vulkan1", is_integrated=True),
        card("RPC0"),
        card("RPC1"),
    )
    assert chosen("auto", *cards) == ["CUDA0", "RPC0", "RPC1"]
    assert chosen("vulkan0, Vulkan1", *cards) == ["Vulkan0", "Vulkan1"]
    assert chosen("auto", card("Vulkan0", is_integrated=True)) == ["Vulkan0"]


@pytest.mark.parametrize(
    ("description", "shares"),
    [(b"llvmpipe (LLVM 15.0.6, 256 bits)", True), (b"AMD Radeon RX 7600 (RADV)", False)],
)
def test_a_software_device_takes_the_host_s_memory(
    description: bytes, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ggml's Vulkan says of both that they are GPUs."""

    def get_props(device: int, address: int) -> None:
        props = ggml_device.DeviceProps.from_address(address)
        props.name, props.description, props.type = b"Vulkan0", description, ggml_device.TYPE_GPU

    monkeypatch.setattr(ggml_device, "ggml_backend_dev_count", lambda: 1)
    monkeypatch.setattr(ggml_device, "ggml_backend_dev_get", lambda index: 1)
    monkeypatch.setattr(ggml_device, "ggml_backend_dev_type", lambda device: ggml_device.TYPE_GPU)
    monkeypatch.setattr(ggml_device, "ggml_backend_dev_get_props", get_props)
    (found,) = available_devices()
    assert (found.name, found.shares_host_memory) == ("Vulkan0", shares)


def test_names_choose_and_order() -> None:
    assert chosen("RPC0,CUDA0,rpc0", card("CUDA0"), card("CUDA1"), card("RPC0")) == ["RPC0", "CUDA0"]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("none,CUDA0", "none takes no device. Write it alone"),
        ("CUDA0,NONE", "none takes no device. Write it alone"),
        ("auto,RPC0", "auto takes every GPU there is. Write it alone"),
        ("CUDA0,", "has nothing before or after a comma"),
        ("", "has nothing before or after a comma"),
    ],
)
def test_lists_of_names_that_make_no_sense(wanted: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        chosen(wanted, card("CUDA0"), card("RPC0"))
    assert repr(wanted) in str(refused.value)


def test_words_for_devices_in_any_case() -> None:
    assert chosen("None", card("CUDA0")) == []
    assert chosen("AUTO", card("CUDA0")) == ["CUDA0"]


@pytest.mark.parametrize("wanted", ["CUDA7", "CUDA0,CUDA7"])
def test_a_name_that_there_is_not(wanted: str) -> None:
    with pytest.raises(UsageError, match=r"no such device. There is CUDA0 \(a card\), RPC0 \(a card\)"):
        chosen(wanted, card("CUDA0"), card("RPC0"))


def test_a_name_where_there_is_nothing() -> None:
    with pytest.raises(UsageError, match="'CUDA0', but there is none on this machine"):
        chosen("CUDA0")


def test_none_and_a_server_contradict_each_other() -> None:
    with pytest.raises(UsageError, match="--device none takes no device, but --rpc names one"):
        choose_devices("none", ["127.0.0.1:1"])


def test_the_cpu_is_no_device(server: RpcServer) -> None:
    found = available_devices([server.endpoint, server.endpoint])
    assert tuple(device.name for device in found[:-1]) == LOCAL
    lent = found[-1]
    assert lent.name.startswith("RPC")
    assert lent.description == server.endpoint
    assert 0 < lent.free_bytes <= lent.total_bytes
    assert lent.shares_host_memory
    assert not any("CPU" in device.name for device in found)


def test_a_driver_that_fails_to_open(server: RpcServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml_device, "ggml_backend_dev_init", lambda handle, params: None)
    with pytest.raises(DeviceError, match=r"CUDA0 .* cannot be opened"):
        DeviceBackend(card("CUDA0"))


# --- RPC servers that do not do ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":1", "host:0", "host:65536", "host:x", "[::1]:5", "::1:5", "a b:1", "http://host:1"]
)
def test_what_is_no_endpoint(text: str) -> None:
    with pytest.raises(UsageError, match=r"--rpc is .* such as 10\.0\.0\.7:50052"):
        available_devices([text])


def test_endpoints() -> None:
    assert parse_endpoint("gpu-box.lan:50052") == RpcEndpoint("gpu-box.lan", 50052)
    assert [parse_endpoint(text).is_local for text in ("localhost:1", "127.0.0.9:1", "10.0.0.7:1")] == [1, 1, 0]


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    with pytest.raises(DeviceError, match=f"No RPC server answers at 127.0.0.1:{port} .*Connection refused"):
        available_devices([f"127.0.0.1:{port}"])


def test_a_name_that_nobody_has() -> None:
    with pytest.raises(DeviceError, match=r"No RPC server answers at no\.such\.host\.invalid:1"):
        available_devices(["no.such.host.invalid:1"])


@contextmanager
def answering(answer: bytes) -> Iterator[RpcEndpoint]:
    """A listener that says `answer` to every greeting and hangs up."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 10)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield RpcEndpoint("127.0.0.1", listener.getsockname()[1])
        thread.join()


def greeting(major: int, minor: int) -> bytes:
    return (28).to_bytes(8, "little") + bytes([major, minor, 0, 0]) + bytes(24)


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", greeting(7, 0)[:-1]],
    ids=["nothing", "http", "short"],
)
def test_what_answers_is_something_else(answer: bytes) -> None:
    with answering(answer) as endpoint, pytest.raises(DeviceError, match="is no RPC server of ggml"):
        check_answers(endpoint, VERSION)


@pytest.mark.parametrize("version", [(6, 0), (7, 1), (8, 0)])
def test_another_version_of_the_protocol(version: tuple[int, int]) -> None:
    with answering(greeting(*version)) as endpoint, pytest.raises(DeviceError, match=r"speaks version .* 7\.0 is"):
        check_answers(endpoint, VERSION)


def test_the_library_is_asked_for_its_protocol() -> None:
    assert ggml_rpc.own_version() == ggml_rpc.protocol_version() == VERSION


def test_a_server_that_another_client_has(server: RpcServer, monkeypatch: pytest.MonkeyPatch) -> None:
    first = DeviceBackend(available_devices([server.endpoint])[-1])
    with monkeypatch.context() as patch, closing(first):
        patch.setattr(rpc_endpoint, "PATIENCE_SECONDS", 0.2)
        with pytest.raises(DeviceError, match="serves one client at a time"):
            available_devices([server.endpoint])
    assert available_devices([server.endpoint])


def ran(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)


def test_a_ggml_without_rpc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMOE_LIBRARY", "xllamacpp")
    code = (
        "from slimoe.offload.errors import LibraryError\n"
        "from slimoe.offload.ggml.devices import choose_devices\n"
        "choose_devices('auto')\n"
        "try:\n    choose_devices('auto', ['127.0.0.1:1'])\n"
        "except LibraryError as error:\n    print(error)\n"
    )
    done = ran(code)
    assert re.match(
        r"xllamacpp \S+ has no RPC \(libggml-rpc\), which --rpc needs.* scripts/install native", done.stdout
    ), done.stderr


def test_a_server_that_is_killed_is_noticed() -> None:
    """ggml can only end the process, which is why the engine has one of its own."""
    code = (
        "import sys\nimport numpy as np\n"
        "from slimoe.offload.ggml.device_backend import DeviceBackend\n"
        "from slimoe.offload.ggml.devices import available_devices\n"
        "from tests.offload.ggml.test_devices import Tensors, Type\n"
        "backend = DeviceBackend(available_devices([sys.argv[1]])[-1])\n"
        "tensor = Tensors(backend).new(Type.F32, 64)\n"
        "print(flush=True)\nsys.stdin.readline()\n"
        "backend.get(tensor, np.empty(64, np.float32))\nprint('went on')\n"
    )
    with rpc_server() as server:
        command = [sys.executable, "-c", code, server.endpoint]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=ROOT, text=True, stdin=pipe, stdout=pipe, stderr=pipe) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "\n"
            server.kill()
            out, err = child.communicate("go\n", timeout=DEADLINE)
    assert child.returncode == -signal.SIGABRT
    assert out == ""
    assert "Remote RPC server crashed" in err
