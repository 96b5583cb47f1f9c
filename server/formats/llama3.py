"""Llama 3's calls. Apart: each family of models has a file.

They are an answer that is a JSON object with a name and parameters, or one behind `<|python_tag|>`.
"""

from slimoe.server.formats.marked_reader import Waiting, json_text
from slimoe.server.formats.tagged_calls import HEAD, HermesReader
from slimoe.server.messages import Reading

TAG = "<|python_tag|>"


class Llama3Reader(HermesReader):
    """`{"name": "weather", "parameters": {"city": "Paris"}}`, several with `;` between."""

    call_marks: tuple[str, ...] = (TAG,)

    def __init__(self, reading: Reading) -> None:
        self._is_at_start = reading.has_tools
        super().__init__(reading)

    def answer(self) -> Waiting[None]:
        """Reads a call at the answer's beginning, where no mark tells of it; else text."""
        while self._is_at_start and not self.buffer.lstrip() and not self.is_over:
            yield
        if self._is_at_start and self.buffer.lstrip().startswith("{"):
            self._is_at_start = False
            yield from self.call("")
        self._is_at_start = False
        yield from super().answer()

    def thought(self) -> Waiting[None]:
        """Reads reasoning, behind which the answer begins."""
        yield from super().thought()
        self._is_at_start = self.reading.has_tools

    def call(self, mark: str) -> Waiting[None]:
        """Reads calls of tools that there are; any other object is said."""
        while True:
            head = yield from self.taken(HEAD, TAG)
            name = "" if head is None else json_text(head["name"])
            if head is None or name not in self.reading.texts:
                self.say(mark + ("" if head is None else head[0]))
                return
            self.begin_call(name)
            yield from self.json_object()
            yield from self.follows("}")
            yield from self.follows(";")
            is_tagged = yield from self.follows(TAG)
            mark = TAG if is_tagged else ""
            if not self.buffer.lstrip().startswith("{"):
                return
