"""Reading from disk while serving: what fails, who hears of it, and that nothing is left behind."""

import errno
import os
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from bench.baselines.stepping import random_tokens
from slimoe.offload.cache.disk_reader import PAGE, ReadFailedError
from slimoe.offload.engine import Engine
from slimoe.offload.experts.runner import TieredRunner
from slimoe.offload.ggml.cpu_backend import EngineAbortedError
from slimoe.offload.graph.batch import Batch
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.text.generation import Event, Failed, Finished, GenerationRequest, SamplingParams, TokenStep
from tests.models.configs import engine_config
from tests.models.conversation import stopped_after
from tests.models.tiered import resident_engine, tiered_engine
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf

TOKENS = random_tokens(40, 300)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TinyShape(n_layer=3, n_embd=32, n_head=2, n_head_kv=1, n_ff=64, n_expert=5, n_expert_used=2)
    return write_tiny_gguf(tmp_path_factory.mktemp("faults") / "m.gguf", None, shape=shape)


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All experts are used, so that rounding, which differs between batches, never chooses others."""
    shape = TinyShape(n_layer=2, n_embd=32, n_head=2, n_head_kv=1, n_ff=64, n_expert=2, n_expert_used=2)
    return write_tiny_gguf(tmp_path_factory.mktemp("settled") / "m.gguf", None, shape=shape)


@pytest.fixture
def path(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy2(stored, tmp_path / "m.gguf"))


def config(path: Path, **changed: Any) -> EngineConfig:
    return engine_config(path, **{"n_ctx": 256, "n_batch": 16, "n_threads": 1} | changed)


class Disk:
    """In place of the system's reads of whole pages, as those of experts are: broken when told so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._read = os.preadv
        self.is_broken = False
        monkeypatch.setattr(os, "preadv", self.preadv)

    def preadv(self, file: int, buffers: list[memoryview], offset: int) -> int:
        if self.is_broken and offset % PAGE == 0 and len(buffers[0]) % PAGE == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._read(file, buffers, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def greedy(prompt: list[int], max_tokens: int) -> GenerationRequest:
    return GenerationRequest(tuple(prompt), max_tokens, SamplingParams(temperature=0.0))


def finish(engine: Engine, told: dict[int, list[Event | Failed]] | None = None) -> dict[int, list[Event | Failed]]:
    """What comes of all requests."""
    told = {} if told is None else told
    while not engine.is_idle:
        for id, event in engine.step():
            told.setdefault(id, []).append(event)
    return told


def tokens(events: list[Event | Failed]) -> list[int]:
    return [event.token for event in events if isinstance(event, TokenStep)]


def answer(engine: Engine, prompt: list[int], max_tokens: int = 6) -> list[int]:
    """A new request's tokens; raises its error."""
    id = engine.submit(greedy(prompt, max_tokens))
    events = finish(engine)[id]
    if isinstance(events[-1], Failed):
        raise events[-1].error
    return tokens(events)


def assert_nothing_is_held(engine: Engine) -> None:
    """No cell and no slot is in use for somebody who is gone."""
    assert engine.is_idle
    cells = engine.cells
    assert cells.n_unused == cells.n_cells - engine.n_past
    tiers = engine.tiers
    assert tiers is not None
    assert tiers.host_pool is not None
    tiers.host_pool.check()


# --- the disk ----------------------------------------------------------------------------------------------


def test_a_disk_error_ends_the_request_that_needed_the_disk(
    stored: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [TOKENS[:5], TOKENS[5:17], TOKENS[17:20]]
    lengths, broken_for, run = dict[int, int](), set[int](), TieredRunner.run

    def run_badly(runner: TieredRunner, batch: Batch, is_cancelled: Callable[[], bool] | None) -> Any:
        """Notes how long each sequence is, by its first cell; the disk is broken for some of them."""
        lengths.update((int(one.visible[0]), len(one.visible)) for one in batch.runs)
        disk.is_broken = any(int(one.visible[0]) in broken_for for one in batch.runs)
        return run(runner, batch, is_cancelled)

    monkeypatch.setattr(TieredRunner, "run", run_badly)
    with closing(resident_engine(config(stored, n_parallel=3))) as engine:
        expected = [answer(engine, prompt, 12) for prompt in prompts]
    with closing(tiered_engine(config(stored, n_parallel=3), 0.0)) as engine:
        ids = [engine.submit(greedy(prompt, 12)) for prompt in prompts]
        told: dict[int, list[Event | Failed]] = {}
        while not all(tokens(told.get(id, [])) for id in ids):
            for id, event in engine.step():
                told.setdefault(id, []).append(event)
        broken_for.add(max(lengths, key=lambda cell: lengths[cell]))  # the longest is the second request's
        finish(engine, told)
        broken_for.clear()
        disk.is_broken = False
        end = told[ids[1]][-1]
        assert isinstance(end, Failed)
        assert isinstance(end.error, ReadFailedError)
        assert "m.gguf: reading failed (Input/output error). Check the disk" in str(end.error)
        assert [tokens(told[ids[n]]) for n in (0, 2)] == [expected[0], expected[2]]
        assert_nothing_is_held(engine)
        assert [answer(engine, prompt, 12) for prompt in prompts] == expected


def test_while_the_disk_is_broken_every_request_says_so(stored: Path, disk: Disk) -> None:
    with closing(resident_engine(config(stored))) as engine:
        expected = answer(engine, TOKENS[:9])
    with closing(tiered_engine(config(stored), 0.0)) as engine:
        disk.is_broken = True
        for _ in range(5):
            with pytest.raises(ReadFailedError, match="reading failed"):
                answer(engine, TOKENS[:9])
            with pytest.raises(ReadFailedError, match="reading failed"):
                list(engine.generate(greedy(TOKENS[:9], 3)))
            assert_nothing_is_held(engine)
        disk.is_broken = False
        assert answer(engine, TOKENS[:9]) == expected
        events = list(engine.generate(greedy(TOKENS[:9], 6)))
        assert [event.token for event in events if isinstance(event, TokenStep)] == expected


def test_a_disk_that_fails_now_and_then_changes_no_bit(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(resident_engine(config(stored))) as engine:
        expected = [engine.decode(token).copy() for token in TOKENS]
    real, draw, failed = os.preadv, random.Random(1), []

    def preadv(file: int, buffers: list[memoryview], offset: int) -> int:
        if draw.random() < 0.02:
            failed.append(offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, buffers, offset)

    with closing(tiered_engine(config(stored), 0.3)) as engine:
        monkeypatch.setattr(os, "preadv", preadv)
        for token, logits in zip(TOKENS, expected, strict=True):
            for _ in range(100):
                try:
                    got = engine.decode(token)
                    break
                except ReadFailedError:
                    continue
            np.testing.assert_array_equal(got, logits)
    assert failed


def test_a_model_that_cannot_be_read_when_it_is_opened(stored: Path, disk: Disk) -> None:
    process = psutil.Process()
    with closing(tiered_engine(config(stored), 0.5)):
        pass
    before = process.num_fds(), threading.active_count()
    disk.is_broken = True
    for _ in range(3):
        with pytest.raises(ReadFailedError, match="reading failed"):
            tiered_engine(config(stored), 0.5)
    assert (process.num_fds(), threading.active_count()) == before


# --- the file ----------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, 9 * PAGE)


def overwrite(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))
    os.utime(path, ns=(0, 1))


@pytest.mark.parametrize("damage", [truncate, overwrite])
@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_changes_is_told_of_until_it_is_put_back(
    path: Path, stored: Path, damage: Callable[[Path], None], direct: bool
) -> None:
    with closing(resident_engine(config(path))) as engine:
        expected = answer(engine, TOKENS[:9], 12)
    with closing(tiered_engine(config(path, direct_io=direct), 0.0)) as engine:
        id = engine.submit(greedy(TOKENS[:9], 12))
        told: dict[int, list[Event | Failed]] = {id: []}
        while len(tokens(told[id])) < 3:
            told[id] += [event for _, event in engine.step()]
        damage(path)
        finish(engine, told)
        end = told[id][-1]
        assert isinstance(end, Failed)
        assert "m.gguf: the file was changed while it was open. Start again with the new file." in str(end.error)
        for _ in range(3):
            with pytest.raises(ReadFailedError, match="was changed while it was open"):
                answer(engine, TOKENS[:9])
        assert_nothing_is_held(engine)
        path.write_bytes(stored.read_bytes())
        os.utime(path, ns=(path.stat().st_atime_ns, stored.stat().st_mtime_ns))
        assert answer(engine, TOKENS[:9], 12) == expected


def test_a_file_replaced_by_renaming_is_read_on(path: Path, tmp_path: Path) -> None:
    with closing(resident_engine(config(path))) as engine:
        expected = answer(engine, TOKENS[:9], 12)
    with closing(tiered_engine(config(path), 0.0)) as old:
        assert answer(old, TOKENS[:9], 3) == expected[:3]
        shape = TinyShape(n_layer=2, n_expert=3, n_expert_used=1)
        os.replace(write_tiny_gguf(tmp_path / "new.gguf", None, shape=shape), path)
        with closing(tiered_engine(config(path), 0.0)) as new:
            assert new.spec.n_layer == 2
            other = answer(new, TOKENS[:9], 12)
        assert answer(old, TOKENS[:9], 12) == expected
        assert other != expected


def test_two_engines_over_one_file(stored: Path) -> None:
    with closing(resident_engine(config(stored))) as engine:
        expected = [engine.decode(token).copy() for token in TOKENS]
    with closing(tiered_engine(config(stored), 0.0)) as first:
        with closing(tiered_engine(config(stored, direct_io=False, policy="lru"), 0.4)) as second:
            for token, logits in zip(TOKENS[:30], expected, strict=False):
                np.testing.assert_array_equal(first.decode(token), logits)
                np.testing.assert_array_equal(second.decode(token), logits)
        for token, logits in zip(TOKENS[30:], expected[30:], strict=True):
            np.testing.assert_array_equal(first.decode(token), logits)


# --- cancelling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_step_may_be_stopped_anywhere(stored: Path, share: float) -> None:
    """What was under way then is nobody's business later."""
    with closing(resident_engine(config(stored))) as engine:
        batch, single = engine.prefill(TOKENS[:12]).copy(), engine.decode(TOKENS[12]).copy()
    n_stopped = 0
    with closing(tiered_engine(config(stored), share)) as engine:
        for n_calls in range(0, 120, 3):
            try:
                engine.read(TOKENS[20:32], 1, stopped_after(n_calls))
            except EngineAbortedError:
                n_stopped += 1
            engine.truncate(0)
            if n_calls % 5 == 0:
                np.testing.assert_array_equal(engine.prefill(TOKENS[:12]), batch)
                np.testing.assert_array_equal(engine.decode(TOKENS[12]), single)
                engine.truncate(0)
    assert n_stopped > 20


def test_closing_while_experts_are_read_ahead(stored: Path) -> None:
    process = psutil.Process()
    with closing(tiered_engine(config(stored), 0.4)) as engine:
        engine.decode(1)
    before = process.num_fds(), threading.active_count()
    for n_tokens in range(8):
        with closing(tiered_engine(config(stored), 0.4)) as engine:
            for token in TOKENS[:n_tokens]:
                engine.decode(token)
    assert (process.num_fds(), threading.active_count()) == before


@dataclass
class Visitor:
    """A request, and what it was told."""

    request: GenerationRequest
    got: list[int] = field(default_factory=list)
    is_cancelled: bool = False


def test_a_thousand_requests_come_and_go_and_nothing_stays(settled: Path, disk: Disk) -> None:
    """Admitted, cancelled and failed at random; what is answered is what the resident model answers."""
    draw, process = random.Random(4), psutil.Process()
    prompts = [TOKENS[begin : begin + length] for begin, length in ((0, 1), (2, 4), (9, 2), (20, 3))]
    with closing(resident_engine(config(settled))) as engine:
        expected = {tuple(prompt): answer(engine, prompt, 5) for prompt in prompts}
    kinds = Counter[str]()
    held: dict[int, int] = {}
    visitors: dict[int, Visitor] = {}
    with closing(tiered_engine(config(settled, n_parallel=4, n_ctx=64, n_batch=5), 0.2)) as engine:
        n_come = 0
        while n_come < 1000 or visitors:
            if n_come < 1000 and len(visitors) < 8 and draw.random() < 0.6:
                visitor = Visitor(greedy(draw.choice(prompts), draw.choice([0, 1, 2, 3])))
                visitors[engine.submit(visitor.request, partial(getattr, visitor, "is_cancelled"))] = visitor
                n_come += 1
            if visitors and draw.random() < 0.15:
                draw.choice(list(visitors.values())).is_cancelled = True
            disk.is_broken = draw.random() < 0.02
            for id, event in engine.step():
                if isinstance(event, TokenStep):
                    visitors[id].got.append(event.token)
                elif isinstance(event, Finished | Failed):
                    kinds[_check_end(visitors.pop(id), event, expected)] += 1
            if n_come % 100 == 0:
                held[n_come] = process.memory_info().rss
        disk.is_broken = False
        assert_nothing_is_held(engine)
        assert answer(engine, prompts[0], 5) == expected[tuple(prompts[0])]
        assert engine.counters()["misses"] > 1000
    assert min(kinds[kind] for kind in ("length", "cancelled", "failed")) > 10, kinds
    assert held[1000] - held[400] < 2 << 20


def _check_end(visitor: Visitor, event: Finished | Failed, expected: dict[tuple[int, ...], list[int]]) -> str:
    reason = event.reason if isinstance(event, Finished) else "failed"
    wanted = expected[visitor.request.prompt_ids][: visitor.request.max_tokens]
    assert visitor.got == (wanted if reason == "length" else wanted[: len(visitor.got)])
    return reason
