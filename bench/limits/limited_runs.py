"""Runs candidates in turn, each alone in a process, within memory limits and without one."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.baselines.ik_llama_cpp import IK_BASELINES, ik_environment
from bench.disk_speed import DiskSpeed
from bench.limits.cgroup import MemoryGroup, Usage, drop_cached, memory_group
from bench.limits.engine_changes import Changes
from bench.limits.isolated_plan import Expected
from bench.limits.isolated_run import BASELINES, OURS, Job, Outcome
from slimoe.offload.errors import SlimoeError

REARRANGED = ("llama.cpp", "ik_llama.cpp -rtr")
_DISK_SECONDS = 0.5


class BenchChildError(SlimoeError):
    """A process of the bench ended without the figures that it was started for."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit of memory, None for none; rearranged copies of the weights are tried only where the file `fits`."""

    name: str
    n_bytes: int | None
    fits: bool

    @property
    def candidates(self) -> tuple[str, ...]:
        """The candidates that run under the limit, ours first, without ik_llama.cpp."""
        return (OURS, *self.possible(BASELINES))

    def possible(self, baselines: Iterable[str]) -> tuple[str, ...]:
        """Those of the baselines that can run under the limit."""
        return tuple(name for name in baselines if self.fits or name not in REARRANGED)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: a prompt and then `tokens`, of which `n_warm` do not count, under each limit in each round.

    llama.cpp reads `model` and ours `own_model`, which may hold more copies of the experts. `piece_bytes` is what is
    read at once to time the disk. `ik` is the Python that has ik_llama.cpp, None to leave that out.
    """

    model: Path
    own_model: Path
    limits: tuple[Limit, ...]
    n_threads: int
    n_rounds: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    n_warm: int
    piece_bytes: int
    engine: Changes = field(default_factory=dict)
    ik: Path | None = None

    def candidates(self, limit: Limit) -> tuple[str, ...]:
        """All that run under a limit, ours first."""
        return limit.candidates + (limit.possible(IK_BASELINES) if self.ik else ())

    def job(self, candidate: str, limit: Limit) -> Job:
        """The job of a candidate under a limit."""
        ours = candidate == OURS
        return Job(
            candidate,
            str(self.own_model if ours else self.model),
            self.n_threads,
            self.prompt,
            self.tokens,
            self.n_warm,
            ram=f"{limit.n_bytes}B" if ours and limit.n_bytes is not None else None,
            engine=self.engine if ours else {},
        )


@dataclass(frozen=True, slots=True)
class Run:
    """A candidate's outcome, or why there is none; `usage` is the control group's, None without a limit."""

    outcome: Outcome | None
    failure: str | None
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class Runs:
    """Everything measured: runs by limit and candidate, the disk's speed by limit, and what our plan expected by limit.

    There is one of each per round.
    """

    candidates: dict[tuple[str, str], list[Run]] = field(default_factory=dict)
    disk: dict[str, list[DiskSpeed]] = field(default_factory=dict)
    expected: dict[str, list[Expected]] = field(default_factory=dict)


def measure(plan: Plan, say: Callable[[str], None]) -> Runs:
    """Carries out all rounds; the order of the candidates turns from round to round. Raises SlimoeError."""
    runs = Runs()
    for round_no in range(plan.n_rounds):
        for limit in plan.limits:
            say(f"round {round_no + 1} of {plan.n_rounds}, memory {limit.name}: what the plan expects")
            runs.expected.setdefault(limit.name, []).append(expect(plan, limit))
            names = plan.candidates(limit)
            for name in names[round_no % len(names) :] + names[: round_no % len(names)]:
                say(f"round {round_no + 1} of {plan.n_rounds}, memory {limit.name}: {name}")
                run = run_candidate(plan.job(name, limit), limit.n_bytes, plan.ik if name in IK_BASELINES else None)
                runs.candidates.setdefault((limit.name, name), []).append(run)
            if limit.n_bytes is not None:
                runs.disk.setdefault(limit.name, []).append(time_disk(plan, limit.n_bytes))
    return runs


def run_candidate(job: Job, limit_bytes: int | None, ik: Path | None = None) -> Run:
    """Runs a job in a process of its own; under a limit nothing of the file is in the page cache when it begins.

    A job of ik_llama.cpp needs the Python that has it.

    Raises NoControlGroupError and StillCachedError.
    """
    with ExitStack() as stack:
        group = None
        if limit_bytes is not None:
            drop_cached(Path(job.model))
            group = stack.enter_context(memory_group(limit_bytes))
        text = json.dumps(asdict(job))
        if ik is None:
            done = _run("bench.limits.isolated_run", [], group, text)
        else:
            done = _run("bench.baselines.ik_process", ["job"], group, text, ik)
        usage = group.usage() if group else None
    if done.returncode == 0:
        return Run(Outcome(**json.loads(done.stdout.splitlines()[-1])), None, usage)
    return Run(None, _why(done, usage), usage)


def expect(plan: Plan, limit: Limit) -> Expected:
    """What our plan predicts for the run under the limit, from measurements under it; raises BenchChildError."""
    with ExitStack() as stack:
        group = stack.enter_context(memory_group(limit.n_bytes)) if limit.n_bytes is not None else None
        done = _run("bench.limits.isolated_plan", [], group, json.dumps(asdict(plan.job(OURS, limit))))
        usage = group.usage() if group else None
    if done.returncode:
        raise BenchChildError(f"The plan could not be asked: {_why(done, usage)}.")
    return Expected(**json.loads(done.stdout.splitlines()[-1]))


def time_disk(plan: Plan, limit_bytes: int) -> DiskSpeed:
    """How fast our file comes from its disk, under the limit; raises BenchChildError."""
    drop_cached(plan.own_model)
    arguments = [str(plan.own_model), "--piece-mib", str(plan.piece_bytes / 2**20), "--seconds", str(_DISK_SECONDS)]
    with memory_group(limit_bytes) as group:
        done = _run("bench.disk_speed", arguments, group, "")
        if done.returncode:
            raise BenchChildError(f"The disk could not be timed: {_why(done, group.usage())}.")
    return DiskSpeed(**json.loads(done.stdout.splitlines()[-1]))


def _run(
    module: str, arguments: Sequence[str], group: MemoryGroup | None, text: str, ik: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = [str(ik or sys.executable), "-m", module, *arguments]
    entered = group.entering(command) if group else command
    environment = None if ik is None else ik_environment()
    return subprocess.run(entered, input=text, capture_output=True, text=True, check=False, env=environment)


def _why(done: subprocess.CompletedProcess[str], usage: Usage | None) -> str:
    if usage is not None and usage.n_oom_kills:
        return "killed, because it needed more memory than the limit"
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}"
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
