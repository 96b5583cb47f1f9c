"""Prompts that are kept on disk: what is there is computed no more, and what is not right there costs computing only.

Computed tokens are counted where steps count them, and answers compared with those of an engine that keeps nothing.
"""

import random
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from slimoe.offload.engine import Engine
from slimoe.offload.errors import UsageError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.plan.engine_plan import plan_engine
from slimoe.offload.text.generation import Failed, Finished, GenerationRequest, SamplingParams, Timings, TokenStep
from tests.models.configs import engine_config, roomy_machine
from tests.models.tier_models import mixed_model
from tests.models.tiered import device_engine, tiered_engine
from tests.models.tiny_gguf import FineShape, write_family
from tests.offload.devices import Devices

SHAPE = FineShape(n_layer=4, n_embd_head=64, n_expert=8, n_expert_used=2)
PLAIN, RECURRENT = ("qwen3moe", "gemma4", "deepseek2", "deepseek2-old"), ("qwen3next", "lfm2moe", "nemotron_h_moe")
BLOCK, STEP, N_BATCH = 32, 32, 128
"""At most so many tokens are in a block; of a prompt a state is kept at the last multiple of a step."""
N_ANSWER = 6
draw = random.Random(8)
SYSTEM = tuple(draw.randrange(3, 290) for _ in range(400))
FIRST = (*SYSTEM, *(draw.randrange(3, 290) for _ in range(150)))
SECOND = (*SYSTEM, *(draw.randrange(3, 290) for _ in range(130)))
OTHERS = [tuple(draw.randrange(3, 290) for _ in range(700)) for _ in range(2)]
OPTIONS: dict[str, Any] = {"n_ctx": 1024, "n_batch": N_BATCH, "n_threads": 1, "kv_type": "f32", "n_parallel": 1}


@pytest.fixture(scope="module", params=(*PLAIN, *RECURRENT))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("m") / f"{request.param}.gguf", request.param, shape=SHAPE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("m") / "m.gguf", "qwen3moe", shape=SHAPE)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("m") / "m.gguf", "qwen3next", shape=SHAPE)


def opened(path: Path, kept: Path | None = None, **changed: Any) -> Engine:
    return Engine.open(engine_config(path, **OPTIONS | {"prompt_cache": kept} | changed))


def rest(engine: Engine) -> None:
    """As between two requests."""
    while engine.tidy():
        pass


class Asked:
    """What came of requests: the tokens of answers, what the last one says of its prompt, and what was computed."""

    def __init__(self, engine: Engine, *prompts: tuple[int, ...], n_answer: int = N_ANSWER) -> None:
        def n_computed() -> int:
            total = engine.snapshot().work.total
            return total.n_prompt + total.n_predicted

        before, told = n_computed(), dict[int, list[int]]()
        for prompt in prompts:
            request = GenerationRequest(prompt, n_answer, SamplingParams(temperature=0), ignore_eos=True)
            told[engine.submit(request)] = []
        while not engine.is_idle:
            for id, event in engine.step():
                assert not isinstance(event, Failed), event.error
                if isinstance(event, TokenStep):
                    told[id].append(event.token)
                if isinstance(event, Finished):
                    self.timings: Timings = event.timings
        self.answers = list(told.values())
        self.n_read = n_computed() - before - (n_answer - 1) * len(prompts)
        """How many tokens of prompts were computed."""
        if len(prompts) == 1:
            assert self.timings.prompt_n == self.n_read
            assert self.timings.cached_n == len(prompts[0]) - self.n_read


def anew(path: Path, *prompts: tuple[int, ...], n_answer: int = N_ANSWER, **changed: Any) -> list[list[int]]:
    """The answers of engines that have read nothing before."""
    answers = []
    for prompt in prompts:
        with closing(opened(path, **changed)) as engine:
            answers += Asked(engine, prompt, n_answer=n_answer).answers
    return answers


