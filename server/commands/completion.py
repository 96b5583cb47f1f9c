"""`slimoe completion`: the script that completes commands, flags and their values in a shell."""

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the script with which SHELL completes slimoe's commands, flags and values.

    \b
    bash:  slimoe completion bash >~/.local/share/bash-completion/completions/slimoe
    zsh:   slimoe completion zsh >~/.zfunc/_slimoe, where ~/.zfunc is in fpath
    fish:  slimoe completion fish >~/.config/fish/completions/slimoe.fish
    """
    maker = get_completion_class(shell)
    assert maker is not None
    click.echo(maker(ctx.find_root().command, {}, "slimoe", "_SLIMOE_COMPLETE").source())
