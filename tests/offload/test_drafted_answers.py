"""Engines that draft tokens give the answers of engines that do not, in fewer steps."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slimoe.offload.engine import Engine
from slimoe.offload.errors import UsageError
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.text.generation import Constraint, GenerationRequest, SamplingParams
from tests.models.configs import engine_config, reconfigured
from tests.models.tier_models import mixed_model, plain_model
from tests.models.tiered import device_engine, resident_engine, tiered_engine
from tests.models.tiny_gguf import FineShape, write_family
from tests.offload.devices import Devices
from tests.offload.drafted import answers

DEMO = Path(__file__).parents[2] / "server" / "demo" / "demo.gguf"
GREEDY = SamplingParams(temperature=0.0)
TEXT = (5, 9, 30, 7, 22, 41, 8, 19, 60, 3, 77, 14)


def config(path: Path, **changed: Any) -> EngineConfig:
    """The cache in F32: rounding to F16 makes of differences in the last bit some that change close choices."""
    return engine_config(path, **{"n_ctx": 256, "n_batch": 64, "n_threads": 1, "kv_type": "f32"} | changed)


def request(**changed: Any) -> GenerationRequest:
    return replace(GenerationRequest(TEXT * 3, 60, GREEDY, ignore_eos=True, n_logprobs=0), **changed)


FEW = dict.fromkeys((5, 9, 30), 50.0)
"""A bias for so few tokens that answers repeat themselves, which random models hardly do by themselves."""
REPETITIVE = {
    "greedy": request(sampling=SamplingParams(0.0, logit_bias=FEW)),
    "short": request(prompt_ids=TEXT[:1], max_tokens=100, sampling=SamplingParams(0.0, logit_bias=FEW)),
    "seed": request(sampling=SamplingParams(0.3, seed=5, logit_bias=FEW)),
    "penalties": request(sampling=SamplingParams(0.3, seed=2, logit_bias=FEW, repeat_penalty=1.01)),
}
REQUESTS = REPETITIVE | {
    "plain": request(),
    "wild": request(sampling=SamplingParams(temperature=1.5, seed=5)),
}


def open_engine(kind: str, path: Path, draft: str) -> Engine:
    opened = config(path, draft=draft, n_parallel=3)
    if kind == "resident":
        return resident_engine(opened)
    return tiered_engine(opened, 0.3 if kind == "read from disk" else 1.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights are in F32: logits of a batch differ by so little from single ones that no choice does."""
    return plain_model(tmp_path_factory.mktemp("drafted"))


@pytest.fixture(scope="module", params=["resident", "in slots", "read from disk"])
def engines(request: pytest.FixtureRequest, model: Path) -> Iterator[tuple[Engine, Engine]]:
    """One that drafts nothing, and one that does."""
    with (
        closing(open_engine(request.param, model, "none")) as plain,
        closing(open_engine(request.param, model, "ngram")) as drafting,
    ):
        yield plain, drafting


@pytest.mark.parametrize("name", REQUESTS)
def test_the_answer_is_the_same(engines: tuple[Engine, Engine], name: str) -> None:
    (plain,), (drafted,) = (answers(engine, REQUESTS[name]) for engine in engines)
    assert drafted.tokens == plain.tokens
    assert drafted.logprobs == pytest.approx(plain.logprobs, abs=1e-3)
    timings = drafted.finished.timings
    assert drafted.n_steps == plain.n_steps - timings.draft_n_accepted
    if name in REPETITIVE:
        assert timings.draft_n_accepted >= 10


def test_beside_each_other(engines: tuple[Engine, Engine]) -> None:
    plain, drafted = (answers(engine, *REQUESTS.values()) for engine in engines)
    assert [one.tokens for one in drafted] == [one.tokens for one in plain]
    assert drafted[0].n_steps < plain[0].n_steps
    assert sum(one.finished.timings.draft_n_accepted for one in drafted) > 30


def test_auto_says_the_same(model: Path) -> None:
    with closing(open_engine("read from disk", model, "none")) as plain:
        expected = [one.tokens for one in answers(plain, *REQUESTS.values())]
    with closing(open_engine("read from disk", model, "auto")) as engine:
        assert [one.tokens for one in answers(engine, *REQUESTS.values())] == expected


