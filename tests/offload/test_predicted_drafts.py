"""Engines that draft tokens with the model's own MTP block give the answers of engines that do not, in fewer steps."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slimoe.offload.engine import Engine
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.engine_plan import plan_engine
from slimoe.offload.text.generation import Finished, GenerationRequest, SamplingParams
from tests.models.configs import engine_config
from tests.models.gguf_content import read_content, write_content
from tests.models.tiered import resident_engine, tiered_engine
from tests.models.tiny_gguf import FineShape, write_family
from tests.offload.drafted import Answer, answers, with_mtp_block, with_right_block

SHAPE = FineShape(n_layer=4, n_embd_head=64, n_expert=8, n_expert_used=2)
TEXT = (5, 9, 30, 7, 22, 41, 8, 19, 60, 3, 77, 14)
FAMILIES = ("glm4moe", "qwen3next", "qwen35moe")
REQUESTS = {
    "greedy": GenerationRequest(TEXT, 60, SamplingParams(0.0), ignore_eos=True, n_logprobs=0),
    "seed": GenerationRequest(TEXT[:5], 60, SamplingParams(0.6, seed=5), ignore_eos=True, n_logprobs=0),
    "wild": GenerationRequest(TEXT[3:], 40, SamplingParams(3.0, seed=5), ignore_eos=True, n_logprobs=0),
    "short": GenerationRequest(TEXT[:1], 7, SamplingParams(0.0), ignore_eos=True, n_logprobs=0),
}


def config(path: Path, **changed: Any) -> EngineConfig:
    usual = {"n_ctx": 256, "n_batch": 64, "n_threads": 1, "kv_type": "f32", "n_parallel": 3, "device": "none"}
    return engine_config(path, **usual | changed)


def open_engine(kind: str, path: Path, draft: str) -> Engine:
    opened = config(path, draft=draft)
    return resident_engine(opened) if kind == "resident" else tiered_engine(opened, 0.5)


@pytest.fixture(scope="module", params=FAMILIES)
def right(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose block is right but for some tokens."""
    folder = tmp_path_factory.mktemp("right")
    content = read_content(write_family(folder / "plain.gguf", request.param, shape=SHAPE))
    return write_content(folder / "m.gguf", with_right_block(content, SHAPE.n_layer))


