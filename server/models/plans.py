"""What opening each of several models would take, asked of a process of its own before any is opened."""

import asyncio
import contextlib
import os
from collections.abc import Sequence

import msgspec

from slimoe.offload.plan.engine_config import EngineConfig, changed
from slimoe.server.child_python import module_command

PLAN_SECONDS = 20.0
"""For all models together; those that are not planned by then are offered without figures."""


class PlannedModel(msgspec.Struct, frozen=True):
    """What a plan says: the context window, the bytes for all processes, and whether they are there.

    `problem` says why it does not fit, or why the file cannot be opened at all.
    """

    n_ctx: int = 0
    required_bytes: int = 0
    available_bytes: int = 0
    fits: bool = False
    problem: str | None = None


_encoder = msgspec.msgpack.Encoder(enc_hook=str)  # of paths
decode_configs = msgspec.msgpack.Decoder(list[EngineConfig], dec_hook=lambda kind, value: kind(value)).decode
_decode = msgspec.json.Decoder(PlannedModel).decode


async def plan_models(configs: Sequence[EngineConfig], seconds: float = PLAN_SECONDS) -> list[PlannedModel | None]:
    """The plan of each model; None for those that are not planned after so many seconds."""
    plans: list[PlannedModel | None] = []
    command = (*module_command("slimoe.server.models.plan_child"), str(os.getpid()))
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, start_new_session=True)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with contextlib.suppress(TimeoutError, ConnectionError, msgspec.MsgspecError):
            async with asyncio.timeout(seconds):
                child.stdin.write(_encoder.encode([_unmeasured(config) for config in configs]))
                await child.stdin.drain()
                child.stdin.close()
                async for line in child.stdout:
                    plans.append(_decode(line))
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
        await child.wait()
    return plans + [None] * (len(configs) - len(plans))


def _unmeasured(config: EngineConfig) -> EngineConfig:
    """The configuration without the kernels being measured, which takes seconds for each model."""
    if config.memory.weights != "auto":
        return config
    return changed(config, {"weights": "copied" if config.is_budgeted else "mapped"})