@pytest.mark.parametrize("kind", ["resident", "read from disk"])
def test_of_quantised_weights_each_token_is_as_good_as_the_likeliest(tmp_path: Path, kind: str) -> None:
    """Their products with a batch are rounded otherwise than with one token, so that close choices may differ."""
    path = mixed_model(tmp_path)
    with closing(open_engine(kind, path, "ngram")) as engine:
        (said,) = answers(engine, REPETITIVE["greedy"])
        assert said.finished.timings.draft_n_accepted >= 10
    with closing(open_engine(kind, path, "none")) as engine:
        few = list(FEW)
        logits = engine.prefill(TEXT * 3)[few].copy()
        for token in said.tokens:
            assert logits[few.index(token)] >= logits.max() - 0.05
            logits = engine.decode(token)[few].copy()


# --- with a vocabulary --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demos() -> Iterator[tuple[Engine, Engine]]:
    """The demo model without drafts and with them."""
    with (
        closing(Engine.open(config(DEMO))) as plain,
        closing(Engine.open(config(DEMO, draft="ngram"))) as drafting,
    ):
        yield plain, drafting


def prompted(engine: Engine, text: str, **changed: Any) -> GenerationRequest:
    assert engine.tokenizer is not None
    return replace(request(prompt_ids=tuple(engine.tokenizer.encode(text))), **changed)


SCHEMA = {"type": "array", "items": {"enum": ["one two three four", "five"]}, "minItems": 9, "maxItems": 9}


def test_held_to_a_form(demos: tuple[Engine, Engine]) -> None:
    form = Constraint("json_schema", json.dumps(SCHEMA))
    plain, drafted = (
        answers(engine, prompted(engine, "A list:", constraint=form, max_tokens=200))[0] for engine in demos
    )
    assert drafted.text == plain.text
    assert len(json.loads(drafted.text)) == 9
    assert drafted.finished.reason == plain.finished.reason == "stop"
    assert drafted.finished.timings.draft_n_accepted > 10
    assert drafted.n_steps == plain.n_steps - drafted.finished.timings.draft_n_accepted


def test_ends_at_stop_strings_in_the_midst_of_a_draft(demos: tuple[Engine, Engine]) -> None:
    """The demo model answers with zeros."""
    for n_zeros in (11, 23, 30, 41):
        stop = ("0" * n_zeros,)
        plain, drafted = (answers(engine, prompted(engine, "one two three " * 9, stop=stop))[0] for engine in demos)
        assert (drafted.text, drafted.tokens) == (plain.text, plain.tokens)
        assert drafted.finished.stop_text == plain.finished.stop_text == stop[0]
        assert drafted.finished.reason == plain.finished.reason == "stop"
        assert drafted.finished.timings.draft_n_accepted > 0


def test_the_tokens_of_an_answer_are_known_for_the_next(demos: tuple[Engine, Engine]) -> None:
    _, engine = demos
    first = prompted(engine, "Something else that is asked once", max_tokens=30)
    (said,) = answers(engine, first)
    follow_up = replace(first, prompt_ids=(*first.prompt_ids, *said.tokens, 20, 21))
    (again,) = answers(engine, follow_up)
    assert again.finished.timings.cached_n == len(first.prompt_ids) + 29


def test_counts_what_was_computed(demos: tuple[Engine, Engine]) -> None:
    """A drafted token counts as predicted once the answer has it."""
    _, engine = demos
    before = engine.snapshot().work.total.n_predicted
    (said,) = answers(engine, prompted(engine, "What nobody has asked before", max_tokens=30))
    assert said.finished.timings.draft_n_accepted > 0
    assert engine.snapshot().work.total.n_predicted - before == 29


# --- recurrent layers ---------------------------------------------------------------------------------------

RECURRENT = ("qwen3next", "qwen35moe", "lfm2moe")


@pytest.fixture(scope="module", params=RECURRENT)
def recurrent_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = FineShape(n_layer=4, n_embd_head=64, n_expert=8, n_expert_used=2)
    return write_family(tmp_path_factory.mktemp("recurrent") / "m.gguf", request.param, shape=shape)


