"""The `slimoe` command: finds the command that was asked for and tells its errors in one line."""

import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from slimoe.offload.errors import SlimoeError
from slimoe.offload.files.regular_file import reason
from slimoe.server.telling import did_you_mean, one_line, tell

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

SECTIONS = {
    "Use a model": {
        "run": "Complete a prompt, or chat in the terminal.",
        "serve": "Serve a model over HTTP as OpenAI's API.",
        "launch": "Print a client's settings for the running server, or start it with them.",
    },
    "Make a model": {
        "calibrate": "Measure on texts what the layers and experts of a checkpoint do.",
        "convert": "Make a GGUF file of a checkpoint, quantised or compressed to a size.",
        "report": "Evaluate a file against the model that it was made of.",
    },
    "Look and measure": {
        "inspect": "Show what a model file or checkpoint holds.",
        "plan": "Say what a model would take or become, and how fast it would be, without loading it.",
        "eval": "Evaluate a model on tasks of lm-eval, within a budget of memory.",
        "bench": "Measure prompt and decoding speed of a model.",
        "doctor": "Say which ggml computes here, what this machine has, and what would make it faster.",
    },
    "Shell": {
        "completion": "Print the script that completes commands and flags in a shell.",
    },
}
"""The commands by what they are for."""
COMMANDS = {name: about for section in SECTIONS.values() for name, about in section.items()}
"""Each is `command` in `server/commands/NAME.py`, imported only when it is used."""
_NO_THREAD = "can't start new thread"
"""What Python says where the system refuses one, in a RuntimeError."""


class LazyGroup(click.Group):
    """A group that knows its commands by name and one line of help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, now imported; None for an unknown name. Raises ClickException where no command can run."""
        if cmd_name not in COMMANDS:
            return None
        if sys.platform == "win32":
            # Files are locked and read at offsets by calls that Windows lacks.
            raise click.ClickException("This program does not run on Windows itself. Install it inside WSL.")
        command = importlib.import_module(f"slimoe.server.commands.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is meant; raises UsageError, with similar names, for one that there is not."""
        name = args[0]
        if name not in COMMANDS and name[:1].isalnum() and not ctx.resilient_parsing:
            raise click.UsageError(f"No such command {name!r}.{did_you_mean(name, COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in the help, without importing any."""
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(list(commands.items()), col_max=max(map(len, COMMANDS)))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem]":
        """What the shell may complete a word to, without importing any command."""
        from click.shell_completion import CompletionItem

        found = [CompletionItem(name, help=COMMANDS[name]) for name in COMMANDS if name.startswith(incomplete)]
        return found or click.Command.shell_complete(self, ctx, incomplete)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="slimoe", prog_name="slimoe", message="%(prog)s %(version)s")
def cli() -> None:
    """Makes a big mixture-of-experts model small enough for this machine, and runs it here."""


def run(arguments: Sequence[str]) -> int:
    """Carries out a command line and returns its exit status; errors go to standard error, one line each."""
    try:
        status = cli.main(list(arguments), prog_name="slimoe", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        shown, words = io.StringIO(), error.format_message()
        error.show(shown)
        sys.stderr.write(shown.getvalue().replace(words, one_line(words)))
        return error.exit_code
    except SlimoeError as error:
        tell(f"slimoe: {' '.join(str(error).split())}")
        return error.exit_code
    except click.Abort:  # click has ended the line of ^C
        return 130
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except MemoryError:
        tell("slimoe: There is not enough memory. Use a smaller model or a smaller --ctx.")
        return 4
    except BrokenPipeError:
        # Whoever read the output has left; the interpreter must not try to flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        tell(f"slimoe: {where}{reason(error)}. Check the disk, permissions and limits (ulimit -a).")
        return 1
    except RuntimeError as error:
        if str(error) != _NO_THREAD:
            raise
        tell("slimoe: The system gives this program no further thread. Raise its limit (ulimit -u), or use fewer.")
        return 1
    return status if isinstance(status, int) else 0


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
