import dataclasses
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slimoe.offload.engine import Engine
from slimoe.offload.errors import UsageError
from slimoe.offload.resources.process_limits import resident_bytes
from slimoe.offload.text.generation import (
    Constraint,
    Finished,
    GenerationRequest,
    Outcome,
    SamplingParams,
    TokenStep,
)
from slimoe.offload.text.grammars import ConstraintError, GrammarLimits, Grammars
from tests.models.configs import engine_config

DEMO = Path(__file__).parents[3] / "server" / "demo" / "demo.gguf"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PERSON = Constraint("json_schema", json.dumps(SCHEMA))
ANYTHING = Constraint("regex", "(?s:.*)")
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine.open(engine_config(DEMO, n_ctx=256, n_threads=1, n_parallel=4))
    yield engine
    engine.close()


@pytest.fixture
def grammars(engine: Engine) -> Grammars:
    assert engine.grammars is not None
    return engine.grammars


def wild(seed: int) -> SamplingParams:
    """Draws from the model's own distribution, without any filter."""
    return SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed)


def request(engine: Engine, constraint: Constraint | None, **changed: Any) -> GenerationRequest:
    assert engine.tokenizer is not None
    ids = tuple(engine.tokenizer.encode("Answer:", add_bos=True))
    return dataclasses.replace(GenerationRequest(ids, max_tokens=120, constraint=constraint), **changed)


def answer(engine: Engine, constraint: Constraint | None, **changed: Any) -> tuple[str, str]:
    """The text, and why it ended."""
    text, reason = "", ""
    for event in engine.generate(request(engine, constraint, **changed)):
        if isinstance(event, TokenStep | Finished):
            text += event.text
        if isinstance(event, Finished):
            reason = event.reason
    return text, reason


def is_person(text: str) -> bool:
    """By rules of our own, not llguidance's."""
    found = json.loads(text)
    tags_fit = len(found["tags"]) <= 3 and set(found["tags"]) <= {"a", "b"}
    return list(found) == ["name", "age", "tags"] and len(found["name"]) <= 12 and 0 <= found["age"] <= 99 and tags_fit


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_is_held_whatever_is_drawn(engine: Engine, seed: int) -> None:
    text, reason = answer(engine, PERSON, sampling=wild(seed))
    assert reason == "stop"
    assert is_person(text), text


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("regex", "[A-Z]{3}-[0-9]{2}/ü", r"[A-Z]{3}-[0-9]{2}/ü"),
        ("lark", 'start: start "a" | "b"', r"ba*"),
        ("lark", 'start: "x" sub "y"\nsub: %json {"enum": ["p", 7]}', r'x("p"|7)y'),
        ("gbnf", 'root ::= "no" | "yes" ws [0-9]{2,3}\nws ::= [ \\t]?', r"no|yes[ \t]?[0-9]{2,3}"),
    ],
)
def test_each_kind_of_form_is_held(engine: Engine, kind: Any, text: str, expected: str) -> None:
    for seed in range(3):
        found, reason = answer(engine, Constraint(kind, text), sampling=wild(seed))
        assert re.fullmatch(expected, found), found
        assert reason == "stop"


def test_a_form_that_allows_all_changes_nothing(engine: Engine) -> None:
    penalised = SamplingParams(temperature=0.0, repeat_penalty=1.3, presence_penalty=0.5, logit_bias={300: 5.0})
    for sampling in (GREEDY, penalised):
        assert answer(engine, ANYTHING, sampling=sampling) == answer(engine, None, sampling=sampling)


def test_the_first_space_of_a_chats_answer_stands_outside_the_form(engine: Engine) -> None:
    for seed in range(6):
        text, _ = answer(engine, Constraint("regex", " ?(yes|no)"), sampling=wild(seed), strips_space=True)
        assert text in ("yes", "no", " yes", " no")
        text, _ = answer(engine, Constraint("regex", " (yes|no)"), sampling=wild(seed), strips_space=True)
        assert text in (" yes", " no")
    free = answer(engine, None, sampling=GREEDY, strips_space=True)
    assert answer(engine, ANYTHING, sampling=GREEDY, strips_space=True) == free


def test_an_answer_that_is_cut_off_says_so(engine: Engine) -> None:
    text, reason = answer(engine, PERSON, sampling=wild(0), max_tokens=4)
    assert reason == "length"
    assert not text.endswith("}")


