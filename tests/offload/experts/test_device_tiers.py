"""Layers, KV cache and hot experts on devices: what is computed where changes no bit.

Runs on RPC devices over the CPU, whose kernels are the same, and on every GPU of the machine, whose kernels round
otherwise: there answers are as far from the CPU's as llama.cpp's are.
"""

import sys
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.offload.cache.device_pool import SlotPool
from slimoe.offload.cache.policy import POLICIES
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.router_trace import read_trace
from slimoe.offload.cache.swap import SwapRule
from slimoe.offload.engine import Engine
from slimoe.offload.errors import DeviceError, DoesNotFitError
from slimoe.offload.experts.device_experts import DeviceExperts
from slimoe.offload.experts.device_graph import SlotGraphs, SlotWork
from slimoe.offload.experts.host_experts import HostExperts
from slimoe.offload.experts.host_graph import ExpertGraphs
from slimoe.offload.experts.moe_step import MoEStep
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ggml_rpc
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import EngineAbortedError
from slimoe.offload.ggml.device_backend import DeviceBackend
from slimoe.offload.ggml.devices import choose_devices
from slimoe.offload.ggml.rpc_endpoint import check_answers, parse_endpoint
from slimoe.offload.machine.expert_times import ExpertTimes, LinkTimes
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.machine import Machine, this_machine
from tests.models.configs import engine_config, reconfigured
from tests.models.conversation import TOKENS, answers, conversation, stopped_after
from tests.models.gguf_content import write_content
from tests.models.native_files import plain_ffn, write_native
from tests.models.tier_models import WIDE, content_of, mixed_model, plain_model, tied_model, uneven_model
from tests.models.tiered import device_engine, least_vram, resident_engine, tiered_engine
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf
from tests.offload.devices import Devices, largest_divergence, lent
from tests.offload.experts.full_device import none_allocated

Array = np.ndarray[Any, Any]
WHOLE = 2.0
FREE_SWAPS = SwapRule(gain_seconds=1.0, cost_seconds=0.0, margin=1.0)
NEVER, ALWAYS = 1e9, 0.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("device-tiers")


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A file, the resident engine's logits of the conversation, and a file of its sizes that llama.cpp reads."""

    path: Path
    expected: Array
    stock: Path


def on_the_cpu(path: Path) -> Model:
    with closing(resident_engine(engine_config(path, n_ctx=256, n_batch=32, n_threads=1))) as engine:
        return Model(path, conversation(engine), path)


@pytest.fixture(scope="module")
def plain(directory: Path) -> Model:
    return on_the_cpu(plain_model(directory))


@pytest.fixture(scope="module")
def mixed(directory: Path) -> Model:
    return on_the_cpu(mixed_model(directory))


@pytest.fixture(scope="module")
def tied(directory: Path) -> Model:
    return on_the_cpu(tied_model(directory))


@pytest.fixture(scope="module")
def uneven(directory: Path, plain: Model) -> Model:
    path = uneven_model(directory)
    with closing(tiered_engine(engine_config(path, n_ctx=256, n_batch=32, n_threads=1), 1.0)) as engine:
        return Model(path, conversation(engine), plain.path)


@pytest.fixture(params=["plain", "mixed", "tied", "uneven"])
def model(request: pytest.FixtureRequest) -> Model:
    found: Model = request.getfixturevalue(request.param)
    return found


def set_rule(engine: Engine, rule: SwapRule) -> None:
    for device in engine.device_experts:
        assert device.swaps is not None
        device.swaps.rule = rule
        device.uploads = device.watch = None


def set_times(engine: Engine, host_seconds: float) -> None:
    """How long the host is taken to need for an expert, where a device needs no time."""
    for device in engine.device_experts:
        device.watch = None
        device.times = LinkTimes(ExpertTimes((1, 2), (host_seconds,) * 2), ExpertTimes((1, 2), (0, 0)), 1e-3)


# --- exactness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [0.0, 1.0], ids=["disk", "memory"])
def test_every_room_gives_the_same_bits(one_device: Devices, model: Model, in_memory: float) -> None:
    policies = list(POLICIES)
    for number, on_device in enumerate((0.0, 0.4, 0.8, 1.0)):
        case = one_device.config(model.path, policy=policies[(number + int(in_memory)) % len(policies)])
        with closing(device_engine(case, on_device, in_memory)) as engine:
            assert not engine.plan.devices[0].is_whole
            set_rule(engine, FREE_SWAPS)
            one_device.check(conversation(engine), model.expected, model.stock)
            counters = engine.counters()
            assert counters["device_hits"] > 0
            n_read = counters["misses"] + counters["pending"]
            assert n_read > 0 if in_memory + on_device == 0 else n_read == 0 or in_memory + on_device < 1


