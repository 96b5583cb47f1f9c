"""Faults of the system under a server that answers while it reads experts from disk."""

import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.faults.cases import CLEAR, RIGHT, WRONG, BrokenBenchError, drawn
from bench.faults.library import Fault, FaultLibrary
from bench.limits.least_budget import least_budget
from bench.limits.victim import Victim, victim

_FAULTS = (
    Fault("read", "short", pattern="/sources/"),
    Fault("read", "EINTR", pattern="/sources/"),
    Fault("read", "EIO", pattern="/sources/"),
    Fault("read", "end", pattern="/sources/"),
    Fault("read", "ENOMEM", pattern="/sources/"),
    Fault("read", "ENXIO", pattern="/sources/"),
)
_ENDLESS = ("short", "EINTR")
_PROMPT = list(range(300, 340))
_SAME = -1
_ROUNDING = 0.05
"""Weights are F32, but keys and values are kept in F16."""
_PAUSE_SECONDS, _PATIENCE_SECONDS = 0.5, 60.0
_FLAGS = ("--ctx", "256")


def serve_cases(model: Path, n_cases: int, seed: int, library: FaultLibrary) -> Iterator[tuple[Fault, str, str, bool]]:
    """Yields (fault, outcome, why, whether it was met) of each case; a server that has ended is started again.

    The server has as little memory as it says it needs. Raises VictimError and BrokenBenchError where it does not work
    without any fault.
    """
    draw = random.Random(f"{seed} serve")
    done = 0
    environment = {**library.environment, "SLIMOE_CACHE": str(model.parent / "cache")}
    setting = ["env", *(f"{name}={value}" for name, value in environment.items())]
    flags = ("--ram", f"{least_budget(model, *_FLAGS).mib}MiB", *_FLAGS)
    while done < n_cases:
        with victim(model, *flags, wrap=lambda command: [*setting, *command]) as server:
            right = _asked(server, _SAME)
            if right.status != 200:
                raise BrokenBenchError(f"The server answers {right} without any fault.")
            while done < n_cases and server.process.poll() is None:
                fault = _FAULTS[done % len(_FAULTS)]
                with library.counting(fault.pattern) as counts:
                    _asked(server, done)
                always = fault.kind not in _ENDLESS and draw.random() < 0.4
                fault = drawn(fault, max(1, counts[fault.call]), 0.7 * draw.random(), always=always)
                with library.armed(fault):
                    answer = _asked(server, _SAME)
                is_hit = library.n_hit > 0
                done += 1
                yield (fault, *_evaluated(server, answer, right), is_hit)


def _asked(server: Victim, skip: int) -> "Answer":
    """What comes of the prompt that all cases share, or of another one."""
    prompt = _PROMPT if skip == _SAME else [token + 41 + skip for token in _PROMPT]
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 1}
    data = json.dumps(body).encode()
    request = urllib.request.Request(server.url + "/v1/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE_SECONDS) as response:
            choice = json.loads(response.read())["choices"][0]
            logprobs = choice["logprobs"]
            return Answer(response.status, choice["text"], tuple(logprobs["tokens"]), tuple(logprobs["token_logprobs"]))
    except urllib.error.HTTPError as error:
        try:
            return Answer(error.code, json.loads(error.read())["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return Answer(error.code, "")
    except OSError as error:
        return Answer(0, str(error))


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, and the text with its tokens, or the error's message."""

    status: int
    text: str
    tokens: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()

    def is_as(self, other: "Answer") -> bool:
        """Whether both are the same, or part at a token where two were equally likely but for rounding.

        After a failure the cache's cells lie in another order, and so sums do.
        """
        if (self.status, other.status) != (200, 200) or len(self.tokens) != len(other.tokens):
            return False
        for ours, theirs, one, two in zip(self.tokens, other.tokens, self.logprobs, other.logprobs, strict=True):
            if abs(one - two) > _ROUNDING:
                return False
            if ours != theirs:
                break
        return True


def _evaluated(server: Victim, answer: Answer, right: Answer) -> tuple[str, str]:
    """The answer under the fault, and that the server is well again behind it."""
    if findings := server.log_findings():
        return WRONG, f"in the log: {findings[0]}"
    if answer.status == 200 and not answer.is_as(right):
        return WRONG, f"the answer is another: {answer}"
    if answer.status != 200 and (answer.status < 500 or not answer.text):
        return WRONG, f"no clear error: {answer}"
    end = time.monotonic() + _PATIENCE_SECONDS
    while not (again := _asked(server, _SAME)).is_as(right):
        if again.status == 200:
            return WRONG, f"a later answer is another: {again}"
        if server.process.poll() is not None:
            return WRONG, f"the server ended: {' | '.join(server.log().splitlines()[-3:])}"
        if time.monotonic() > end:
            return WRONG, f"the server does not recover: {again}"
        time.sleep(_PAUSE_SECONDS)
    return (RIGHT, "") if answer.status == 200 else (CLEAR, answer.text)
