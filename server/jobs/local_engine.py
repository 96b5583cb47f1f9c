"""The engine in the command's own process, as `run`, `plan` and `bench` use it."""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from slimoe.offload.engine import Engine
from slimoe.offload.ggml.abort import end_with_error, on_device_abort
from slimoe.offload.plan.engine_plan import EngineConfig
from slimoe.server.options.engine_options import EngineOptions
from slimoe.server.options.serving_memory import running_bytes
from slimoe.server.telling import tell
from slimoe.server.terminal.terminal import loading_progress


def engine_config(options: EngineOptions) -> EngineConfig:
    """The flags as the engine takes them; what was left open takes its defaults."""
    chosen = {name: value for name in EngineOptions.__slots__ if (value := getattr(options, name)) is not None}
    own = {"model": options.path, "reserve_bytes": running_bytes()}
    config: EngineConfig = msgspec.convert({**chosen, **own}, EngineConfig, dec_hook=_as_is)
    return config


def open_engine(options: EngineOptions) -> Engine:
    """Opens the model, with a progress line on a terminal, and says what the plan has to say."""
    on_device_abort(options.rpc, end_with_error)
    with loading_progress(options.path.name) as progress:
        engine = Engine.open(engine_config(options), progress)
    say_notes(engine.notes)
    return engine


def say_notes(notes: Iterable[str]) -> None:
    """Tells a plan's notes on standard error."""
    for note in notes:
        tell(note)


def _as_is(kind: type, value: object) -> object:
    assert kind is Path
    return value
