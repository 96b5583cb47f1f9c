"""Calls between `<tool_call>` and `</tool_call>`: of Hermes and Qwen as JSON, of Qwen3-Coder and others as fields.

This is also how models are asked to call whose chat template knows no tools.
"""

import json
import re

from slimoe.server.formats.marked_reader import MarkedReader, Waiting, as_calls, json_text, json_value

BEGIN, END = "<tool_call>", "</tool_call>"
_CALLS, _CALLS_END = "<minimax:tool_call>", "</minimax:tool_call>"
_INVOKE, _INVOKE_END, _PARAMETER = '<invoke name="', "</invoke>", '<parameter name="'
HEAD = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"(?P<name>(?:[^"\\]|\\.)*)"\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{\s*["}])'
)
"""A call as JSON, up to its arguments."""


class HermesReader(MarkedReader):
    """`<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>`, one after the other."""

    call_marks: tuple[str, ...] = (BEGIN,)

    def call(self, mark: str) -> Waiting[None]:
        """Reads the object between the tags."""
        while mark == BEGIN:
            head = yield from self.taken(HEAD, END)
            if head is None:
                body, mark = yield from self.collected(END, BEGIN)
                self.begin_whole(BEGIN + body + (mark if mark == END else ""), body)
            else:
                self.begin_call(json_text(head["name"]))
                yield from self.json_object()
                tail, mark = yield from self.collected(END, BEGIN)
                self.say_rest(tail)

    def begin_whole(self, written: str, body: str) -> None:
        """Tells the calls that stand in `body`, or says all that was written."""
        calls = as_calls(body)
        if not calls:
            self.say(written)
        for name, arguments in calls:
            self.begin_call(name)
            self.argue(arguments)

    def say_rest(self, tail: str) -> None:
        """Says what stands behind a call's arguments, unless it only ends the call's object, or would have."""
        if self.is_over and not tail.endswith("}") and tail.lstrip()[:1] in ("", ","):
            return
        try:
            json.loads('{"a":{}' + tail)
        except ValueError:
            self.say(tail.strip().removeprefix("}"))


class QwenCoderReader(HermesReader):
    """`<tool_call><function=weather><parameter=city>Paris</parameter></function></tool_call>`."""

    call_marks: tuple[str, ...] = (BEGIN, "<function=")

    def call(self, mark: str) -> Waiting[None]:
        """Reads a function and its parameters; a few models write JSON between the tags."""
        if mark == BEGIN:
            is_function = yield from self.follows("<function=")
            if not is_function:
                yield from super().call(mark)
                return
        name, end = yield from self.collected(">", "\n")
        if end != ">":
            self.say(f"<function={name}{end}")
            return
        self.begin_call(name)
        fields = _Fields(self, name)
        stray, end = yield from self.collected("<parameter=", "</function>", END)
        while end == "<parameter=":
            key, _ = yield from self.collected(">")
            yield from fields.read(key.strip(), ("\n</parameter>", "</parameter>"))
            stray, end = yield from self.collected("<parameter=", "</function>", END)
        if end:
            fields.close()
        if end == "</function>":
            yield from self.follows(END)
        self.say(stray.strip())


class GlmReader(HermesReader):
    """`<tool_call>weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>`."""

    def call(self, mark: str) -> Waiting[None]:
        """Reads a name, then keys and values."""
        while not self.buffer.lstrip() and not self.is_over:
            yield
        if self.buffer.lstrip().startswith("{"):
            yield from super().call(mark)
            return
        name, end = yield from self.collected("<arg_key>", END)
        if not re.fullmatch(r"\s*[^\s{}<>]+\s*", name) or not end:
            self.begin_whole(mark + name + end, name)
            return
        self.begin_call(name.strip())
        fields = _Fields(self, name.strip())
        while end == "<arg_key>":
            key, _ = yield from self.collected("</arg_key>")
            yield from self.follows("<arg_value>")
            yield from fields.read(key.strip(), ("</arg_value>",))
            stray, end = yield from self.collected("<arg_key>", END)
            self.say(stray.strip())
        if end:
            fields.close()


class MiniMaxReader(MarkedReader):
    """`<minimax:tool_call><invoke name="weather"><parameter name="city">Paris</parameter></invoke>...`."""

    call_marks: tuple[str, ...] = (_CALLS,)

    def call(self, mark: str) -> Waiting[None]:
        """Reads one call after the other, with their parameters, or with an object where a grammar asks for calls."""
        stray, end = yield from self.collected(_INVOKE, _CALLS_END)
        if end != _INVOKE:
            self.say(mark + stray + end)
            return
        while end == _INVOKE:
            self.say(stray.strip())
            name, is_whole = yield from self.collected('">')
            if not is_whole:
                self.say(f"{_INVOKE}{name}")
                return
            self.begin_call(name)
            while not self.buffer.lstrip() and not self.is_over:
                yield
            if self.buffer.lstrip().startswith("{"):
                self.buffer = self.buffer.lstrip()
                yield from self.json_object()
                stray, end = yield from self.collected(_INVOKE_END, _CALLS_END)
            else:
                stray, end = yield from self._fields(name)
            self.say(stray.strip())
            stray = ""
            if end == _INVOKE_END:
                stray, end = yield from self.collected(_INVOKE, _CALLS_END)
        self.say(stray.strip())

    def _fields(self, name: str) -> Waiting[tuple[str, str]]:
        """Reads parameters; returns what stands behind the last one, and the mark that ends the call."""
        fields = _Fields(self, name)
        stray, end = yield from self.collected(_PARAMETER, _INVOKE_END, _CALLS_END)
        while end == _PARAMETER:
            key, _ = yield from self.collected('">')
            yield from fields.read(key, ("</parameter>",))
            stray, end = yield from self.collected(_PARAMETER, _INVOKE_END, _CALLS_END)
        if end:
            fields.close()
        return stray, end


class _Fields:
    """Writes fields one by one as the JSON object of a call's arguments."""

    def __init__(self, reader: MarkedReader, tool: str) -> None:
        self._reader, self._tool = reader, tool
        self._n_fields = 0

    def read(self, key: str, ends: tuple[str, ...]) -> Waiting[None]:
        """Reads a value up to one of `ends`; a text is told as it comes, without the line break at its beginning."""
        reader = self._reader
        reader.argue(("{" if self._n_fields == 0 else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
        self._n_fields += 1
        if not reader.is_text(self._tool, key):
            value, _ = yield from reader.collected(*ends)
            reader.argue(json_value(value.removeprefix("\n")))
            return
        reader.argue('"')
        while not reader.buffer and not reader.is_over:
            yield
        reader.buffer = reader.buffer.removeprefix("\n")
        yield from reader.until(ends, lambda text: reader.argue(json.dumps(text, ensure_ascii=False)[1:-1]))
        reader.argue('"')

    def close(self) -> None:
        """Ends the object."""
        self._reader.argue("}" if self._n_fields else "{}")
