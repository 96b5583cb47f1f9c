"""The flag `--chat-template`: a template by its name, or in a file, in place of the model's own."""

from pathlib import Path
from typing import Any

import click

from slimoe.offload.files.regular_file import read_regular, reason

_FOLDER = Path(__file__).parents[1] / "chat" / "templates"
PLAIN = "plain"
"""No template: turns are written out as `User: ...` and `Assistant: ...`."""
NAMES = (*sorted(path.stem for path in _FOLDER.glob("*.jinja")), PLAIN)
MAX_BYTES = 1 << 20


class ChatTemplate(click.ParamType[str]):
    """A built-in template by its name, or a Jinja file; its value is the template's text, empty for none."""

    name = "template"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Gives the template's text."""
        if value == PLAIN:
            return ""
        path = _FOLDER / f"{value}.jinja" if value in NAMES else Path(value)
        try:
            data = read_regular(path)
        except OSError as error:
            names = ", ".join(NAMES)
            self.fail(f"{value!r} is none of {names}, and no file that can be read ({reason(error)}).", param, ctx)
        if len(data) > MAX_BYTES:
            self.fail(f"The file {value} has {len(data):,} bytes, and a template at most {MAX_BYTES:,}.", param, ctx)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            self.fail(f"The file {value} is no text ({error}).", param, ctx)
        if not text.strip():
            self.fail(f"The file {value} is empty. {PLAIN} is the name for no template.", param, ctx)
        return text


template_flag = click.option(
    "--chat-template",
    type=ChatTemplate(),
    metavar="NAME|FILE",
    help=f"Chat template to use in place of the model's: {', '.join(NAMES)}, or a Jinja file.",
)
