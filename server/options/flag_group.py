"""Adds several command-line flags to a command at once."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


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
