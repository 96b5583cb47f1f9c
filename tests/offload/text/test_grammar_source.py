"""Schemas that llguidance would let an answer only seem to follow."""

import json
from typing import Any

import pytest

from slimoe.offload.text.generation import Constraint
from slimoe.offload.text.grammar_source import UnusableGrammarError, grammar_of

INTEGER: Any = {"type": "integer"}
FREE: Any = {"type": "object", "additionalProperties": INTEGER, "minProperties": 2}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "patternProperties": {"^x$": INTEGER}, "additionalProperties": False, "minProperties": 2},
        FREE,
        {"minProperties": 2},
        {**FREE, "type": ["object", "null"]},
        {**FREE, "properties": {"x": INTEGER}, "required": ["x", "x"]},
        {"type": "array", "items": FREE},
        {"$ref": "#/$defs/const", "$defs": {"const": FREE}},
        {"properties": {"minProperties": FREE}, "additionalProperties": False},
        {"anyOf": [{"type": "null"}, FREE]},
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_a_property_written_twice_is_not_counted_as_two(schema: Any) -> None:
    for wanted in (
        Constraint("json_schema", json.dumps(schema), "json_schema"),
        Constraint("lark", f"start: %json {json.dumps(schema)}", "lark"),
        Constraint("regex", "a", instead=f'start: "a" %json {json.dumps(schema)} "b"'),
    ):
        with pytest.raises(
            UnusableGrammarError, match="minProperties is 2, which a property written twice would reach"
        ):
            grammar_of(wanted)


@pytest.mark.parametrize(
    "schema",
    [
        {**FREE, "minProperties": 1},
        {**FREE, "properties": {"x": INTEGER}, "required": ["x", "y"]},
        {"type": "object", "properties": {"x": INTEGER}, "required": ["x"], "additionalProperties": False},
        {"const": {"minProperties": 3}},
        {"type": "object", "properties": {"minProperties": INTEGER}, "required": ["minProperties"]},
        {"type": "array", "minProperties": 3},
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_a_least_number_of_properties_that_is_sure_is_held(schema: Any) -> None:
    assert grammar_of(Constraint("json_schema", json.dumps(schema)))
    assert grammar_of(Constraint("lark", f"start: %json {json.dumps(schema)}"))


def test_what_need_not_be_followed_is_not_counted() -> None:
    lenient = json.dumps({**FREE, "x-guidance": {"lenient": True}})
    assert grammar_of(Constraint("lark", f"start: %json {lenient}"))
    with pytest.raises(UnusableGrammarError, match="minProperties"):
        grammar_of(Constraint("json_schema", lenient))
