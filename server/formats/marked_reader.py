"""Reads answers in which marks, such as `<think>`, tell reasoning and calls from what is said.

A family's reader is written as if the whole answer were there: a generator that yields where it needs more of it. Marks
may so be split at any place. What does not look like a call after all is said as it was written; a call whose end does
not come keeps the arguments that did.
"""

import json
import re
import uuid
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import msgspec

from slimoe.server.formats.answer_reader import CallDelta, Parts
from slimoe.server.messages import Reading

T = TypeVar("T")
Waiting = Generator[None, None, T]
_ESCAPED = '"\\/bfnrtu'
MAX_HEAD = 1024
"""Characters in which a call must name its tool for its arguments to be told as they come."""


class MarkedReader:
    """Base of the readers: what has come, what was found in it, and the steps that families are made of."""

    call_marks: tuple[str, ...] = ()
    """What begins a call."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.buffer = ""
        self.is_over = False
        self._parts: list[Parts] = []
        self._n_calls = 0
        self._kind, self._blanks = "text", ""
        self._is_after_mark = self._is_in_call = False
        self._steps = self._read()
        next(self._steps)

    def feed(self, text: str) -> Parts:
        """Takes a piece and returns what can be told; what may begin a mark is held back."""
        self.buffer += text
        next(self._steps)
        return self._told()

    def finish(self) -> Parts:
        """Returns what was held back, once no more text comes."""
        self.is_over = True
        next(self._steps)
        if self._kind == "text":
            self._parts.append(Parts(self._blanks))
        return self._told()

    def _read(self) -> Waiting[None]:
        if self.reading.begins_thinking:
            yield from self.thought()
        while not self.is_over or self.buffer:
            self._is_in_call = False
            yield from self.answer()
        yield

    def _told(self) -> Parts:
        parts, self._parts = self._parts, []
        return Parts(
            "".join(part.text for part in parts),
            "".join(part.reasoning for part in parts),
            tuple(delta for part in parts for delta in part.calls),
        )

    # --- what families say otherwise -----------------------------------------------------------------------

    def answer(self) -> Waiting[None]:
        """Reads text up to the next mark, and what that mark begins."""
        think = self.reading.think or ("",)
        mark = yield from self.until([mark for mark in (*self._marks, think[0]) if mark], self.say)
        if mark == think[0]:
            yield from self.thought()
        elif mark is not None:
            yield from self.call(mark)

    def call(self, mark: str) -> Waiting[None]:
        """Reads the call that `mark` has begun."""
        raise NotImplementedError

    def thought(self) -> Waiting[None]:
        """Reads reasoning to its end, or to a call that is made in the midst of it."""
        assert self.reading.think is not None
        _, end = self.reading.think
        self._turn_to("reasoning")
        mark = yield from self.until((end, *self._marks), self.reason)
        self._turn_to("text")
        if mark is not None and mark != end:
            yield from self.call(mark)

    @property
    def _marks(self) -> tuple[str, ...]:
        return self.call_marks if self.reading.has_tools else ()

    # --- telling -------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Adds to the text, if there may be one."""
        if not self.reading.must_call:
            self._add("text", text)

    def reason(self, text: str) -> None:
        """Adds to the reasoning."""
        self._add("reasoning", text)

    def begin_call(self, name: str) -> None:
        """Begins a call, under a new id."""
        self._turn_to("text")
        self._is_in_call = True
        # Some templates take ids of nine letters and digits only.
        id = uuid.uuid4().hex[:9] if self.reading.has_short_ids else f"call_{uuid.uuid4().hex[:24]}"
        self._parts.append(Parts(calls=(CallDelta(self._n_calls, id, name),)))
        self._n_calls += 1

    def argue(self, arguments: str) -> None:
        """Adds to the arguments of the last call."""
        if arguments:
            self._parts.append(Parts(calls=(CallDelta(self._n_calls - 1, arguments=arguments),)))

    def is_text(self, tool: str, parameter: str) -> bool:
        """Whether a tool's parameter is a text, whatever it looks like."""
        return parameter in self.reading.texts.get(tool, ())

    def _turn_to(self, kind: str) -> None:
        """Blanks around a mark belong to the mark and are dropped."""
        self._kind, self._blanks, self._is_after_mark = kind, "", True

    def _add(self, kind: str, text: str) -> None:
        """Blanks at the end are held back, for a mark may follow."""
        if kind != self._kind:
            self._turn_to(kind)
        text = self._blanks + text
        if self._is_after_mark:
            text = text.lstrip()
            self._is_after_mark = not text
        told = text.rstrip()
        self._blanks = text[len(told) :]
        if told:
            self._parts.append(Parts(told) if kind == "text" else Parts(reasoning=told))

    # --- steps ---------------------------------------------------------------------------------------------

    def until(self, marks: Sequence[str], tell: Callable[[str], None]) -> Waiting[str | None]:
        """Tells all up to the first of `marks` and takes that; None at the end of the answer."""
        pattern = re.compile("|".join(map(re.escape, marks)) or "(?!)")
        while True:
            found = pattern.search(self.buffer)
            end = len(self.buffer) if found is None else found.start()
            if found is None and (self._is_in_call or not self.is_over):
                longest = max(map(len, marks), default=1) - 1
                edges = (
                    n for n in range(min(longest, end), 0, -1) if any(m.startswith(self.buffer[-n:]) for m in marks)
                )
                end -= next(edges, 0)
            tell(self.buffer[:end])
            self.buffer = "" if found is None and self.is_over else self.buffer[end if found is None else found.end() :]
            if found is not None or self.is_over:
                return None if found is None else found[0]
            yield

    def collected(self, *marks: str) -> Waiting[tuple[str, str]]:
        """Takes all up to the first of `marks`, and that, which is empty at the end of the answer; tells nothing."""
        taken: list[str] = []
        mark = yield from self.until(marks, taken.append)
        return "".join(taken), mark or ""

    def taken(self, pattern: "re.Pattern[str]", stop: str) -> Waiting["re.Match[str] | None"]:
        """Takes what the buffer begins with once that matches; None when it never will, or `stop` comes before."""
        while True:
            found = pattern.match(self.buffer)
            # What matches up to the very end may go on with what comes.
            if found is not None and (found.end() < len(self.buffer) or self.is_over):
                self.buffer = self.buffer[found.end() :]
                return found
            if self.is_over or len(self.buffer) > MAX_HEAD or stop in self.buffer:
                return None
            yield

    def follows(self, literal: str) -> Waiting[bool]:
        """Takes `literal`, with blanks before it, if that comes next."""
        while True:
            rest = self.buffer.lstrip()
            if rest.startswith(literal):
                self.buffer = rest[len(literal) :]
                return True
            if self.is_over or not literal.startswith(rest):
                if self._is_in_call and literal.startswith(rest):
                    self.buffer = ""
                return False
            yield

    def json_object(self) -> Waiting[None]:
        """Tells a JSON object as arguments while it comes, up to the bracket that closes it."""
        depth, is_text = 0, False
        while True:
            told: list[str] = []
            at = 0
            while at < len(self.buffer):
                char = self.buffer[at]
                if is_text and char == "\\":
                    if at + 1 == len(self.buffer):
                        break
                    char += self.buffer[at + 1]
                    if char[1] not in _ESCAPED:
                        told.append("\\")
                elif char == '"':
                    is_text = not is_text
                elif not is_text:
                    depth += (char in "{[") - (char in "}]")
                elif char < " ":
                    # Models write line breaks in texts as they are, which JSON does not allow.
                    told.append(json.dumps(char)[1:-1])
                    at += 1
                    continue
                told.append(char)
                at += len(char)
                if depth == 0:
                    break
            self.argue("".join(told))
            self.buffer = self.buffer[at:]
            if depth > 0 and self.is_over:
                self.buffer = ""
            if depth == 0 or self.is_over:
                return
            yield


def json_value(text: str) -> str:
    """A value as JSON: as it stands if it is that, else as a text."""
    try:
        msgspec.json.decode(text.strip())
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return text.strip()


def json_text(text: str) -> str:
    """What stands between the quotes of a JSON text."""
    try:
        value: str = json.loads(f'"{text}"')
    except ValueError:
        return text
    return value


def as_calls(body: str) -> list[tuple[str, str]]:
    """The names and arguments of calls written as JSON objects, in whichever order of fields; none if it is no call."""
    try:
        value = json.loads(body, strict=False, parse_constant=str)
    except (ValueError, RecursionError):
        return []
    calls = []
    for one in value if isinstance(value, list) else [value]:
        name = one.get("name") if isinstance(one, dict) else None
        arguments = one.get("arguments", one.get("parameters", {})) if isinstance(one, dict) else None
        if isinstance(arguments, str):
            arguments = json.loads(json_value(arguments))
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return []
        calls.append((name, json.dumps(arguments, ensure_ascii=False)))
    return calls
