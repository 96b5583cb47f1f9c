"""Flags that benches have in common: what is measured, how much of it, and whether beside other work."""

import click

from slimoe.server.options.flag_group import flag_group

type_flag = click.option(
    "--type",
    "kind",
    metavar="TYPE[,EXPERTS]",
    help="Type of matrices, and of those of experts.  [default: Q4_K]",
)
threads_flag = click.option("--threads", type=click.IntRange(1), help="[default: physical cores]")
run_flags = flag_group(
    click.option("--smoke", is_flag=True, help="Seconds only: shows that the bench works, measures nothing."),
    click.option("--allow-busy", is_flag=True, help="Measure although other processes use the cores."),
)
"""How much is measured, and whether beside other work."""
