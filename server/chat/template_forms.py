"""The forms of a conversation that a template is tried with: as it is, then in the words that older templates know."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from slimoe.server.chat.template import ChatTemplate
from slimoe.server.chat.template_error import ChatTemplateError, TemplateLimitError
from slimoe.server.chat.template_messages import CONTINUED

_BLANK = "\n\n"
Turn = Mapping[str, Any]


def render_conversation(
    template: ChatTemplate, messages: Sequence[Turn], values: Mapping[str, Any], generate: bool
) -> str:
    """The text of the first form that the template takes without dropping a system text.

    A trailing assistant message is continued if `generate`. Raises ChatTemplateError.
    """
    error: ChatTemplateError | None = None
    for form in _forms(messages):
        try:
            text = _render_form(template, form, values, generate)
        except TemplateLimitError:
            raise
        except ChatTemplateError as refusal:
            error = refusal
            continue
        if all(m["content"].strip() in text for m in messages if m["role"] in ("system", "developer")):
            return text
        error = ChatTemplateError("The model's chat template leaves out the system message.")
    assert error is not None
    raise error


def _forms(messages: Sequence[Turn]) -> Iterator[Sequence[Turn]]:
    """The messages as they are, then in the words older templates know: system for developer, then two roles only."""
    yield messages
    roles = {message["role"] for message in messages}
    if "developer" in roles:
        yield [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
    # Everything that is not the assistant's becomes the user's, and neighbours of one role become one message.
    turns: list[Turn] = []
    for message in messages:
        role = "assistant" if message["role"] == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            texts = (turns[-1]["content"], message["content"])
            turns[-1] = {**turns[-1], "content": _BLANK.join(text for text in texts if text)}
        else:
            turns.append({**message, "role": role})
    if turns != messages:
        yield turns


def _render_form(template: ChatTemplate, messages: Sequence[Turn], values: Mapping[str, Any], generate: bool) -> str:
    if not messages or messages[-1]["role"] != "assistant" or not generate:
        return template.render(messages, values, generate)
    # The blank after the mark shows whether the template strips what it is given.
    last = {**messages[-1], "content": messages[-1]["content"] + CONTINUED + " "}
    text = template.render([*messages[:-1], last], values, False)
    at = text.rfind(CONTINUED)
    if at < 0:
        raise ChatTemplateError("The model's chat template leaves out the assistant message to continue.")
    return text[:at] if text[at : at + 2] == CONTINUED + " " else text[:at].rstrip()
