"""Memory that commands take beside the engine's process, the same figure for whoever asks."""

_FRONT_BYTES = 56 << 20
"""The process that speaks HTTP, before the first request."""
IN_FLIGHT_BYTES = 12 << 20
"""The bodies of all requests in progress: sixty prompts of 200 kB."""
_BODIES_BYTES = 4 * IN_FLIGHT_BYTES
"""A body is there as it came, as text, as a message to the engine's process, and in the pipe to it."""
TEMPLATE_BYTES = 70 << 20
"""The process that renders chat templates: 21 MiB as it starts, and what a template may take, see `TemplateLimits`."""
_ORDINARY_TEMPLATE_BYTES = 24 << 20
"""The same process with a template that does no more than to write a conversation out."""


def serving_bytes() -> int:
    """What the other processes of `slimoe serve` take at most, all together."""
    return _FRONT_BYTES + _BODIES_BYTES + TEMPLATE_BYTES


def running_bytes() -> int:
    """What the other process of `slimoe run` takes, where nobody but the person at the terminal chats."""
    return _ORDINARY_TEMPLATE_BYTES
