"""gpt-oss's format, harmony. Apart: each family of models has a file.

Messages go to the channels analysis, commentary and final, calls to `functions.NAME`.
"""

import re

from slimoe.server.formats.marked_reader import MarkedReader, Waiting

CHANNEL, MESSAGE, START = "<|channel|>", "<|message|>", "<|start|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", START, CHANNEL)
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
_OBJECT = re.compile(r'\s*(?=\{\s*["}])')


class HarmonyReader(MarkedReader):
    """`<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.weather ...`."""

    def answer(self) -> Waiting[None]:
        """Reads one message; text that no header comes before is said."""
        is_addressed = yield from self.follows("to=")
        mark = "to=" if is_addressed else (yield from self.until((START, CHANNEL, MESSAGE, "<|end|>"), self.say))
        while mark in ("to=", START, CHANNEL):
            header, message = yield from self.collected(MESSAGE)
            if not message:
                self.say(header if mark == "to=" else "")
                return
            mark = yield from self._message(mark + header)

    def _message(self, header: str) -> Waiting[str]:
        """Reads a message's body; returns what ends it."""
        recipient = _RECIPIENT.search(header)
        if recipient is not None and self.reading.has_tools:
            is_object = yield from self.taken(_OBJECT, "<|")
            if is_object is not None:
                self.begin_call(recipient[1])
                yield from self.json_object()
                stray, end = yield from self.collected(*_ENDS)
            else:
                stray, end = yield from self.collected(*_ENDS)
                if not stray.strip():
                    self.begin_call(recipient[1])
                    self.argue("{}")
            self.say(stray.strip())
            return end
        is_thought = f"{CHANNEL}analysis" in header
        last = yield from self.until(_ENDS, self.reason if is_thought and self.reading.think else self.say)
        if is_thought and not self.reading.think:
            self.say("\n\n")
        return last or ""
