"""A model's own chat template, compiled once and run in a sandbox.

The template comes with the model file, so it is somebody else's program. It sees plain values only, cannot change them
and cannot reach Python's internals. The sandbox does not bound time and memory, and compiling runs parts of a template
already: both are done in a process that can be killed, see `slimoe.server.chat.template_process`. Extensions, filters
and globals are those that Hugging Face's templates are written against.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from slimoe.server.chat.template_error import ChatTemplateError, TemplateLimitError, UnusableTemplateError

MAX_SOURCE = 256 * 1024
MAX_OUTPUT = 16 * 1024 * 1024
MAX_REPEATED = 1024 * 1024
MAX_EXPONENT = 64
_MAX_REASON = 500


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

    def __init__(self) -> None:
        """Adds what Hugging Face's templates are written against."""
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

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


def _dates() -> dict[str, str]:
    """Today, by the names under which templates of Llama 3 and its kin look for it; some have a date of 2024 else."""
    now = datetime.now()
    return {"date_string": now.strftime("%d %b %Y"), "datetime": now.strftime("%b %d %Y %H:%M:%S")}


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which a model was never trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=_listed
    )


def _listed(value: Any) -> list[Any]:
    """What filters such as `map` make, as llama.cpp's own templates hand it on."""
    if isinstance(value, Iterator):
        return list(value)
    raise TypeError(f"{type(value).__name__} is no value of JSON")


class ChatTemplate:
    """A compiled template; `render` turns messages into the text the model was trained on."""

    def __init__(self, source: str, max_output: int = MAX_OUTPUT) -> None:
        """Compiles `source`, which may write `max_output` characters for a conversation.

        Raises UnusableTemplateError when it is too long or no valid template, and MemoryError.
        """
        self._max_output = max_output
        # Firefunction's templates want the tools as one text.
        self._has_functions = "functools[" in source
        if len(source) > MAX_SOURCE:
            raise UnusableTemplateError(f"it is longer than {MAX_SOURCE} characters")
        try:
            self._template = _Sandbox().from_string(source)
        except RecursionError:
            raise UnusableTemplateError("it is nested too deeply") from None
        except MemoryError:
            raise
        except Exception as error:
            raise UnusableTemplateError(f"it does not compile ({_reason(error)})") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any], add_generation_prompt: bool
    ) -> str:
        """The text of the conversation; `values` are further names the template may use, such as `bos_token`.

        Raises ChatTemplateError with the template's own words when it refuses the conversation, TemplateLimitError
        when it writes too much, and MemoryError.
        """
        scope = {**_dates(), **values, "messages": messages, "add_generation_prompt": add_generation_prompt}
        if self._has_functions:
            scope.setdefault("functions", _tojson(values.get("tools") or [], indent=2))
        parts: list[str] = []
        n_chars = 0
        try:
            for part in self._template.generate(scope):
                parts.append(part)
                n_chars += len(part)
                if n_chars > self._max_output:
                    raise TemplateLimitError(f"{self._max_output} characters of output")
        except (MemoryError, TemplateLimitError):
            raise
        except RecursionError:
            raise TemplateLimitError(f"{sys.getrecursionlimit()} nested calls") from None
        except Exception as error:
            raise ChatTemplateError(f"The model's chat template refuses these messages: {_reason(error)}.") from None
        return "".join(parts)


def _reason(error: Exception) -> str:
    """The error's first words, without a full stop: they may be the template's own, and as many as it likes."""
    text = str(error).rstrip(".") or type(error).__name__
    return text if len(text) <= _MAX_REASON else text[:_MAX_REASON] + "..."
