"""The forms of a conversation that a template is tried with: as it is, then in the words that older templates know."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from slimoe.server.chat.native_form import native_messages
from slimoe.server.chat.plain_form import plain_messages
from slimoe.server.chat.template import ChatTemplate
from slimoe.server.chat.template_error import ChatTemplateError, TemplateLimitError
from slimoe.server.chat.template_messages import CONTINUED, Rendered, TemplateCaps

_BLANK = "\n\n"
Entry = dict[str, Any]


class Conversation(NamedTuple):
    """What is to be rendered.

    Each message has a role and content, and may have `calls`, `call_id`, `name` and `reasoning`; a call has its
    `arguments` as text, and their `value` if that is JSON. A trailing assistant message is continued if `generate`.
    """

    messages: Sequence[Entry]
    tools: Sequence[Entry]
    values: Mapping[str, Any]
    generate: bool


class Form(NamedTuple):
    """Messages as a template is given them, and the tools if it describes them itself."""

    messages: list[Entry]
    tools: Sequence[Entry] | None


def render_conversation(template: ChatTemplate, conversation: Conversation, caps: TemplateCaps) -> Rendered:
    """The text of the first form that the template takes without leaving out anything that must not be lost.

    Raises ChatTemplateError.
    """
    error: ChatTemplateError | None = None
    for form in _forms(conversation, caps):
        try:
            text = _render_form(template, form, conversation)
        except TemplateLimitError:
            raise
        except ChatTemplateError as refusal:
            error = refusal
            continue
        lost = _lost(text, conversation)
        if lost is None:
            return Rendered(text, bool(conversation.tools) and form.tools is None)
        error = ChatTemplateError(f"The model's chat template leaves out {lost}.")
    assert error is not None
    raise error


def _forms(conversation: Conversation, caps: TemplateCaps) -> Iterator[Form]:
    """The conversation in the template's own fields, then in plain words, each in the roles of older templates too."""
    messages, tools, _, generate = conversation
    has_calls = any(message.get("calls") or message["role"] == "tool" for message in messages)
    # What follows a call is its result: a message that ends in one is continued as text.
    is_open = generate and bool(messages) and bool(messages[-1].get("calls"))
    has_reasoning = any(message.get("reasoning") for message in messages)
    is_native = not is_open and bool(caps.calls if has_calls else has_reasoning and caps.reasoning)
    told = tools if caps.tools else None
    if is_native and (told or not tools):
        # Some templates take no reasoning beside a text, or leave out a text beside calls.
        yield from _in_roles(native_messages(messages, caps), told)
        if has_reasoning:
            yield from _in_roles(native_messages([{**m, "reasoning": ""} for m in messages], caps), told)
        apart = [one for message in messages for one in _apart(message)]
        if len(apart) > len(messages):
            yield from _in_roles(native_messages(apart, caps), told)
    if told:
        yield from _in_roles(plain_messages(messages, ()), told)
    yield from _in_roles(plain_messages(messages, tools), None)


def _apart(message: Entry) -> list[Entry]:
    """A message as one with its text and one with its calls."""
    if not message.get("calls") or not message["content"]:
        return [message]
    return [{"role": message["role"], "content": message["content"]}, {**message, "content": ""}]


def _in_roles(messages: list[Entry], tools: Sequence[Entry] | None) -> Iterator[Form]:
    """The messages as they are, then in the words older templates know: system for developer, then two roles only."""
    yield Form(messages, tools)
    roles = {message["role"] for message in messages}
    if "developer" in roles:
        yield Form([{**m, "role": "system"} if m["role"] == "developer" else m for m in messages], tools)
    # All but calls and their results becomes the user's or assistant's, and neighbours of one role one message.
    turns: list[Entry] = []
    for message in messages:
        keeps_role = message["role"] == "assistant" or "tool_call_id" in message
        role = message["role"] if keeps_role else "user"
        is_plain = message.keys() == {"role", "content"} and isinstance(message["content"], str)
        if turns and is_plain and turns[-1].keys() == message.keys() and turns[-1]["role"] == role:
            texts = (turns[-1]["content"], message["content"])
            turns[-1] = {**turns[-1], "content": _BLANK.join(text for text in texts if text)}
        else:
            turns.append({**message, "role": role})
    if turns != messages:
        yield Form(turns, tools)


def _render_form(template: ChatTemplate, form: Form, conversation: Conversation) -> str:
    messages, values = form.messages, {**conversation.values, "tools": form.tools}
    last = messages[-1] if messages else {"role": ""}
    if last["role"] != "assistant" or not conversation.generate:
        return template.render(messages, values, conversation.generate)
    # The blank after the mark shows whether the template strips what it is given.
    end = CONTINUED + " "
    if not isinstance(last["content"], str):
        raise ChatTemplateError("The model's chat template cannot continue a message with reasoning.")
    text = template.render([*messages[:-1], {**last, "content": last["content"] + end}], values, False)
    at = text.rfind(CONTINUED)
    if at < 0:
        raise ChatTemplateError("The model's chat template leaves out the assistant message to continue.")
    return text[:at] if text[at : at + 2] == end else text[:at].rstrip()


def _lost(text: str, conversation: Conversation) -> str | None:
    """What the text leaves out of what must be in it: system texts, calls, what tools gave back, and the tools."""
    at = 0
    for message in conversation.messages:
        calls = message.get("calls", ())
        wanted = []
        for call in calls:
            wanted.append((f"the name {call['name']} of a called tool", call["name"]))
            if "value" not in call:  # JSON may be written in the template's own way.
                wanted.append((f"the arguments of a call of {call['name']}", call["arguments"]))
        if calls or message["role"] in ("system", "developer", "tool"):
            whose = "system" if message["role"] == "developer" else message["role"]
            wanted.append((f"the {whose} message", message["content"]))
        for what, part in wanted:
            at = _find(text, part.strip(), at)
            if at < 0:
                return what
    names = [tool["function"]["name"] for tool in conversation.tools]
    return next((f"the tool {name}" for name in names if _find(text, name, 0) < 0), None)


def _find(text: str, part: str, at: int) -> int:
    """Where a part stands, as it is or as JSON has it; most stand in the order of the messages."""
    for spelling in (part, json.dumps(part, ensure_ascii=False)[1:-1]):
        for begin in (at, 0):
            found = text.find(spelling, begin)
            if found >= 0:
                return found
    return -1
