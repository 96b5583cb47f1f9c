"""The forms of answers: which fields ask for them, what is refused, and answers that have them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from pydantic import BaseModel

from slimoe.offload.text.generation import Constraint
from slimoe.server.api.forms import constraint_of
from slimoe.server.api_error import ApiError
from slimoe.server.dialects.chat_api import ChatRequest
from tests.models.live_server import serving

DEMO = Path(__file__).parents[3] / "server" / "demo" / "demo.gguf"
SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"type": "null"}}, "required": ["z"]}
TEXT = json.dumps(SCHEMA)
GBNF = 'root ::= "a" | "b"'
LARK = 'start: "a" | "b"'


def asked(**fields: Any) -> Constraint | None:
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], **fields})
    return constraint_of(msgspec.json.decode(body, type=ChatRequest))


@pytest.mark.parametrize(
    ("fields", "kind", "text", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}', "response_format"),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "json_schema", TEXT, "response_format.schema"),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, "json_schema", TEXT, "response_format.schema"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            "json_schema",
            TEXT,
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "regex", "pattern": "a+"}}, "regex", "a+", "response_format.pattern"),
        ({"response_format": {"type": "grammar", "grammar": GBNF}}, "gbnf", GBNF, "response_format.grammar"),
        ({"json_schema": SCHEMA}, "json_schema", TEXT, "json_schema"),
        ({"json_schema": {}}, "json_schema", "{}", "json_schema"),
        ({"grammar": GBNF}, "gbnf", GBNF, "grammar"),
        ({"grammar": "%llguidance {}\n" + LARK}, "lark", "%llguidance {}\n" + LARK, "grammar"),
        ({"guided_json": SCHEMA}, "json_schema", TEXT, "guided_json"),
        ({"guided_json": TEXT}, "json_schema", TEXT, "guided_json"),
        ({"guided_json_object": True}, "json_schema", '{"type": "object"}', "guided_json_object"),
        ({"guided_regex": "a+"}, "regex", "a+", "guided_regex"),
        ({"guided_choice": ["a.b", "c/d\n", "é"]}, "regex", "a\\.b|c\\/d\n|é", "guided_choice"),
        ({"guided_grammar": GBNF}, "gbnf", GBNF, "guided_grammar"),
        ({"guided_grammar": LARK}, "lark", LARK, "guided_grammar"),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", TEXT, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a"}}, "regex", "a", "structured_outputs.regex"),
        ({"structured_outputs": {"choice": ["a"]}}, "regex", "a", "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": LARK}}, "lark", LARK, "structured_outputs.grammar"),
        (
            {"structured_outputs": {"json_object": True}},
            "json_schema",
            '{"type": "object"}',
            "structured_outputs.json_object",
        ),
        ({"regex": "a+"}, "regex", "a+", "regex"),
        ({"ebnf": GBNF}, "gbnf", GBNF, "ebnf"),
        ({"lark": LARK}, "lark", LARK, "lark"),
    ],
)
def test_every_field_that_asks_for_a_form(fields: Any, kind: str, text: str, param: str) -> None:
    found = asked(**fields)
    assert found == Constraint(kind, text, param)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None, "json_schema": None, "guided_choice": None, "structured_outputs": None},
        {"grammar": "", "regex": "", "guided_regex": "", "lark": "", "ebnf": "", "guided_grammar": ""},
        {"guided_json_object": False, "structured_outputs": {}},
    ],
)
def test_plain_text_has_no_form(fields: Any) -> None:
    assert asked(**fields) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"grammar": GBNF, "json_schema": SCHEMA}, "grammar"),
        ({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"guided_json": SCHEMA, "structured_outputs": {"json": SCHEMA}}, "structured_outputs.json"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a"] * 5000}, "guided_choice"),
        ({"json_schema": [1]}, "json_schema"),
        ({"json_schema": 5}, "json_schema"),
        ({"guided_json": "word"}, "guided_json"),
        ({"response_format": {"type": "json_schema"}}, "response_format.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"response_format": {"type": "regex"}}, "response_format"),
        ({"response_format": {"type": "poem"}}, "response_format.type"),
    ],
)
def test_what_is_no_form_is_refused_by_name(fields: Any, param: str) -> None:
    with pytest.raises(ApiError) as refusal:
        asked(**fields)
    assert (refusal.value.status, refusal.value.info.param) == (400, param)


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with serving(DEMO, "--ctx", "512", "--parallel", "2") as (_, url):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    messages = [{"role": "user", "content": "Answer."}]
    wanted: dict[str, Any] = {"model": "demo", "messages": messages, "max_tokens": 200, **fields}
    return client.chat.completions.create(**wanted).choices[0]


def form(**fields: Any) -> dict[str, Any]:
    return {"extra_body": fields}


def test_a_chat_is_held_to_a_schema_streamed_and_whole(client: openai.OpenAI) -> None:
    # Closed: with properties of its own an answer may be cut off, and with which seed differs by processor.
    closed = SCHEMA | {"additionalProperties": False}
    wanted: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "x", "schema": closed, "strict": True}}
    for seed in range(3):
        choice = chat(client, response_format=wanted, temperature=1.0, seed=seed)
        found = json.loads(choice.message.content)
        assert choice.finish_reason == "stop"
        assert isinstance(found["z"], int)
    create: Any = client.chat.completions.create
    asked = [{"role": "user", "content": "Answer."}]
    stream = create(model="demo", messages=asked, response_format=wanted, temperature=1.0, seed=2, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == choice.message.content


def test_the_official_clients_helper_parses_an_answer(client: openai.OpenAI) -> None:
    class Step(BaseModel):
        done: bool
        kind: int | None

    class Plan(BaseModel):
        steps: list[Step]

    answer = client.chat.completions.parse(
        model="demo", messages=[{"role": "user", "content": "Plan."}], response_format=Plan, max_tokens=400, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, Plan)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"guided_choice": ["a.b", "c/d\n", "é(", "x y"]}, r"a\.b|c/d\n|é\(|x y"),
        ({"guided_regex": r"\d{3}"}, r"\d{3}"),
        ({"grammar": 'root ::= "n" [0-9]{1,5} "!"'}, r"n[0-9]{1,5}!"),
        ({"lark": 'start: "(" start ")" | "x"'}, r"\(*x\)*"),
        ({"structured_outputs": {"choice": ["one", "two"]}}, r"one|two"),
    ],
)
def test_chats_and_texts_have_the_form(client: openai.OpenAI, fields: Any, expected: str) -> None:
    assert re.fullmatch(expected, chat(client, **form(**fields)).message.content)
    text = client.completions.create(model="demo", prompt="Say", max_tokens=100, n=2, extra_body=fields)
    assert len(text.choices) == 2
    for choice in text.choices:
        assert re.fullmatch(expected, choice.text), choice.text


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"json_schema": {"not": {}}}, "json_schema", '"not"'),
        ({"guided_json": {"$ref": "https://example.com/x"}}, "guided_json", "example.com"),
        ({"guided_regex": "(?=a)"}, "guided_regex", "look-ahead"),
        ({"grammar": "root ::= ("}, "grammar", "Expected ')'"),
        ({"lark": "start: start"}, "lark", "no text has this form"),
        ({"json_schema": {"type": "integer", "multipleOf": 999983}}, "json_schema", "processor time"),
        ({"json_schema": {"const": "x" * 1_100_000}}, "json_schema", "characters"),
    ],
)
def test_what_cannot_be_held_is_refused_and_harms_nobody(
    client: openai.OpenAI, fields: Any, param: str, said: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(said)) as refusal:
        chat(client, **form(**fields))
    assert refusal.value.param == param
    with pytest.raises(openai.BadRequestError, match=re.escape(said)) as refusal:
        client.completions.create(model="demo", prompt="Say", extra_body=fields)
    assert refusal.value.param == param
    assert chat(client, **form(guided_choice=["fine"])).message.content == "fine"
