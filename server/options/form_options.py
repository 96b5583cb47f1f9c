"""The flags `--json-schema` and `--grammar`, which hold answers to a form. Apart: sampling knows no forms."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from slimoe.offload.errors import UsageError
from slimoe.offload.text.generation import Constraint
from slimoe.server.options.flag_group import flag_group
from slimoe.server.options.text_file import TextFile


class FormText(TextFile):
    """A form by the name of its file; with `is_schema` also as it is written."""

    name = "form"
    most_bytes = 4 << 20

    def __init__(self, *, is_schema: bool) -> None:
        self._is_schema = is_schema

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Gives the form's text."""
        if self._is_schema and value.lstrip().startswith("{"):
            return str(value)
        other = "no JSON schema, which begins with {, and " if self._is_schema else ""
        return self.text_of(Path(value), value, other, param, ctx)


form_flags = flag_group(
    click.option(
        "--json-schema",
        type=FormText(is_schema=True),
        metavar="FILE|TEXT",
        help="JSON schema that answers follow: a file, or the schema itself.",
    ),
    click.option(
        "--grammar", type=FormText(is_schema=False), metavar="FILE", help="Grammar in GBNF that answers follow."
    ),
)
"""The flags that say which form answers have, as a decorator of a command."""


def form_of(values: Mapping[str, Any]) -> Constraint | None:
    """The form that a command's values ask for; raises UsageError for two of them."""
    schema, grammar = values.get("json_schema"), values.get("grammar")
    if schema is not None and grammar is not None:
        raise UsageError("An answer has one form. Give --json-schema or --grammar, not both.")
    if schema is not None:
        return Constraint("json_schema", schema, "--json-schema")
    return None if grammar is None else Constraint("gbnf", grammar, "--grammar")
