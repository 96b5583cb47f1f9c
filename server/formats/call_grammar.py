"""Grammars of answers that must call tools, or must call them well, in Lark as llguidance reads it.

All that a family writes around a call's arguments is text; the arguments are JSON that follows the tool's schema. Marks
that are control tokens of the vocabulary are named by their ids, since no text spells them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slimoe.offload.text.generation import Constraint
from slimoe.server.messages import ChatPrompt, Tool

NAME = "NAME"
_SPACE = r" |\n{1,2}[ \t]{0,20}"
"""White space between the parts of arguments: a small model could write it for ever."""
_HEAD = r"""%llguidance {"no_forcing": true}
TEXT: /(.|\n)*/
BLANKS: /[ \n]{0,4}/
"""


@dataclass(frozen=True, slots=True)
class CallForm:
    """What a family writes around a call's arguments, `before` with NAME in the tool's place.

    All calls stand between `opening` and `closing`, with `between` between them, which is None for one call at most.
    They begin with `mark`; without one an answer that begins with a bracket is a call.
    """

    before: str
    after: str
    mark: str = ""
    opening: str = ""
    between: str | None = ""
    closing: str = ""


class CallGrammar:
    """The grammars of one answer: `think` stands around reasoning, `prefix` before the text, `control` are ids by name.

    With `begins_thinking` the prompt has opened the reasoning already.
    """

    def __init__(
        self,
        form: CallForm,
        control: Mapping[str, int],
        think: tuple[str, str] | None = None,
        *,
        begins_thinking: bool = False,
        prefix: str = "",
    ) -> None:
        self._form, self._control, self._think = form, control, think
        self._begins_thinking, self._prefix = begins_thinking, prefix
        names = sorted((name for name in control if name), key=len, reverse=True)
        self._split = re.compile("(" + ("|".join(map(re.escape, names)) or "(?!)") + ")")

    def constraint(self, conversation: ChatPrompt, wanted: Constraint | None) -> Constraint | None:
        """What holds the answer to the tools and to the form that is wanted besides; None if nothing does."""
        tools, choice = conversation.usable_tools, conversation.tool_choice
        if choice.mode == "required":
            called = [tool for tool in tools if choice.name in ("", tool.name)]
            start = f"{_HEAD}start: {self._thought()} calls\n"
            rules = self._rules(called, choice.is_parallel and not choice.name)
            return Constraint("lark", start + rules, "tools", tools=_schemas(called))
        if wanted is not None:
            before = f"{_HEAD}start: {self._thought()} {self._literal(self._prefix)}\n{self._thought_rules()}"
            instead = f"{_HEAD}start: calls\n" + self._rules(tools, choice.is_parallel) if tools else ""
            return replace(
                wanted, before=before if self._think or self._prefix else "", instead=instead, tools=_schemas(tools)
            )
        if not tools or (choice.is_parallel and not any(tool.strict for tool in tools)):
            return None
        rules = self._rules(tools, choice.is_parallel)
        return Constraint("lark", _HEAD + self._free() + rules, "tools", tools=_schemas(tools))

    def _free(self) -> str:
        """An answer of text, in which calls may follow."""
        mark = self._form.mark
        if not mark:
            text = f"{self._literal(self._prefix)} TEXT" if self._prefix else "(OTHER)?"
            return f"start: {self._thought()} ({text} | calls)\nOTHER: /[^{{\\s](.|\\n)*/\n"
        trigger = f"trigger: TEXT {self._literal(mark)}\n"
        if mark not in self._control:
            trigger = f"trigger[lazy]: TEXT {json.dumps(mark, ensure_ascii=False)}\n"
        return f"start: {self._thought()} (trigger rest | TEXT)\n{trigger}"

    def _rules(self, tools: Sequence[Tool], is_parallel: bool) -> str:
        """The rules `calls` and `rest`, which is the same without its mark."""
        form = self._form
        more = f"({self._literal(form.between)} call)*" if is_parallel and form.between is not None else ""
        n_mark = len(form.mark)
        opening, rest_opening = self._literal(form.opening), self._literal(form.opening[n_mark:])
        closing = self._literal(form.closing)
        names = [(f"call_{n}", f"first_{n}") for n in range(len(tools))]
        lines = [
            f"calls: {opening} call {more} {closing}",
            f"rest: {rest_opening} {'call' if form.opening else 'first'} {more} {closing}",
            "call: " + " | ".join(call for call, _ in names),
            "first: " + " | ".join(first for _, first in names),
        ]
        for (call, first), tool in zip(names, tools, strict=True):
            before = form.before.replace(NAME, tool.name)
            body = f"%json {_schema(tool)} {self._literal(form.after)}"
            lines.append(f"{call}: {self._literal(before)} {body}")
            lines.append(f"{first}: {self._literal(before if form.opening else before[n_mark:])} {body}")
        return "\n".join((*lines, self._thought_rules()))

    def _thought(self) -> str:
        """Reasoning that may come first, or goes on already."""
        if self._think is None:
            return ""
        return "thought_end" if self._begins_thinking else "thought?"

    def _thought_rules(self) -> str:
        if self._think is None:
            return ""
        begin, end = self._think
        rules = f"thought: {self._literal(begin)} thought_end\n"
        if self._split.split(end)[:1] == [""]:
            return f"{rules}thought_end: TEXT {self._literal(end)} BLANKS\n"
        return (
            f"{rules}thought_end: thought_text BLANKS\nthought_text[lazy]: TEXT {json.dumps(end, ensure_ascii=False)}\n"
        )

    def _literal(self, text: str | None) -> str:
        """A text, with control tokens by their ids."""
        parts = self._split.split(text or "")
        return " ".join(
            f"<[{self._control[part]}]>" if n % 2 else json.dumps(part, ensure_ascii=False)
            for n, part in enumerate(parts)
            if part
        )


def _schemas(tools: Sequence[Tool]) -> tuple[tuple[str, str, str], ...]:
    return tuple((tool.place, tool.name, _schema(tool)) for tool in tools)


def _schema(tool: Tool) -> str:
    """The schema of a tool's arguments, which are an object; of a strict tool all of it is followed."""
    schema: dict[str, Any] = json.loads(tool.parameters)
    if not tool.strict:
        # What is not said of an object is not allowed in it, so that small models do not invent fields.
        schema = {"properties": {}, **schema} if not schema.keys() & _SAYS_WHAT_IS_IN_IT else schema
        schema = {"additionalProperties": False, **schema} if "properties" in schema else schema
    guidance = {"whitespace_pattern": _SPACE, "lenient": not tool.strict}
    return json.dumps({"type": "object", **schema, "x-guidance": guidance})


_SAYS_WHAT_IS_IN_IT = {"properties", "$ref", "anyOf", "oneOf", "allOf", "additionalProperties", "patternProperties"}
