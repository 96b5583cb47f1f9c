"""Adds several command-line flags to a command at once."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import click

from slimoe.offload.resources.memory import parse_bytes

F = TypeVar("F", bound=Callable[..., Any])


class BareType(click.ParamType[bool | str]):
    """The type of a flag that may stand alone, with the value `bare`, where what follows is none that it `takes`."""

    bare: str

    def takes(self, text: str) -> bool:
        """Whether the text is the flag's value."""
        raise NotImplementedError


class SizeType(click.ParamType[int]):
    """A number of bytes as people write it, such as 12GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Gives the number of bytes."""
        n_bytes = parse_bytes(str(value))
        if not n_bytes:
            self.fail(f"{value!r} is no size. Write one like 12GiB or 500MB.", param, ctx)
        return n_bytes


def with_bare_values(command: click.Command, args: Sequence[str]) -> list[str]:
    """Arguments in which each flag of a `BareType` has a value."""
    kinds = {name: param.type for param in command.params if isinstance(param.type, BareType) for name in param.opts}
    found = []
    for arg, following in pairwise([*args, ""]):
        kind = kinds.get(arg)
        found.append(arg if kind is None or kind.takes(following) else f"{arg}={kind.bare}")
    return found


class FlagGroup(Protocol):
    """A decorator of a command's function."""

    def __call__(self, function: F) -> F:
        """Adds the flags to the command."""


def flag_group(*flags: Callable[[Any], Any]) -> FlagGroup:
    """A decorator that adds all `flags`, made by click.option or click.argument, in the order of the help page."""

    def add(function: F) -> F:
        for flag in reversed(flags):
            function = flag(function)
        return function

    return add
