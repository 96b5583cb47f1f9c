"""A process that does nothing but render one chat template: a stranger's program, which may be killed at any time.

It limits itself: the kernel ends it when one conversation takes too much processor time, and refuses memory past a
bound. Whoever started it watches the clock. It holds no key, no model and no connection. The first message has the
template and its limits, each further one a conversation, or asks what the template does with tools. Run as
`python -m slimoe.server.chat.template_process`.
"""

import sys
from dataclasses import asdict
from typing import Any, BinaryIO

from slimoe.offload.resources.process_limits import limit_memory, limit_time
from slimoe.server.chat.template import ChatTemplate
from slimoe.server.chat.template_error import ChatTemplateError, TemplateLimitError, UnusableTemplateError
from slimoe.server.chat.template_forms import Conversation, render_conversation
from slimoe.server.chat.template_messages import HEADER_BYTES, TemplateCaps, packed, unpacked
from slimoe.server.chat.template_probe import TemplateProbe


class TemplateProcess:
    """Compiles the template that the first message holds, then tries it or renders conversations, one by one."""

    def __init__(self, stdin: BinaryIO, stdout: BinaryIO) -> None:
        self._stdin, self._stdout = stdin, stdout

    def run(self) -> None:
        """Until the other side closes the pipe, or memory was short."""
        setup = self._message(self._stdin.read(HEADER_BYTES))
        limit_time(setup["compile_seconds"])
        limit_memory(setup["memory_bytes"])
        try:
            template = ChatTemplate(setup["source"], setup["max_output"])
            self._answer({"ready": True})
            while header := self._stdin.read(HEADER_BYTES):
                limit_time(setup["cpu_seconds"])
                self._answer(_rendered(template, self._message(header)))
        except UnusableTemplateError as error:
            self._answer({"unusable": error.reason})
        except MemoryError:
            # What the template held was let go of on the way here.
            self._answer({"limit": f"{setup['memory_bytes'] >> 20} MiB of memory"})

    def _message(self, header: bytes) -> dict[str, Any]:
        return unpacked(self._stdin.read(int.from_bytes(header, "big")))

    def _answer(self, message: dict[str, Any]) -> None:
        self._stdout.write(packed(message))
        self._stdout.flush()
        limit_time(0)


def _rendered(template: ChatTemplate, request: dict[str, Any]) -> dict[str, Any]:
    try:
        if "probed" in request:
            return asdict(TemplateProbe(template, request["probed"]).caps())
        caps = TemplateCaps(**request.pop("caps"))
        return render_conversation(template, Conversation(**request), caps)._asdict()
    except TemplateLimitError as error:
        return {"limit": error.limit}
    except ChatTemplateError as error:
        return {"refused": str(error)}


def main() -> None:
    """The process's whole life."""
    try:
        TemplateProcess(sys.stdin.buffer, sys.stdout.buffer).run()
    except BrokenPipeError:
        sys.stdout = None  # nobody is left to flush it for


if __name__ == "__main__":
    main()
