"""Experts read from disk: every budget gives the bits that the resident model gives."""

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.offload.cache.disk_reader import DiskReader, Read
from slimoe.offload.cache.host_pool import HostPool, n_read_ahead
from slimoe.offload.cache.host_slots import Bank
from slimoe.offload.cache.policy import POLICIES
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.slots import MAX_PREFETCH_DEPTH
from slimoe.offload.engine import Engine
from slimoe.offload.experts.host_graph import BankWork, ExpertGraphs, TokenShape
from slimoe.offload.experts.moe_step import MoEStep
from slimoe.offload.ggml.cpu_backend import CpuBackend
from slimoe.offload.graph.exchange import Exchange, ExchangeShape
from slimoe.offload.graph.segment import Segment
from slimoe.offload.model.experts import SlotClass
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.engine_plan import EnginePlan, plan_engine
from slimoe.offload.plan.machine import Machine
from slimoe.offload.resources.memory import HostMemory
from tests.models.configs import engine_config, reconfigured, roomy_machine
from tests.models.conversation import TOKENS, answers, conversation
from tests.models.gguf_content import GGUFContent, StoredTensor
from tests.models.native_files import NativeFfn, StoredExpert, plain_ffn, write_native
from tests.models.tier_models import apart_model, content_of, mixed_model, plain_model, tied_model, uneven_model
from tests.models.tiered import resident_engine, tiered_engine, tiered_plan
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf
from tests.offload.experts.watched_ids import WatchedIds

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiers")


@pytest.fixture(scope="module")
def plain(directory: Path) -> Path:
    return plain_model(directory)


@pytest.fixture(scope="module")
def mixed(directory: Path) -> Path:
    return mixed_model(directory)


@pytest.fixture(scope="module")
def tied(directory: Path) -> Path:
    return tied_model(directory)


@pytest.fixture(scope="module")
def apart(directory: Path) -> Path:
    return apart_model(directory)


MODELS = ("plain", "mixed", "tied", "apart")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def config(path: Path, **changed: Any) -> EngineConfig:
    return engine_config(path, **{"n_ctx": 256, "n_batch": 32, "n_threads": 1} | changed)


# --- exactness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_batch", [1, 9, 32])
def test_every_budget_gives_the_same_bits(model: Path, n_batch: int) -> None:
    policies = list(POLICIES)
    with closing(resident_engine(config(model, n_batch=n_batch))) as engine:
        expected = conversation_in(engine, n_batch)
    assert expected.std() > 0.1
    for number, share in enumerate((0.0, 0.2, 0.6, 1.0)):
        policy, direct = policies[(number + n_batch) % len(policies)], bool((number + n_batch) % 2)
        case = config(model, n_batch=n_batch, policy=policy, direct_io=direct)
        with closing(tiered_engine(case, share)) as engine:
            np.testing.assert_array_equal(conversation_in(engine, n_batch), expected, f"{share} {policy} {direct}")


def conversation_in(engine: Engine, n_batch: int) -> Array:
    """The conversation with no more than `n_batch` tokens at once."""
    if n_batch >= 32:
        return conversation(engine)
    told = [engine.prefill(TOKENS[:30])[None].copy()]
    told += [engine.decode(token)[None].copy() for token in TOKENS[30:36]]
    return np.concatenate(told)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("direct", [True, False])
def test_no_policy_changes_a_bit(plain: Path, policy: str, direct: bool) -> None:
    with closing(resident_engine(config(plain))) as engine:
        expected = conversation(engine)
    with closing(tiered_engine(config(plain, policy=policy, direct_io=direct), 0.4)) as engine:
        np.testing.assert_array_equal(conversation(engine), expected)
        counters = engine.counters()
        assert counters["misses"] > 0
        assert counters["bytes_read"] > counters["bytes_wasted"]


def test_two_threads_agree_with_themselves(plain: Path) -> None:
    def told(engine: Engine) -> Array:
        return np.stack([engine.decode(token).copy() for token in TOKENS[:3]])

    with closing(resident_engine(config(plain, n_threads=2))) as engine:
        expected = told(engine)
    with closing(tiered_engine(config(plain, n_threads=2), 0.3)) as engine:
        np.testing.assert_array_equal(told(engine), expected)


