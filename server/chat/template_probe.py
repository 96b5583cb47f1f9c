"""Finds out what a chat template does with tools: it is given some, and what it writes is looked at."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from slimoe.server.chat.template import ChatTemplate
from slimoe.server.chat.template_error import ChatTemplateError, TemplateLimitError
from slimoe.server.chat.template_messages import TemplateCaps

_PARAMETERS = {
    "type": "object",
    "properties": {"probe_parameter": {"type": "string", "description": "A probe."}},
    "required": ["probe_parameter"],
}
_TOOL = {
    "type": "function",
    "function": {"name": "probe_tool", "description": "Probes.", "parameters": _PARAMETERS},
}
_USER = {"role": "user", "content": "probe_question"}
_LONG_IDS, _SHORT_IDS = ("call_probe_1", "call_probe_2"), ("probe0001", "probe0002")
_THOUGHT = "probe_thought"


class TemplateProbe:
    """Tries one template; `values` are the names that it may use besides, such as `bos_token`."""

    def __init__(self, template: ChatTemplate, values: Mapping[str, Any]) -> None:
        self._template, self._values = template, values

    def caps(self) -> TemplateCaps:
        """What the template does; raises TemplateLimitError when it takes too much."""
        tools = [_TOOL]
        text = self._text([_USER], tools)
        knows_tools = "probe_tool" in text and "probe_parameter" in text
        found = TemplateCaps(tools=knows_tools, reasoning=self._reasoning([_USER, _said({}), _USER], None))
        given = tools if knows_tools else None
        for ids in (_LONG_IDS, _SHORT_IDS):
            for form in ("object", "text"):
                text = self._text(_conversation(ids[:1], form), given)
                # A dictionary as Python writes it, or a text in a text, is not what the model was trained on.
                is_foreign = "'probe_key'" in text or '\\"probe_key' in text
                if is_foreign or not _has(text, "probe_call_1 probe_key probe_value_1 probe_result_1"):
                    continue
                both = self._text(_conversation(ids, form), given)
                return TemplateCaps(
                    tools=knows_tools,
                    calls=form,
                    is_parallel=_has(both, "probe_call_2 probe_value_1 probe_value_2 probe_result_1 probe_result_2"),
                    shows_ids=ids[0] in text,
                    has_short_ids=ids is _SHORT_IDS,
                    reasoning=self._reasoning(_conversation(ids[:1], form), given) or found.reasoning,
                )
        return found

    def _reasoning(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None) -> str:
        """The field in which the template reads the reasoning of the assistant's message, which is the second."""
        user, said, *rest = messages
        for field in ("reasoning_content", "thinking", "reasoning"):
            if _THOUGHT in self._text([user, {**said, field: _THOUGHT}, *rest], tools):
                return field
        chunks = [{"type": "thinking", "thinking": _THOUGHT}, {"type": "text", "text": "probe_answer"}]
        text = self._text([user, {**said, "content": chunks}, *rest], tools)
        return "chunk" if _THOUGHT in text and "'type'" not in text and '"type": "thinking"' not in text else ""

    def _text(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None) -> str:
        """What the template writes, nothing if it refuses."""
        try:
            return self._template.render(messages, {**self._values, "tools": tools}, True)
        except TemplateLimitError:
            raise
        except ChatTemplateError:
            return ""


def _said(fields: Mapping[str, Any]) -> dict[str, Any]:
    return (
        {"role": "assistant", "content": "", **fields} if fields else {"role": "assistant", "content": "probe_answer"}
    )


def _conversation(ids: Sequence[str], form: str) -> list[dict[str, Any]]:
    """A question, a call with each of the ids, and the calls' results."""
    calls, results = [], []
    for number, id in enumerate(ids, 1):
        name, value = f"probe_call_{number}", {"probe_key": f"probe_value_{number}"}
        arguments = value if form == "object" else json.dumps(value)
        calls.append({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
        results.append({"role": "tool", "tool_call_id": id, "name": name, "content": f"probe_result_{number}"})
    return [_USER, _said({"tool_calls": calls}), *results]


def _has(text: str, words: str) -> bool:
    return all(word in text for word in words.split())
