"""The engine in the command's own process, as `run`, `plan` and `bench` use it."""

from collections.abc import Iterable

from slimoe.offload.engine import Engine
from slimoe.offload.ggml.abort import end_with_error, on_device_abort
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.server.telling import tell
from slimoe.server.terminal.terminal import loading_progress


def open_engine(config: EngineConfig) -> Engine:
    """Opens the model, with a progress line on a terminal, and says what the plan has to say."""
    on_device_abort(config.devices.rpc, end_with_error)
    with loading_progress(config.model.name) as progress:
        engine = Engine.open(config, progress)
    say_notes(engine.notes)
    return engine


def say_notes(notes: Iterable[str]) -> None:
    """Tells a plan's notes on standard error."""
    for note in notes:
        tell(note)
