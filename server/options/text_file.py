"""Flags whose value is a text in a file, read once and checked before anything starts."""

from pathlib import Path

import click

from slimoe.offload.files.regular_file import read_regular, reason


class TextFile(click.ParamType[str]):
    """A text of at most `most_bytes` by the name of its file; what it is stands in `name`."""

    most_bytes: int
    if_empty = ""
    """What to do instead of naming an empty file."""

    def text_of(
        self, path: Path, value: str, other: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        """The text at `path`; fails where there is none, and says with `other` what else `value` is not."""
        try:
            data = read_regular(path)
        except OSError as error:
            self.fail(f"{value!r} is {other}no file that can be read ({reason(error)}).", param, ctx)
        if len(data) > self.most_bytes:
            problem = f"The file {value} has {len(data):,} bytes, and a {self.name} at most {self.most_bytes:,}."
            self.fail(problem, param, ctx)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            self.fail(f"The file {value} is no text ({error}).", param, ctx)
        if not text.strip():
            self.fail(f"The file {value} is empty.{self.if_empty}", param, ctx)
        return text
