"""Slots in files: what is restored is computed no more, and what is no whole file of this model changes nothing."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from slimoe.offload.engine import Engine
from slimoe.offload.errors import UsageError
from slimoe.offload.requests.slot_file import SlotFileError
from slimoe.offload.text.generation import Finished, GenerationRequest, SamplingParams, Timings, TokenStep
from tests.models.configs import engine_config
from tests.models.conversation import TOKENS
from tests.models.tier_models import mixed_model, plain_model
from tests.models.tiered import device_engine, tiered_engine
from tests.models.tiny_gguf import FineShape, write_family
from tests.offload.devices import Devices

PROMPT, OTHER = tuple(TOKENS[:40]), tuple(TOKENS[5:45])
N_ANSWER = 6
N_KNOWN = len(PROMPT) + N_ANSWER - 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_model(tmp_path_factory.mktemp("slots"))


def opened(path: Path, **changed: Any) -> Engine:
    settings = {"n_ctx": 128, "n_batch": 32, "n_threads": 1, "n_parallel": 2, "device": "none", "weights": "copied"}
    return Engine.open(engine_config(path, **settings | changed))


@pytest.fixture
def engine(model: Path) -> Iterator[Engine]:
    with closing(opened(model)) as engine:
        yield engine


def answer(engine: Engine, prompt: tuple[int, ...], slot: int | None = None) -> tuple[list[int], Timings]:
    request = GenerationRequest(prompt, N_ANSWER, SamplingParams(temperature=0), ignore_eos=True, id_slot=slot)
    engine.submit(request)
    told: list[int] = []
    while not engine.is_idle:
        for _, event in engine.step():
            if isinstance(event, TokenStep):
                told.append(event.token)
            if isinstance(event, Finished):
                timings = event.timings
    return told, timings


def test_what_is_restored_is_computed_no_more(engine: Engine, model: Path, tmp_path: Path) -> None:
    """In a program of its own, as after a restart; the answer is the same to the last token."""
    path = tmp_path / "slot"
    expected, timings = answer(engine, PROMPT, 1)
    assert (timings.prompt_n, timings.cached_n) == (40, 0)
    saved = engine.slots.save(1, path)
    assert (saved.n_tokens, saved.n_bytes) == (N_KNOWN, path.stat().st_size)
    with closing(opened(model)) as other:
        answer(other, OTHER, 0)
        restored = other.slots.restore(0, path)
        assert (restored.n_tokens, restored.n_bytes) == (N_KNOWN, saved.n_bytes)
        told, timings = answer(other, PROMPT, 1)
        assert told == expected
        assert (timings.prompt_n, timings.cached_n) == (1, 39)
        # The conversation goes on from the answer, and what else was known still is.
        assert answer(other, (*PROMPT, *expected), 0)[1].prompt_n == 1
        assert answer(other, OTHER, 0)[1].prompt_n == 1
        # Saved again it is the same file.
        other.slots.restore(0, path)
        other.slots.save(0, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("make", [plain_model, mixed_model])
def test_all_kinds_of_caches(make: Any, kv_type: str, tmp_path: Path) -> None:
    settings = {"n_ctx": 128, "n_batch": 32, "n_threads": 1, "kv_type": kv_type}
    config = engine_config(make(tmp_path), **settings)
    with closing(tiered_engine(config, 0.5)) as engine:
        expected, _ = answer(engine, PROMPT)
        engine.slots.save(0, tmp_path / "slot")
    with closing(tiered_engine(config, 0.2)) as engine:
        engine.slots.restore(0, tmp_path / "slot")
        told, timings = answer(engine, PROMPT)
    assert (told, timings.prompt_n) == (expected, 1)


@pytest.mark.parametrize("name", ["deepseek2", "deepseek2-old"])
def test_latent_attention_on_devices_and_the_host(name: str, two_devices: Devices, tmp_path: Path) -> None:
    """One row for keys and values, or rows of different length for both."""
    path = write_family(tmp_path / "m.gguf", name, shape=FineShape(n_expert=16))
    config = engine_config(path, n_ctx=128, n_batch=32, n_threads=1, **two_devices.settings)
    with closing(device_engine(config, 0.5)) as engine:
        expected, _ = answer(engine, PROMPT)
        engine.slots.save(0, tmp_path / "slot")
    with closing(opened(path)) as engine:
        engine.slots.restore(0, tmp_path / "slot")
        told, timings = answer(engine, PROMPT)
        engine.slots.save(0, tmp_path / "again")
    assert timings.prompt_n == 1
    assert len(told) == len(expected)
    assert told == expected or not two_devices.is_exact
    assert (tmp_path / "again").stat().st_size == (tmp_path / "slot").stat().st_size


def test_a_cache_on_devices(model: Path, two_devices: Devices, tmp_path: Path) -> None:
    """Saved from two devices, restored to the host: where layers lie makes no difference to the file."""
    config = engine_config(model, n_ctx=128, n_batch=32, n_threads=1, **two_devices.settings)
    with closing(device_engine(config, 0.5)) as engine:
        expected, _ = answer(engine, PROMPT)
        engine.slots.save(0, tmp_path / "slot")
    with closing(opened(model)) as engine:
        engine.slots.restore(0, tmp_path / "slot")
        assert answer(engine, PROMPT)[1].prompt_n == 1
    with closing(device_engine(config, 0.2)) as engine:
        engine.slots.restore(0, tmp_path / "slot")
        told, timings = answer(engine, PROMPT)
    assert (told, timings.prompt_n) == (expected, 1)


def test_requests_at_once_lie_mixed_in_the_cache(engine: Engine, model: Path, tmp_path: Path) -> None:
    for prompt in (PROMPT, OTHER):
        request = GenerationRequest(prompt, N_ANSWER, SamplingParams(temperature=0), ignore_eos=True)
        engine.submit(request)
    while not engine.is_idle:
        engine.step()
    for slot in (0, 1):
        assert engine.slots.save(slot, tmp_path / f"{slot}").n_tokens == N_KNOWN
    with closing(opened(model)) as other:
        expected = [answer(other, prompt)[0] for prompt in (PROMPT, OTHER)]
    with closing(opened(model)) as other:
        for slot in (0, 1):
            other.slots.restore(slot, tmp_path / f"{slot}")
        for prompt, tokens in zip((PROMPT, OTHER), expected, strict=True):
            told, timings = answer(other, prompt)
            assert (told, timings.prompt_n) == (tokens, 1)


def test_erased_is_computed_anew(engine: Engine) -> None:
    answer(engine, PROMPT, 1)
    answer(engine, OTHER, 0)
    assert engine.slots.erase(1).n_tokens == N_KNOWN
    assert answer(engine, OTHER, 0)[1].prompt_n == 1
    assert answer(engine, PROMPT, 1)[1].prompt_n == 40
    assert engine.slots.erase(1).n_tokens == N_KNOWN
    assert engine.slots.erase(1).n_tokens == 0


def test_a_slot_that_answers_is_left_alone(engine: Engine, tmp_path: Path) -> None:
    answer(engine, PROMPT, 1)
    engine.slots.save(1, tmp_path / "slot")
    engine.submit(GenerationRequest(OTHER, N_ANSWER, ignore_eos=True, id_slot=1))
    engine.step()
    for action in ("restore", "erase"):
        with pytest.raises(UsageError, match="answers a request now"):
            engine.slots.change(action, 1, tmp_path / "slot")
    assert engine.slots.restore(0, tmp_path / "slot").n_tokens == N_KNOWN
    # What is there already of a running answer can be saved.
    assert 0 < engine.slots.save(1, tmp_path / "half").n_tokens < 40
    while not engine.is_idle:
        engine.step()


def test_nothing_to_save(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to save in slot 1"):
        engine.slots.save(1, tmp_path / "slot")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(engine: Engine, tmp_path: Path) -> None:
    answer(engine, PROMPT, 0)
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "slot"):
        with pytest.raises(UsageError):
            engine.slots.save(0, path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("damage", ["cut", "longer", "flipped", "empty", "text", "head", "gone", "folder"])
def test_damaged_files_change_nothing(engine: Engine, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "slot"
    answer(engine, PROMPT, 1)
    engine.slots.save(1, path)
    answer(engine, OTHER, 0)
    whole = path.read_bytes()
    path.unlink()
    match damage:
        case "cut":
            cuts = [whole[:n] for n in (5, 12, 60, len(whole) // 2, len(whole) - 1)]
        case "longer":
            cuts = [whole + b"\0"]
        case "flipped":
            cuts = [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in (0, 11, 40, 300, 5000, len(whole) - 1)]
        case "head":
            cuts = [whole.replace(b'"n_tokens":45', b'"n_tokens":%d' % n) for n in (0, 44, 46)]
            cuts.append(whole.replace(b'"n_tokens":45', b'"n_tokens":-5'))
        case "folder":
            cuts = []
            path.mkdir()
        case _:
            cuts = [] if damage == "gone" else [{"empty": b"", "text": b"{}" * 100}[damage]]
    for n in range(max(1, len(cuts))):
        if cuts:
            path.write_bytes(cuts[n])
        with pytest.raises(SlotFileError, match="slot"):
            engine.slots.restore(0, path)
    assert answer(engine, OTHER, 0)[1].prompt_n == 1
    assert answer(engine, PROMPT, 1)[1].prompt_n == 1


def test_files_of_others_are_refused(engine: Engine, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "slot"
    answer(engine, PROMPT, 1)
    engine.slots.save(1, path)
    with closing(opened(mixed_model(tmp_path))) as other, pytest.raises(SlotFileError, match="another model"):
        other.slots.restore(0, path)
    with closing(opened(model, kv_type="q8_0")) as other, pytest.raises(SlotFileError, match="--kv-type"):
        other.slots.restore(0, path)
    with closing(opened(model, n_ctx=32)) as other, pytest.raises(SlotFileError, match="45 tokens"):
        other.slots.restore(0, path)
