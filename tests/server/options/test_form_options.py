"""`--json-schema` and `--grammar`: files, a schema as it is written, and what is neither."""

from pathlib import Path

import click
import pytest

from slimoe.offload.errors import UsageError
from slimoe.offload.text.generation import Constraint
from slimoe.server.options.form_options import FormText, form_of

SCHEMA, GRAMMAR = FormText(is_schema=True), FormText(is_schema=False)


def test_a_form_stands_in_a_file_and_a_schema_also_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "form"
    path.write_text('{"type": "object"}')
    assert SCHEMA.convert(str(path), None, None) == '{"type": "object"}'
    assert SCHEMA.convert(' {"type": "null"}', None, None) == ' {"type": "null"}'
    path.write_text('root ::= "a"')
    assert GRAMMAR.convert(str(path), None, None) == 'root ::= "a"'
    assert form_of({"json_schema": "{}", "grammar": None}) == Constraint("json_schema", "{}", "--json-schema")
    assert form_of({"grammar": "root ::= [a]"}) == Constraint("gbnf", "root ::= [a]", "--grammar")
    assert form_of({}) is None
    with pytest.raises(UsageError, match="not both"):
        form_of({"json_schema": "{}", "grammar": "root ::= [a]"})


def test_what_is_no_form(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_bytes(b" " * ((4 << 20) + 1))
    for option, value, words in (
        (SCHEMA, "[1]", "no JSON schema, which begins with {, and no file that can be read"),
        (GRAMMAR, 'root ::= "a"', "is no file that can be read"),
        (GRAMMAR, str(tmp_path), "is no file that can be read"),
        (SCHEMA, str(tmp_path / "empty"), "is empty"),
        (GRAMMAR, str(tmp_path / "bytes"), "is no text"),
        (GRAMMAR, str(tmp_path / "large"), "has 4,194,305 bytes"),
    ):
        with pytest.raises(click.BadParameter, match=words):
            option.convert(value, None, None)
