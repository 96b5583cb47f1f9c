"""Mistral's calls. Apart: each family of models has a file.

`[TOOL_CALLS]` stands before a JSON array, or before a name, `[ARGS]` and an object.
"""

import re

from slimoe.server.formats.marked_reader import Waiting, json_text
from slimoe.server.formats.tagged_calls import HEAD, HermesReader

BEGIN = "[TOOL_CALLS]"
_NAMED = re.compile(r"\s*(?P<name>[^\s\[\]{}]+)\s*(?:\[CALL_ID\]\s*[^\[]*)?(?:\[ARGS\])?\s*(?=\{)")


class MistralReader(HermesReader):
    """`[TOOL_CALLS][{"name": "weather", "arguments": {}}]` and `[TOOL_CALLS]weather[ARGS]{}`, with `[THINK]`."""

    call_marks: tuple[str, ...] = (BEGIN,)

    def call(self, mark: str) -> Waiting[None]:
        """Reads an array of calls, or one call."""
        is_array = yield from self.follows("[")
        if is_array:
            yield from self._array()
            return
        head = yield from self.taken(_NAMED, BEGIN)
        if head is None:
            body, end = yield from self.collected(BEGIN)
            self.begin_whole(mark + body, body)
            if end:
                yield from self.call(end)
        else:
            self.begin_call(head["name"])
            yield from self.json_object()

    def _array(self) -> Waiting[None]:
        """Reads calls up to the bracket that closes them."""
        is_first = True
        while True:
            head = yield from self.taken(HEAD, BEGIN)
            if head is None:
                body, end = yield from self.collected(BEGIN)
                self.begin_whole((BEGIN + "[" if is_first else "") + body, "[" + body)
                if end:
                    yield from self.call(end)
                return
            self.begin_call(json_text(head["name"]))
            yield from self.json_object()
            tail, closing = yield from self.collected("}")
            self.say_rest(tail + closing)
            is_first = False
            is_more = yield from self.follows(",")
            if not is_more:
                yield from self.follows("]")
                return
