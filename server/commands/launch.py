"""`slimoe launch`: other programs' settings for a running server."""

import http.client
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

import click
import msgspec

from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.server.options.engine_options import OptionsCommand
from slimoe.server.options.idle_flags import refuse_idle
from slimoe.server.telling import did_you_mean, tell
from slimoe.server.terminal.client_settings import CLIENTS, Server, child_environment, settings_for, shell_lines

_SECONDS, _LONGEST_ANSWER = 5, 1 << 20
_UNKNOWN_CTX = 4096


class ClientName(click.ParamType[str]):
    """The name of a client in the table."""

    name = "client"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Gives the name; fails, with similar ones and all of them, for one that is not there."""
        if value not in CLIENTS:
            self.fail(f"No settings for {value!r}.{did_you_mean(value, CLIENTS)} Known: {', '.join(CLIENTS)}.", param)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """The names that begin like this."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in CLIENTS if name.startswith(incomplete)]


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Card]


@click.command("launch", cls=OptionsCommand)
@click.argument("client", required=False, type=ClientName())
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--url", default="http://127.0.0.1:8080", show_default=True, help="Address of the running server.")
@click.option("--model", help="Model to use (default: the server's first).")
@click.option("--key-env", metavar="NAME", help="Environment variable that holds the server's key, if it has one.")
@click.option("--run", "is_run", is_flag=True, help="Start the client, without keys of cloud services around it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(values: Mapping[str, Any]) -> None:
    """Print the settings with which CLIENT uses the running server, or start it with them.

    Without CLIENT all clients are listed. What follows -- is handed to a client that is started.
    """
    if values["client"] is None:
        refuse_idle(["is_run", "url", "model", "key_env"], "is for one client. Name it; without flags all are listed.")
        if values["as_json"]:
            click.echo(msgspec.json.encode({name: client.title for name, client in CLIENTS.items()}))
        else:
            click.echo("\n".join(f"{name:<18}{client.title}" for name, client in CLIENTS.items()))
        return
    if values["arguments"] and not values["is_run"]:
        raise UsageError("Arguments are for a client that is started. Add --run.")
    if values["is_run"]:
        refuse_idle(["as_json"], "prints settings, and --run starts the client. Leave one of them out.")
    key = None if values["key_env"] is None else os.environ.get(values["key_env"])
    if values["key_env"] is not None and not key:
        raise UsageError(f"The environment variable {values['key_env']} holds no key. Put it there, or leave it out.")
    url = str(values["url"]).rstrip("/").removesuffix("/v1")
    card = _chosen(_served(url, key), values["model"], url)
    server = Server(url, card.id, card.max_model_len or _UNKNOWN_CTX, values["key_env"])
    settings = settings_for(CLIENTS[values["client"]], server)
    if values["is_run"]:
        if not settings.command:
            raise UsageError(f"{settings.title} cannot be started from here. Without --run its settings are printed.")
        program = shutil.which(settings.command[0])
        if program is None:
            raise UsageError(f"{settings.command[0]} is not in PATH. Install {settings.title}, or leave --run out.")
        if settings.text:
            tell(f"{settings.title} also needs what slimoe launch {values['client']} prints in {settings.where}.")
        sys.stdout.flush()
        environment = child_environment(settings, key, os.environ)
        os.execve(program, [*settings.command, *values["arguments"]], environment)
    if values["as_json"]:
        fields = {**asdict(settings), "url": url, "model": card.id, "key_env": values["key_env"]}
        click.echo(msgspec.json.encode(fields))
    else:
        click.echo("\n".join(shell_lines(settings, server)))


def _served(url: str, key: str | None) -> list[_Card]:
    """The models of the server at `url`; raises SlimoeError when none answers."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--url is {url!r}, but an address looks like http://127.0.0.1:8080.")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    try:
        # Neither a proxy nor a redirection is followed: the key is for this server.
        connection = kind(parts.hostname, parts.port, timeout=_SECONDS)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        connection.request("GET", f"{parts.path}/v1/models", headers=headers)
        answer = connection.getresponse()
        body = answer.read(_LONGEST_ANSWER)
        connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        hint = "Start one with slimoe serve, or name its address with --url."
        raise SlimoeError(f"No server answers at {url} ({error}). {hint}") from None
    if answer.status in (401, 403):
        raise UsageError(f"The server at {url} asks for a key. Name its variable with --key-env.")
    try:
        if answer.status == 200:
            return msgspec.json.decode(body, type=_Models).data
    except msgspec.DecodeError:
        pass
    raise SlimoeError(f"{url}/v1/models answers no list of models, but status {answer.status}. Is it slimoe serve?")


def _chosen(cards: list[_Card], name: str | None, url: str) -> _Card:
    names = [card.id for card in cards]
    if name is not None and name not in names:
        raise UsageError(
            f"The server at {url} has no model {name!r}.{did_you_mean(name, names)} It has: {', '.join(names)}."
        )
    if not cards:
        raise SlimoeError(f"The server at {url} has no model.")
    return next(card for card in cards if name in (None, card.id))
