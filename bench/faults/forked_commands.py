"""`slimoe` commands in forks of one process that has everything loaded, so that a hundred of them take seconds each."""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_PAUSE_SECONDS, _TELLING_SECONDS = 0.005, 0.5


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit status, negative for a signal, None if it was still running after all its time."""

    status: int | None
    out: str
    err: str


class ForkedCommands:
    """The process that forks; `environment` is added to this process's own."""

    def __init__(self, directory: Path, environment: Mapping[str, str], *, calibrates: bool) -> None:
        self._out, self._err = directory / "stdout", directory / "stderr"
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.faults.forked_commands", *(["calibrates"] if calibrates else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads, **environment},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(self, arguments: Sequence[str], seconds: float = 150.0) -> Ended:
        """Runs one command to its end, or to the end of its time."""
        order = {"arguments": list(arguments), "out": str(self._out), "err": str(self._err), "seconds": seconds}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        status = json.loads(self._process.stdout.readline())
        return Ended(status, self._out.read_text("utf-8", "replace"), self._err.read_text("utf-8", "replace"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _carry_out(order: dict[str, object]) -> int | None:
    """Forks, runs the command there, and waits for it."""
    child = os.fork()
    if child == 0:
        _become(order)
    end = time.monotonic() + float(str(order["seconds"]))
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(_PAUSE_SECONDS)
    os.kill(child, signal.SIGUSR1)
    time.sleep(_TELLING_SECONDS)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _become(order: dict[str, object]) -> None:
    """The command itself, ended as Python ends: with a traceback and status 1 where it raises."""
    from slimoe.server.cli import run

    status = 1
    faulthandler.register(signal.SIGUSR1)
    for name, descriptor in (("out", 1), ("err", 2)):
        file = os.open(str(order[name]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(file, descriptor)
    try:
        arguments = order["arguments"]
        assert isinstance(arguments, list)
        status = run(arguments)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Loads what commands need, then carries out one for each line of standard input; each is an object in JSON."""
    import slimoe.server.commands.convert
    import slimoe.server.commands.inspect
    import slimoe.server.commands.run

    if sys.argv[1:]:
        import slimoe.server.commands.calibrate
        import slimoe.server.jobs.compress  # noqa: F401  with torch, which takes seconds
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_carry_out(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
