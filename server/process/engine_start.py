"""Where the engine's process begins. Apart, so that a ggml that cannot be loaded is told like any failure.

Run as `python -m slimoe.server.process.engine_start PARENT_PID`.
"""

from slimoe.offload.errors import SlimoeError
from slimoe.server.messages import Failure
from slimoe.server.process.child_life import leave
from slimoe.server.process.pipe import Pipe


def main() -> None:
    """Runs the engine's process, whose modules open ggml when they are imported."""
    try:
        from slimoe.server.process import engine_process
    except SlimoeError as error:
        Pipe.over_stdio().send(Failure(0, "model", str(error), exit_code=error.exit_code))
        leave()
    engine_process.main()


if __name__ == "__main__":
    main()
