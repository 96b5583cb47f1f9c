"""One candidate alone in its process: reads the tokens it is told to read, and says how long each one took.

All candidates read the same tokens, so that their routers choose the same experts. A job comes as JSON on stdin, the
outcome goes as JSON to stdout. `bench.offload` runs this under a memory limit.
"""

import json
import sys
import time
import zlib
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.stepping import Candidate
from bench.limits.engine_changes import Changes
from slimoe.offload.engine import Engine
from slimoe.offload.errors import SlimoeError
from slimoe.offload.plan.engine_config import ContextConfig, EngineConfig, MemoryConfig, changed
from slimoe.offload.resources.memory import peak_resident_bytes

OURS = "slimoe"
BASELINES = {"llama.cpp": True, "llama.cpp --no-repack": False}
_IO = Path("/proc/self/io")


@dataclass(frozen=True, slots=True)
class Job:
    """What a candidate reads: a prompt at once, then tokens one by one, the first `n_warm` of which do not count.

    `ram` and `engine` are for our engine alone.
    """

    candidate: str
    model: str
    n_threads: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    n_warm: int
    ram: str | None = None
    engine: Changes = field(default_factory=dict)

    @property
    def n_ctx(self) -> int:
        """The context, in the steps of 256 tokens that llama.cpp takes."""
        return -(-(len(self.prompt) + len(self.tokens)) // 256) * 256


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job took. All totals are of the steps that count.

    `graph_seconds` were spent inside graphs and `counters` are the engine's own, both empty for llama.cpp;
    `disk_bytes` is what the system read from disk for this process. `choices` are the likeliest tokens and `checksum`
    is that of all logits: equal means the same to the last bit.
    """

    load_seconds: float
    prompt_seconds: float
    step_seconds: list[float]
    graph_seconds: float
    counters: dict[str, float]
    disk_bytes: int | None
    peak_resident: int
    choices: list[int]
    checksum: int


def engine_config(job: Job) -> EngineConfig:
    """The configuration of our engine for a job."""
    config = EngineConfig(
        Path(job.model),
        n_threads=job.n_threads,
        context=ContextConfig(n_ctx=job.n_ctx),
        memory=MemoryConfig(ram=job.ram),
    )
    return changed(config, job.engine)


def open_candidate(job: Job) -> Candidate:
    """Opens the candidate; raises as `Engine.open` and `LlamaCpp` do."""
    if job.candidate in BASELINES:
        return LlamaCpp(LlamaCppConfig(Path(job.model), job.n_ctx, job.n_threads, BASELINES[job.candidate]))
    return Engine.open(engine_config(job))


def carry_out(job: Job) -> Outcome:
    """Opens the candidate, has it read everything, and closes it; raises as `open_candidate` does."""
    begin = time.perf_counter()
    with closing(open_candidate(job)) as candidate:
        opened = time.perf_counter()
        candidate.prefill(job.prompt)
        prompted = time.perf_counter()
        for token in job.tokens[: job.n_warm]:
            candidate.decode(token)
        step_seconds, choices, checksum = [], [], 0
        counters, graphs, disk = _counters(candidate), _graph_seconds(candidate), _disk_bytes()
        for token in job.tokens[job.n_warm :]:
            before = time.perf_counter()
            logits = candidate.decode(token)
            step_seconds.append(time.perf_counter() - before)
            choices.append(int(logits.argmax()))
            checksum = zlib.crc32(logits.tobytes(), checksum)
        now = _disk_bytes()
        return Outcome(
            opened - begin,
            prompted - opened,
            step_seconds,
            _graph_seconds(candidate) - graphs,
            {name: value - counters.get(name, 0) for name, value in _counters(candidate).items()},
            None if disk is None or now is None else now - disk,
            peak_resident_bytes(),
            choices,
            checksum,
        )


def _counters(candidate: Candidate) -> dict[str, float]:
    return candidate.counters() if isinstance(candidate, Engine) else {}


def _graph_seconds(candidate: Candidate) -> float:
    return candidate.compute_seconds if isinstance(candidate, Engine) else 0.0


def _disk_bytes() -> int | None:
    """What the system has read from disk for this process, page faults on mapped files included."""
    try:
        fields = dict(line.split(": ") for line in _IO.read_text().splitlines())
    except OSError:
        return None
    return int(fields["read_bytes"])


def main() -> None:
    """Carries out the job on stdin; exits as the `slimoe` command does."""
    try:
        outcome = carry_out(Job(**json.load(sys.stdin)))
    except SlimoeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main()