def test_with_room_for_all_nothing_is_cut(one_device: Devices, model: Model, uneven: Model) -> None:
    with closing(device_engine(one_device.config(model.path), WHOLE)) as engine:
        assert engine.plan.devices[0].is_whole is (model is not uneven)
        assert (engine.plan.tiers is None) is (model is not uneven)
        one_device.check(conversation(engine), model.expected, model.stock)


@pytest.mark.parametrize("on_device", [0.4, 1.0])
def test_cut_or_whole_a_device_answers_alike(one_device: Devices, plain: Model, on_device: float) -> None:
    """In slots a batch's experts are multiplied pair by pair, by other kernels of a GPU than in a whole graph."""
    case = one_device.config(plain.path)
    with closing(device_engine(case, WHOLE)) as engine:
        assert engine.plan.devices[0].is_whole
        whole = conversation(engine)
    with closing(device_engine(case, on_device)) as engine:
        assert not engine.plan.devices[0].is_whole
        got = conversation(engine)
    if one_device.is_exact:
        np.testing.assert_array_equal(got, whole)
    else:
        assert largest_divergence(got, whole) < 1e-5


@pytest.mark.parametrize("policy", ["lfu-decay", "lru"])
def test_two_devices_share_the_layers(two_devices: Devices, model: Model, policy: str) -> None:
    case = two_devices.config(model.path, policy=policy)
    with closing(device_engine(case, 0.2, 0.3)) as engine:
        layers = [layer for device in engine.plan.devices for layer in device.layers]
        assert len(engine.plan.devices) == 2
        assert layers == list(range(engine.spec.n_layer))
        set_rule(engine, FREE_SWAPS)
        two_devices.check(conversation(engine), model.expected, model.stock)
        assert all(device.hits for device in engine.device_experts)


@pytest.mark.parametrize("kv_type", ["f32", "q8_0"])
def test_a_cut_device_before_a_whole_one(two_devices: Devices, directory: Path, plain: Model, kv_type: str) -> None:
    """Of five layers the first device, with a little room, has experts of two in slots; the other needs no cut."""
    content = content_of(directory, replace(WIDE, n_layer=5, n_ff=64))
    layers = [plain_ffn(6, Type.F32), plain_ffn(6, Type.F16), None, plain_ffn(6), None]
    path = write_native(directory / f"{kv_type}.gguf", content, layers)
    case = two_devices.config(path, kv_type=kv_type)
    with closing(resident_engine(reconfigured(case, device="none", rpc=()))) as engine:
        expected = conversation(engine)
    least = least_vram(case)
    with closing(Engine.open(reconfigured(case, vram=(str(least + (1 << 18)), str(60 << 20))))) as engine:
        assert [device.is_whole for device in engine.plan.devices] == [False, True]
        two_devices.check(conversation(engine), expected, plain.stock)


def test_several_requests_at_once(one_device: Devices, mixed: Model) -> None:
    """Batches of a prompt's part and others' tokens, in cells that lie apart; prompts that share their beginnings."""
    case = one_device.config(mixed.path, n_parallel=3, n_batch=16)
    with closing(resident_engine(reconfigured(case, device="none", rpc=()))) as engine:
        expected = answers(engine)
    for policy, seconds in (("lru", NEVER), ("lfu-decay", ALWAYS)):
        with closing(device_engine(reconfigured(case, policy=policy), 0.3, 0.3)) as engine:
            set_rule(engine, FREE_SWAPS)
            set_times(engine, seconds)
            told = answers(engine)
            if one_device.is_exact:
                assert told == expected
            assert told.keys() == expected.keys()


@pytest.mark.parametrize(("host_seconds", "is_streamed"), [(1.0, True), (0.0, False)])
def test_experts_that_pass_through_for_a_batch(
    one_device: Devices, model: Model, host_seconds: float, is_streamed: bool
) -> None:
    with closing(device_engine(one_device.config(model.path), 0.1, 0.6)) as engine:
        set_times(engine, host_seconds)
        one_device.check(conversation(engine), model.expected, model.stock)
        assert (engine.counters()["streamed"] > 0) is is_streamed


