"""The flag `--chat-template`: a template by its name, or in a file, in place of the model's own."""

from pathlib import Path
from typing import Any

import click

from slimoe.server.options.text_file import TextFile

_FOLDER = Path(__file__).parents[1] / "chat" / "templates"
PLAIN = "plain"
"""No template: turns are written out as `User: ...` and `Assistant: ...`."""
NAMES = (*sorted(path.stem for path in _FOLDER.glob("*.jinja")), PLAIN)


class ChatTemplate(TextFile):
    """A built-in template by its name, or a Jinja file; its value is the template's text, empty for none."""

    name = "template"
    most_bytes = 1 << 20
    if_empty = f" {PLAIN} is the name for no template."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Gives the template's text."""
        if value == PLAIN:
            return ""
        path = _FOLDER / f"{value}.jinja" if value in NAMES else Path(value)
        return self.text_of(path, value, f"none of {', '.join(NAMES)}, and ", param, ctx)


template_flag = click.option(
    "--chat-template",
    type=ChatTemplate(),
    metavar="NAME|FILE",
    help=f"Chat template to use in place of the model's: {', '.join(NAMES)}, or a Jinja file.",
)