@pytest.fixture(scope="module", params=FAMILIES)
def wrong(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights, whose block is hardly ever right."""
    folder = tmp_path_factory.mktemp("wrong")
    content = read_content(write_family(folder / "plain.gguf", request.param, shape=SHAPE))
    return write_content(folder / "m.gguf", with_mtp_block(content, SHAPE.n_layer))


@pytest.fixture(params=["resident", "read from disk"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def assert_same(drafted: Answer, plain: Answer) -> None:
    assert drafted.tokens == plain.tokens
    assert drafted.logprobs == pytest.approx(plain.logprobs, abs=1e-3)
    assert drafted.n_steps == plain.n_steps - drafted.finished.timings.draft_n_accepted


def test_what_the_block_predicts_is_accepted(right: Path, kind: str) -> None:
    with closing(open_engine(kind, right, "none")) as plain, closing(open_engine(kind, right, "mtp")) as drafting:
        assert not drafting.notes
        for asked in REQUESTS.values():
            (wanted,), (drafted,) = (answers(engine, asked) for engine in (plain, drafting))
            assert_same(drafted, wanted)
        (greedy,) = answers(drafting, REQUESTS["greedy"])
    timings = greedy.finished.timings
    assert timings.draft_n_accepted > 30, "three of four tokens, but for those that the block is wrong about"
    assert timings.draft_n_accepted < timings.draft_n


def test_what_is_wrong_changes_nothing(wrong: Path, kind: str) -> None:
    with closing(open_engine(kind, wrong, "none")) as plain:
        for asked in REQUESTS.values():
            # One that has learnt how often the block is right hardly drafts any more.
            with closing(open_engine(kind, wrong, "mtp")) as drafting:
                (wanted,), (drafted,) = (answers(engine, asked) for engine in (plain, drafting))
            assert_same(drafted, wanted)
            assert drafted.finished.timings.draft_n > 0


def test_beside_each_other(right: Path) -> None:
    requests = [replace(REQUESTS["greedy"], max_tokens=180), *REQUESTS.values()]
    with closing(open_engine("resident", right, "none")) as plain:
        wanted = answers(plain, *requests)
    with closing(open_engine("resident", right, "mtp")) as drafting:
        drafted = answers(drafting, *requests)
    assert [one.tokens for one in drafted] == [one.tokens for one in wanted]
    assert sum(one.finished.timings.draft_n_accepted for one in drafted) > 30


@pytest.mark.parametrize("draft", ["ngram", "mtp", "auto"])
def test_an_answer_that_is_cancelled_leaves_nothing_to_draft(right: Path, draft: str) -> None:
    """It was the only one; what is asked for next is answered."""
    request = REQUESTS["greedy"]
    with closing(open_engine("resident", right, draft)) as engine:
        (wanted,) = answers(engine, request)
        told: list[object] = []
        id = engine.submit(request, lambda: len(told) > 5)
        while not engine.is_idle:
            told += [event for owner, event in engine.step() if owner == id]
        assert isinstance(told[-1], Finished)
        assert told[-1].reason == "cancelled"
        (again,) = answers(engine, request)
    assert again.tokens == wanted.tokens


def test_auto_takes_the_block_where_all_is_in_memory(right: Path) -> None:
    with closing(open_engine("resident", right, "none")) as plain:
        wanted = [one.tokens for one in answers(plain, *REQUESTS.values())]
    with closing(open_engine("resident", right, "auto")) as engine:
        assert engine.plan.mtp is not None
        assert [one.tokens for one in answers(engine, *REQUESTS.values())] == wanted
    needed = plan_engine(config(right)).weight_forms.required
    with_block = plan_engine(config(right, draft="auto", ram=f"{2 * needed}B"))
    without = plan_engine(config(right, draft="auto", ram=f"{needed + 1}B"))
    assert (with_block.mtp is None, without.mtp is None) == (False, True)
    assert without.is_resident


def test_a_smaller_budget_takes_the_block_away_and_a_larger_one_brings_it_back(right: Path) -> None:
    needed = plan_engine(config(right)).weight_forms.required
    with closing(Engine.open(config(right, draft="auto", ram=f"{needed + 1}B"))) as engine:
        assert engine.plan.mtp is None
        (wanted,) = answers(engine, REQUESTS["seed"])
        for size, has_block in ((2 * needed, True), (needed + 1, False)):
            engine.rebudget(f"{size}B", ())
            assert (engine.plan.mtp is not None) is has_block
            (said,) = answers(engine, REQUESTS["seed"])
            assert said.tokens == wanted.tokens


def test_its_memory_is_planned(right: Path) -> None:
    without, with_block = (plan_engine(config(right, draft=draft)) for draft in ("none", "mtp"))
    assert with_block.mtp is not None
    n_experts = sum(source.n_bytes for source in with_block.mtp.weights if len(source.ne) == 3)
    assert n_experts == 3 * SHAPE.n_expert * SHAPE.n_ff * SHAPE.n_embd * 4, "all experts of the block stay in memory"
    taken = with_block.weight_forms.required - without.weight_forms.required
    assert n_experts < taken < 3 * n_experts


def test_a_file_without_block_says_so(tmp_path: Path) -> None:
    path = write_family(tmp_path / "m.gguf", "glm4moe", shape=SHAPE)
    with closing(Engine.open(config(path, draft="mtp"))) as engine:
        assert any("--draft mtp" in note and "no block that predicts" in note for note in engine.notes)
        (said,) = answers(engine, REQUESTS["short"])
        assert len(said.tokens) == 7
        assert said.finished.timings.draft_n == 0
