"""Messages in, token ids out: the model's template, with the client's text kept apart from the model's own marks.

A message may contain `</s>` or `<|im_start|>` written out. Rendered into the template such text would be read as
the control token of that name, so every occurrence in a message is replaced by a placeholder before rendering, the
rendered text is split at the control tokens the template itself wrote, and only then are the placeholders undone.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from slimoe.offload.text.tokenizer import Tokenizer
from slimoe.server.chat.plain_form import plain_messages
from slimoe.server.chat.template_child import MAX_OUTPUT, TemplateChild, TemplateLimits
from slimoe.server.chat.template_messages import CONTINUED, NO_TOOLS, Rendered, TemplateCaps
from slimoe.server.formats.call_grammar import CallGrammar
from slimoe.server.formats.families import PLAIN, family_of, grammar_of, think_of
from slimoe.server.formats.schema_texts import text_parameters
from slimoe.server.messages import PLAIN_READING, Call, ChatPrompt, Reading, Tool, Turn

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_PLACEHOLDER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_PLAIN_NAMES = {"user": "User: ", "assistant": "Assistant: ", "tool": "Tool: "}
FALLBACK_STOP = ("\nUser:",)
"""What ends an answer of a model without a template, besides its own end token."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to read, the strings that end the answer besides the model's own end token, and how it is written.

    `grammar` holds it to tools and forms that are asked for.
    """

    ids: tuple[int, ...]
    stop: tuple[str, ...] = ()
    reading: Reading = PLAIN_READING
    grammar: CallGrammar | None = None


class Chat:
    """Builds prompts for one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_output: int = MAX_OUTPUT,
        template: str | None = None,
        thinks: bool | None = None,
    ) -> None:
        """The `template`, or else the model's own, is compiled when it is first used, in a process of its own.

        It may write `max_output` characters for a conversation. `thinks` is whether answers begin with reasoning
        where a conversation does not say, None for as the template has it.
        """
        self._tokenizer = tokenizer
        self._values: dict[str, Any] = {} if thinks is None else {"enable_thinking": thinks}
        self._marks = _Marks(tuple(tokenizer.special_tokens))
        source = tokenizer.chat_template if template is None else template
        limits, values = TemplateLimits(max_output=max_output), _special_values(tokenizer)
        self._template = None if source is None else TemplateChild(source, limits, values)
        self._family = family_of(source or "")
        self._think = think_of(source or "")
        self._control = {name: id for name, id in tokenizer.special_tokens.items() if id in tokenizer.control}

    def check(self) -> None:
        """Raises UnusableTemplateError or TemplateLimitError for a template that no chat is possible with."""
        if self._template is not None:
            self._template.check()

    def close(self) -> None:
        """Ends the template's process; it starts again when it is needed."""
        if self._template is not None:
            self._template.close()

    def prompt(self, conversation: ChatPrompt, generate: bool = True) -> Prompt:
        """The ids of `conversation`, equal to those of Hugging Face's `apply_chat_template`.

        With `generate` the assistant's next message is begun, or the trailing one continued.

        Without a template the turns are written out as `User: ...` and `Assistant: ...`. Raises ChatTemplateError
        when the template refuses the conversation, also after system turns were folded and equal roles merged.
        """
        tokenizer = self._tokenizer
        rendered = self._rendered(conversation, generate)
        parts = self._marks.split(rendered.text)
        segments = [tokenizer.special_tokens[part] if n % 2 else self._marks.undo(part) for n, part in enumerate(parts)]
        ids = tokenizer.encode_segments([segment for segment in segments if segment != ""])
        reading = self._reading(conversation, rendered)
        goes_on = bool(conversation.messages) and conversation.messages[-1].role == "assistant"
        grammar = grammar_of(reading, self._control, self._think, goes_on=goes_on)
        if self._template is None:
            prefix = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
            return Prompt((*prefix, *ids), FALLBACK_STOP, reading, grammar)
        return Prompt(tuple(ids), (), reading, grammar)

    def render(self, conversation: ChatPrompt, generate: bool = True) -> str:
        """The conversation as a person may read it: the template's text with the client's own words put back."""
        return self._marks.undo(self._rendered(conversation, generate).text)

    def _rendered(self, conversation: ChatPrompt, generate: bool) -> Rendered:
        """The text, in which control tokens are only those of the template."""
        marks = self._marks
        messages = [_entry(turn, marks) for turn in conversation.messages]
        tools = [_description(tool, marks) for tool in conversation.usable_tools]
        if self._template is not None:
            has_extras = tools or any(message.keys() != {"role", "content"} for message in messages)
            caps = self._caps() if has_extras else NO_TOOLS
            chosen = {**self._values, **marks.hide_in(conversation.values)}
            return self._template.render(messages, chosen, generate, tools, caps)
        plain = plain_messages(messages, tools)
        turns = [_PLAIN_NAMES.get(message["role"], "") + message["content"] for message in plain]
        if generate and (not messages or messages[-1]["role"] != "assistant"):
            turns.append("Assistant:")
        return Rendered("\n\n".join(turns), bool(tools))

    def _caps(self) -> TemplateCaps:
        """What the template does with tools; it describes none where nobody could read how they are called then."""
        caps = NO_TOOLS if self._template is None else self._template.caps()
        return caps if self._family is not None else replace(caps, tools=False)

    def _reading(self, conversation: ChatPrompt, rendered: Rendered) -> Reading:
        """How the answer is written."""
        tools = conversation.usable_tools
        is_plain = rendered.has_plain_tools or self._family is None
        think, said = None if conversation.keeps_reasoning else self._think, rendered.text.rstrip()
        return Reading(
            family=PLAIN if is_plain or self._family is None else self._family.name,
            think=think,
            begins_thinking=think is not None and said.endswith(think[0].strip()),
            has_thought=self._think is not None and said.endswith(self._think[1].strip()),
            has_tools=bool(tools),
            texts={tool.name: text_parameters(tool) for tool in tools},
            has_short_ids=bool(tools) and self._caps().has_short_ids,
            must_call=conversation.tool_choice.mode == "required",
        )


