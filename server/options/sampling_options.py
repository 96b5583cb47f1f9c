"""The command-line flags that say how the next token is chosen. Apart: each subject's flags have a file here."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click
import msgspec

from slimoe.offload.text.generation import SamplingParams

_DEFAULTS = SamplingParams()

F = TypeVar("F", bound=Callable[..., Any])


def _number(flag: str, name: str, low: float, high: float | None, text: str) -> Callable[[F], F]:
    kind = click.FloatRange(low, high)
    return click.option(flag, name, type=kind, default=getattr(_DEFAULTS, name), show_default=True, help=text)


def _count(flag: str, name: str, low: int, text: str) -> Callable[[F], F]:
    kind = click.IntRange(min=low)
    return click.option(flag, name, type=kind, default=getattr(_DEFAULTS, name), show_default=True, help=text)


_FLAGS: tuple[Callable[[Any], Any], ...] = (
    _number("--temp", "temperature", 0, None, "Sampling temperature; 0 always takes the likeliest token."),
    _count("--top-k", "top_k", 0, "Sample among this many likeliest tokens; 0 is all."),
    _number("--top-p", "top_p", 0, 1, "Sample among the likeliest tokens of this total probability."),
    _number("--min-p", "min_p", 0, 1, "Leave out tokens below this share of the likeliest one's probability."),
    _number(
        "--repeat-penalty", "repeat_penalty", 0.01, None, "Above 1 makes recent tokens less likely; 1 changes nothing."
    ),
    _count("--repeat-last-n", "repeat_last_n", -1, "How many tokens count as recent; -1 is all."),
    _number("--presence-penalty", "presence_penalty", -2, 2, "Subtracted from the logits of recent tokens."),
    _number("--frequency-penalty", "frequency_penalty", -2, 2, "Subtracted once for each time that a token is recent."),
    click.option("--seed", type=int, help="Random seed, which makes answers repeatable."),
)


def sampling_flags(function: F) -> F:
    """Adds the flags to a command."""
    for flag in reversed(_FLAGS):
        function = flag(function)
    return function


def sampling_params(values: Mapping[str, Any]) -> SamplingParams:
    """The flags' values out of a command's."""
    return msgspec.convert(dict(values), SamplingParams)
