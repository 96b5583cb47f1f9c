"""Measuring the machine, with clocks and backends whose speed is known, and remembering what was measured."""

import dataclasses
import json
import math
import re
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import msgspec
import pytest
from gguf import GGMLQuantizationType as Type

from bench.baselines.rpc_server import rpc_server
from slimoe.offload.cache.disk_reader import PAGE, Read, Urgency
from slimoe.offload.ggml.cpu_backend import CpuBackend
from slimoe.offload.ggml.device_backend import DeviceBackend
from slimoe.offload.ggml.devices import available_devices
from slimoe.offload.gguf.header import GGUFFile, read_gguf
from slimoe.offload.machine.kernel_bench import AttentionShape, KernelBench
from slimoe.offload.machine.measure import Calibration, KernelNeeds, Limits, kernel_needs
from slimoe.offload.machine.measurement_cache import MeasurementCache, default_path, machine_name
from slimoe.offload.machine.probe import FormSpeed, KernelSpeed, measured_speeds, measurement_name
from slimoe.offload.machine.speed import LinkSpeed, MachineSpeed, MatrixKernel, SpeedCurve
from slimoe.offload.machine.transfer_bench import (
    MAX_PIECE,
    N_UNDER_WAY,
    disk_bytes_per_second,
    link_speed,
    random_pieces,
    read_speed,
)
from slimoe.offload.model.experts import expert_layers
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import Span
from slimoe.offload.model.weight_reader import model_sources
from slimoe.offload.resources.system_files import SystemFiles
from tests.models.measured_machine import (
    BATCH_CELL_SECONDS,
    BYTE_SECONDS,
    CELL_SECONDS,
    GRAPH_SECONDS,
    OP_SECONDS,
    ROW_SECONDS,
    Clock,
    FarBackend,
    KnownBackend,
    machine,
    processor,
)
from tests.models.tiny_gguf import write_tiny_gguf

Q8 = MatrixKernel(Type.Q8_0, 256, True)
ATTENTION = AttentionShape(4, 2, 32, Type.F16)


@pytest.fixture
def cache(tmp_path: Path) -> MeasurementCache:
    """One that nothing disturbs, whatever else runs beside the tests."""
    return MeasurementCache(tmp_path / "cache" / "m.json", "this", SystemFiles(tmp_path / "proc"))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    return read_gguf(write_tiny_gguf(tmp_path_factory.mktemp("speed") / "m.gguf", None))


def needs_of(gguf: GGUFFile) -> KernelNeeds:
    spec = ModelSpec.from_gguf(gguf)
    sources = model_sources(gguf, spec)
    return kernel_needs(spec, sources, expert_layers(sources, spec))


# --- values ------------------------------------------------------------------------------------------------


def link_figures(link: LinkSpeed) -> tuple[float, float, float]:
    return link.to_device, link.from_device, link.round_trip


def test_a_curve_is_straight_between_its_points_and_proportional_outside() -> None:
    curve = SpeedCurve((1, 4, 16), (1.0, 2.5, 5.0))
    assert [curve.seconds(10, n) for n in (1, 4, 16)] == [10, 25, 50]
    assert curve.seconds(10, 2) == pytest.approx(15)
    assert curve.seconds(10, 10) == pytest.approx(37.5)
    assert curve.seconds(10, 64) == pytest.approx(200)
    assert curve.seconds(10, 0.5) == pytest.approx(5)
    assert curve.seconds(10, 0) == 0


@pytest.mark.parametrize("points", [(), (1,), (1, 1), (4, 1), (1, 4, 16)])
def test_a_curve_that_is_none_is_refused(points: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="as many speeds as ascending row counts"):
        SpeedCurve(points, (1.0, 2.0))


def test_a_machine_survives_json() -> None:
    speed = machine(processor(1e9, [Q8]), 1e9, processor(1e11, [Q8]))
    assert msgspec.json.decode(msgspec.json.encode(speed), type=MachineSpeed) == speed