def test_layers_that_are_not_alike_in_any_budget(directory: Path) -> None:
    path = uneven_model(directory)
    with closing(tiered_engine(config(path), 1.0)) as engine:
        expected = conversation(engine)
        assert engine.counters() == {}  # all of it is in memory
    for share in (0.0, 0.5):
        with closing(tiered_engine(config(path), share)) as engine:
            np.testing.assert_array_equal(conversation(engine), expected)


def test_looking_further_ahead_than_there_are_slots(directory: Path) -> None:
    """As when there is less room for slots when the model is opened than when it was planned.

    A layer that needs one expert leaves slots to those of the layers after it, and the next one then needs three.
    """
    stock = content_of(directory, TinyShape(n_layer=4))
    constants = NativeFfn((StoredExpert(0),), (0, -1, -2), np.ones((2, 64), np.float32))
    layers = [constants, plain_ffn(6), plain_ffn(6), plain_ffn(6)]
    path = write_native(directory / "narrow.gguf", stock, layers)
    with closing(tiered_engine(config(path), 1.0)) as engine:
        expected = conversation(engine)
    with closing(tiered_engine(config(path), 0.0, prefetch_depth=3)) as engine:
        np.testing.assert_array_equal(conversation(engine), expected)


def test_several_requests_at_once_get_the_same_bits(mixed: Path) -> None:
    """Batches of a prompt's part and other requests' tokens, in cells that lie apart."""
    case = config(mixed, n_parallel=3, n_batch=16)
    with closing(resident_engine(case)) as engine:
        expected = answers(engine)
    assert len({token for steps in expected.values() for token, _ in steps}) > 10
    with closing(tiered_engine(case, 0.2)) as engine:
        assert answers(engine) == expected


# --- plans -------------------------------------------------------------------------------------------------


def test_a_budget_leads_to_tiers_that_stay_within_it(mixed: Path) -> None:
    case = config(mixed, device="none")

    def within(ram: int) -> EnginePlan:
        """On a machine with so much memory, for a program that takes none before it opens the model."""
        return plan_engine(case, Machine(HostMemory(ram, ram, ram), (), 1, held=0))

    with closing(resident_engine(case)) as engine:
        expected = conversation(engine)
    required = plan_engine(reconfigured(case, weights="copied"), roomy_machine(held=0)).weight_forms.required
    shortfall = within(0).shortfall
    assert shortfall is not None
    least = shortfall.required_bytes
    assert least < required
    for ram in (least, (least + required) // 2, required - 1):
        plan, seen = within(ram), list[tuple[int, int]]()
        assert plan.tiers is not None
        plan = replace(plan, tiers=replace(plan.tiers, is_final=True))
        with closing(Engine(case, plan, lambda *now, seen=seen: seen.append(now))) as engine:
            tiers = engine.plan.tiers
            assert tiers is not None
            assert tiers.fixed + tiers.host_pool <= ram
            np.testing.assert_array_equal(conversation(engine), expected)
            memory = engine.memory()
        assert memory["host_pool"] == memory["arena"] == tiers.host_pool
        assert memory["compute"] <= tiers.compute
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1][0] <= seen[-1][1]
    assert within(required).tiers is None


def test_a_class_that_has_room_for_all_holds_nobody_up(directory: Path) -> None:
    """One expert in a type of its own leaves room to prefetch the others."""
    stock = content_of(directory, TinyShape(n_layer=3))
    odd = NativeFfn((StoredExpert(0, (Type.F16,)), *(StoredExpert(e) for e in range(1, 6))), tuple(range(6)))
    path = write_native(directory / "odd.gguf", stock, [odd, plain_ffn(6), plain_ffn(6)])
    tiers = tiered_plan(config(path), 0.9).tiers
    assert tiers is not None
    assert min(n for _, n in tiers.n_slots) == 1
    assert tiers.prefetch_depth == MAX_PREFETCH_DEPTH


