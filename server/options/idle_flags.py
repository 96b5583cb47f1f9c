"""Refuses flags that would do nothing beside the others, so that nobody waits for what they ask for in vain."""

from collections.abc import Iterable

import click
from click.core import ParameterSource

from slimoe.offload.errors import UsageError


def refuse_idle(names: Iterable[str], why: str) -> None:
    """Raises UsageError if one of these parameters was given on the command line that is carried out.

    `why` follows the flag's name, as a sentence with advice. What a flag switches off is off: --no-report is never
    refused. Without a command line nothing is.
    """
    context = click.get_current_context(silent=True)
    if context is None:
        return
    flags = {param.name: max(param.opts, key=len) for param in context.command.params}
    for name in names:
        is_given = name in flags and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if is_given and context.params.get(name) is not False:
            raise UsageError(f"{flags[name]} {why}")