def test_lossy_modes_decide_the_same_on_devices(one_device: Devices, directory: Path) -> None:
    """Second copies are the host's; modes that go by expert weights alone give what they give without a device."""
    stock = content_of(directory, replace(WIDE, n_layer=3))
    path = write_native(directory / "pair.gguf", stock, [plain_ffn(6, Type.Q8_0, Type.Q4_0)] * 3)
    case = one_device.config(path, lossy="gate:0.7")  # no expert's weight is so near that rounding decides
    # The CPU rounds what it multiplies with experts of Q8_0, a device may not.
    alike = write_content(directory / "alike.gguf", stock.quantised(Type.Q8_0, lambda name: "_exps" in name))
    with closing(tiered_engine(reconfigured(case, rpc=()), 0.5)) as engine:
        expected, lost = conversation(engine), engine.counters()["low_selected"]
    for on_device in (0.3, WHOLE):
        with closing(device_engine(case, on_device, 0.5)) as engine:
            one_device.check(conversation(engine), expected, alike)
            if one_device.is_exact:
                assert engine.counters()["low_selected"] == lost > 0
    with closing(device_engine(reconfigured(case, lossy="low"), 0.3, 0.0)) as engine:
        assert np.isfinite(conversation(engine)).all()
        assert engine.counters()["low_selected"] > 0
        assert engine.counters()["device_hits"] > 0
    with closing(device_engine(reconfigured(case, lossy="elastic:0.5"), 0.3)) as engine:
        assert np.isfinite(conversation(engine)).all()
        assert engine.counters()["device_hits"] > 0


# --- what is multiplied, and where -------------------------------------------------------------------------


@dataclass
class Stop:
    """What one layer of one step computes: columns by either side, and slots filled so far by stack."""

    device: list[int]
    host: list[int]
    n_seen: int = 0


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Stop:
    """Asserts that every selected expert is computed once, and on a device with the number of its slot."""
    stop, filled = Stop([], []), dict[tuple[SlotPool, int], tuple[int, ...]]()
    run, write, begin = MoEStep.run, SlotPool.write, SlotGraphs.begin
    multiply, multiply_each = ExpertGraphs.run, ExpertGraphs.run_apart

    def write_slot(pool: SlotPool, slot: int, addresses: tuple[int, int, int]) -> None:
        filled[pool, slot] = addresses
        write(pool, slot, addresses)

    def run_layer(moe_step: MoEStep, segment: Any, n_rows: int, is_cancelled: Any) -> None:
        stop.device.clear()
        stop.host.clear()
        run(moe_step, segment, n_rows, is_cancelled)
        layer = moe_step.layers[segment.last]
        assert layer is not None
        n_constant = n_rows * layer.n_expert_used - len(stop.device) - len(stop.host)
        assert n_constant == 0 or layer.constants is not None
        assert max(Counter(stop.device + stop.host).values()) == 1

    def begin_on_device(graphs: SlotGraphs, works: list[SlotWork], n_tokens: int, *rest: int) -> None:
        for work in works:
            pool = graphs.pools[work.bank]
            assert work.slots.min() >= 0
            assert all((pool, slot) in filled for slot in work.slots.tolist()), "a slot that nothing was written to"
            assert len(work.slots) == len(work.experts) == len(work.columns)
            assert not work.is_token or n_tokens == 1
            stop.device += work.columns.tolist()
            stop.n_seen += len(work.slots)
        begin(graphs, works, n_tokens, *rest)

    def multiply_on_host(graphs: ExpertGraphs, work: Any, *rest: Any) -> None:
        stop.host += work.columns.tolist()
        multiply(graphs, work, *rest)

    def multiply_apart(graphs: ExpertGraphs, *rest: Any) -> None:
        stop.host += rest[-1]
        multiply_each(graphs, *rest)

    monkeypatch.setattr(SlotPool, "write", write_slot)
    monkeypatch.setattr(MoEStep, "run", run_layer)
    monkeypatch.setattr(SlotGraphs, "begin", begin_on_device)
    monkeypatch.setattr(ExpertGraphs, "run", multiply_on_host)
    monkeypatch.setattr(ExpertGraphs, "run_apart", multiply_apart)
    return stop


