"""Has `bench.system_faults` make the system fail, and tells what came of it as the other attacks do."""

import json
import subprocess
import sys

from bench.limits.finding import Finding, Outcome
from slimoe.offload.errors import SlimoeError

_FIGURES = ("cases", "clear_errors", "right_results", "wrong", "not_met", "seconds")


class FaultBenchError(SlimoeError):
    """The bench of faults ended without its figures."""


def attack_system(seed: int) -> Outcome:
    """Its cases of a seed; raises FaultBenchError."""
    command = [sys.executable, "-m", "bench.system_faults", "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if not lines:
        raise FaultBenchError(f"{' '.join(command[1:])} ended with status {done.returncode}: {done.stderr[-2000:]}")
    document = json.loads(lines[-1])
    findings = [
        Finding("a wrong file or answer, or no clear line", one.partition(":")[0], one) for one in document["found"]
    ]
    return Outcome({name: document[name] for name in _FIGURES}, findings)
