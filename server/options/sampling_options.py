"""The command-line flags that say how the next token is chosen. Apart: each subject's flags have a file here."""

from collections.abc import Callable, Mapping
from typing import Any

import click
import msgspec

from slimoe.offload.text.generation import SamplingParams
from slimoe.server.options.flag_group import flag_group

_DEFAULTS = SamplingParams()


def _flag(flag: str, kind: click.ParamType[Any], text: str, name: str | None = None) -> Callable[[Any], Any]:
    name = name or flag.removeprefix("--").replace("-", "_")
    return click.option(flag, name, type=kind, default=getattr(_DEFAULTS, name), show_default=True, help=text)


sampling_flags = flag_group(
    _flag("--temp", click.FloatRange(0), "Sampling temperature; 0 always takes the likeliest token.", "temperature"),
    _flag("--top-k", click.IntRange(0), "Sample among this many likeliest tokens; 0 is all."),
    _flag("--top-p", click.FloatRange(0, 1), "Sample among the likeliest tokens of this total probability."),
    _flag("--min-p", click.FloatRange(0, 1), "Leave out tokens below this share of the likeliest one's probability."),
    _flag("--repeat-penalty", click.FloatRange(0.01), "Above 1 makes recent tokens less likely; 1 changes nothing."),
    _flag("--repeat-last-n", click.IntRange(-1), "How many tokens count as recent; -1 is all."),
    _flag("--presence-penalty", click.FloatRange(-2, 2), "Subtracted from the logits of recent tokens."),
    _flag("--frequency-penalty", click.FloatRange(-2, 2), "Subtracted once for each time that a token is recent."),
    click.option("--seed", type=int, help="Random seed, which makes answers repeatable."),
)
"""The flags that say how to choose tokens, as a decorator of a command."""


def sampling_params(values: Mapping[str, Any]) -> SamplingParams:
    """The flags' values out of a command's."""
    return msgspec.convert(dict(values), SamplingParams)
