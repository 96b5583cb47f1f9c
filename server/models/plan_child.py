"""Plans models one after the other, in a process of its own: run as `python -m slimoe.server.models.plan_child PID`.

The server's own process never loads the tensor library that a plan asks for its sizes.
"""

import sys

import msgspec

from slimoe.offload.errors import SlimoeError
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.server.models.plans import PlannedModel, decode_configs
from slimoe.server.process.child_life import settle_in


def planned(config: EngineConfig) -> PlannedModel:
    """What opening one model would take, or why it cannot be opened."""
    try:
        # Here, so that a ggml that cannot be loaded is told like any reason why a model cannot be opened.
        from slimoe.offload.plan.engine_plan import plan_each
        from slimoe.server.terminal.plan_report import host_bytes

        (plan,) = plan_each([config])
    except SlimoeError as error:
        return PlannedModel(problem=str(error))
    except (OSError, MemoryError, ValueError) as error:
        return PlannedModel(problem=f"{config.model} cannot be read ({type(error).__name__}).")
    fits, shortfall = plan.shortfall is None, plan.shortfall
    return PlannedModel(
        n_ctx=plan.n_ctx,
        required_bytes=sum(host_bytes(plan).values()) if shortfall is None else shortfall.required_bytes,
        available_bytes=plan.available if shortfall is None else shortfall.available_bytes,
        fits=fits,
        problem=None if shortfall is None else str(shortfall),
    )


def main() -> None:
    """Reads configurations until the end of standard input, and writes a line of JSON for each."""
    settle_in(int(sys.argv[1]))
    for config in decode_configs(sys.stdin.buffer.read()):
        sys.stdout.buffer.write(msgspec.json.encode(planned(config)) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