def tail(path: Path) -> int:
    """The most tokens of a prompt that are computed again."""
    return STEP + 8 if path.stem in RECURRENT else BLOCK


def test_after_a_restart_the_tail_is_computed(model: Path, tmp_path: Path) -> None:
    with closing(opened(model, tmp_path)) as engine:
        assert Asked(engine, FIRST).n_read == len(FIRST)
        rest(engine)
    with closing(opened(model, tmp_path)) as engine:
        asked = Asked(engine, FIRST)
        counters = engine.counters()
    assert asked.n_read <= tail(model)
    assert asked.answers == anew(model, FIRST)
    assert counters["n_prompt_cache_tokens"] == len(FIRST) - asked.n_read
    assert counters["bytes_prompt_cache_read"] > 0
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_a_conversation_goes_on_after_a_restart(model: Path, tmp_path: Path) -> None:
    with closing(opened(model, tmp_path)) as engine:
        asked = Asked(engine, FIRST, n_answer=60)
        rest(engine)
    following = (*FIRST, *asked.answers[0], *SECOND[-100:])
    with closing(opened(model, tmp_path)) as engine:
        asked = Asked(engine, following)
    n_new = len(following) - len(FIRST) - 59
    # The last token of an answer is drawn, and not read; behind an answer there is a state.
    assert n_new <= asked.n_read <= n_new + (0 if model.stem in RECURRENT else BLOCK)
    assert asked.answers == anew(model, following)


def test_what_another_conversation_pushed_out_is_read(model: Path, tmp_path: Path) -> None:
    with closing(opened(model, tmp_path)) as engine:
        Asked(engine, FIRST)
        rest(engine)
        for other in OTHERS:
            Asked(engine, other)
            rest(engine)
        again = Asked(engine, FIRST)
        assert again.n_read <= tail(model)
        assert again.answers == anew(model, FIRST)
    with closing(opened(model)) as engine:
        for prompt in (FIRST, *OTHERS):
            Asked(engine, prompt)
        # Without a folder all of it is computed, or else this would show nothing.
        assert Asked(engine, FIRST).n_read == len(FIRST)


def test_what_texts_begin_with_is_kept_once(model: Path, tmp_path: Path) -> None:
    with closing(opened(model, tmp_path)) as engine:
        Asked(engine, FIRST)
        rest(engine)
    n_first = len(list(tmp_path.glob("*.kv")))
    with closing(opened(model, tmp_path)) as engine:
        edited = Asked(engine, SECOND)
        rest(engine)
    # What they share was read up to a block's end, or with states up to the end of a part that was read at once.
    assert len(SECOND) - len(SYSTEM) <= edited.n_read <= len(SECOND) - len(SYSTEM) + N_BATCH
    assert edited.answers == anew(model, SECOND)
    assert len(list(tmp_path.glob("*.kv"))) < 2 * n_first


def test_requests_at_once(model: Path, tmp_path: Path) -> None:
    prompts = (FIRST, SECOND, OTHERS[0])
    with closing(opened(model, tmp_path, n_parallel=3)) as engine:
        assert Asked(engine, *prompts).answers == anew(model, *prompts)
        rest(engine)
    with closing(opened(model, tmp_path, n_parallel=3)) as engine:
        asked = Asked(engine, *prompts)
    assert asked.n_read <= 3 * tail(model)
    assert asked.answers == anew(model, *prompts)


def test_without_a_moment_of_rest(plain: Path, tmp_path: Path) -> None:
    with closing(opened(plain, tmp_path)) as engine:
        for prompt in (FIRST, *OTHERS):
            Asked(engine, prompt)
        again = Asked(engine, FIRST)
    assert again.answers == anew(plain, FIRST)
    assert again.n_read < len(FIRST)


def test_what_is_left_is_written_at_the_end(model: Path, tmp_path: Path) -> None:
    with closing(opened(model, tmp_path)) as engine:
        Asked(engine, FIRST)
    with closing(opened(model, tmp_path)) as engine:
        assert Asked(engine, FIRST).n_read <= tail(model)


