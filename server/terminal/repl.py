"""The interactive chat: a person types, the model answers, and the conversation is kept."""

import contextlib
import sys

import click

from slimoe.offload.engine import Engine
from slimoe.offload.errors import ContextOverflowError
from slimoe.offload.text.generation import GenerationRequest
from slimoe.server.chat.prompts import Prompts
from slimoe.server.chat.template_error import ChatTemplateError
from slimoe.server.messages import ChatPrompt, Turn
from slimoe.server.terminal.terminal import generate, show_figures

HELP = "Ctrl-C stops an answer, /reset forgets the conversation, /exit or Ctrl-D leaves."
PROMPT = "> "


class Repl:
    """One conversation with one engine; what was read stays in its KV cache from turn to turn."""

    def __init__(self, engine: Engine, request: GenerationRequest, system: str | None = None) -> None:
        """`request` holds everything but the prompt, `system` is said first.

        Raises RequestError for a model without a tokenizer, ChatTemplateError for one with an unusable template.
        """
        self._engine = engine
        self._request = request
        self._prompts = Prompts(engine.tokenizer, engine.spec.n_vocab, engine.n_ctx, engine.grammars)
        self._prompts.chat.check()  # says now, not after the first line, that the model cannot chat
        self._opening = [] if system is None else [Turn("system", system)]
        self._turns = list(self._opening)

    def run(self) -> None:
        """Talks until the person leaves."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() a history and line editing
        click.echo(HELP, err=True)
        while (line := _read_line()) is not None:
            words = line.strip()
            if words in ("/exit", "/quit", "/bye"):
                break
            if words == "/reset":
                self._turns = list(self._opening)
                click.echo("The conversation is forgotten.", err=True)
            elif words.startswith("/") and " " not in words and words.count("/") == 1:
                click.echo(HELP, err=True)
            elif words:
                self._answer(line)

    def _answer(self, line: str) -> None:
        turns = [*self._turns, Turn("user", line)]
        try:
            request = self._prompts.complete(self._request, ChatPrompt(tuple(turns)))
            outcome = generate(self._engine, request, shows_text=True)
            print(flush=True)
            show_figures(outcome.finished)
            self._turns = [*turns, Turn("assistant", outcome.text.strip())]
        except ContextOverflowError as error:
            click.echo(f"{error} Or type /reset to start over.", err=True)
        except ChatTemplateError as error:
            click.echo(str(error), err=True)
        except KeyboardInterrupt:
            # Ctrl-C ends a generation cleanly; this is for the moments before and after it.
            click.echo("Stopped.", err=True)


def _read_line() -> str | None:
    """What the person typed, None at the end of input; Ctrl-C throws the line away."""
    is_typed, is_shown = sys.stdin.isatty(), sys.stdout.isatty()
    while True:
        if is_typed and not is_shown:
            click.echo(PROMPT, nl=False, err=True)
        try:
            return input(PROMPT if is_typed and is_shown else "")
        except KeyboardInterrupt:
            click.echo(f"\n{HELP}", err=True)
        except EOFError:
            return None