class _Marks:
    """The control tokens' texts, and how they are hidden in a client's text and put back."""

    def __init__(self, special: tuple[str, ...]) -> None:
        names = sorted((name for name in special if name), key=len, reverse=True)
        # A vocabulary may hold runs of spaces as tokens of their own: those mean the same whoever wrote them.
        hidden = (*(name for name in names if not name.isspace()), _OPEN, _CLOSE, CONTINUED)
        heads = {name[n:] for name in names for n in range(1, len(name))}
        tails = {name[:n] for name in names for n in range(1, len(name))}
        edges = sorted((edge for edge in heads | tails if edge == edge.strip()), key=len, reverse=True)
        self._table = list(dict.fromkeys((*hidden, *edges)))
        self._index = {text: n for n, text in enumerate(self._table)}
        self._hidden = re.compile(_any_of(hidden))
        self._control = re.compile(f"({_any_of(names)})")
        # A part of a control token at the edge of a message could be completed by the template's text beside it.
        self._head = re.compile(rf"\A({_any_of([edge for edge in edges if edge in heads])})")
        self._last = re.compile(rf"({_any_of([edge for edge in edges if edge in tails])})(?=\s*\Z)")

    def hide(self, text: str) -> str:
        """`text` with every control token in it, or part of one at its edges, replaced by a placeholder."""
        text = self._last.sub(self._placeholder, self._hidden.sub(self._placeholder, text))
        begin = len(text) - len(text.lstrip())
        return text[:begin] + self._head.sub(self._placeholder, text[begin:])

    def hide_in(self, value: Any) -> Any:
        """A JSON value, with the control tokens in all of its texts replaced by placeholders."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, dict):
            return {self.hide(name): self.hide_in(inner) for name, inner in value.items()}
        return [self.hide_in(inner) for inner in value] if isinstance(value, list) else value

    def undo(self, text: str) -> str:
        """`text` with the placeholders replaced by what they stand for."""
        return _PLACEHOLDER.sub(lambda match: self._table[int(match[1])], text)

    def split(self, text: str) -> list[str]:
        """Texts at even places, control tokens at odd ones."""
        return self._control.split(text)

    def _placeholder(self, match: re.Match[str]) -> str:
        return f"{_OPEN}{self._index[match[0]]}{_CLOSE}"


def _any_of(texts: Sequence[str]) -> str:
    return "|".join(map(re.escape, texts)) or "(?!)"


def _special_values(tokenizer: Tokenizer) -> dict[str, Any]:
    bos, eos = tokenizer.bos, tokenizer.eos
    return {
        "bos_token": "" if bos is None else tokenizer.token_text(bos),
        "eos_token": "" if eos is None else tokenizer.token_text(eos),
        "documents": None,
    }


def _entry(turn: Turn, marks: _Marks) -> dict[str, Any]:
    """A turn as the forms of conversations are made of, in which control tokens are hidden."""
    extras = {"call_id": turn.call_id, "name": turn.name, "reasoning": turn.reasoning}
    entry: dict[str, Any] = {"role": turn.role, "content": marks.hide(turn.content)}
    entry |= {field: marks.hide(text) for field, text in extras.items() if text}
    return {**entry, "calls": [_call(call, marks) for call in turn.calls]} if turn.calls else entry


def _call(call: Call, marks: _Marks) -> dict[str, Any]:
    entry = {"id": marks.hide(call.id), "name": marks.hide(call.name), "arguments": marks.hide(call.arguments)}
    try:
        return {**entry, "value": marks.hide_in(json.loads(call.arguments))}
    except (ValueError, RecursionError):
        return entry


def _description(tool: Tool, marks: _Marks) -> dict[str, Any]:
    """A tool as OpenAI's API and Hugging Face's templates describe it."""
    schema = json.loads(tool.parameters) or {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": schema}
    return {"type": "function", "function": marks.hide_in(function)}
