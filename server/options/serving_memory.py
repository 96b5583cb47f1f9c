"""Memory that commands take beside the engine's process, the same figure for whoever asks."""

_FRONT_BYTES = 66 << 20
"""The process that speaks HTTP, before the first large request: 64 MiB after every dialect and page was asked for."""
IN_FLIGHT_BYTES = 12 << 20
"""The bodies of all requests in progress: sixty prompts of 200 kB."""
_BODIES_BYTES = 4 * IN_FLIGHT_BYTES
"""A body is there as it came, as text, as a message to the engine's process, and in the pipe to it."""
TEMPLATE_BYTES = 70 << 20
"""The process that renders chat templates: 21 MiB as it starts, and what a template may take, see `TemplateLimits`."""
_GRAMMAR_BYTES = 72 << 20
"""The process that holds answers to grammars: 24 MiB, and what one grammar may take, see `GrammarLimits`, or many of
usual size together."""
_ORDINARY_TEMPLATE_BYTES = 24 << 20
"""The same process with a template that does no more than to write a conversation out."""


def serving_bytes() -> int:
    """What the other processes of `slimoe serve` take at most, all together."""
    return _FRONT_BYTES + _BODIES_BYTES + TEMPLATE_BYTES + _GRAMMAR_BYTES


def running_bytes() -> int:
    """What the other process of `slimoe run` takes, where nobody but the person at the terminal chats."""
    return _ORDINARY_TEMPLATE_BYTES