# --- what a step costs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch_depth", [0, 2])
def test_python_calls_are_as_many_for_eight_selected_experts_as_for_two(directory: Path, prefetch_depth: int) -> None:
    def n_calls(n_used: int) -> int:
        """Calls of Python and C functions that a decoded token takes, with all its experts in memory."""
        name = directory / f"fine-{n_used}.gguf"
        path = write_tiny_gguf(name, None, shape=TinyShape(n_layer=4, n_expert=16, n_expert_used=n_used, n_ff=64))
        counted = list[str]()
        with closing(tiered_engine(config(path), 1.0, prefetch_depth)) as engine:
            engine.decode(1)
            engine.decode(2)
            sys.setprofile(lambda frame, event, what: counted.append(event) if event.endswith("call") else None)
            try:
                engine.decode(3)
            finally:
                sys.setprofile(None)
            assert engine.tiers is not None
            assert engine.tiers.host_pool is not None
            counters = engine.tiers.host_pool.counters
            assert (counters.hits, counters.misses, counters.pending) == (3 * 4 * n_used, 0, 0)
        return len(counted)

    assert n_calls(8) == n_calls(2)


def test_a_batch_reads_many_small_experts_while_it_computes_those_that_are_here(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_gguf(directory / "many.gguf", None, shape=TinyShape(n_layer=3, n_expert=24, n_ff=64))
    n_begun, most, submit, run = 0, 0, DiskReader.submit, ExpertGraphs.run

    def watched_submit(reader: DiskReader, *rest: Any, **named: Any) -> Read:
        nonlocal n_begun
        n_begun += 1
        return submit(reader, *rest, **named)

    def watched_run(graphs: ExpertGraphs, work: BankWork, *rest: Any) -> None:
        nonlocal n_begun, most
        most, n_begun = max(most, n_begun), 0
        run(graphs, work, *rest)

    with closing(tiered_engine(config(path), 0.5)) as engine:
        monkeypatch.setattr(DiskReader, "submit", watched_submit)
        monkeypatch.setattr(ExpertGraphs, "run", watched_run)
        engine.prefill(TOKENS[:30])
    assert most > 4
    assert (n_read_ahead(99 << 20), n_read_ahead(3 << 20), n_read_ahead(32 << 20)) == (2, 10, 2)


@pytest.mark.parametrize("n_tokens", [1, 8])
def test_experts_that_have_arrived_are_computed_in_one_graph(
    directory: Path, n_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the disk is so fast that everything has arrived when it is looked for."""
    shape = TinyShape(n_layer=4, n_expert=24, n_expert_used=4, n_ff=64)
    path = write_tiny_gguf(directory / f"fast-{n_tokens}.gguf", None, shape=shape)
    n_read, n_graphs, submit, run = 0, 0, DiskReader.submit, ExpertGraphs.run

    def read_at_once(reader: DiskReader, *rest: Any, **named: Any) -> Read:
        nonlocal n_read
        n_read += 1
        read = submit(reader, *rest, **named)
        reader.wait(read)
        return read

    def counted_run(graphs: ExpertGraphs, *rest: Any) -> None:
        nonlocal n_graphs
        n_graphs += 1
        run(graphs, *rest)

    with closing(resident_engine(config(path))) as engine:
        expected = engine.prefill(TOKENS[:n_tokens]).copy()
    with closing(tiered_engine(config(path), 0.5, 0)) as engine:
        monkeypatch.setattr(DiskReader, "submit", read_at_once)
        monkeypatch.setattr(ExpertGraphs, "run", counted_run)
        np.testing.assert_array_equal(engine.prefill(TOKENS[:n_tokens]), expected)
    assert n_read > (10 if n_tokens > 1 else 5)
    # Of four layers two are in memory, and the others compute what was held before what was not.
    assert n_graphs <= 6


def test_a_tokens_experts_have_one_graph_wherever_in_their_pages_they_begin(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices whose bytes are no whole pages are no stack in their slots."""
    shape = TinyShape(n_layer=3, n_expert=8, n_expert_used=4, n_ff=40)
    path = write_tiny_gguf(directory / "phases.gguf", None, shape=shape)
    submit, run, n_experts = DiskReader.submit, ExpertGraphs.run_apart, list[int]()

    def read_at_once(reader: DiskReader, *rest: Any, **named: Any) -> Read:
        read = submit(reader, *rest, **named)
        reader.wait(read)
        return read

    def watched_run(graphs: ExpertGraphs, layer: int, kind: SlotClass, experts: Any, columns: Sequence[int]) -> None:
        n_experts.append(len(experts))
        run(graphs, layer, kind, experts, columns)

    tokens = TOKENS[9:15]
    with closing(resident_engine(config(path))) as engine:
        engine.prefill(TOKENS[:9])
        expected = [engine.decode(token).copy() for token in tokens]
    with closing(tiered_engine(config(path), 0.6, 0)) as engine:
        engine.prefill(TOKENS[:9])
        monkeypatch.setattr(DiskReader, "submit", read_at_once)
        monkeypatch.setattr(ExpertGraphs, "run_apart", watched_run)
        for token, logits in zip(tokens, expected, strict=True):
            np.testing.assert_array_equal(engine.decode(token), logits)
    assert n_experts == [4] * 3 * len(tokens)


@pytest.mark.parametrize("n_waiting", [0, 9])
def test_a_busy_disk_is_asked_for_the_next_layer_alone(
    directory: Path, n_waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_gguf(directory / f"busy-{n_waiting}.gguf", None, shape=TinyShape(n_layer=5, n_expert=8))
    run, prefetch, at, ahead = MoEStep.run, HostPool.prefetch, 0, set[int]()

    def watched_run(moe_step: MoEStep, segment: Segment, *rest: Any) -> None:
        nonlocal at
        at = segment.last
        run(moe_step, segment, *rest)

    def watched_prefetch(host_pool: HostPool, key: Key, *rest: Any, **named: Any) -> None:
        ahead.add(key[0] - at)
        prefetch(host_pool, key, *rest, **named)

    monkeypatch.setattr(MoEStep, "run", watched_run)
    monkeypatch.setattr(HostPool, "prefetch", watched_prefetch)
    monkeypatch.setattr(DiskReader, "n_waiting", property(lambda reader: n_waiting))
    with closing(tiered_engine(config(path), 0.5, 2)) as engine:
        logits = [engine.decode(token).copy() for token in TOKENS[:20]]
    assert ahead == ({1} if n_waiting else {1, 2})
    with closing(resident_engine(config(path))) as engine:
        np.testing.assert_array_equal(logits, [engine.decode(token).copy() for token in TOKENS[:20]])


# --- what is multiplied ------------------------------------------------------------------------------------


@dataclass
class Stops:
    """Looks at every stop between two segments: who writes which column of the outputs."""

    columns: list[int]
    n_stops: int = 0


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> Stops:
    stops, run, multiply = Stops([]), MoEStep.run, ExpertGraphs.run
    multiply_token, multiply_apart = ExpertGraphs.run_token, ExpertGraphs.run_apart

    def watched_stop(moe_step: MoEStep, segment: Segment, n_rows: int, is_cancelled: Any) -> None:
        exchange = moe_step.parts[segment.last].exchange
        n_columns = n_rows * exchange.shape.n_used
        outputs = exchange.read("outputs", exchange.shape.n_tokens * exchange.shape.n_used, exchange.shape.n_embd)
        outputs[:] = np.nan
        stops.columns.clear()
        run(moe_step, segment, n_rows, is_cancelled)
        assert sorted(stops.columns) == list(range(n_columns)), "the column of every selected expert, once"
        assert not np.isnan(outputs[:n_columns]).any()
        assert np.isnan(outputs[n_columns:]).all()
        stops.n_stops += 1

    def watched_apart(graphs: ExpertGraphs, layer: int, kind: SlotClass, experts: Any, columns: Sequence[int]) -> None:
        stops.columns += columns
        multiply_apart(graphs, layer, kind, experts, columns)

    def watched_product(graphs: ExpertGraphs, work: BankWork, *rest: Any) -> None:
        if not work.is_token:  # which `run_token` sees
            stops.columns += work.columns.tolist()
        multiply(graphs, work, *rest)

    monkeypatch.setattr(MoEStep, "run", watched_stop)

    def watched_token(graphs: ExpertGraphs, shape: TokenShape, slots: Array, experts: Array) -> None:
        stops.columns += range(len(slots))
        multiply_token(graphs, shape, slots, experts)

    monkeypatch.setattr(ExpertGraphs, "run", watched_product)
    monkeypatch.setattr(ExpertGraphs, "run_apart", watched_apart)
    monkeypatch.setattr(ExpertGraphs, "run_token", watched_token)
    return stops


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_every_selected_expert_is_computed_once_with_ids_that_no_backend_minds(
    model: Path, share: float, stops: Stops, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = WatchedIds(monkeypatch)
    with closing(tiered_engine(config(model), share)) as engine:
        n_layer = engine.spec.n_layer
        assert np.isfinite(conversation(engine)).all()
    assert stops.n_stops == n_layer * 14
    assert watched.n_seen > 0


@pytest.mark.parametrize("kind", [Type.F32, Type.Q4_0])
def test_any_pairs_in_any_order_are_the_products(kind: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also selections that no router makes: an expert several times for one token, tokens without experts."""
    watched, draw = WatchedIds(monkeypatch), np.random.default_rng(2)
    n_embd, n_ff, n_used, n_tokens, n_expert = 64, 32, 3, 8, 4
    matrices = [
        draw.standard_normal((n_expert, *ne), np.float32) / 8 for ne in ((n_ff, n_embd),) * 2 + ((n_embd, n_ff),)
    ]
    stored = [GGUFContent({}, {"m": StoredTensor(m, Type.F32)}).quantised(kind).tensors["m"].data for m in matrices]
    slot_class = SlotClass.of((kind, (n_embd, n_ff)), (kind, (n_embd, n_ff)), (kind, (n_ff, n_embd)))
    # As in a slot: gate, up and down of an expert one after the other, with gaps that are nobody's.
    matrix_bytes, gap = [part[0].nbytes for part in stored], 96
    memory = np.full((n_expert, sum(matrix_bytes) + 3 * gap), 0xFF, np.uint8)
    begins = [gap + sum(matrix_bytes[:part]) + gap * part for part in range(3)]
    for part, begin in zip(stored, begins, strict=True):
        memory[:, begin : begin + part[0].nbytes] = part.reshape(n_expert, -1).view(np.uint8)
    gate, up, down = (memory.ctypes.data + begin for begin in begins)
    bank = Bank((gate, up, down), memory.strides[0], n_expert)
    with (
        closing(CpuBackend(1)) as backend,
        closing(Exchange(backend, ExchangeShape(n_embd, n_embd, n_tokens, 256, n_expert, n_used, 0))) as exchange,
        closing(ExpertGraphs(backend, exchange, {slot_class}, 1)) as graphs,
    ):
        outputs = exchange.read("outputs", n_tokens * n_used, n_embd)
        normed = draw.standard_normal((n_tokens, n_embd), np.float32)
        weights = draw.random(n_tokens * n_used, np.float32)
        exchange.write("normed", normed)
        exchange.write("expert_weights", weights)
        expected = np.array(
            [[_expert(matrices, expert, row) for expert in range(n_expert)] for row in normed]
        )  # [n_tokens, n_expert, n_embd]
        for step in range(60):
            n_rows = 1 if step % 3 == 0 else int(draw.integers(1, n_tokens + 1))
            selected = draw.integers(-1, n_expert, n_rows * n_used)
            columns = draw.permutation(np.flatnonzero(selected >= 0))
            slots = selected[columns]
            is_token = n_rows == 1 and len(set(slots)) == n_used and bool((np.diff(columns) > 0).all())
            outputs[:] = np.nan
            if len(slots):
                graphs.run(BankWork(0, slot_class, bank, slots, slots, columns, is_token), n_rows)
            for column, expert in enumerate(selected.tolist()):
                if expert < 0:
                    assert np.isnan(outputs[column]).all()
                    continue
                wanted = expected[column // n_used, expert] * weights[column]
                np.testing.assert_allclose(outputs[column], wanted, atol=1e-4 if kind is Type.F32 else 0.5)
            assert np.isnan(outputs[n_rows * n_used :]).all()
    assert watched.n_seen > 0


def _expert(matrices: Sequence[Array], expert: int, row: Array) -> Array:
    gate, up, down = (part[expert] for part in matrices)
    gated = gate @ row
    result: Array = down @ (gated / (1 + np.exp(-gated)) * (up @ row))
    return result
