"""`slimoe serve`: one model behind an OpenAI-compatible HTTP server."""

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import msgspec

from slimoe.offload.errors import UsageError
from slimoe.offload.files.private_folder import make_private
from slimoe.offload.files.regular_file import read_regular, reason
from slimoe.offload.plan.engine_config import changed
from slimoe.offload.resources.duration import parse_duration
from slimoe.server.api.request_body import Defaults
from slimoe.server.app import AppConfig
from slimoe.server.http.accepting import connection_limits, open_file_limit
from slimoe.server.http.access import AccessRules
from slimoe.server.log_format import log_to_stderr
from slimoe.server.messages import ModelInfo
from slimoe.server.offer import Offer
from slimoe.server.options.engine_options import OptionsCommand, draft_flag, engine_config, engine_flags
from slimoe.server.options.idle_flags import refuse_idle
from slimoe.server.options.installed import version_of
from slimoe.server.options.prompt_cache_flags import prompt_cache_flags
from slimoe.server.options.sampling_options import sampling_flags, sampling_params
from slimoe.server.options.serving_memory import serving_bytes
from slimoe.server.options.template_option import template_flag
from slimoe.server.process.supervisor import DEFAULT_N_QUEUE
from slimoe.server.serving import GRACE_SECONDS, Address, is_loopback, serve
from slimoe.server.telling import tell
from slimoe.server.watch.prompt_log import PromptLog


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The command's own flags."""

    host: str
    port: int
    alias: str | None
    n_queue: int
    api_key_env: str | None
    api_key_file: Path | None
    no_key: bool
    no_page: bool
    allowed_host: tuple[str, ...]
    allowed_origin: tuple[str, ...]
    max_connections: int | None
    exit_with_parent: bool
    grace: float
    idle_unload: float | None
    models: Path | None
    models_max: int
    log_prompts: Path | None
    slots: bool
    slot_save_path: Path | None
    n_predict: int | None


