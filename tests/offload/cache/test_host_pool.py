"""Experts in memory: whose bytes lie where, who may be driven out, and what a failed read leaves."""

import ctypes
import errno
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.offload.cache.disk_reader import DiskReader, ReadFailedError
from slimoe.offload.cache.host_pool import HostPool
from slimoe.offload.cache.host_slots import Addresses, slot_bytes
from slimoe.offload.cache.policy import PolicyContext, make_policy
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.slots import slot_classes
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.experts import ExpertCopy, expert_layers
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import WeightSource
from slimoe.offload.model.weight_reader import model_sources
from tests.models.gguf_content import read_content, write_content
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf

N_LAYER, N_EXPERT = 3, 5


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of five experts; those of the last layer are of another class."""
    directory = tmp_path_factory.mktemp("host_pool")
    shape = TinyShape(n_layer=N_LAYER, n_ff=64, n_expert=N_EXPERT, n_expert_used=2)
    content = read_content(write_tiny_gguf(directory / "f32.gguf", None, shape=shape))
    return write_content(directory / "m.gguf", content.quantised(Type.Q8_0, lambda name: "blk.2.ffn_down" in name))


@pytest.fixture
def path(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copyfile(stored, tmp_path / "m.gguf"))


class Bench:
    """A host expert cache over a file, `n_slots` of either class; the values of its policy say who leaves first."""

    def __init__(self, path: Path, *n_slots: int) -> None:
        gguf = read_gguf(path)
        spec = ModelSpec.from_gguf(gguf)
        layers = expert_layers(model_sources(gguf, spec), spec)
        self.whole = path.read_bytes()
        self.copies: dict[Key, ExpertCopy] = {
            (index, expert): copies[0]
            for index, layer in enumerate(layers)
            if layer is not None
            for expert, copies in enumerate(layer.experts)
        }
        self.policy = make_policy("static", PolicyContext(N_LAYER, N_EXPERT, 2))
        self.reader = DiskReader(gguf)
        classes = list(slot_classes(layers))
        self.n_slots = dict(zip(classes, n_slots, strict=True))
        self.host_pool = HostPool(self.reader, self.policy, self.n_slots)

    def rank(self, layer: int, ranks: Sequence[float]) -> None:
        """Says what the experts of a layer are worth from now on."""
        self.policy.ranks[layer] = ranks
        self.policy.n_falls[layer] += 1

    def demand(self, *keys: Key) -> None:
        """Has experts read at once, and looks at them."""
        self.host_pool.pin(set(keys))
        slots = [self.host_pool.demand(key, self.copies[key]) for key in keys]
        for key, slot in zip(keys, slots, strict=True):
            self.assert_holds(key, self.host_pool.addresses(slot))

    def prefetch(self, *keys: Key) -> None:
        for key in keys:
            self.host_pool.prefetch(key, self.copies[key])

    def fill(self) -> list[int]:
        done: list[int] = []
        self.host_pool.fill(self.copies.items(), done.append)
        return done

    def settle(self) -> None:
        """Lets all that is under way arrive."""
        end = time.monotonic() + 30
        while not all(slot.is_ready for slot in self.host_pool.slots):
            assert time.monotonic() < end
            time.sleep(0.001)

    def assert_holds(self, key: Key, addresses: Addresses) -> None:
        copy = self.copies[key]
        for address, source in zip(addresses, copy.matrices, strict=True):
            assert ctypes.string_at(address, source.n_bytes) == self.bytes_of(source)

    def bytes_of(self, source: WeightSource) -> bytes:
        (span,) = source.spans
        return self.whole[span.offset : span.offset + span.n_bytes]

    @property
    def held(self) -> set[Key]:
        """Who has a slot."""
        return set(self.host_pool.keys)

    @property
    def complete(self) -> set[Key]:
        return {key for key, copy in self.copies.items() if self.host_pool.holds(key, copy)}

    def counts(self) -> tuple[int, int, int]:
        counters = self.host_pool.counters
        return counters.hits, counters.pending, counters.misses

    def check(self) -> None:
        self.host_pool.check()

    def close(self) -> None:
        self.host_pool.close()
        self.reader.close()


@pytest.fixture
def bench(path: Path) -> Iterator[Bench]:
    with closing(Bench(path, 4, 3)) as bench:
        yield bench


class Disk:
    """In place of the system's reads: can fail, and can be held up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._read = os.preadv
        self.fails: Callable[[], bool] = lambda: False
        self.is_open = threading.Event()
        self.is_open.set()
        monkeypatch.setattr(os, "preadv", self.preadv)

    def preadv(self, file: int, buffers: list[memoryview], offset: int) -> int:
        assert self.is_open.wait(30)
        if self.fails():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._read(file, buffers, offset)

    def opens_when(self, owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Is held up until a method is called."""
        method = getattr(owner, name)

        def call(*arguments: object) -> object:
            self.is_open.set()
            return method(*arguments)

        self.is_open.clear()
        monkeypatch.setattr(owner, name, call)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(monkeypatch)
    yield disk
    disk.is_open.set()


# --- slots -------------------------------------------------------------------------------------------------


def test_it_is_filled_in_order_as_far_as_there_is_room(bench: Bench) -> None:
    done = bench.fill()
    assert bench.held == {(0, 0), (0, 1), (0, 2), (0, 3), (2, 0), (2, 1), (2, 2)}
    assert sorted(done) == sorted(bench.copies[key].n_bytes for key in bench.held)
    assert bench.complete == bench.held
    assert bench.counts() == (0, 0, 0)
    assert bench.fill() == []
    bench.demand(*bench.held)
    assert bench.counts() == (7, 0, 0)
    assert list(bench.n_slots.values()) == [4, 3]
    assert bench.host_pool.n_bytes == sum(n * slot_bytes(kind) for kind, n in bench.n_slots.items())
    assert bench.host_pool.n_free_to_pin == 3
    bench.check()


def test_the_least_worth_leaves_and_the_pinned_stay(bench: Bench) -> None:
    bench.fill()
    bench.rank(0, [4, 1, 2, 3, 0])
    bench.rank(1, [9] * N_EXPERT)
    bench.demand((1, 0))
    assert (0, 1) not in bench.held
    bench.demand((0, 2), (1, 1))
    assert bench.held & {(0, 0), (0, 2), (0, 3)} == {(0, 0), (0, 2)}, "the pinned one was worth less"
    bench.demand((0, 4), (0, 1), (0, 3), (1, 2))
    assert bench.held - {(2, 0), (2, 1), (2, 2)} == {(0, 4), (0, 1), (0, 3), (1, 2)}
    bench.check()


def test_reading_ahead_takes_no_pinned_slot(bench: Bench) -> None:
    bench.fill()
    full = {(0, 0), (0, 1), (0, 2), (0, 3)}
    bench.host_pool.pin(full | {(1, 0)})
    bench.prefetch((1, 0), (0, 0))
    assert bench.host_pool.counters.n_prefetched == 0
    bench.host_pool.pin(full - {(0, 2)} | {(1, 0), (1, 1)})
    bench.prefetch((1, 0), (1, 1))
    assert bench.held & set(bench.copies) - {(2, 0), (2, 1), (2, 2)} == full - {(0, 2)} | {(1, 0)}
    assert bench.host_pool.counters.n_prefetched == 1
    bench.check()


def test_what_is_needed_drives_out_what_is_only_likely(bench: Bench) -> None:
    bench.fill()
    likely: set[Key] = {(0, 0), (0, 1), (0, 2)}
    bench.host_pool.pin({(1, 0)}, likely)
    bench.host_pool.demand((1, 0), bench.copies[1, 0])
    assert bench.held >= likely | {(1, 0)}
    bench.host_pool.pin({(1, 0), (1, 1), (1, 2)}, likely)
    for key in ((1, 0), (1, 1), (1, 2)):
        bench.host_pool.demand(key, bench.copies[key])
    assert bench.held >= {(1, 0), (1, 1), (1, 2)}
    assert len(bench.held & likely) == 1
    bench.host_pool.hold({(1, 0), (1, 1), (1, 2)}, "test")
    bench.host_pool.pin({(0, 3)})
    bench.host_pool.demand((0, 3), bench.copies[0, 3])
    assert bench.held >= {(1, 0), (1, 1), (1, 2), (0, 3)}
    bench.check()


# --- counters ----------------------------------------------------------------------------------------------


def test_what_was_read_ahead_counts_once(bench: Bench) -> None:
    keys: list[Key] = [(0, 0), (1, 0), (2, 0)]
    bench.host_pool.pin(set(keys))
    bench.prefetch(*keys)
    bench.prefetch(*keys)
    assert (bench.host_pool.counters.n_prefetched, bench.counts()) == (3, (0, 0, 0))
    bench.demand(*keys)
    assert bench.counts() == (0, 3, 0)
    bench.demand(*keys)
    assert bench.counts() == (3, 3, 0)
    bench.demand((2, 1))
    assert bench.counts() == (3, 3, 1)
    n_bytes = sum(bench.copies[key].n_bytes for key in (*keys, (2, 1)))
    assert bench.reader.n_read >= n_bytes
    assert (bench.host_pool.counters.n_cancelled, bench.reader.n_wasted) == (0, 0)


def test_one_read_serves_many_picks(bench: Bench) -> None:
    key = (1, 1)
    bench.host_pool.pin({key})
    slot = bench.host_pool.demand(key, bench.copies[key], counts=5)
    assert bench.host_pool.demand(key, bench.copies[key], counts=2) is slot
    assert bench.counts() == (2, 0, 5)
    bench.assert_holds(key, bench.host_pool.addresses(slot))


def test_a_read_that_is_driven_out_is_dropped(bench: Bench, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.fill()
    disk.opens_when(bench.reader, "cancel", monkeypatch)
    bench.host_pool.pin({(1, 0)})
    bench.prefetch((1, 0))
    assert (1, 0) not in bench.complete
    bench.rank(1, [-1, *bench.policy.ranks[1, 1:]])
    bench.demand((1, 1))
    assert bench.held >= {(1, 1), (0, 0)}
    assert (1, 0) not in bench.held
    assert bench.host_pool.counters.n_cancelled == 1
    bench.check()


def test_a_wrong_guess_gives_its_slot_back(bench: Bench, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.opens_when(bench.reader, "cancel", monkeypatch)
    keys: list[Key] = [(0, 0), (0, 1), (0, 2), (0, 3)]
    bench.host_pool.pin(set(keys))
    bench.prefetch(*keys)
    for key in (*keys, (1, 4)):
        bench.host_pool.abandon(key, bench.copies[key])
    assert bench.held == set()
    assert bench.host_pool.counters.n_cancelled == 4
    bench.check()
    bench.demand((1, 0), (1, 1), (1, 2), (1, 3))
    assert bench.counts() == (0, 0, 4)
    assert bench.host_pool.counters.n_cancelled == 4


def test_a_wrong_guess_that_is_here_stays(bench: Bench) -> None:
    bench.host_pool.pin({(0, 0)})
    bench.prefetch((0, 0))
    bench.settle()
    bench.host_pool.abandon((0, 0), bench.copies[0, 0])
    bench.demand((0, 0))
    assert bench.counts() == (1, 0, 0)
    bench.demand((0, 1))
    bench.host_pool.abandon((0, 1), bench.copies[0, 1])
    assert bench.held == {(0, 0), (0, 1)}
    assert bench.host_pool.counters.n_cancelled == 0


def test_waiting_for_the_disk_is_counted(bench: Bench, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.demand((0, 0))
    before = bench.host_pool.counters.stall_seconds
    bench.demand((0, 0))
    assert bench.host_pool.counters.stall_seconds == before
    disk.opens_when(bench.reader, "wait", monkeypatch)
    bench.demand((0, 1))
    assert bench.host_pool.counters.stall_seconds > before


# --- faults ------------------------------------------------------------------------------------------------


def test_a_failed_read_frees_its_slot(bench: Bench, path: Path) -> None:
    before, times = path.read_bytes(), path.stat()
    bench.demand((0, 0))
    os.truncate(path, 5000)
    for _ in range(2):
        with pytest.raises(ReadFailedError, match="was changed"):
            bench.demand((0, 1))
    assert bench.held == {(0, 0)}
    bench.demand((0, 0))
    path.write_bytes(before)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    bench.demand((0, 1), (2, 1))
    assert bench.held == {(0, 0), (0, 1), (2, 1)}
    assert bench.counts() == (1, 0, 5)
    bench.check()


def test_what_failed_ahead_of_time_is_tried_again(bench: Bench, disk: Disk) -> None:
    disk.fails = lambda: True
    bench.host_pool.pin({(0, 1), (0, 2)})
    bench.prefetch((0, 1))
    bench.host_pool.demand((0, 2), bench.copies[0, 2])
    bench.settle()
    assert bench.complete == set()
    disk.fails = lambda: False
    bench.demand((0, 1), (0, 2))
    assert bench.complete == {(0, 1), (0, 2)}
    assert bench.counts() == (0, 0, 3)
    bench.check()


def test_a_slot_is_not_ready_because_somebody_stopped_waiting(
    bench: Bench, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    disk.is_open.clear()
    with monkeypatch.context() as patched:
        patched.setattr(bench.reader, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bench.demand((1, 3))
    assert bench.complete == set()
    disk.opens_when(bench.reader, "wait", monkeypatch)
    bench.demand((1, 3))


def test_closing_with_reads_under_way(path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is the host expert cache's until nothing writes to it any more."""
    bench = Bench(path, 4, 3)
    disk.opens_when(bench.reader, "cancel", monkeypatch)
    bench.prefetch(*((layer, expert) for layer in (0, 2) for expert in range(3)))
    reads = [slot.read for slot in bench.host_pool.slots]
    bench.host_pool.close()
    assert sum(read is not None for read in reads) == 6
    assert all(read.is_done for read in reads if read is not None)
    bench.close()


# --- at random ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "failing"), [(0, 0.0), (1, 0.05), (2, 0.3)])
def test_steps_at_random(path: Path, disk: Disk, seed: int, failing: float) -> None:
    """As the engine goes: pins what a layer needs and the next ones may, demands, prefetches, looks; or breaks off."""
    draw, chance, numbers = random.Random(seed), random.Random(seed), np.random.default_rng(seed)
    n_demanded = 0
    with closing(Bench(path, 4, 4)) as bench:
        disk.fails = lambda: chance.random() < failing
        for step in range(400):
            layer = step % N_LAYER
            needed = {(layer, expert) for expert in draw.sample(range(N_EXPERT), 2)}
            likely = {((layer + 1) % N_LAYER, expert) for expert in draw.sample(range(N_EXPERT), 2)}
            bench.host_pool.pin(needed | likely)
            slots = {key: bench.host_pool.demand(key, bench.copies[key]) for key in needed}
            n_demanded += len(needed)
            bench.prefetch(*likely)
            for key in draw.sample(sorted(likely - needed), 1):
                bench.host_pool.abandon(key, bench.copies[key])
            assert bench.held >= needed
            try:
                for key, slot in slots.items():
                    if draw.random() < 0.1:
                        break
                    bench.assert_holds(key, bench.host_pool.addresses(slot))
            except ReadFailedError:
                assert failing
            for layer, ranks in enumerate(numbers.random(bench.policy.ranks.shape)):
                bench.rank(layer, ranks)
            bench.check()
        bench.settle()
        disk.fails = lambda: False
        assert sum(bench.counts()) == n_demanded
        assert min(bench.counts()) > 0
        assert bench.host_pool.counters.n_cancelled <= bench.host_pool.counters.n_prefetched + n_demanded
        for key in bench.copies:
            bench.demand(key)