def assert_slots_hold_their_experts(engine: Engine) -> None:
    """Compares each slot of a device with the file."""
    for device in engine.device_experts:
        device.arrive()
        for key in device:
            copy, slot, bank = device.copies[key], device.slot(key), device.bank_of(key)
            assert bank is not None
            assert key[0] in bank.layers
            pool = device.pools[bank]
            for stack, matrix in zip(pool.stacks, copy.matrices, strict=True):
                (span,) = matrix.spans
                stored = np.fromfile(engine.gguf.paths[span.shard], np.uint8, span.n_bytes, offset=span.offset)
                there = np.empty_like(stored)
                pool.backend.get(stack, there, slot * span.n_bytes)
                np.testing.assert_array_equal(there, stored)


@pytest.mark.parametrize("policy", ["lfu-decay", "lru"])
def test_every_selected_expert_is_computed_once_and_with_slots_that_are_filled(
    one_device: Devices, model: Model, policy: str, watched: Stop
) -> None:
    with closing(device_engine(one_device.config(model.path, policy=policy), 0.3, 0.6)) as engine:
        set_rule(engine, FREE_SWAPS)
        set_times(engine, 1e-3)
        one_device.check(conversation(engine), model.expected, model.stock)
        assert_slots_hold_their_experts(engine)
    assert watched.n_seen > 0


