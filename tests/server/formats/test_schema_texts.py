"""Parameters that are texts by their schemas, however those say so."""

import json
from typing import Any

import pytest

from slimoe.server.formats.schema_texts import text_parameters
from slimoe.server.messages import Tool

TEXT, NULL = {"type": "string"}, {"type": "null"}


@pytest.mark.parametrize(
    ("schema", "is_text"),
    [
        (TEXT, True),
        ({"type": ["null", "string"]}, True),
        ({"anyOf": [TEXT, NULL]}, True),
        ({"anyOf": [TEXT, {"type": ["string", "null"]}]}, True),
        ({"enum": ["a", "b"]}, True),
        ({"type": "string", "enum": []}, True),
        ({"type": ["string", "integer"]}, False),
        ({"type": ["string", {}]}, False),
        ({"anyOf": [TEXT, {"type": ["integer"]}]}, False),
        ({"anyOf": [TEXT, {"$ref": "#/x"}]}, False),
        ({"anyOf": [TEXT, 1]}, False),
        ({"anyOf": "x", "type": "null"}, False),
        ({"enum": ["a", 1]}, False),
        ({"enum": [{}]}, False),
        ({}, False),
        (NULL, False),
        (True, False),
    ],
)
def test_which_parameters_are_texts(schema: Any, is_text: bool) -> None:
    tool = Tool("weather", "", json.dumps({"properties": {"city": schema}}))
    assert text_parameters(tool) == (("city",) if is_text else ())


@pytest.mark.parametrize("properties", [None, [], ["city"], "city"])
def test_properties_that_are_none(properties: Any) -> None:
    assert text_parameters(Tool("weather", "", json.dumps({"properties": properties}))) == ()