@pytest.mark.parametrize("value", ["0", "-1.0", "1e300", '"fast"', "null", "[]"])
def test_speeds_that_are_none_are_refused(value: str) -> None:
    text = msgspec.json.encode(machine(processor(1e9, [Q8]), 12345.0)).decode()
    damaged = text.replace('"graph_seconds":1e-12', f'"graph_seconds":{value}')
    assert damaged != text
    with pytest.raises(ValueError, match="graph_seconds"):
        msgspec.json.decode(damaged, type=MachineSpeed)


# --- the cache ---------------------------------------------------------------------------------------------


def test_what_was_put_is_there_for_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "new" / "m.json"
    MeasurementCache(path, "a").put({"link": LinkSpeed(1.0, 2.0), "curve": SpeedCurve((1,), (3.0,))})
    MeasurementCache(path, "b").put({"link": LinkSpeed(5.0, 6.0)})
    MeasurementCache(path, "a").put({"other": LinkSpeed(7.0, 8.0)})
    again = MeasurementCache(path, "a")
    assert again.get("link", LinkSpeed) == LinkSpeed(1.0, 2.0)
    assert again.get("curve", SpeedCurve) == SpeedCurve((1,), (3.0,))
    assert again.get("other", LinkSpeed) == LinkSpeed(7.0, 8.0)
    assert MeasurementCache(path, "b").get("link", LinkSpeed) == LinkSpeed(5.0, 6.0)
    assert MeasurementCache(path, "b").get("curve", SpeedCurve) is None
    assert [file.name for file in path.parent.iterdir()] == ["m.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"null",
        b"[1, 2]",
        b'{"format": 2, "machines": {"this": {"link": {"to_device": 5, "from_device": 5}}}}',
        b'{"format": 3}',
        b'{"format": 3, "machines": 5}',
        b'{"format": 3, "machines": {"this": 5}}',
        b'{"format": 3, "machines": {"this": {"link": 5}}}',
        b'{"format": 3, "machines": {"this": {"link": {"to_device": -1, "from_device": 1}}}}',
        b'{"format": 3, "machines": {"this": {"link": {"to_device": NaN, "from_device": 1}}}}',
        b"[" * 100_000,
    ],
    ids=range(13),
)
def test_a_damaged_or_foreign_file_is_measured_over(cache: MeasurementCache, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cache" / "m.json"
    path.parent.mkdir()
    path.write_bytes(content)
    assert cache.get("link", LinkSpeed) is None
    cache.put({"link": LinkSpeed(1.0, 2.0)})
    assert cache.get("link", LinkSpeed) == LinkSpeed(1.0, 2.0)
    assert json.loads(path.read_text())["machines"]["this"]["link"] == {
        "to_device": 1.0,
        "from_device": 2.0,
        "round_trip": 0.0,
        "is_apart": False,
    }


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = MeasurementCache(tmp_path / "file" / "m.json", "this")
    cache.put({"link": LinkSpeed(1.0, 2.0)})
    assert cache.get("link", LinkSpeed) is None
    (tmp_path / "folder" / "m.json").mkdir(parents=True)
    MeasurementCache(tmp_path / "folder" / "m.json", "this").put({"link": LinkSpeed(1.0, 2.0)})
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["m.json"]


def test_the_cache_lies_where_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLIMOE_CACHE", str(tmp_path / "here"))
    assert default_path() == tmp_path / "here" / "measurements.json"
    assert machine_name() == machine_name()


# --- kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [Q8, MatrixKernel(Type.Q8_0, 256, False)], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("every", [0, 5], ids=["quiet", "each fifth run takes 30 times as long"])
def test_the_speed_of_products_is_found(kernel: MatrixKernel, every: int) -> None:
    clock = Clock()
    backend = KnownBackend(clock, lambda n: 30.0 if every and n % every == 0 else 1.0)
    with closing(backend), closing(KernelBench(backend, 16 << 20, clock)) as bench:
        curve = bench.curve(kernel, 1000)
    for n_rows, seconds in zip(curve.n_rows, curve.seconds_per_byte, strict=True):
        assert seconds == pytest.approx(BYTE_SECONDS + n_rows * ROW_SECONDS, rel=1e-3)


def test_the_overheads_are_found() -> None:
    clock = Clock()
    backend = KnownBackend(clock, lambda n: 1.0 if n % 3 else 10.0)
    with closing(backend), closing(KernelBench(backend, 0, clock)) as bench:
        overheads = bench.overheads()
        assert bench.is_steady
    assert overheads.graph_seconds == pytest.approx(GRAPH_SECONDS + 2 * OP_SECONDS)
    assert overheads.op_seconds == pytest.approx(OP_SECONDS)
    assert overheads.view_seconds == pytest.approx(OP_SECONDS)  # it takes views for operations


@pytest.mark.parametrize("shape", [ATTENTION, AttentionShape(64, 64, 128, Type.F16)], ids=lambda shape: shape.name)
def test_the_speed_of_attention_is_found(shape: AttentionShape) -> None:
    """With little memory and large heads over fewer cells."""
    clock = Clock()
    with closing(KnownBackend(clock)) as backend, closing(KernelBench(backend, 0, clock)) as bench:
        assert bench.attention(shape) == pytest.approx(CELL_SECONDS)
        assert bench.attention(shape, 64) == pytest.approx(BATCH_CELL_SECONDS)


def test_weights_are_not_found_in_a_cache() -> None:
    """Between two reads of the same weights lie as many others as the memory holds."""
    clock = Clock()
    backend = KnownBackend(clock)
    n_bytes = 8 << 20
    with closing(backend), closing(KernelBench(backend, n_bytes, clock)) as bench:
        bench.curve(Q8, 512)
    matrix_bytes = 512 * 256 // 32 * 34
    begins = backend.addresses[:200]
    distances = [begins[n + 1 :].index(begin) for n, begin in enumerate(begins) if begin in begins[n + 1 :]]
    assert distances
    assert (min(distances) + 1) * matrix_bytes > n_bytes - 2 * matrix_bytes
    assert max(begins) + matrix_bytes - min(begins) <= n_bytes


def test_noise_is_noticed() -> None:
    clock = Clock()
    backend = KnownBackend(clock, lambda n: 1.0 if n % 2 else 9.0)
    with closing(backend), closing(KernelBench(backend, 4 << 20, clock)) as bench:
        bench.curve(Q8, 64)
        assert not bench.is_steady
        backend.noise = lambda n: 1.0
        bench.curve(Q8, 64)
        assert bench.is_steady


def test_what_takes_less_than_nothing_is_noise() -> None:
    clock = Clock()
    backend = KnownBackend(clock)
    with closing(backend), closing(KernelBench(backend, 4 << 20, clock)) as bench:
        backend.noise = lambda n: 0.0
        assert 0 < bench.attention(ATTENTION) < CELL_SECONDS / 1e3
        assert not bench.is_steady


def test_more_rows_are_never_said_to_be_faster() -> None:
    clock = Clock()
    with (
        closing(KnownBackend(clock, row_seconds=-3e-12)) as backend,
        closing(KernelBench(backend, 4 << 20, clock)) as bench,
    ):
        speeds = bench.curve(Q8, 64).seconds_per_byte
    assert speeds == pytest.approx([BYTE_SECONDS - 3e-12] * len(speeds))


@pytest.mark.parametrize("kind", [Type.F32, Type.BF16, Type.Q4_K, Type.IQ1_S, Type.IQ4_XS], ids=lambda kind: kind.name)
def test_every_type_can_be_measured(kind: Type) -> None:
    """Those as well that need an importance matrix to be quantised, and do it slowly."""
    clock = Clock()
    with closing(KnownBackend(clock)) as backend, closing(KernelBench(backend, 0, clock)) as bench:
        assert all(speed > 0 for speed in bench.curve(MatrixKernel(kind, 256, True), 96).seconds_per_byte)


# --- disk and link -----------------------------------------------------------------------------------------


class _KnownDisk:
    """Reads 1.25 GB in a second, one read after the other."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.under_way, self.most = clock, 0, 0
        self.addresses: set[int] = set()

    def submit(self, parts: list[tuple[Span, int]], *, demanded: bool) -> Read:
        assert demanded
        (span, address), *others = parts
        assert not others
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        self.addresses.add(address)
        return Read(deque(), span.n_bytes, 0, Urgency.DEMANDED)

    def wait(self, read: Read) -> None:
        self.under_way -= 1
        self.clock.now += read.n_bytes / 1.25e9


def _pieces(n_bytes: int) -> Iterator[Span]:
    while True:
        yield Span(0, 0, n_bytes)


@pytest.mark.parametrize("n_bytes", [50_000, 3 << 20, 200 << 20])
def test_the_speed_of_the_disk_is_found(n_bytes: int) -> None:
    clock = Clock()
    disk = _KnownDisk(clock)
    # The memory of the largest is never touched, so that it costs nothing.
    assert read_speed(disk, _pieces(n_bytes), clock) == pytest.approx(1.25e9)
    assert (disk.under_way, disk.most) == (0, N_UNDER_WAY if n_bytes < 1 << 24 else 1)
    assert len(disk.addresses) == disk.most
    assert all(address % PAGE == 0 for address in disk.addresses)
    assert clock.now < 0.7


@pytest.mark.parametrize("n_bytes", [50_000, 3 << 20])
def test_the_disk_is_read_to_huge_pages_as_the_engine_reads_it(n_bytes: int) -> None:
    """To small ones it gave half as many bytes in a second, and plans expected a third more time than was taken."""
    flags = dict[int, list[str]]()

    class Disk(_KnownDisk):
        def submit(self, parts: list[tuple[Span, int]], *, demanded: bool) -> Read:
            flags.update((address, _flags_of_memory(address)) for _, address in parts if address not in flags)
            return super().submit(parts, demanded=demanded)

    disk = Disk(Clock())
    read_speed(disk, _pieces(n_bytes), disk.clock)
    has_huge_pages = Path("/sys/kernel/mm/transparent_hugepage").exists()
    assert ["hg" in of for of in flags.values()] == [has_huge_pages] * N_UNDER_WAY


def _flags_of_memory(address: int) -> list[str]:
    """What the system notes of the memory that an address lies in (VmFlags of proc(5); hg: on huge pages if it can)."""
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_there = int(found[1], 16) <= address < int(found[2], 16)
        elif is_there and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise LookupError(hex(address))


def test_pieces_lie_within_the_file(gguf: GGUFFile) -> None:
    size = gguf.path.stat().st_size
    pieces = list(islice(random_pieces(gguf, 1000), 50))
    assert len({piece.offset for piece in pieces}) > 10
    assert all(piece.offset + piece.n_bytes <= size and piece.n_bytes == 1000 for piece in pieces)
    assert next(random_pieces(gguf, 1 << 40)) == Span(0, 0, min(size, MAX_PIECE))


@pytest.mark.parametrize("direct", [True, False])
def test_a_real_file_is_read(gguf: GGUFFile, direct: bool) -> None:
    speed = disk_bytes_per_second(gguf, 10_000, direct)
    assert 0 < speed < math.inf


def test_the_speed_of_a_link_is_found() -> None:
    clock = Clock()
    with closing(FarBackend(clock)) as backend:
        speed = link_speed(backend, 1 << 20, clock)
    assert speed.to_device == pytest.approx(2e9, rel=1e-3)
    assert speed.from_device == pytest.approx(1e9, rel=1e-3)
    assert speed.round_trip == pytest.approx(5e-6, rel=1e-3)


# --- all of it ---------------------------------------------------------------------------------------------


def test_the_workload_names_what_the_model_has(gguf: GGUFFile) -> None:
    needs = needs_of(gguf)
    assert needs.kernels == {
        MatrixKernel(Type.F32, 64, False): 300,
        MatrixKernel(Type.F32, 64, True): 96,
        MatrixKernel(Type.F32, 96, True): 64,
    }
    assert needs.matrix_bytes == 64 * 96 * 4
    vectors = sum(tensor.n_bytes for name, tensor in gguf.tensors.items() if "norm" in name)
    embedding = gguf.tensors["token_embd.weight"].n_bytes
    assert needs.n_bytes == sum(tensor.n_bytes for tensor in gguf.tensors.values()) - vectors - embedding


def test_a_real_machine_is_measured(gguf: GGUFFile, cache: MeasurementCache) -> None:
    with closing(CpuBackend(1)) as backend:
        speed = Calibration(needs_of(gguf), Limits(ram=8 << 20), cache).machine(gguf, backend, {"far": backend})
    flat = [value for curve in speed.cpu.kernels.values() for value in curve.seconds_per_byte]
    flat += [*dataclasses.astuple(speed.cpu.overheads), speed.cpu.attention_seconds, speed.disk or 0]
    flat += [*link_figures(speed.links["far"])]
    assert all(0 < value < math.inf for value in flat)
    assert msgspec.json.decode(msgspec.json.encode(speed), type=MachineSpeed) == speed


def test_what_is_known_is_not_measured(cache: MeasurementCache, gguf: GGUFFile) -> None:
    clock = Clock()
    needs = KernelNeeds({Q8: 64}, {ATTENTION: 1}, 10_000, 1 << 20)
    with closing(KnownBackend(clock)) as backend:
        first = Calibration(needs, Limits(clock=clock), cache)
        speed = first.processor("CPU", backend, 1 << 24)
        assert first.n_measured == 4
        n_computed = backend.n_computed
        again = Calibration(needs, Limits(clock=clock), cache)
        assert again.processor("CPU", backend, 1 << 24) == speed
        assert (again.n_measured, backend.n_computed) == (0, n_computed)
        wider = KernelNeeds({Q8: 64, MatrixKernel(Type.Q4_K, 256, True): 64}, {ATTENTION: 1}, 10_000, 1 << 20)
        more = Calibration(wider, Limits(clock=clock), cache)
        more.processor("CPU", backend, 1 << 24)
        assert more.n_measured == 1
        more.processor("another", backend, 1 << 24)
        assert more.n_measured == 6


def test_what_was_measured_in_noise_is_remembered_by_its_object_only(tmp_path: Path) -> None:
    clock, path, system = Clock(), tmp_path / "m.json", SystemFiles(tmp_path / "proc")
    needs = KernelNeeds({Q8: 64}, {ATTENTION: 1}, 10_000, 1 << 20)
    with closing(KnownBackend(clock, lambda n: 1.0 if n % 2 else 9.0)) as backend:
        for _ in range(2):
            noisy = Calibration(needs, Limits(clock=clock), MeasurementCache(path, "this", system))
            noisy.processor("CPU", backend, 1 << 24)
            assert noisy.n_measured == 4
        cache = MeasurementCache(path, "this", system)
        for n_measured in (4, 0):
            once = Calibration(needs, Limits(clock=clock), cache)
            once.processor("CPU", backend, 1 << 24)
            assert once.n_measured == n_measured
        assert len(cache.disturbed) == 4
        assert not path.exists()
        backend.noise, cache = lambda n: 1.0, MeasurementCache(path, "this", system)
        for n_measured in (4, 0):
            quiet = Calibration(needs, Limits(clock=clock), cache)
            quiet.processor("CPU", backend, 1 << 24)
            assert quiet.n_measured == n_measured
    assert not cache.disturbed


@pytest.mark.parametrize(
    ("waited", "times"),
    [((0.0, 0.0), 1), ((0.001, 0.002), 1), ((10.0, 0.001), 2), ((0.001, 10.0), 2)],
    ids=["alone", "a little", "the first thread waits", "the second thread waits"],
)
def test_what_was_measured_beside_a_busy_program_is_not_remembered(
    tmp_path: Path, waited: tuple[float, ...], times: int
) -> None:
    """Threads wait for so many seconds of 0.02 or a little more; one that ended has no file any more."""
    task = tmp_path / "proc/self/task"
    for thread in range(3):
        (task / str(thread)).mkdir(parents=True)
        (task / str(thread) / "schedstat").write_text("10 7000000000 20\n")
    system, n_measured = SystemFiles(tmp_path / "proc"), 0

    def measure() -> LinkSpeed:
        nonlocal n_measured
        n_measured += 1
        (task / "2" / "schedstat").unlink(missing_ok=True)
        time.sleep(0.02)
        for thread, seconds in enumerate(waited):
            file = task / str(thread) / "schedstat"
            file.write_text(f"20 {int(file.read_text().split()[1]) + int(1e9 * seconds)} 40\n")
        return LinkSpeed(1.0, 2.0)

    for _ in range(2):
        cache = MeasurementCache(tmp_path / "m.json", "this", system)
        for _ in range(2):
            assert cache.measured("link", LinkSpeed, measure) == LinkSpeed(1.0, 2.0)
    assert n_measured == times
    assert cache.disturbed == (("link",) if times > 1 else ())


class _Counting(KnownBackend):
    """Counts what is allocated."""

    allocated = 0

    def allocate(self, n_bytes: int) -> int:
        self.allocated = max(self.allocated, n_bytes)
        return super().allocate(n_bytes)


@pytest.mark.parametrize("limit", [8 << 20, 40 << 20])
def test_measuring_keeps_to_its_memory(cache: MeasurementCache, limit: int) -> None:
    clock = Clock()
    needs = KernelNeeds({Q8: 64}, {ATTENTION: 1}, 10_000, 1 << 40)
    with closing(_Counting(clock)) as backend:
        Calibration(needs, Limits(clock=clock), cache).processor("CPU", backend, limit)
        assert limit / 4 <= backend.allocated <= limit * 3 / 5 + (1 << 16)


# --- plain or repacked -------------------------------------------------------------------------------------


def test_the_probe_remembers_through_the_cache(cache: MeasurementCache) -> None:
    known = KernelSpeed(FormSpeed((1,), (1.0,), (2.0,)), FormSpeed((1, 4), (1.0, 2.0), (2.0, 3.0)))
    cache.put({measurement_name(Type.Q4_K, 1): known})
    with closing(CpuBackend(1)) as backend:
        assert measured_speeds([Type.Q4_K, Type.F32], backend, cache=cache) == {"Q4_K": known}


def test_a_device_is_measured_through_its_link(gguf: GGUFFile, cache: MeasurementCache) -> None:
    """One whose memory is not the host's, so that nothing can be done behind its back."""
    with rpc_server() as server:
        device = available_devices([server.endpoint])[-1]
        needs = dataclasses.replace(needs_of(gguf), kernels={Q8: 64, MatrixKernel(Type.Q4_K, 256, False): 64})
        limits = Limits(ram=8 << 20, vram=8 << 20)
        with closing(DeviceBackend(device)) as backend, closing(CpuBackend(1)) as cpu:
            speed = Calibration(needs, limits, cache).machine(None, cpu, {"RPC": backend})
    assert speed.disk is None
    far = speed.devices["RPC"]
    flat = [value for curve in far.kernels.values() for value in curve.seconds_per_byte]
    flat += [*dataclasses.astuple(far.overheads), far.attention_seconds, *link_figures(speed.links["RPC"])]
    assert len(flat) == 5 + 3 + 7
    assert all(0 < value < math.inf for value in flat)
