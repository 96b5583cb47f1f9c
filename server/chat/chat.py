"""Messages in, token ids out: the model's template, with the client's text kept apart from the model's own marks.

A message may contain `</s>` or `<|im_start|>` written out. Rendered into the template such text would be read as
the control token of that name, so every occurrence in a message is replaced by a placeholder before rendering, the
rendered text is split at the control tokens the template itself wrote, and only then are the placeholders undone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slimoe.offload.text.tokenizer import Tokenizer
from slimoe.server.chat.template_child import MAX_OUTPUT, TemplateChild, TemplateLimits
from slimoe.server.chat.template_messages import CONTINUED
from slimoe.server.messages import ChatPrompt

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_PLACEHOLDER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_PLAIN_NAMES = {"user": "User: ", "assistant": "Assistant: ", "tool": "Tool: "}
FALLBACK_STOP = ("\nUser:",)
"""What ends an answer of a model without a template, besides its own end token."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to read, and the strings that end the answer besides the model's own end token."""

    ids: tuple[int, ...]
    stop: tuple[str, ...] = ()


class Chat:
    """Builds prompts for one model."""

    def __init__(self, tokenizer: Tokenizer, max_output: int = MAX_OUTPUT) -> None:
        """The model's template is compiled when it is first used, in a process of its own.

        It may write `max_output` characters for a conversation.
        """
        self._tokenizer = tokenizer
        self._marks = _Marks(tuple(tokenizer.special_tokens))
        self._special_values = _special_values(tokenizer)
        source = tokenizer.chat_template
        self._template = None if source is None else TemplateChild(source, TemplateLimits(max_output=max_output))

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
        parts = self._marks.split(self._text(conversation, generate))
        segments = [tokenizer.special_tokens[part] if n % 2 else self._marks.undo(part) for n, part in enumerate(parts)]
        ids = tokenizer.encode_segments([segment for segment in segments if segment != ""])
        if self._template is None:
            prefix = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
            return Prompt((*prefix, *ids), FALLBACK_STOP)
        return Prompt(tuple(ids))

    def render(self, conversation: ChatPrompt, generate: bool = True) -> str:
        """The conversation as a person may read it: the template's text with the client's own words put back."""
        return self._marks.undo(self._text(conversation, generate))

    def _text(self, conversation: ChatPrompt, generate: bool) -> str:
        """The rendered text, in which control tokens are only those of the template."""
        messages = [{"role": turn.role, "content": self._marks.hide(turn.content)} for turn in conversation.messages]
        if self._template is not None:
            values = {**_hide_in(conversation.values, self._marks), **self._special_values}
            return self._template.render(messages, values, generate)
        turns = [_PLAIN_NAMES.get(message["role"], "") + message["content"] for message in messages]
        if generate and (not messages or messages[-1]["role"] != "assistant"):
            turns.append("Assistant:")
        return "\n\n".join(turns)


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
        "tools": None,
        "documents": None,
    }


def _hide_in(value: Any, marks: _Marks) -> Any:
    if isinstance(value, str):
        return marks.hide(value)
    if isinstance(value, dict):
        return {name: _hide_in(inner, marks) for name, inner in value.items()}
    return [_hide_in(inner, marks) for inner in value] if isinstance(value, list) else value
