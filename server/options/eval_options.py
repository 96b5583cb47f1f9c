"""The command-line flags that say on which texts a compressed model is evaluated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from slimoe.converter.forward.texts import TextFile
from slimoe.offload.errors import ModelFileError
from slimoe.offload.files.regular_file import open_regular, reason
from slimoe.server.options.flag_group import flag_group

DEFAULT_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """The flags' values.

    `texts` are FILE or DOMAIN=FILE; without any, the built-in mixture's evaluation part is taken. `device` is auto or a
    name that torch knows. `n_threads` are for the engine that writes texts, None for its own choice.
    """

    texts: tuple[str, ...] = ()
    n_tokens: int = DEFAULT_TOKENS
    device: str = "auto"
    n_threads: int | None = None


eval_flags = flag_group(
    click.option(
        "--eval-text",
        "eval_texts",
        metavar="[NAME=]FILE",
        multiple=True,
        help="Text to evaluate on, best one that was not used to calibrate. Repeatable.",
    ),
    click.option(
        "--eval-tokens",
        type=click.IntRange(min=64),
        default=DEFAULT_TOKENS,
        show_default=True,
        help="Most tokens to evaluate on.",
    ),
)
"""The flags that say on which texts to evaluate, as a decorator of a command."""


def eval_options(values: Mapping[str, Any], device: str = "auto") -> EvalOptions:
    """The flags' values out of a command's; raises ModelFileError for a file that is absent, before any long work."""
    for text in values["eval_texts"]:
        path = TextFile.parse(text).path
        try:
            open_regular(path).close()
        except FileNotFoundError:
            raise ModelFileError(path, "there is no file of this name.", "Name a text file with --eval-text.") from None
        except OSError as error:
            raise ModelFileError(path, f"the text cannot be read ({reason(error)}).") from None
    return EvalOptions(values["eval_texts"], values["eval_tokens"], device, values["threads"])