def test_the_callers_own_sequence(model: Path, tmp_path: Path) -> None:
    """As `slimoe run` asks."""
    request = GenerationRequest(FIRST, N_ANSWER, SamplingParams(temperature=0), ignore_eos=True)
    for n_most in (len(FIRST), tail(model)):
        with closing(opened(model, tmp_path)) as engine:
            *events, finished = engine.generate(request)
        assert isinstance(finished, Finished)
        assert finished.timings.prompt_n <= n_most
        assert [[event.token for event in events if isinstance(event, TokenStep)]] == anew(model, FIRST)


def test_a_prompt_that_was_stopped_is_kept_as_far_as_it_was_read(model: Path, tmp_path: Path) -> None:
    with closing(opened(model, tmp_path)) as engine:

        def is_cancelled() -> bool:
            return engine.snapshot().work.total.n_prompt > 400

        engine.submit(GenerationRequest(FIRST, N_ANSWER), is_cancelled)
        while not engine.is_idle:
            engine.step()
        assert engine.snapshot().work.total.n_prompt < len(FIRST)
    with closing(opened(model, tmp_path)) as engine:
        asked = Asked(engine, FIRST)
    assert asked.n_read <= len(FIRST) - 384
    assert asked.answers == anew(model, FIRST)


def test_a_request_that_is_cancelled_while_it_is_read(model: Path, tmp_path: Path) -> None:
    with closing(opened(model, tmp_path)) as engine:
        Asked(engine, FIRST)
    with closing(opened(model, tmp_path, n_parallel=2)) as engine:
        asked = iter([False, False, False])
        engine.submit(GenerationRequest(FIRST, N_ANSWER), lambda: next(asked, True))
        while not engine.is_idle:
            engine.step()
        assert engine.snapshot().work.total.n_prompt == 0
        asked_again = Asked(engine, FIRST)
    assert asked_again.n_read <= tail(model)
    assert asked_again.answers == anew(model, FIRST)


def test_short_prompts_are_not_kept(model: Path, tmp_path: Path) -> None:
    with closing(opened(model, tmp_path)) as engine:
        Asked(engine, FIRST[:120])
    assert list(tmp_path.iterdir()) == []


def test_what_is_only_scored_is_not_kept(plain: Path, tmp_path: Path) -> None:
    with closing(opened(plain, tmp_path)) as engine:
        list(engine.generate(GenerationRequest(FIRST, 0, prompt_logprobs=True)))
    assert list(tmp_path.iterdir()) == []


def test_its_memory_is_planned(plain: Path, tmp_path: Path) -> None:
    """Three blocks: one that is written, one that waits for that, and one that is read."""
    plans = [
        plan_engine(engine_config(plain, **OPTIONS, prompt_cache=kept), roomy_machine()) for kept in (None, tmp_path)
    ]
    without, with_blocks = (plan.weight_forms.program for plan in plans)
    with closing(opened(plain, tmp_path)) as engine:
        Asked(engine, FIRST)
    largest = max(path.stat().st_size for path in tmp_path.iterdir())
    assert 0 < with_blocks - without <= 3 * largest < with_blocks - without + 3 * 512


# --- what is not right -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed", [{"kv_type": "f16"}, {"lossy": "skip:0.1"}, {"lossy": "skip:0.2"}, "model"], ids=str
)
def test_others_have_other_files(plain: Path, tmp_path: Path, changed: Any) -> None:
    with closing(opened(plain, tmp_path)) as engine:
        Asked(engine, FIRST)
    before = {path.name for path in tmp_path.iterdir()}
    other, options = plain, changed
    if changed == "model":
        other, options = tmp_path.with_suffix(".gguf"), {}
        content = bytearray(plain.read_bytes())
        content[read_gguf(plain).tensors["blk.2.attn_k.weight"].offset] ^= 1
        other.write_bytes(content)
    with closing(opened(other, tmp_path, **options)) as engine:
        assert Asked(engine, FIRST).n_read == len(FIRST)
    assert len({path.name for path in tmp_path.iterdir()} - before) == len(before)
    with closing(opened(plain, tmp_path)) as engine:
        assert Asked(engine, FIRST).n_read <= BLOCK


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def exchange(path: Path) -> None:
    other = next(one for one in sorted(path.parent.iterdir()) if one.suffix == path.suffix and one != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [cut, flip, exchange, Path.unlink], ids=lambda damage: damage.__name__)
