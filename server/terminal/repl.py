"""The interactive chat: a person types, the model answers, and the conversation is kept."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from slimoe.offload.engine import Engine
from slimoe.offload.errors import ContextOverflowError, SlimoeError, UsageError
from slimoe.offload.files.regular_file import read_regular, reason
from slimoe.offload.files.whole_file import whole_file
from slimoe.offload.text.generation import GenerationRequest, SamplingParams
from slimoe.offload.text.sampler import check_params
from slimoe.server.chat.prompts import Prompts
from slimoe.server.messages import ChatPrompt, Turn
from slimoe.server.telling import did_you_mean
from slimoe.server.terminal.terminal import generate, show_figures
from slimoe.server.terminal.typed_lines import TypedLines

HELP = "Ctrl-C stops an answer, /reset forgets the conversation, /help says more, /exit or Ctrl-D leaves."
COMMANDS = {
    "/help": "tell all this",
    "/set [NAME VALUE]": "set temp, top_p, seed, max_tokens, system ...; alone it tells the values",
    "/regenerate": "answer the last message again",
    "/reset": "forget the conversation",
    "/save FILE": "write the conversation to a file",
    "/load FILE": "go on with a conversation from a file",
    "/info": "tell the model, the context and the settings",
    "/exit": "leave, like Ctrl-D",
}
_OTHER_NAMES = {"/quit": "/exit", "/bye": "/exit", "/?": "/help"}
_LINES = [
    *(f"{name:<20}{about}" for name, about in COMMANDS.items()),
    "//text sends a message that begins with a slash. A backslash at the end of a line goes on with the next,",
    'and """ begins and ends a message of several lines.',
]
_SAMPLING = {
    "temp": "temperature",
    **{item.name: item.name for item in dataclasses.fields(SamplingParams) if item.name != "logit_bias"},
}


class SavedTurn(msgspec.Struct, frozen=True):
    """A message in a saved conversation, as OpenAI's API has them."""

    role: str
    content: str


class SavedChat(msgspec.Struct, frozen=True):
    """A saved conversation."""

    messages: list[SavedTurn]


