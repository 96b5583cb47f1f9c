"""When records are written and read: as long as it pays, and in no more of the time than is allowed."""

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.offload.ggml.cpu_backend import CpuBackend
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.memory.cells import Cells, Sequence
from slimoe.offload.memory.contents import Bytes, read_rows, row_shape, write_rows
from slimoe.offload.memory.kv_cache import KVSize
from slimoe.offload.memory.kv_store import HOST, KVPlace, KVStore
from slimoe.offload.memory.prompt_cache import PromptCache
from slimoe.offload.memory.prompt_folder import PromptFolder
from slimoe.offload.memory.prompt_record import RecordForm, RecordName
from slimoe.offload.model.model_file import ModelFile
from tests.models.gguf_content import Array
from tests.models.tiny_gguf import write_family

N_CELLS = 1024
TEXT = np.random.default_rng(3).integers(0, 300, 700, np.int32)
OTHER = np.random.default_rng(4).integers(0, 300, 900, np.int32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KVStore]:
    spec = ModelFile.of(read_gguf(write_family(tmp_path_factory.mktemp("m") / "m.gguf", "qwen3moe"))).spec
    with closing(CpuBackend(1)) as backend, closing(KVStore(spec, KVSize(Type.F16, N_CELLS))) as store:
        store.arrange({HOST: KVPlace(backend, tuple(range(spec.n_layer)))})
        yield store


class Kept:
    """A cache of prompts in `path`, over cells of its own."""

    def __init__(self, store: KVStore, path: Path, folder: type[PromptFolder] = PromptFolder) -> None:
        self.told: list[str] = []
        self.store, self.cells = store, Cells(N_CELLS)
        form = RecordForm.of("model", "", store)
        self.prompts = PromptCache(folder(path, 1 << 30, self.told.append), form, self.cells, store, self.told.append)

    def compute(self, tokens: Array) -> Sequence:
        """A sequence of these tokens, whose rows are their numbers and places."""
        sequence = self.cells.begin()
        self.cells.append(sequence, tokens)
        for tensor in self.store.tensors():
            n_heads, row_bytes = row_shape(tensor)
            write_rows(tensor, sequence.cells, range(n_heads), self.rows(tokens, n_heads, row_bytes))
        return sequence

    @staticmethod
    def rows(tokens: Array, n_heads: int, row_bytes: int) -> Array:
        each = (tokens + np.arange(len(tokens)))[None, :, None] + np.arange(n_heads)[:, None, None]
        return np.ascontiguousarray(np.broadcast_to(each, (n_heads, len(tokens), row_bytes)) % 251).astype(np.uint8)

    def load(self, tokens: Array, *, is_alone: bool = True) -> int:
        """How many tokens of a text are read into a new sequence, and lie there as they were computed."""
        sequence = self.cells.begin()
        while not self.prompts.load(sequence, tokens.tolist(), lambda: False, is_alone=is_alone):
            pass
        for tensor in self.store.tensors() if len(sequence) else ():
            n_heads, row_bytes = row_shape(tensor)
            rows = read_rows(tensor, sequence.cells, range(n_heads))
            np.testing.assert_array_equal(rows, self.rows(tokens[: len(sequence)], n_heads, row_bytes))
        n_read = len(sequence)
        self.cells.truncate(sequence, 0)
        self.cells.remember(sequence)
        return n_read

    def rest(self) -> None:
        while self.prompts.tidy(1):
            pass


def n_records(path: Path) -> int:
    return len(list(path.glob("*.kv")))


def test_whole_blocks_are_written_and_read(store: KVStore, tmp_path: Path) -> None:
    kept = Kept(store, tmp_path)
    with closing(kept.prompts):
        kept.prompts.note(kept.compute(TEXT))
        kept.rest()
        assert n_records(tmp_path) == 21
    other = Kept(store, tmp_path)
    with closing(other.prompts):
        assert other.load(TEXT) == 672
        assert other.load(TEXT, is_alone=False) == 672
        assert other.load(TEXT[:600]) == 576
        assert other.load(np.concatenate([TEXT[:300], OTHER])) == 288
        assert other.load(TEXT[1:]) == 0
        assert len(other.told) == 4
        assert other.prompts.counters()["n_prompt_cache_tokens"] == 672 + 672 + 576 + 288


