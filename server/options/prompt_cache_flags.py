"""The flags for prompts that are kept on disk. Apart: most commands that open a model answer no prompt twice."""

from pathlib import Path

import click

from slimoe.server.options.flag_group import SizeType, flag_group

prompt_cache_flags = flag_group(
    click.option(
        "--prompt-cache",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Keep in this folder what was computed of prompts, so that it need not be computed again after a restart "
        "(default: off).",
    ),
    click.option(
        "--prompt-cache-size",
        type=SizeType(),
        metavar="SIZE",
        help="Most bytes of --prompt-cache, such as 20GiB; what was used longest ago goes first (default: 4GiB).",
    ),
)
"""The folder of a prompt cache and its size, as a decorator of a command."""