def test_python_calls_are_as_many_for_eight_selected_experts_as_for_two(
    directory: Path, endpoints: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In layers whose experts the device has, in those whose experts the host has, and in those of both."""
    run, server = MoEStep.run, lent(endpoints[0])

    def n_calls(n_used: int) -> dict[tuple[bool, bool], set[int]]:
        """Calls of Python and C functions for a layer of a token, by whether device and host had experts of it."""
        name = directory / f"fine-{n_used}.gguf"
        path = write_tiny_gguf(name, None, shape=TinyShape(n_layer=4, n_expert=16, n_expert_used=n_used, n_ff=64))
        found: dict[tuple[bool, bool], set[int]] = defaultdict(set)

        def counted_run(moe_step: MoEStep, *rest: Any) -> None:
            called = list[str]()

            def noted(frame: FrameType, event: str, _: object) -> None:
                # How often Python's own locks are asked depends on which thread came first.
                if "offload" in Path(frame.f_code.co_filename).parts:
                    called.append(frame.f_code.co_qualname if event == "call" else event)

            sys.setprofile(noted)
            try:
                run(moe_step, *rest)
            finally:
                sys.setprofile(None)
            n = sum(not name.endswith(("return", "exception")) for name in called)
            found["DeviceExperts.begin" in called, "DeviceExperts.write" in called].add(n)

        # All experts of the first layers are on the device, none of the last one, and a part of one between.
        with closing(device_engine(server.config(path, policy="static"), 0.6)) as engine:
            for token in TOKENS:  # every number of experts on either side has its graph then
                engine.decode(token)
            with monkeypatch.context() as patch:
                patch.setattr(MoEStep, "run", counted_run)
                for token in TOKENS:
                    engine.decode(token)
            assert engine.counters()["misses"] == 0
        return found

    few, many = n_calls(2), n_calls(8)
    assert few.keys() == {(True, False), (False, True), (True, True)}
    assert all(len(numbers) == 1 for numbers in few.values())
    assert many == few


# --- swaps -------------------------------------------------------------------------------------------------


@dataclass
class Uses:
    """Experts that one step multiplied, by side."""

    device: set[Key]
    host: set[Key]


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> Uses:
    uses, begin, run = Uses(set(), set()), DeviceExperts.begin, HostExperts.run

    def begin_some(device: DeviceExperts, layer: int, experts: Array, *rest: Any, is_token: bool) -> None:
        uses.device |= {(layer, expert) for expert in experts.tolist()}
        begin(device, layer, experts, *rest, is_token=is_token)

    def run_some(host: HostExperts, index: int, selected: Array, *rest: Any) -> None:
        uses.host |= {(index, expert) for expert in selected.ravel().tolist() if expert >= 0}
        run(host, index, selected, *rest)

    monkeypatch.setattr(DeviceExperts, "begin", begin_some)
    monkeypatch.setattr(HostExperts, "run", run_some)
    return uses


def test_nothing_of_a_slot_is_ever_read_back(
    one_device: Devices, plain: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts are read-only: one that leaves its slot is still in the file, so that only newcomers cross the link."""
    read, get = set[int](), DeviceBackend.get

    def note_read(backend: DeviceBackend, tensor: int, *values: Any) -> None:
        read.add(tensor)
        get(backend, tensor, *values)

    monkeypatch.setattr(DeviceBackend, "get", note_read)
    with closing(device_engine(one_device.config(plain.path), 0.3, 0.0)) as engine:
        set_rule(engine, FREE_SWAPS)
        for token in TOKENS:
            engine.decode(token)
        (device,) = engine.device_experts
        assert device.n_swaps > 5
        stacks = {stack for pool in device.pools.values() for stack in pool.stacks}
        assert stacks
        assert read
        assert not stacks & read


@pytest.mark.parametrize("policy", ["lfu-decay", "lru"])
@pytest.mark.parametrize("in_memory", [0.0, 1.0], ids=["disk", "memory"])
def test_after_a_swap_both_are_used_where_they_are_now(
    one_device: Devices, plain: Model, in_memory: float, policy: str, uses: Uses
) -> None:
    """The newcomer from its slot, its victim on the host, which perhaps has to read it."""
    with closing(resident_engine(one_device.config(plain.path, rpc=()))) as engine:
        expected = [engine.decode(token).copy() for token in TOKENS]
    came, left, got = set[Key](), set[Key](), []
    used_there, used_here = set[Key](), set[Key]()
    with closing(device_engine(one_device.config(plain.path, policy=policy), 0.3, in_memory)) as engine:
        set_rule(engine, FREE_SWAPS)
        (device,) = engine.device_experts
        n_slots = len(set(device))
        for token in TOKENS:
            held = set(device)
            uses.device.clear()
            uses.host.clear()
            got.append(engine.decode(token).copy())
            assert uses.device <= held
            assert not uses.host & held
            used_there |= uses.device & came
            used_here |= uses.host & left
            came |= set(device) - held
            left |= held - set(device)
            assert len(set(device)) == n_slots
        assert device.n_swaps >= len(came) > 5
        expert_bytes = next(iter(device.copies.values())).n_bytes
        assert device.bytes_uploaded == (n_slots + device.n_swaps) * expert_bytes
    one_device.check(np.stack(got), np.stack(expected), plain.stock)
    assert used_there
    assert used_here


def test_swaps_that_do_not_pay_are_not_made(one_device: Devices, plain: Model) -> None:
    with closing(device_engine(one_device.config(plain.path), 0.3)) as engine:
        set_rule(engine, replace(FREE_SWAPS, cost_seconds=1e9))
        conversation(engine)
        assert engine.counters()["swaps"] == 0


# --- budgets -----------------------------------------------------------------------------------------------


def test_a_budget_that_is_too_small_is_refused_with_numbers(one_device: Devices, plain: Model) -> None:
    case = one_device.config(plain.path)
    least = least_vram(case)
    with pytest.raises(DoesNotFitError, match=r"needs at least \S+ MiB for its 4 layers, .* Raise --vram to") as caught:
        Engine.open(reconfigured(case, vram=(str(least - 1),)))
    assert (caught.value.required_bytes, caught.value.available_bytes) == (least, least - 1)
    with closing(Engine.open(reconfigured(case, vram=(str(least),)))) as engine:
        assert engine.notes == ()
        one_device.check(conversation(engine), plain.expected, plain.stock)


def with_free(config: EngineConfig, one_device: Devices, *free: int) -> Machine:
    """This machine, if its devices were these, with so much free memory."""
    found = [device for name in one_device.names for device in choose_devices(name, one_device.endpoints)]
    sizes = [replace(device, free_bytes=n, total_bytes=n) for device, n in zip(found, free, strict=True)]
    return replace(this_machine(reconfigured(config, device="none", rpc=())), devices=tuple(sizes))


def test_devices_that_are_too_small_are_left_out_and_noted(two_devices: Devices, plain: Model) -> None:
    case = two_devices.config(plain.path, device="auto")
    with closing(Engine.open(case, machine=with_free(case, two_devices, 6 << 20, 5 << 20))) as engine:
        assert engine.plan.devices == ()
        first, second = engine.notes
        assert first.startswith(f"Without {two_devices.names[1]}: ")
        assert second.startswith(f"Computing on the CPU: {two_devices.names[0]} needs at least")
        assert two_devices.names[0] in second
        assert np.isfinite(conversation(engine)).all()
    with closing(Engine.open(case, machine=with_free(case, two_devices, 6 << 20, 40 << 20))) as engine:
        assert [device.device.name for device in engine.plan.devices] == [two_devices.names[1]]
        (note,) = engine.notes
        assert note.startswith(f"Without {two_devices.names[0]}: ")
        two_devices.check(conversation(engine), plain.expected, plain.stock)


class Memory:
    """Counts what is allocated on devices, and what of it is freed again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.buffers: dict[int, int] = {}
        self.allocators: set[int] = set()
        self.most, self.n_until_full = 0, -1
        self._allocate, self._free = DeviceBackend.allocate, ggml_backend.ggml_backend_buffer_free
        self._begin, self._end = ggml_backend.ggml_gallocr_new, ggml_backend.ggml_gallocr_free
        self._reserve = ggml_backend.ggml_gallocr_reserve
        self._init, self._free_context = ggml.ggml_init, ggml.ggml_free
        self.contexts: set[int] = set()
        monkeypatch.setattr(DeviceBackend, "allocate", lambda backend, n_bytes: self._take(backend, n_bytes))
        monkeypatch.setattr(ggml_backend, "ggml_backend_buffer_free", self._give)
        monkeypatch.setattr(ggml_backend, "ggml_gallocr_new", self._new_allocator)
        monkeypatch.setattr(ggml_backend, "ggml_gallocr_free", self._free_allocator)
        monkeypatch.setattr(ggml_backend, "ggml_gallocr_reserve", self._reserve_graph)
        monkeypatch.setattr(ggml, "ggml_init", self._new_context)
        monkeypatch.setattr(ggml, "ggml_free", self._close_context)

    @property
    def n_bytes(self) -> int:
        """Of buffers and graphs."""
        sizes = [int(ggml_backend.ggml_gallocr_get_buffer_size(one, 0)) for one in self.allocators]
        return sum(self.buffers.values()) + sum(sizes)

    @property
    def is_all_free(self) -> bool:
        return not (self.buffers or self.allocators or self.contexts)

    def _is_full(self) -> bool:
        self.n_until_full -= 1
        return self.n_until_full == -1

    def _take(self, backend: DeviceBackend, n_bytes: int) -> int:
        if self._is_full():
            return none_allocated(backend, n_bytes)
        buffer = self._allocate(backend, n_bytes)
        self.buffers[buffer] = n_bytes
        return buffer

    def _give(self, buffer: int) -> None:
        self.buffers.pop(buffer, None)
        self._free(buffer)

    def _new_allocator(self, buft: int) -> int:
        allocator: int = self._begin(buft)
        if not ggml_backend.ggml_backend_buft_is_host(buft):
            self.allocators.add(allocator)
        return allocator

    def _free_allocator(self, allocator: int) -> None:
        self.allocators.discard(allocator)
        self._end(allocator)

    def _reserve_graph(self, allocator: int, graph: int) -> bool:
        return not (allocator in self.allocators and self._is_full()) and bool(self._reserve(allocator, graph))

    def _new_context(self, params: Any) -> int:
        context = int(self._init(params))
        self.contexts.add(context)
        return context

    def _close_context(self, context: int) -> None:
        self.contexts.discard(context)
        self._free_context(context)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    return Memory(monkeypatch)


@pytest.mark.parametrize("on_device", [0.0, 0.5, 1.0, WHOLE])
def test_devices_hold_no_more_than_planned_and_nothing_in_the_end(
    one_device: Devices, mixed: Model, on_device: float, memory: Memory
) -> None:
    with closing(device_engine(one_device.config(mixed.path, n_parallel=3), on_device)) as engine:
        (plan,) = engine.plan.devices
        at_first = memory.n_bytes
        assert plan.weights + plan.kv + plan.slots <= at_first <= plan.required <= plan.budget
        one_device.check(conversation(engine), mixed.expected, mixed.stock)
        assert memory.n_bytes == at_first
    assert memory.is_all_free
    for endpoint in one_device.endpoints:
        check_answers(parse_endpoint(endpoint), ggml_rpc.PROTOCOL_VERSION)


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_device_that_runs_out_while_it_is_loaded(
    one_device: Devices, mixed: Model, is_cut: bool, memory: Memory
) -> None:
    """Whatever it is that finds no room, nothing stays; half as much is tried, or the CPU takes over, told once."""
    room = least_vram(one_device.config(mixed.path))
    case = one_device.config(mixed.path, device="auto")
    machine = with_free(case, one_device, room * 6 // 5 if is_cut else 60 << 20)
    n_cases = 0
    while True:
        memory.n_until_full = n_cases
        with closing(Engine.open(case, machine=machine)) as engine:
            if memory.n_until_full >= 0:
                assert engine.plan.devices[0].is_whole is not is_cut
                break
            (note,) = engine.notes
            assert note.startswith("Computing on the CPU: " if is_cut else "Half as much is taken of devices: ")
            assert "Lower --vram" in note
            assert bool(engine.plan.devices) is not is_cut
            assert not (is_cut and (memory.allocators or memory.buffers))
            if n_cases % 10 == 0:
                assert np.isfinite(engine.decode(1)).all()
        n_cases += 1
        assert memory.is_all_free
    assert n_cases > 20


def test_a_device_that_lacks_an_operation(
    one_device: Devices, mixed: Model, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked before it computes: most end the process at what they do not know."""

    def supports(backend: DeviceBackend, operation: int) -> bool:
        return bool(ggml.ggml_op_desc(operation) != b"MUL_MAT_ID")

    monkeypatch.setattr(DeviceBackend, "supports", supports)
    for room in (least_vram(one_device.config(mixed.path)), 1 << 30):
        with pytest.raises(DeviceError, match=r"does not compute MUL_MAT_ID of Q[45]_K.*--device none"):
            Engine.open(one_device.config(mixed.path, vram=(str(room),)))
        assert memory.is_all_free
    case = one_device.config(mixed.path, device="auto")
    with closing(Engine.open(case, machine=with_free(case, one_device, 40 << 20))) as engine:
        assert "does not compute MUL_MAT_ID" in engine.notes[0]
        assert np.isfinite(engine.decode(1)).all()


# --- faults ------------------------------------------------------------------------------------------------


def test_a_step_may_be_stopped_anywhere(one_device: Devices, plain: Model) -> None:
    """Also while experts are streamed; what was under way then is nobody's business later."""
    with closing(resident_engine(one_device.config(plain.path, rpc=()))) as engine:
        expected = [engine.prefill(TOKENS[:12]).copy(), engine.decode(TOKENS[12]).copy()]
    n_stopped = n_streamed = 0
    with closing(device_engine(one_device.config(plain.path, policy="lru"), 0.3, 0.5)) as engine:
        for n_calls in range(0, 40, 3):
            set_times(engine, 2e-3)
            before = engine.counters()["streamed"]
            try:
                engine.read(TOKENS[20:32], 1, stopped_after(n_calls))
            except EngineAbortedError:
                n_stopped += 1
                n_streamed += engine.counters()["streamed"] > before
            engine.truncate(0)
            got = [engine.prefill(TOKENS[:12]).copy(), engine.decode(TOKENS[12]).copy()]
            one_device.check(np.stack(got), np.stack(expected), plain.stock)
            engine.truncate(0)
    assert n_stopped > 5
    assert n_streamed > 2


def test_an_error_while_experts_are_streamed(
    one_device: Devices, plain: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(device_engine(one_device.config(plain.path), 0.3, 0.6)) as engine:
        set_times(engine, 1.0)
        with monkeypatch.context() as patch:

            def fail(pool: SlotPool, slot: int, addresses: object) -> None:
                raise DeviceError("The card is gone.")

            patch.setattr(SlotPool, "write", fail)
            for _ in range(3):
                with pytest.raises(DeviceError, match="The card is gone"):
                    engine.prefill(TOKENS[:12])
                assert engine.n_past == 0
        one_device.check(conversation(engine), plain.expected, plain.stock)
        assert engine.counters()["streamed"] > 0


def test_what_is_recorded_is_cut(one_device: Devices, plain: Model, tmp_path: Path) -> None:
    """A trace needs to see every layer, also where a device has room for all."""
    case = one_device.config(plain.path, trace=tmp_path / "trace")
    with closing(device_engine(case, WHOLE)) as engine:
        one_device.check(conversation(engine), plain.expected, plain.stock)
        assert engine.counters()["misses"] == 0
    steps = read_trace(tmp_path / "trace").steps
    assert len(steps) == 14
    assert all(len(step.layers) == 4 for step in steps)
