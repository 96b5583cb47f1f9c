"""Lets slimoe read mutants, each in a process of its own that is forked from this one, which has everything loaded.

Standard input is a job in JSON, standard output one JSON line for each case: how it ended, what it wrote, and what it
took. A case that takes too long is killed, with all that it started.
"""

import contextlib
import faulthandler
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.attacks.mutants import mutant
from bench.attacks.specimens import Specimen
from slimoe.server import cli

CPU_SECONDS, WALL_SECONDS = 10, 60
_MAX_ADDRESSES = 4 << 30
_COMMANDS = ("convert", "inspect", "plan", "run")
_TORCH = ("slimoe.converter.stats.calibrate", "slimoe.server.jobs.compress")  # with torch, seconds


@dataclass(frozen=True, slots=True)
class ReadingJob:
    """Cases `first` to `first + n_cases` of a seed, of the specimens below `root`, `n_jobs` at once.

    If they are `sound`, the specimens themselves are read in place of mutants, one for each case.
    """

    root: str
    seed: int
    first: int
    n_cases: int
    n_jobs: int
    keeps: bool = False
    sound: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """How a case ended: `status` of its last command, or None where it was killed by a signal.

    `fault` is a traceback, `text` what it wrote, `growth` the bytes of memory that it took.
    """

    case: int
    kind: str
    target: str
    status: int | None
    signal: int
    seconds: float
    growth: int
    command: str
    fault: str
    text: str


@dataclass(slots=True)
class _Running:
    case: int
    specimen: Specimen
    folder: Path
    begin: float


def main() -> None:
    """Carries out the job on stdin; prints each reading as a line of JSON."""
    job = ReadingJob(**json.loads(sys.stdin.read()))
    listed = json.loads((Path(job.root) / "specimens.json").read_text())
    specimens = [Specimen(**one | {"folder": Path(one["folder"])}) for one in listed]
    needs_calibration = {"statistics", "recipe"} & {one.kind for one in specimens}
    for name in (*(f"slimoe.server.commands.{name}" for name in _COMMANDS), *(_TORCH if needs_calibration else ())):
        importlib.import_module(name)
    running: dict[int, _Running] = {}
    cases = iter(range(job.first, job.first + job.n_cases))
    is_over = False
    while running or not is_over:
        while not is_over and len(running) < job.n_jobs:
            case = next(cases, None)
            is_over = case is None
            if case is not None:
                pid, state = _start(job, specimens, case)
                running[pid] = state
        for pid, state in list(running.items()):
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                del running[pid]
                print(json.dumps(asdict(_reading(state, status, usage.ru_maxrss))), flush=True)
                _sweep(pid)
                if not job.keeps:
                    shutil.rmtree(state.folder, ignore_errors=True)
            elif time.monotonic() - state.begin > WALL_SECONDS:
                _sweep(pid)
        time.sleep(0.003)


def specimen_of(specimens: list[Specimen], seed: int, case: int) -> tuple[Specimen, random.Random]:
    """The specimen that a case is a mutant of, all kinds in turn, and the random numbers that make the mutant."""
    kinds = list(dict.fromkeys(specimen.kind for specimen in specimens))
    rng = random.Random(f"{seed}/{case}")
    return rng.choice([one for one in specimens if one.kind == kinds[case % len(kinds)]]), rng


def _sweep(pid: int) -> None:
    """Ends what a case started and left behind, or all of it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _start(job: ReadingJob, specimens: list[Specimen], case: int) -> tuple[int, _Running]:
    """Forks the process that reads a mutant: it lies among links to the files that it belongs to."""
    specimen, rng = (specimens[case], None) if job.sound else specimen_of(specimens, job.seed, case)
    folder = Path(job.root) / "cases" / str(case)
    folder.mkdir(parents=True)
    pid = os.fork()
    if pid:
        return pid, _Running(case, specimen, folder, time.monotonic())
    try:
        os.setpgid(0, 0)
        data = (specimen.folder / specimen.target).read_bytes()
        for file in specimen.folder.iterdir():
            if file.name != specimen.target:
                (folder / file.name).symlink_to(file)
        (folder / specimen.target).write_bytes(mutant(specimen.kind, specimen.target, data, rng) if rng else data)
        os.chdir(folder)
        os.dup2(os.open("log", os.O_CREAT | os.O_WRONLY), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        faulthandler.enable(os.open("fault", os.O_CREAT | os.O_WRONLY))
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        most = psutil.Process().memory_info().vms + _MAX_ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        _read(specimen, folder)
    except BaseException:  # a mistake of the bench itself
        _note(folder, {"command": "bench", "fault": traceback.format_exc(), "status": 99})
    finally:
        os._exit(0)


def _read(specimen: Specimen, folder: Path) -> None:
    status, least = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for command in specimen.commands:
        if command[0].startswith("!") and status:
            continue
        arguments = [str(folder / "out.gguf") if word == "OUT" else word.removeprefix("!") for word in command]
        # What a model says is its own; everything else that is written must be fit for a terminal.
        os.dup2(os.open(os.devnull if arguments[0] == "run" else "out", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1)
        _note(folder, {"command": " ".join(arguments), "fault": "", "status": None, "least_kb": least})
        try:
            status = cli.run(arguments)
        except BaseException:
            fault = traceback.format_exc()
            _note(folder, {"command": " ".join(arguments), "fault": fault, "status": 99, "least_kb": least})
            return
        if command[0].startswith("!"):
            (folder / "out.gguf").unlink(missing_ok=True)
    _note(folder, {"command": " ".join(arguments), "fault": "", "status": status, "least_kb": least})


def _note(folder: Path, state: dict[str, Any]) -> None:
    (folder / "state.json").write_text(json.dumps(state))


def _reading(state: _Running, status: int, peak_kb: int) -> Reading:
    folder = state.folder
    noted: dict[str, Any] = {"command": "", "fault": "", "status": None}
    with contextlib.suppress(OSError, ValueError):
        noted = json.loads((folder / "state.json").read_text())
    killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    text = fault = ""
    with contextlib.suppress(OSError):
        text = (folder / "log").read_bytes()[-20_000:].decode("utf-8", "replace")
        fault = (folder / "fault").read_text()
        text = (folder / "out").read_bytes()[:20_000].decode("utf-8", "replace") + text
    return Reading(
        case=state.case,
        kind=state.specimen.kind,
        target=f"{state.specimen.folder.name}/{state.specimen.target}",
        status=None if killed_by else noted["status"],
        signal=killed_by,
        seconds=round(time.monotonic() - state.begin, 2),
        growth=1024 * (peak_kb - noted.get("least_kb", peak_kb)),
        command=str(noted["command"]),
        fault=str(noted["fault"] or fault),
        text=text,
    )


if __name__ == "__main__":
    main()
