"""The forms that clients ask answers to have, in whichever field: each becomes a `Constraint`, or is refused.

A form is never followed only in part. What llguidance cannot hold it refuses by name when the request is prepared.
"""

import re
from collections.abc import Iterator
from typing import Protocol

import msgspec

from slimoe.offload.text.generation import Constraint
from slimoe.server.api_error import invalid, unsupported

Schema = msgspec.Raw
"""A JSON schema as it was sent, in which the order of the properties counts: an object, true, or a text of one."""
NO_SCHEMA = msgspec.Raw(b"null")
_ANY_OBJECT = '{"type": "object"}'
MAX_OPTIONS = 4096
_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$/&~#-]")
_NO_TAGS = "This server holds answers to JSON schemas, regular expressions, choices and grammars."


class NamedSchema(msgspec.Struct):
    """`response_format.json_schema`; with or without `strict` the schema is followed."""

    schema: Schema = msgspec.field(default_factory=lambda: NO_SCHEMA)
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    """`response_format`: text, json_object, json_schema, and in other servers' words regex and grammar."""

    type: str
    json_schema: NamedSchema | None = None
    schema: Schema = msgspec.field(default_factory=lambda: NO_SCHEMA)
    pattern: str | None = None
    grammar: str | None = None


class StructuredOutputs(msgspec.Struct):
    """`structured_outputs`, as vLLM has it: one of its fields."""

    json: Schema = msgspec.field(default_factory=lambda: NO_SCHEMA)
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: msgspec.Raw = msgspec.field(default_factory=lambda: NO_SCHEMA)
    whitespace_pattern: str | None = None


class FormFields(Protocol):
    """The fields of a body that ask for a form."""

    response_format: ResponseFormat | None
    grammar: str | None
    json_schema: Schema
    guided_json: Schema
    guided_json_object: bool | None
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None
    structured_outputs: StructuredOutputs | None
    regex: str | None
    ebnf: str | None
    lark: str | None


FORM_FIELDS = tuple(FormFields.__annotations__)


def constraint_of(body: FormFields, own: Constraint | None = None) -> Constraint | None:
    """The form that a body asks for, None for plain text; raises ApiError for two of them and for what is none.

    `own` is the form in a field that the dialect alone has.
    """
    found = [*filter(None, (own,)), *_forms(body), *_guided_forms(body)]
    if len(found) > 1:
        first, second = found[0].param, found[1].param
        raise invalid(f"{first} and {second} both give the answer's form. Send one of them.", second)
    return found[0] if found else None


def schema_constraint(schema: Schema, param: str) -> Constraint | None:
    """JSON that follows the schema in the field `param`, None where there is none; raises ApiError."""
    try:
        text = bytes(schema).decode()
    except UnicodeDecodeError:
        raise invalid("A JSON schema is text in UTF-8.", param) from None
    if text.startswith('"'):
        # vLLM takes the schema's text, too.
        text = msgspec.json.decode(text)
    if text.strip() in ("null", ""):
        return None
    if not text.lstrip().startswith("{") and text.strip() not in ("true", "false"):
        raise invalid(f"A JSON schema is an object, not {text:.40}.", param)
    return Constraint("json_schema", text, param)


def object_constraint(param: str) -> Constraint:
    """Any JSON object."""
    return Constraint("json_schema", _ANY_OBJECT, param)


def choice_constraint(options: list[str], param: str) -> Constraint:
    """One of some texts; raises ApiError for none of them or too many."""
    if not 0 < len(options) <= MAX_OPTIONS:
        raise invalid(f"There may be 1 to {MAX_OPTIONS:,} texts to choose from, not {len(options):,}.", param)
    return Constraint("regex", "|".join(_SPECIAL.sub(r"\\\g<0>", option) for option in options), param)


def grammar_constraint(text: str, param: str) -> Constraint:
    """A grammar in GBNF, or in Lark's words, which know no `::=`."""
    is_lark = "::=" not in text or text.lstrip().startswith("%llguidance")
    return Constraint("lark" if is_lark else "gbnf", text, param)


def format_constraint(given: ResponseFormat, param: str = "response_format") -> Constraint | None:
    """The form that a `response_format` asks for, None for plain text; raises ApiError."""
    match given.type:
        case "text":
            return None
        case "json_object":
            return schema_constraint(given.schema, f"{param}.schema") or object_constraint(param)
        case "json_schema":
            named = given.json_schema or NamedSchema(given.schema)
            where = f"{param}.json_schema" if given.json_schema else param
            found = schema_constraint(named.schema, f"{where}.schema")
            if found is None:
                raise invalid("There is no schema to follow.", f"{where}.schema")
            return found
        case "regex" if given.pattern:
            return Constraint("regex", given.pattern, f"{param}.pattern")
        case "grammar" if given.grammar:
            return grammar_constraint(given.grammar, f"{param}.grammar")
        case "structural_tag" | "regex" | "grammar" | "lark" | "ebnf" | "choice":
            raise unsupported(f"The response format {given.type} is not supported. {_NO_TAGS}", param)
    known = "text, json_object and json_schema"
    raise invalid(f"The response format {given.type!r} is not known. There are {known}.", f"{param}.type")


def _forms(body: FormFields) -> Iterator[Constraint]:
    """The forms in the fields of OpenAI, llama.cpp and SGLang."""
    if body.response_format is not None and (form := format_constraint(body.response_format)):
        yield form
    if form := schema_constraint(body.json_schema, "json_schema"):
        yield form
    if body.grammar:
        yield grammar_constraint(body.grammar, "grammar")
    if body.regex:
        yield Constraint("regex", body.regex, "regex")
    if body.ebnf:
        yield Constraint("gbnf", body.ebnf, "ebnf")
    if body.lark:
        yield Constraint("lark", body.lark, "lark")


def _guided_forms(body: FormFields) -> Iterator[Constraint]:
    """The forms in the fields of vLLM, by their old names and their new ones."""
    new = body.structured_outputs or StructuredOutputs()
    for name, value in (("structural_tag", new.structural_tag), ("whitespace_pattern", new.whitespace_pattern)):
        if value not in (None, NO_SCHEMA):
            raise unsupported(f"The field {name} is not supported. {_NO_TAGS}", f"structured_outputs.{name}")
    where = "structured_outputs."
    for schema, param in ((body.guided_json, "guided_json"), (new.json, f"{where}json")):
        if form := schema_constraint(schema, param):
            yield form
    for is_wanted, param in ((body.guided_json_object, "guided_json_object"), (new.json_object, f"{where}json_object")):
        if is_wanted:
            yield object_constraint(param)
    for regex, param in ((body.guided_regex, "guided_regex"), (new.regex, f"{where}regex")):
        if regex:
            yield Constraint("regex", regex, param)
    for options, param in ((body.guided_choice, "guided_choice"), (new.choice, f"{where}choice")):
        if options is not None:
            yield choice_constraint(options, param)
    for grammar, param in ((body.guided_grammar, "guided_grammar"), (new.grammar, f"{where}grammar")):
        if grammar:
            yield grammar_constraint(grammar, param)