def test_a_form_that_is_complete_at_the_last_token_stops(engine: Engine) -> None:
    assert answer(engine, Constraint("regex", "a"), max_tokens=1) == ("a", "stop")


def test_stop_strings_end_a_form_early(engine: Engine) -> None:
    assert answer(engine, Constraint("regex", "ab,cd,ef"), stop=(",c",)) == ("ab", "stop")


def test_ignored_ends_go_on_as_long_as_the_form_allows(engine: Engine) -> None:
    wanted = Constraint("regex", "a{3,40}")
    text, reason = answer(engine, wanted, ignore_eos=True, sampling=wild(1))
    assert (text, reason) == ("a" * 40, "stop")


def test_scores_are_the_models_own(engine: Engine) -> None:
    events = engine.generate(request(engine, Constraint("regex", "q{5}"), n_logprobs=1, sampling=GREEDY))
    step = next(event for event in events if isinstance(event, TokenStep))
    assert step.logprob is not None
    assert step.logprob.top[0][1] > step.logprob.logprob


def test_a_bias_that_forbids_what_the_form_demands_fails_alone(engine: Engine) -> None:
    assert engine.tokenizer is not None
    forbidden = {t: float("-inf") for t in range(engine.tokenizer.n_vocab) if b"q" in engine.tokenizer.piece(t)}
    wanted = request(engine, Constraint("regex", "q{5}"), sampling=SamplingParams(logit_bias=forbidden))
    with pytest.raises(UsageError, match="logit_bias forbids"):
        list(engine.generate(wanted))


def outcomes_of(engine: Engine) -> dict[int, list[Outcome]]:
    found: dict[int, list[Outcome]] = {}
    while not engine.is_idle:
        for outcome in engine.step():
            found.setdefault(outcome.id, []).append(outcome)
    return found


def text_of(outcomes: list[Outcome]) -> str:
    return "".join(event.text for _, event in outcomes if isinstance(event, TokenStep | Finished))


def test_several_answers_are_held_at_once(engine: Engine) -> None:
    held = [engine.submit(request(engine, PERSON, sampling=wild(seed))) for seed in range(2)]
    free = engine.submit(request(engine, None, sampling=GREEDY, max_tokens=8))
    given_up = engine.submit(request(engine, ANYTHING, ignore_eos=True), lambda: True)
    found = outcomes_of(engine)
    assert all(is_person(text_of(found[id])) for id in held)
    assert text_of(found[free]) == answer(engine, None, sampling=GREEDY, max_tokens=8)[0]
    assert isinstance(found[given_up][-1].event, Finished)


def test_a_process_that_is_gone_is_replaced(engine: Engine, grammars: Grammars) -> None:
    grammars.check(ANYTHING)
    before = grammars.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{before}/stat").read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.001)
    assert answer(engine, Constraint("regex", "ok")) == ("ok", "stop")
    assert grammars.pid != before


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json_schema", '{"not": {"type": "string"}}', '"not"'),
        ("json_schema", '{"if": {}, "then": {}}', '"if"'),
        ("json_schema", '{"type": "array", "uniqueItems": true}', '"uniqueItems"'),
        ("json_schema", '{"$ref": "http://example.com/a.json"}', "'http://example.com/a.json', which $ref or"),
        ("json_schema", '{"$schema": "http://example.com/a.json"}', "'http://example.com/a.json', which $ref or"),
        ("json_schema", '{"$ref": "#/$defs/b", "$defs": {}}', "$ref: Pointer"),
        ("json_schema", '{"type": "string", "pattern": "(?=a)b"}', "pattern: regex parse error"),
        ("json_schema", '{"$ref": "file:///etc/passwd"}', "passwd"),
        ("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}', "no text has this form"),
        ("json_schema", '{"not": {}, "x-guidance": {"lenient": true}}', '"not"'),
        ("json_schema", '{"type": "word"}', "word"),
        ("json_schema", '{"type": "string", "format": "colour"}', "colour"),
        ("json_schema", "false", "object"),
        ("json_schema", "[1]", "object"),
        ("json_schema", "{", "EOF"),
        ("json_schema", '{"items":' * 200 + "{}" + "}" * 200, "recursion limit"),
        ("json_schema", '{"type": "integer", "multipleOf": 999983}', "1 seconds of processor time or 48 MiB"),
        ("regex", "(?=a)b", "look-ahead"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "(" * 5000 + ")" * 5000, "regex"),
        ("regex", r"[^\s\S]", "no text has this form"),
        ("lark", "start: start", "no text has this form"),
        ("lark", "start: A\nA: A", "circular"),
        ("lark", "start: <nothing>", "unknown special token"),
        ("lark", "start: " + "(" * 5000 + '"a"' + ")" * 5000, "nested"),
        ("lark", "start: r0\n" + "".join(f"r{n}: r{n + 1}\n" for n in range(30_000)) + 'r30000: "a"', "compiling it"),
        ("gbnf", "root ::= missing", "missing"),
        ("gbnf", "other ::= [a-z]", "root"),
        ("gbnf", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "nested"),
        ("regex", "a" * (1 << 20) + "b", "characters"),
    ],
    ids=lambda value: value[:40].replace("\n", " ") if isinstance(value, str) else None,
)
def test_what_cannot_be_held_is_refused_with_its_reason(grammars: Grammars, kind: Any, text: str, reason: str) -> None:
    with pytest.raises(ConstraintError, match=re.escape(reason)) as refusal:
        grammars.check(Constraint(kind, text, "the_field"))
    assert refusal.value.param == "the_field"
    assert str(refusal.value).startswith("the_field cannot be followed: ")
    grammars.check(ANYTHING)


