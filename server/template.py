"""A model's own chat template, compiled once and run in a sandbox.

The template comes with the model file, so it is somebody else's program. It sees plain values only, cannot change
them, cannot reach Python's internals, and is refused when its source, a repeated string or its output grows past
a fixed size. Extensions, filters and globals are those that Hugging Face's templates are written against.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from offload.errors import SlimoeError

MAX_SOURCE = 256 * 1024
MAX_OUTPUT = 64 * 1024 * 1024
MAX_REPEATED = 1024 * 1024
MAX_EXPONENT = 64


class ChatTemplateError(SlimoeError):
    """The model's template cannot be compiled, or refuses the conversation."""


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The tag's body in its place."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, which also bounds the two operators that make much out of little."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuses the operation when its result would be huge."""
        if operator == "*":
            for repeated, count in ((left, right), (right, left)):
                is_sized = isinstance(repeated, (str, bytes, list, tuple))
                if is_sized and isinstance(count, int) and len(repeated) * count > MAX_REPEATED:
                    raise SecurityError("it repeats a text or list too often")
        elif isinstance(right, (int, float)) and abs(right) > MAX_EXPONENT:
            raise SecurityError("it raises a number to too high a power")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which a model was never trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> _Sandbox:
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    sandbox.filters["tojson"] = _tojson
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.globals["strftime_now"] = _strftime_now
    return sandbox


class ChatTemplate:
    """A compiled template; `render` turns messages into the text the model was trained on."""

    def __init__(self, source: str) -> None:
        """Compiles `source`; raises ChatTemplateError when it is too long or no valid template."""
        if len(source) > MAX_SOURCE:
            raise ChatTemplateError(f"The model's chat template is longer than {MAX_SOURCE} characters.")
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise ChatTemplateError(f"The model's chat template does not compile: {error}.") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any], add_generation_prompt: bool
    ) -> str:
        """The text of the conversation; `values` are further names the template may use, such as `bos_token`.

        Raises ChatTemplateError with the template's own words when it refuses the conversation.
        """
        scope = {**values, "messages": messages, "add_generation_prompt": add_generation_prompt}
        parts: list[str] = []
        n_chars = 0
        try:
            for part in self._template.generate(scope):
                parts.append(part)
                n_chars += len(part)
                if n_chars > MAX_OUTPUT:
                    raise SecurityError("its output is too long")
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise ChatTemplateError(f"The model's chat template refuses these messages: {error}.") from None
        except (RecursionError, MemoryError):
            raise ChatTemplateError("The model's chat template needs too much memory for these messages.") from None
        return "".join(parts)