class Duration(click.ParamType[float | None]):
    """A time such as 90s, 10m or 1h; 0 and off are None."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        """Gives the time in seconds."""
        if not isinstance(value, str):
            return None if value is None else float(value)
        seconds = 0.0 if value == "off" else parse_duration(value)
        if seconds is None or seconds < 0:
            self.fail(f"{value!r} is no time. Write one such as 90s, 10m or 1h, or off.", param, ctx)
        return seconds or None


@click.command("serve", cls=OptionsCommand)
@engine_flags
@prompt_cache_flags
@draft_flag
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on; 0 takes any."
)
@click.option("--alias", help="Name of the model in answers (default: the file's).")
@click.option(
    "--queue",
    "n_queue",
    default=DEFAULT_N_QUEUE,
    show_default=True,
    type=click.IntRange(min=0),
    help="Requests that may wait; further ones get status 429.",
)
@click.option("--api-key-env", metavar="NAME", help="Environment variable that holds the key clients must send.")
@click.option(
    "--api-key-file", type=click.Path(path_type=Path, dir_okay=False), help="File that holds the key clients must send."
)
@click.option("--no-key", is_flag=True, help="Ask for no key although --host lets other machines in.")
@click.option("--no-page", is_flag=True, help="Leave out the page at /, a chat with the map of experts.")
@click.option(
    "--allowed-host",
    multiple=True,
    metavar="NAME",
    help="Host name under which clients may reach this server. Repeatable.",
)
@click.option(
    "--allowed-origin", multiple=True, metavar="URL", help="Web origin whose pages may use this server. Repeatable."
)
@click.option(
    "--max-connections",
    type=click.IntRange(min=1),
    help="Most connections at once (default: 256, or what the limit on open files allows).",
)
@template_flag
@click.option(
    "--reasoning",
    type=click.Choice(["on", "off"]),
    help="Whether answers begin with reasoning where a request does not say and the template can do either.",
)
@sampling_flags
@click.option(
    "--n-predict",
    type=click.IntRange(min=-1),
    help="Most tokens of an answer whose request does not say; -1 is as many as fit.",
)
@click.option("--slots/--no-slots", default=True, show_default=True, help="Tell at /slots what is worked on.")
@click.option(
    "--slot-save-path",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="DIR",
    help="Directory to which clients may save conversations' keys and values (default: they may not).",
)
@click.option("--exit-with-parent", is_flag=True, help="End when standard input is closed.")
@click.option(
    "--grace",
    default=GRACE_SECONDS,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Seconds that running answers get when the server is told to end.",
)
@click.option(
    "--idle-unload",
    type=Duration(),
    metavar="TIME",
    help="Give the model's memory back when nobody has asked for it for so long, such as 10m; the next request loads "
    "it again (default: off).",
)
@click.option(
    "--models",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Offer the GGUF files of a folder, each loaded when a request names it.",
)
@click.option(
    "--models-max",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Most models of --models that are loaded at once, in the memory of --ram.",
)
@click.option(
    "--log-format",
    type=click.Choice(("text", "json")),
    default="text",
    show_default=True,
    help="Form of the log on standard error: lines for a person, or one JSON object a line.",
)
@click.option(
    "--log-prompts",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write prompts and answers to files in this folder, one for each request (default: they are never logged).",
)
def command(values: Mapping[str, Any]) -> None:
    """Serve MODEL, a GGUF file, over HTTP as OpenAI's API.

    Without MODEL the built-in demo is served, or with --models what a folder offers. Once requests are answered, one
    line of JSON with the address goes to standard output; everything else goes to standard error.
    """
    log_to_stderr(is_json=values["log_format"] == "json")
    has_model = values["model"] is not None or values["models"] is None
    engine = engine_config({**values, "model": values["model"] if has_model else values["models"]}, serving_bytes())
    # Named so that the engine's process finds the files wherever it runs.
    path, trace = engine.model.absolute(), None if engine.trace is None else engine.trace.absolute()
    engine = replace(engine, model=path, trace=trace)
    if (prompts := engine.prompts.prompt_cache) is not None:
        make_private(prompts, "--prompt-cache")
        engine = changed(engine, {"prompt_cache": prompts.absolute()})
    options = msgspec.convert(dict(values), ServeOptions)
    if options.models is None:
        refuse_idle(["models_max"], "is for several models. Name a folder with --models.")
    rules = AccessRules(
        _key(options),
        frozenset(name.lower() for name in (*options.allowed_host, options.host)),
        frozenset(options.allowed_origin),
    )
    _check_exposure(options, rules)
    defaults = Defaults(sampling_params(values), options.n_predict)
    config = AppConfig(
        rules,
        has_page=not options.no_page,
        defaults=defaults,
        shows_slots=options.slots,
        prompt_log=None if options.log_prompts is None else PromptLog(options.log_prompts),
        slot_directory=options.slot_save_path and options.slot_save_path.absolute(),
    )
    offer = Offer(
        engine,
        version_of("slimoe"),
        options.alias,
        options.models,
        has_model,
        options.models_max,
        options.idle_unload,
        options.n_queue,
        values["chat_template"],
        None if values["reasoning"] is None else values["reasoning"] == "on",
    )
    asyncio.run(serve_models(config, offer, options))


async def serve_models(config: AppConfig, offer: Offer, options: ServeOptions) -> None:
    """Serves what is offered until the server ends, and prints its address once it is ready."""
    backends = await offer.backends()
    model = backends.default.model

    def say_ready(address: Address, info: ModelInfo | None) -> None:
        host = f"[{address.host}]" if ":" in address.host else address.host
        url = f"http://{host}:{address.port}"
        ready = {
            "event": "ready",
            "url": url,
            "port": address.port,
            "pid": os.getpid(),
            "version": model.version,
            "model": model.id,
        }
        names = [backend.model.id for backend in backends.all()]
        context = "" if info is None else f" (context {info.n_ctx})"
        others = "" if len(names) < 2 else f" and {len(names) - 1} more on request"
        tell(f"Serving {model.id}{context}{others} at {url}/v1, Ctrl-C ends.")
        print(json.dumps(ready), flush=True)

    address = Address(options.host, options.port)
    await serve(
        config,
        backends,
        address,
        say_ready,
        starts_asleep=not offer.has_model,
        exits_with_parent=options.exit_with_parent,
        grace=options.grace,
        limits=connection_limits(options.max_connections, open_file_limit()),
    )


def _check_exposure(options: ServeOptions, rules: AccessRules) -> None:
    """Raises UsageError for a server that other machines reach without a key, unless that is wanted."""
    if rules.key is not None and options.no_key:
        raise UsageError("--no-key serves without a key, but one is given. Leave one of the two out.")
    if rules.key is None and not options.no_key and not is_loopback(options.host):
        raise UsageError(
            f"With --host {options.host or repr('')} other machines reach this server, and it has no key. "
            "Give one with --api-key-env or --api-key-file, or say --no-key."
        )


def _key(options: ServeOptions) -> str | None:
    """The key that was configured; raises UsageError when it is not there, for serving without one is no answer.

    It is taken out of the environment, so that no child of this process finds it there.
    """
    if options.api_key_env is not None:
        refuse_idle(["api_key_file"], "and --api-key-env name one key each. Leave one of them out.")
        key = os.environ.pop(options.api_key_env, "").strip()
        where = f"The environment variable {options.api_key_env}"
    elif options.api_key_file is not None:
        try:
            key = read_regular(options.api_key_file).decode().strip()
        except OSError as error:
            raise UsageError(f"The key file {options.api_key_file} cannot be read ({reason(error)}).") from None
        except UnicodeDecodeError as error:
            raise UsageError(f"The key file {options.api_key_file} is no text ({error}).") from None
        where = f"The key file {options.api_key_file}"
    else:
        return None
    if not key:
        raise UsageError(f"{where} holds no key. Put one there, or leave the option out.")
    return key