def test_a_tool_whose_schema_cannot_be_held_is_named(grammars: Grammars) -> None:
    fine, bad = '{"type": "object"}', '{"type": "array", "uniqueItems": true}'
    tools = (("tools[0].parameters", "a", fine), ("tools[1].parameters", "b", bad))
    calls = f'start: call_0 | call_1\ncall_0: "a" %json {fine}\ncall_1: "b" %json {bad}\n'
    for wanted in (
        Constraint("lark", calls, "tools", tools=tools),
        Constraint("regex", "a", "regex", instead=calls, tools=tools),
    ):
        with pytest.raises(ConstraintError) as refusal:
            grammars.check(wanted)
        reason = "of the tool 'b': Unimplemented keys: [\"uniqueItems\"]."
        assert (refusal.value.param, str(refusal.value)) == (tools[1][0], f"{tools[1][0]} cannot be followed: {reason}")


@pytest.mark.parametrize(
    ("schema", "holds"),
    [
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}, "[[],[]]"),
        ({"enum": [f"word {n}" for n in range(20_000)]}, '"word 7"'),
        ({"description": "x" * 1_000_000, "const": 1}, "1"),
        ({"type": "object", "properties": {f"p{n}": {"type": "null"} for n in range(300)}}, "{}"),
    ],
    ids=("recursive", "a large enum", "a large text", "many properties"),
)
def test_what_is_large_or_recursive_is_held(engine: Engine, grammars: Grammars, schema: Any, holds: str) -> None:
    assert engine.tokenizer is not None
    pieces = engine.tokenizer.all_pieces()
    wanted = Constraint("json_schema", json.dumps(schema))
    grammars.check(wanted)
    held = grammars.hold(wanted)
    for character in holds:
        allowed = held.allowed()
        token = pieces.index(character.encode())
        assert allowed[token]
        held.take(token)


def test_white_space_has_an_end(engine: Engine) -> None:
    assert engine.tokenizer is not None
    spaces = {t: 90.0 for t in range(engine.tokenizer.n_vocab) if engine.tokenizer.piece(t).isspace()}
    text, reason = answer(
        engine, PERSON, sampling=SamplingParams(temperature=1.0, top_k=0, logit_bias=spaces, seed=1), max_tokens=None
    )
    assert reason == "stop"
    assert is_person(text)
    assert max(map(len, re.findall(r"\s+", text))) <= 22