class Repl:
    """One conversation with one engine; what was read stays in its KV cache from turn to turn."""

    def __init__(
        self, engine: Engine, request: GenerationRequest, system: str | None = None, history: Path | None = None
    ) -> None:
        """`request` holds everything but the prompt, `system` is said first; `history` is the file of what was typed.

        Raises RequestError for a model without a tokenizer, ChatTemplateError for one with an unusable template.
        """
        self._engine = engine
        self._request = request
        self._prompts = Prompts(engine.tokenizer, engine.spec.n_vocab, engine.n_ctx, engine.grammars)
        self._prompts.chat.check()  # says now, not after the first line, that the model cannot chat
        self._system = system
        self._turns: list[Turn] = []
        self._history = history
        self._file: Path | None = None
        self._commands: Mapping[str, Callable[[str], None]] = {
            "/help": lambda rest: click.echo("\n".join(_LINES), err=True),
            "/set": self._set,
            "/regenerate": self._regenerate,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/info": self._info,
        }

    def run(self) -> None:
        """Talks until the person leaves."""
        lines = TypedLines(self._history, HELP)
        click.echo(HELP, err=True)
        while (text := lines.read()) is not None:
            words = text.strip()
            if words.startswith("//"):
                self._answer([*self._turns, Turn("user", text.replace("//", "/", 1))])
            elif words.startswith("/"):
                name, _, rest = words.partition(" ")
                name = _OTHER_NAMES.get(name, name)
                if name == "/exit":
                    break
                self._carry_out(name, rest.strip())
            elif words:
                self._answer([*self._turns, Turn("user", text)])

    def _carry_out(self, name: str, rest: str) -> None:
        """Does what a command says; what is no command is not sent to the model."""
        if name not in self._commands:
            known = [*self._commands, "/exit"]
            hint = "/help lists the commands; //text sends a message that begins with a slash."
            click.echo(f"There is no command {name}.{did_you_mean(name, known)} {hint}", err=True)
            return
        try:
            self._commands[name](rest)
        except SlimoeError as error:
            click.echo(str(error), err=True)
        except OSError as error:
            click.echo(f"{rest}: {reason(error)}.", err=True)

    def _answer(self, turns: list[Turn]) -> None:
        """Answers the last of `turns`; what was said until Ctrl-C is kept."""
        opening = [] if self._system is None else [Turn("system", self._system)]
        try:
            request = self._prompts.complete(self._request, ChatPrompt((*opening, *turns)))
            outcome = generate(self._engine, request, shows_text=True)
            print(flush=True)
            show_figures(outcome.finished)
            self._turns = [*turns, Turn("assistant", outcome.text.strip())]
        except ContextOverflowError as error:
            click.echo(f"{error} Or type /reset to start over.", err=True)
        except SlimoeError as error:
            click.echo(str(error), err=True)
        except KeyboardInterrupt:
            # Ctrl-C ends a generation cleanly; this is for the moments before and after it.
            click.echo("Stopped.", err=True)

    # --- commands ------------------------------------------------------------------------------------------

    def _reset(self, rest: str) -> None:
        self._turns, self._file = [], None
        click.echo("The conversation is forgotten.", err=True)

    def _regenerate(self, rest: str) -> None:
        asked = max((n for n, turn in enumerate(self._turns) if turn.role == "user"), default=None)
        if asked is None:
            raise UsageError("Nothing was asked yet.")
        self._answer(self._turns[: asked + 1])

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not name:
            click.echo("\n".join(f"{name:<20}{shown}" for name, shown in self._values().items()), err=True)
            return
        value = value.strip()
        if name == "system":
            self._system = value or None
        elif name == "max_tokens":
            self._request = dataclasses.replace(self._request, max_tokens=_number(name, value, int, least=1))
        elif name in _SAMPLING:
            field = _SAMPLING[name]
            kind = {item.name: item.type for item in dataclasses.fields(SamplingParams)}[field]
            given = _number(name, value, float if kind is float else int)
            if given is None and field != "seed":
                given = getattr(SamplingParams(), field)
            sampling = dataclasses.replace(self._request.sampling, **{field: given})
            check_params(sampling, self._engine.spec.n_vocab)
            self._request = dataclasses.replace(self._request, sampling=sampling)
        else:
            raise UsageError(
                f"There is no setting {name}.{did_you_mean(name, {**_SAMPLING, **self._values()})} /set lists them."
            )
        click.echo(f"{name} is {self._values().get(_SAMPLING.get(name, name), value)}", err=True)

    def _values(self) -> dict[str, Any]:
        sampling = self._request.sampling
        values = {field: getattr(sampling, field) for field in dict.fromkeys(_SAMPLING.values())}
        return {**values, "max_tokens": self._request.max_tokens, "system": self._system}

    def _info(self, rest: str) -> None:
        engine = self._engine
        click.echo(f"{engine.gguf.path.name}: {engine.n_past} of {engine.n_ctx} tokens of context", err=True)
        click.echo(f"{len(self._turns)} messages", err=True)
        self._set("")

    def _save(self, rest: str) -> None:
        if not rest:
            raise UsageError("Say where: /save FILE.")
        path = Path(rest).expanduser()
        if path.exists() and path != self._file:
            raise UsageError(f"{path} exists. Choose another name.")
        system = [] if self._system is None else [SavedTurn("system", self._system)]
        chat = SavedChat([*system, *(SavedTurn(turn.role, turn.content) for turn in self._turns)])
        with whole_file(path) as part:
            part.write_bytes(msgspec.json.format(msgspec.json.encode(chat), indent=1) + b"\n")
        self._file = path
        click.echo(f"{path}: {len(self._turns)} messages", err=True)

    def _load(self, rest: str) -> None:
        if not rest:
            raise UsageError("Say which: /load FILE.")
        path = Path(rest).expanduser()
        try:
            chat = msgspec.json.decode(read_regular(path), type=SavedChat)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is no saved conversation ({error}).") from None
        wrong = next((turn.role for turn in chat.messages if turn.role not in ("system", "user", "assistant")), None)
        if wrong is not None:
            raise UsageError(f"{path} has a message of {wrong!r}; here system, user and assistant speak.")
        self._system = next((turn.content for turn in chat.messages if turn.role == "system"), None)
        self._turns = [Turn(turn.role, turn.content) for turn in chat.messages if turn.role != "system"]
        self._file = path
        click.echo(f"{path}: {len(self._turns)} messages", err=True)


def _number(name: str, value: str, kind: type[int] | type[float], least: int | None = None) -> Any:
    """A setting's value, None for `none`; raises UsageError for what is no such number."""
    if value.lower() in ("none", "default"):
        return None
    try:
        number = kind(value)
    except ValueError:
        number = None
    if number is None or (least is not None and number < least):
        what = "a number" if kind is float else "a whole number"
        raise UsageError(f"{name} is {what}, got {value or 'nothing'}.")
    return number
