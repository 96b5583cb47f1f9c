"""Has slimoe read mutants of every kind of file it takes, and evaluates how it refuses them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.attacks.mutant_reading import CPU_SECONDS, WALL_SECONDS, Reading, ReadingJob
from bench.attacks.specimens import KINDS
from bench.limits.finding import Finding, Outcome
from slimoe.offload.errors import SlimoeError

GROWTH_BYTES = 512 << 20
_LONG = 2000
_OUR_FRAME = re.compile(r'File ".*/((?:server|offload|converter)/[^"]+\.py)", line (\d+)(?:,)? in (\S+)')
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_REFUSAL = re.compile(r"^(slimoe: \S|Error: |Usage: )", re.MULTILINE)


class ReaderError(SlimoeError):
    """The process that reads the mutants ended before its time."""


@dataclass(frozen=True, slots=True)
class FilePlan:
    """Cases `first` to `first + n_cases` of a seed, of these kinds in turn, `n_jobs` at once."""

    seed: int
    n_cases: int
    first: int = 0
    kinds: tuple[str, ...] = KINDS
    n_jobs: int = 2
    keeps: bool = False
    tries_specimens: bool = True


def attack_files(plan: FilePlan) -> Outcome:
    """Makes the sound files, then reads their mutants; raises ReaderError."""
    root = Path(tempfile.mkdtemp(prefix="slimoe-mutants-"))
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment |= {"XDG_CACHE_HOME": str(root / "cache")}
    _run([sys.executable, "-m", "bench.attacks.specimens", str(root), *plan.kinds], environment, "")
    job = ReadingJob(str(root), plan.seed, plan.first, plan.n_cases, plan.n_jobs, plan.keeps)
    if plan.tries_specimens:  # where a sound file is refused, what is said of its mutants would mean nothing
        n_specimens = len(json.loads((root / "specimens.json").read_text()))
        sound = _read(replace(job, first=0, n_cases=n_specimens, sound=True), environment)
        refused = next((one for one in sound if one.status != 0), None)
        if refused is not None:
            said = refused.fault or refused.text[-500:]
            raise ReaderError(f"The sound {refused.target} is refused by slimoe {refused.command}: {said}")
    begin = time.perf_counter()
    readings = _read(job, environment)
    if not plan.keeps:
        shutil.rmtree(root)
    seconds = time.perf_counter() - begin
    ended: dict[str, Counter[str]] = {kind: Counter() for kind in plan.kinds}
    for reading in readings:
        ended[reading.kind]["signal" if reading.status is None else str(reading.status)] += 1
    figures: dict[str, Any] = {
        "n_cases": len(readings),
        "seconds": round(seconds, 1),
        "ended": {kind: dict(sorted(counter.items())) for kind, counter in ended.items()},
        "slowest_s": max((reading.seconds for reading in readings), default=0),
        "most_growth_mib": round(max((reading.growth for reading in readings), default=0) / 2**20, 1),
    }
    return Outcome(figures, [finding for reading in readings for finding in evaluated(reading)])


def _read(job: ReadingJob, environment: dict[str, str]) -> list[Reading]:
    text = _run([sys.executable, "-m", "bench.attacks.mutant_reading"], environment, json.dumps(asdict(job)))
    return [Reading(**json.loads(line)) for line in text.splitlines()]


def _run(command: list[str], environment: dict[str, str], text: str) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise ReaderError(f"{' '.join(command[1:3])} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def evaluated(reading: Reading) -> list[Finding]:
    """The promises that a reading shows broken: a hang, a crash, a traceback, a refusal without a clear line."""
    case, found = str(reading.case), []
    last = next((line for line in reversed(reading.text.splitlines()) if line.strip()), "")
    detail = f"{reading.target}: slimoe {reading.command}: {last[:200]}"
    if reading.signal in (9, 24):  # of our own, at the end of its time
        limit = f"more than {CPU_SECONDS} s of processor or {WALL_SECONDS} s"
        found.append(Finding(f"{reading.kind}: {limit}", case, f"{detail} {reading.fault[-300:]}"))
    elif reading.status is None:
        place = _place(reading.fault.splitlines()[::-1])
        found.append(
            Finding(f"{reading.kind}: signal {reading.signal} at {place}", case, f"{detail} {reading.seconds} s")
        )
    elif reading.fault:
        lines = reading.fault.strip().splitlines()
        error = lines[-1].split(":")[0][:60]
        found.append(Finding(f"{reading.kind}: {error} at {_place(lines)}", case, f"{detail} {lines[-1][:200]}"))
    elif reading.status and len(last) > _LONG:
        found.append(Finding(f"{reading.kind}: a message of more than {_LONG} characters", case, detail))
    elif reading.status and not _REFUSAL.search(reading.text):
        found.append(Finding(f"{reading.kind}: refused without a line", case, detail))
    if reading.growth > GROWTH_BYTES:
        found.append(Finding(f"{reading.kind}: grows by {reading.growth >> 20} MiB", case, detail))
    if _CONTROL.search(reading.text):
        found.append(Finding(f"{reading.kind}: raw control characters in the output", case, repr(reading.text[-300:])))
    return found


def _place(lines: list[str]) -> str:
    """The innermost frame of our own code in a traceback."""
    frames = [match for line in lines if (match := _OUR_FRAME.search(line))]
    return f"{frames[-1][1]}:{frames[-1][3]}" if frames else "?"
