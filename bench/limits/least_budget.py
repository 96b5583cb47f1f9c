"""The least `--ram` that a server says it needs, and whether it starts with that."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.limits.victim import START_SECONDS, VictimError

_ADVICE = re.compile(r"--ram to (\d+)MiB")
_TRIES = 5


@dataclass(frozen=True, slots=True)
class LeastBudget:
    """The values of --ram in MiB that were tried until the server started, each as the refusal before it advised."""

    tried: tuple[int, ...]

    @property
    def mib(self) -> int:
        """The value with which the server starts."""
        return self.tried[-1]


def least_budget(model: Path | None, *flags: str) -> LeastBudget:
    """Follows the advice of `slimoe serve` from 1 MiB on; raises VictimError when it leads nowhere."""
    given = [] if model is None else [str(model)]
    command = [sys.executable, "-m", "slimoe.server.cli", "serve", *given, "--port", "0", *flags, "--ram"]
    tried: list[int] = []
    mib = 1
    for _ in range(_TRIES):
        process = subprocess.Popen([*command, f"{mib}MiB"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        starts = bool(process.stdout.readline())
        process.terminate()
        said = process.communicate(timeout=START_SECONDS)[1].strip()
        if starts:
            return LeastBudget((*tried, mib))
        advice = _ADVICE.search(said)
        if advice is None or int(advice[1]) <= mib:
            raise VictimError(f"With --ram {mib}MiB slimoe serve does not start and gives no larger figure: {said}")
        tried.append(mib)
        mib = int(advice[1])
    raise VictimError(f"The advice of slimoe serve was followed {_TRIES} times, from {tried}, and it does not start.")