def test_a_mask_is_the_same_beside_the_model(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that take long are made by another thread; here all are, or none is."""
    optional = {f"p{n}": {"type": "null"} for n in range(500)}
    long = Constraint("json_schema", json.dumps({"type": "object", "properties": optional}))
    for wanted in (long, PERSON):
        found = []
        for most in (-1.0, 1e9):
            monkeypatch.setattr("slimoe.offload.text.grammars.LONG_MASK_SECONDS", most)
            found.append(answer(engine, wanted, sampling=wild(0), strips_space=True, max_tokens=60))
        assert found[0] == found[1]
        assert found[0][0].startswith("{")


def test_an_answer_may_get_too_hard_to_hold(engine: Engine) -> None:
    hard = Constraint("regex", "(.{0,1000}a.{0,1000}b.{0,1000})*", "regex")
    with pytest.raises(ConstraintError, match="regex cannot be followed: lexer error: too many expressions"):
        answer(engine, hard, sampling=wild(0), ignore_eos=True, max_tokens=200)
    assert answer(engine, Constraint("regex", "ok")) == ("ok", "stop")


AMBIGUOUS = Constraint("lark", "start: x\nx: /[a-z ]/ | x x | /[a-z ]{1,2}/", "lark")


def test_a_form_of_which_a_token_takes_too_long_fails_alone(engine: Engine) -> None:
    """It ends after the first such token."""
    assert engine.tokenizer is not None
    grammars = Grammars(engine.tokenizer, GrammarLimits(token_seconds=0.002))
    held = grammars.hold(AMBIGUOUS)
    letter = engine.tokenizer.all_pieces().index(b"a")
    taken: list[int] = []

    def go_on() -> None:
        while len(taken) < 500:
            assert held.allowed()[letter]
            held.take(letter)
            taken.append(letter)

    with pytest.raises(
        ConstraintError, match=r"^lark cannot be followed: a token of it takes more than 0\.002 s"
    ) as error:
        go_on()
    assert error.value.param == "lark"
    assert len(taken) > 2
    assert grammars.hold(Constraint("regex", "ok")).allowed().any()
    grammars.close()


SLOWER = Constraint("gbnf", 'root ::= root root | [a-z ] | ""', "grammar")
"""Each token takes longer than the one before it, and none takes long."""


def test_a_form_of_which_all_tokens_take_too_long_fails(engine: Engine) -> None:
    assert engine.tokenizer is not None
    grammars = Grammars(engine.tokenizer, GrammarLimits(first_seconds=0.01, mean_seconds=0.0002))
    letter = engine.tokenizer.all_pieces().index(b"a")

    def go_on(constraint: Constraint) -> int:
        held = grammars.hold(constraint)
        for _ in range(400):
            assert held.allowed()[letter]
            held.take(letter)
        return 400

    with pytest.raises(ConstraintError, match=r"its tokens, \d+ so far, take more than 0\.01 seconds") as error:
        go_on(SLOWER)
    assert error.value.param == "grammar"
    assert go_on(ANYTHING) == 400
    grammars.close()


def test_an_answer_that_gets_slower_and_slower_ends_before_others_feel_it(engine: Engine) -> None:
    endless = request(engine, SLOWER, sampling=wild(0), ignore_eos=True, max_tokens=240)
    begin = time.process_time()
    with pytest.raises(
        ConstraintError, match=r"^grammar cannot be followed: its tokens, \d+ so far, take more than 1 s"
    ):
        list(engine.generate(endless))
    assert time.process_time() - begin < 10
    assert answer(engine, Constraint("regex", "ok")) == ("ok", "stop")


@pytest.mark.parametrize(
    "text",
    [
        "start: x{1,1000}\nx: y?\ny: /[a-z ]/ | /[a-z ]{2}/ | /[a-z ]{3}/",
        'start: x{1,200}\nx: "a" | "b" | x x | /[a-z ]{1,5}/',
        'start: x{1,3000} "b"\nx: /[a-z ]{1,3}/ | ""',
    ],
    ids=("optional", "ambiguous", "empty"),
)
def test_what_a_token_of_a_hostile_form_takes_has_a_bound(engine: Engine, text: str) -> None:
    hostile = request(engine, Constraint("lark", text), sampling=wild(0), ignore_eos=True, max_tokens=60)
    before = resident_bytes()
    begin = time.thread_time()
    with pytest.raises(ConstraintError, match=r"[Tt]oo many"):
        list(engine.generate(hostile))
    assert time.thread_time() - begin < 3
    assert resident_bytes() - before < 64 << 20


def test_compiled_forms_are_remembered_but_not_too_many(engine: Engine) -> None:
    assert engine.tokenizer is not None
    grammars = Grammars(engine.tokenizer)
    for n in (*range(70), 69):
        grammars.check(Constraint("regex", f"a{n}"))
    begin = time.perf_counter()
    for _ in range(20):
        grammars.hold(Constraint("regex", "a69"))
    assert (time.perf_counter() - begin) / 20 < 0.002, "it was compiled again"
    grammars.close()
