"""Flags that benches have in common: what is measured, how much of it, and whether beside other work."""

from pathlib import Path

import click

from bench.baselines.ik_llama_cpp import check_ik
from slimoe.offload.errors import UsageError
from slimoe.server.options.flag_group import flag_group

type_flag = click.option(
    "--type",
    "kind",
    metavar="TYPE[,EXPERTS]",
    help="Type of matrices, and of those of experts.  [default: Q4_K]",
)
_IK = "bench.ik"


def _note_ik(context: click.Context, option: click.Parameter, python: Path | None) -> None:
    if python is not None:
        try:
            check_ik(python)
        except UsageError as error:
            raise click.BadParameter(str(error), context, option) from None
    context.meta[_IK] = python


ik_flag = click.option(
    "--ik",
    type=click.Path(path_type=Path),
    metavar="PYTHON",
    callback=_note_ik,
    expose_value=False,
    help="Measure ik_llama.cpp too: a Python that has ik-llama-cpp-python.",
)
"""Leaves its value to `ik_python`."""


def ik_python() -> Path | None:
    """What --ik says in the command that is running, None without it."""
    python: Path | None = click.get_current_context().meta.get(_IK)
    return python


threads_flag = click.option("--threads", type=click.IntRange(1), help="[default: physical cores]")
run_flags = flag_group(
    click.option("--smoke", is_flag=True, help="Seconds only: shows that the bench works, measures nothing."),
    click.option("--allow-busy", is_flag=True, help="Measure although other processes use the cores."),
)
"""How much is measured, and whether beside other work."""