@pytest.mark.parametrize("kind", ["resident", "read from disk"])
def test_recurrent_layers_go_on_from_the_tokens_that_were_right(recurrent_model: Path, kind: str) -> None:
    with (
        closing(open_engine(kind, recurrent_model, "none")) as plain,
        closing(open_engine(kind, recurrent_model, "ngram")) as drafting,
    ):
        assert not drafting.notes
        n_right = n_wrong = 0
        for asked in REQUESTS.values():
            (wanted,), (drafted,) = (answers(engine, asked) for engine in (plain, drafting))
            assert drafted.tokens == wanted.tokens
            assert drafted.logprobs == pytest.approx(wanted.logprobs, abs=1e-3)
            timings = drafted.finished.timings
            assert drafted.n_steps == wanted.n_steps - timings.draft_n_accepted
            n_right += timings.draft_n_accepted
            n_wrong += timings.draft_n - timings.draft_n_accepted
        assert n_right > 20
        assert n_wrong > 3
        # The next one goes on from what is left of the last answer.
        follow_up = request(prompt_ids=(*REQUESTS["greedy"].prompt_ids, *wanted.tokens, *TEXT))
        assert answers(drafting, follow_up)[0].tokens == answers(plain, follow_up)[0].tokens


def test_recurrent_layers_beside_each_other(recurrent_model: Path) -> None:
    with (
        closing(open_engine("resident", recurrent_model, "none")) as plain,
        closing(open_engine("resident", recurrent_model, "ngram")) as drafting,
    ):
        requests = [replace(one, max_tokens=30) for one in REQUESTS.values()]
        requests[0] = replace(requests[0], max_tokens=150)
        wanted, drafted = (answers(engine, *requests) for engine in (plain, drafting))
    assert [one.tokens for one in drafted] == [one.tokens for one in wanted]
    assert sum(one.finished.timings.draft_n_accepted for one in drafted) > 0


@pytest.mark.parametrize("name", ["gpt-oss", "gemma4"])
def test_layers_that_keep_only_a_window(tmp_path: Path, name: str) -> None:
    """Of fewer tokens than a step verifies."""
    path = write_family(tmp_path / "m.gguf", name, shape=FineShape(n_layer=3, n_expert=8, n_expert_used=2))
    with (
        closing(open_engine("resident", path, "none")) as plain,
        closing(open_engine("resident", path, "ngram")) as drafting,
    ):
        for asked in (*([one] for one in REQUESTS.values()), list(REQUESTS.values())):
            wanted, drafted = (answers(engine, *asked) for engine in (plain, drafting))
            assert [one.tokens for one in drafted] == [one.tokens for one in wanted]
        assert drafting.cells.has_windows
        assert sum(one.finished.timings.draft_n_accepted for one in drafted) > 20


# --- where nothing is drafted -------------------------------------------------------------------------------


def test_recordings_and_lossy_modes_say_why_not(tmp_path: Path) -> None:
    for changed, why in (({"trace": tmp_path / "t"}, "recording"), ({"lossy": "skip:0.1", "ram": "50%"}, "lossy")):
        with closing(tiered_engine(config(mixed_model(tmp_path), draft="auto", **changed), 0.5)) as engine:
            assert any("--draft auto" in note and why in note for note in engine.notes)
        (tmp_path / "mixed.gguf").unlink()


def test_an_unknown_mode(tmp_path: Path) -> None:
    opened = reconfigured(config(plain_model(tmp_path)), draft="eagle")
    with pytest.raises(UsageError, match="none, ngram, mtp, auto"):
        Engine.open(opened)


@pytest.mark.parametrize("on_device", [0.5, 2.0], ids=["cut", "whole"])
def test_on_a_device(model: Path, one_device: Devices, on_device: float) -> None:
    opened = config(model, kv_type="f16", n_parallel=3, **one_device.settings)
    requests = list(REPETITIVE.values())
    with closing(device_engine(opened, on_device)) as engine:
        plain = answers(engine, *requests)
    with closing(device_engine(reconfigured(opened, draft="ngram"), on_device)) as engine:
        drafted = answers(engine, *requests)
    assert sum(one.finished.timings.draft_n_accepted for one in drafted) > 30
    if one_device.is_exact:
        assert [one.tokens for one in drafted] == [one.tokens for one in plain]
