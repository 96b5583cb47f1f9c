"""Gemma 4's calls. Apart: each family of models has a file.

Their values are not quite JSON: `<|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|>`.
"""

import json
import re

from slimoe.server.formats.marked_reader import MarkedReader, Waiting, json_value

BEGIN, END, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_HEAD = re.compile(r"\s*call:(?P<name>[^\s{}]+)\s*(?=\{)")
_OPENING = re.compile(r"(?=\{\s*(?P<first>\S))")
_JSON_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_WORD = re.compile(r"[^,:{}\[\]<]+")


class Gemma4Reader(MarkedReader):
    """Keys stand without quotes, texts between marks of their own."""

    call_marks = (BEGIN,)

    def call(self, mark: str) -> Waiting[None]:
        """Reads a name and an object."""
        head = yield from self.taken(_HEAD, END)
        if head is None:
            body, end = yield from self.collected(END)
            self.say(mark + body + end)
            return
        self.begin_call(head["name"])
        opening = yield from self.taken(_OPENING, END)
        if opening is not None and opening["first"] in '"}':
            # JSON, as a grammar has calls written.
            yield from self.json_object()
        else:
            yield from self._object()
        stray, _ = yield from self.collected(END)
        self.say(stray.strip())

    def _object(self) -> Waiting[None]:
        """Tells the object as JSON."""
        opened: list[str] = []
        while True:
            is_text = yield from self.follows(QUOTE)
            self.buffer = self.buffer.lstrip()
            if is_text:
                self.argue('"')
                yield from self.until((QUOTE,), lambda text: self.argue(json.dumps(text, ensure_ascii=False)[1:-1]))
                self.argue('"')
            elif not self.buffer:
                return
            elif self.buffer[0] == '"':
                text = yield from self.taken(_JSON_TEXT, END)
                if text is None:
                    return
                self.argue(text[0])
            elif self.buffer[0] in ",:{}[]":
                char, self.buffer = self.buffer[0], self.buffer[1:]
                self.argue(f"{char} " if char in ",:" else char)
                if char in "{[":
                    opened.append(char)
                elif char in "}]":
                    opened.pop()
                    if not opened:
                        return
            else:
                word = yield from self.taken(_WORD, END)
                if word is None:
                    return
                is_key = self.buffer.startswith(":") and opened[-1] == "{"
                written = word[0].strip()
                self.argue(json.dumps(written, ensure_ascii=False) if is_key else json_value(written))
