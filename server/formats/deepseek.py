"""DeepSeek's calls. Apart: each family of models has a file.

V3.1 writes a name and an object, V3 and R1 a kind, a name and an object in a block of code.
"""

import re

from slimoe.server.formats.marked_reader import MarkedReader, Waiting

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_HEAD = re.compile(r'(?:(?P<name>[^\n{`]+?)\s*```(?:json)?)?\s*(?=\{\s*["}])')


class DeepSeekReader(MarkedReader):
    """`<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>...`."""

    call_marks = (CALLS, CALL)

    def call(self, mark: str) -> Waiting[None]:
        """Reads calls up to the mark that closes them."""
        if mark == CALLS:
            is_call = yield from self.follows(CALL)
            if not is_call:
                self.say(mark)
                return
        is_call = True
        while is_call:
            first, end = yield from self.collected(SEPARATOR, CALL_END, CALLS_END)
            head = (yield from self.taken(_HEAD, CALL_END)) if end == SEPARATOR else None
            if head is None:
                body, last = (yield from self.collected(CALL_END, CALLS_END)) if end == SEPARATOR else ("", "")
                self.say(CALL + first + end + body + last)
            else:
                self.begin_call((head["name"] or first).strip())
                yield from self.json_object()
                stray, _ = yield from self.collected(CALL_END, CALLS_END)
                stray = stray.strip().removeprefix("```")
                self.say("" if self.is_over and stray in ("`", "``") else stray)
            is_call = yield from self.follows(CALL)
        yield from self.follows(CALLS_END)