def test_what_is_known_is_not_read(store: KVStore, tmp_path: Path) -> None:
    """A sequence that has a part of a block gets the rest of it, and its own cells stay as they are."""
    kept = Kept(store, tmp_path)
    with closing(kept.prompts):
        kept.prompts.note(kept.compute(TEXT))
        kept.rest()
    other = Kept(store, tmp_path)
    with closing(other.prompts):
        sequence = other.compute(TEXT[:300])
        tensor = store.tensors()[0]
        marks = np.full((row_shape(tensor)[0], 300, row_shape(tensor)[1]), 255, np.uint8)
        write_rows(tensor, sequence.cells, range(len(marks)), marks)
        assert other.prompts.load(sequence, TEXT.tolist(), lambda: False, is_alone=True)
        assert len(sequence) == 672
        rows = read_rows(tensor, sequence.cells, range(len(marks)))
        np.testing.assert_array_equal(rows[:, :300], marks)
        np.testing.assert_array_equal(rows[:, 300:], other.rows(TEXT[:672], *rows.shape[::2])[:, 300:])
        assert other.prompts.counters()["n_prompt_cache_tokens"] == 372


def test_what_is_computed_faster_is_not_read(store: KVStore, tmp_path: Path) -> None:
    kept = Kept(store, tmp_path)
    with closing(kept.prompts):
        kept.prompts.note(kept.compute(TEXT))
        kept.rest()
        kept.prompts.forget(OTHER)
    other = Kept(store, tmp_path)
    with closing(other.prompts):
        # What was not measured yet is tried.
        assert other.load(TEXT) == 672
        other.prompts.computed(1000, 0.0)
        assert other.load(TEXT) == 0
        for _ in range(20):
            other.prompts.computed(1, 1000.0)
        assert other.load(TEXT) == 672


def test_what_is_lost_is_written_before_if_that_is_faster(store: KVStore, tmp_path: Path) -> None:
    class Stuck(PromptFolder):
        """Its disk takes nothing until it is told to."""

        def write(self, name: RecordName, head: bytes, content: Bytes, used_ns: int) -> None:
            assert goes_on.wait(60)
            super().write(name, head, content, used_ns)

    goes_on = threading.Event()
    for seconds, n_written in ((0.0, 2), (1000.0, 21)):
        path = tmp_path / str(seconds)
        kept = Kept(store, path, Stuck)
        with closing(kept.prompts):
            kept.prompts.computed(1, seconds)
            sequence = kept.compute(TEXT)
            kept.prompts.note(sequence)
            kept.cells.remember(sequence)
            kept.compute(OTHER)
            goes_on.set()
            kept.rest()
            assert n_records(path) == n_written
    other = Kept(store, path)
    with closing(other.prompts):
        assert other.load(TEXT) == 672


def test_a_step_leaves_little_to_writing(store: KVStore, tmp_path: Path) -> None:
    """Steps that took no time give none for writing; long ones give enough for all."""
    kept = Kept(store, tmp_path)
    with closing(kept.prompts):
        kept.prompts.note(kept.compute(TEXT))
        for _ in range(100):
            kept.prompts.step_done(0.0)
        assert n_records(tmp_path) == 0
        for _ in range(100):
            kept.prompts.step_done(10.0)
        kept.rest()
        assert n_records(tmp_path) == 21


def test_what_others_hold_is_not_forgotten(store: KVStore, tmp_path: Path) -> None:
    kept = Kept(store, tmp_path)
    with closing(kept.prompts):
        first, second = kept.compute(TEXT[:400]), kept.compute(np.concatenate([TEXT[:200], OTHER[:300]]))
        for sequence in (first, second):
            kept.prompts.note(sequence)
        kept.rest()
        assert n_records(tmp_path) == 12 + 15 - 6
        tokens = first.tokens.copy()
        kept.cells.truncate(first, 0)
        kept.prompts.forget(tokens)
        assert n_records(tmp_path) == 15
        assert kept.load(second.tokens[:499]) == 480


def test_short_texts_are_left_alone(store: KVStore, tmp_path: Path) -> None:
    kept = Kept(store, tmp_path)
    with closing(kept.prompts):
        kept.prompts.note(kept.compute(TEXT[:127]))
        assert not kept.prompts.tidy(1)
        assert n_records(tmp_path) == 0
        kept.prompts.note(kept.compute(TEXT[:128]))
        kept.rest()
        assert n_records(tmp_path) == 4
        assert kept.load(TEXT[:127]) == 0
        assert kept.load(TEXT[:128]) == 128