def test_a_damaged_record_costs_computing_only(
    model: Path, tmp_path: Path, damage: Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    with closing(opened(model, tmp_path)) as engine:
        Asked(engine, FIRST)
    whole = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    expected, capfd_before = anew(model, FIRST), capfd.readouterr()
    assert "ignored" not in capfd_before.err
    for path in list(whole)[:: max(1, len(whole) // 4)]:
        damage(path)
        with closing(opened(model, tmp_path)) as engine:
            asked = Asked(engine, FIRST)
        assert asked.answers == expected
        assert asked.n_read < len(FIRST) or path == min(whole) or model.stem in RECURRENT
        assert capfd.readouterr().err.count("is ignored") <= 1
        # What was computed in its place is kept again.
        with closing(opened(model, tmp_path)) as engine:
            again = Asked(engine, FIRST)
        assert again.n_read <= tail(model)
        assert "is ignored" not in capfd.readouterr().err
        for name, content in whole.items():
            name.write_bytes(content)


def test_a_state_that_is_lost_is_not_used_half(recurrent: Path, tmp_path: Path) -> None:
    """What goes on from an earlier one answers the same."""
    with closing(opened(recurrent, tmp_path)) as engine:
        Asked(engine, FIRST)
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    places = sorted({path.name.split("-")[2] for path in tmp_path.glob("*.state*")})
    assert len(places) >= 3
    expected, n_read = anew(recurrent, FIRST), []
    for place in reversed(places):
        for path, content in whole.items():
            path.write_bytes(content)
            if path.suffix != ".kv" and path.name.split("-")[2] >= place:
                flip(path)
        with closing(opened(recurrent, tmp_path)) as engine:
            asked = Asked(engine, FIRST)
        assert asked.answers == expected
        n_read.append(asked.n_read)
    assert n_read == sorted(n_read)
    assert n_read[0] <= STEP + 8
    assert n_read[-1] == len(FIRST)


def test_a_folder_that_is_gone_fails_no_request(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with closing(opened(model, tmp_path / "kept")) as engine:
        (tmp_path / "kept").rmdir()
        assert Asked(engine, FIRST).answers == anew(model, FIRST)
        rest(engine)
        assert Asked(engine, OTHERS[0]).answers == anew(model, OTHERS[0])
    assert capfd.readouterr().err.count("cannot be written") == 1


def test_the_bound_is_kept(model: Path, tmp_path: Path) -> None:
    with closing(opened(model, tmp_path)) as engine:
        Asked(engine, FIRST)
    n_bytes = sum(path.stat().st_size for path in tmp_path.iterdir())
    for other in OTHERS:
        with closing(opened(model, tmp_path, prompt_cache_size=2 * n_bytes)) as engine:
            Asked(engine, other)
            rest(engine)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * n_bytes
    with closing(opened(model, tmp_path)) as engine:
        assert Asked(engine, OTHERS[-1]).n_read <= N_BATCH


def test_a_bound_that_keeps_nothing_is_refused(plain: Path, tmp_path: Path) -> None:
    """And one of what the refusal says keeps a prompt."""
    with pytest.raises(UsageError, match=r"--prompt-cache-size is 1.0 KiB, .* Make it \d+MiB or more") as refused:
        opened(plain, tmp_path, prompt_cache_size=1024)
    named = re.search(r"Make it (\d+)MiB", str(refused.value))
    assert named is not None
    with closing(opened(plain, tmp_path, prompt_cache_size=int(named[1]) << 20)) as engine:
        Asked(engine, FIRST[:160])
        rest(engine)
    with closing(opened(plain, tmp_path)) as engine:
        assert Asked(engine, FIRST[:160]).n_read < 160


def test_what_is_erased_is_erased_on_disk(model: Path, tmp_path: Path) -> None:
    with closing(opened(model, tmp_path, n_parallel=2)) as engine:
        Asked(engine, OTHERS[0])
        rest(engine)
        n_other = len(list(tmp_path.iterdir()))
        Asked(engine, FIRST)
        rest(engine)
        assert len(list(tmp_path.iterdir())) > n_other
        engine.slots.erase(0)
        assert len(list(tmp_path.iterdir())) == n_other
        assert Asked(engine, FIRST).n_read == len(FIRST)


# --- elsewhere -------------------------------------------------------------------------------------------------


def test_in_tiers_and_in_memory(tmp_path: Path) -> None:
    path = mixed_model(tmp_path)
    config = engine_config(path, **OPTIONS, prompt_cache=tmp_path / "kept")
    with closing(tiered_engine(config, 0.5)) as engine:
        expected = Asked(engine, FIRST).answers
        assert "hits" in engine.counters()
    with closing(tiered_engine(config, 0.2)) as engine:
        asked = Asked(engine, FIRST)
    assert asked.answers == expected
    assert asked.n_read <= BLOCK


@pytest.mark.parametrize("name", ["qwen3moe", "deepseek2-old", "qwen3next"])
def test_from_devices_to_the_host(name: str, two_devices: Devices, tmp_path: Path) -> None:
    path = write_family(tmp_path / f"{name}.gguf", name, shape=SHAPE)
    options = OPTIONS | {"kv_type": "f16", "prompt_cache": tmp_path / "kept"}
    with closing(device_engine(engine_config(path, **options, **two_devices.settings), 0.5)) as engine:
        expected = Asked(engine, FIRST)
        again = Asked(engine, FIRST)
        rest(engine)
    with closing(opened(path, tmp_path / "kept", kv_type="f16")) as engine:
        asked = Asked(engine, FIRST)
    assert asked.n_read <= tail(path)
    with closing(device_engine(engine_config(path, **options, **two_devices.settings), 0.5)) as engine:
        returned = Asked(engine, FIRST)
    assert returned.n_read <= tail(path)
    if two_devices.is_exact:
        assert expected.answers == again.answers == asked.answers == returned.answers


@pytest.fixture
def kept(plain: Path, tmp_path: Path) -> Path:
    with closing(opened(plain, tmp_path)) as engine:
        Asked(engine, FIRST)
    return tmp_path


def test_two_engines_share_a_folder(plain: Path, kept: Path) -> None:
    with closing(opened(plain, kept)) as one, closing(opened(plain, kept)) as other:
        assert Asked(one, FIRST).n_read <= BLOCK
        Asked(one, OTHERS[0])
        rest(one)
        assert Asked(other, OTHERS[0]).n_read <= BLOCK
        assert Asked(other, FIRST).n_read <= BLOCK


def test_answers_go_on_while_a_prompt_is_read(plain: Path, kept: Path) -> None:
    """Whoever writes gets a token from every step."""
    with closing(opened(plain, kept, n_parallel=2)) as engine:
        writing = engine.submit(GenerationRequest(OTHERS[1][:20], 40, SamplingParams(temperature=0), ignore_eos=True))
        engine.step()
        reading = engine.submit(GenerationRequest(FIRST, 2, SamplingParams(temperature=0), ignore_eos=True))
        begun = False
        while not engine.is_idle and not begun:
            outcomes = engine.step()
            begun = any(id == reading and isinstance(event, TokenStep) for id, event in outcomes)
            assert any(id == writing for id, _ in outcomes)
        assert begun
        while not engine.is_idle:
            engine.step()
