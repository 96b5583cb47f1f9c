"""Faults of the system under a server that answers while it reads experts from disk."""

import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.fault_cases import CLEAR, RIGHT, WRONG, BrokenBenchError, drawn
from bench.fault_library import ALWAYS, Fault, FaultLibrary
from bench.victim import Victim, VictimError, victim

_FAULTS = (
    Fault("read", "short", pattern="/sources/"),
    Fault("read", "EINTR", pattern="/sources/"),
    Fault("read", "EIO", pattern="/sources/"),
    Fault("read", "end", pattern="/sources/"),
    Fault("read", "ENOMEM", pattern="/sources/"),
    Fault("memory", "ENOMEM"),
    Fault("thread", "EAGAIN"),
)
_ENDLESS = ("short", "EINTR")
_PROMPT = list(range(300, 340))
_MOST_STEPS = 4
_PATIENCE_SECONDS = 60.0
_ADVICE = re.compile(r"Raise --ram to (\S+),")


def serve_cases(model: Path, n_cases: int, seed: int, library: FaultLibrary) -> Iterator[tuple[Fault, str, str, bool]]:
    """(fault, outcome, why, whether it was met) of each; a server that has ended is started again."""
    draw = random.Random(f"{seed} serve")
    done = 0
    environment = {**library.environment, "SLIMOE_CACHE": str(model.parent / "cache")}
    room = _room(model)
    while done < n_cases:
        with victim(model, "--ram", room, "--ctx", "256", wrap=lambda command: _with(environment, command)) as server:
            right = _asked(server, 40)
            if right[0] != 200:
                raise BrokenBenchError(f"The server answers {right} without any fault.")
            while done < n_cases and server.process.poll() is None:
                fault = _FAULTS[done % len(_FAULTS)]
                with library.armed(Fault(fault.call, "EIO", ALWAYS, 1, fault.pattern)):
                    _asked(server, done)
                always = fault.call == "thread" or (fault.kind not in _ENDLESS and draw.random() < 0.4)
                fault = drawn(fault, max(1, library.n_seen), draw.random(), always=always)
                with library.armed(fault):
                    answer = _asked(server, 40)
                is_hit = library.n_hit > 0
                done += 1
                yield (fault, *_judged(server, answer, right), is_hit)


def _with(environment: dict[str, str], command: Any) -> list[str]:
    return ["env", *(f"{name}={value}" for name, value in environment.items()), *command]


def _room(model: Path) -> str:
    """The least --ram that the server says it needs; raises BrokenBenchError."""
    room = "1MiB"
    for _ in range(_MOST_STEPS):
        try:
            with victim(model, "--ram", room, "--ctx", "256"):
                return room
        except VictimError as error:
            found = _ADVICE.search(str(error))
            room = room if found is None else found[1]
    raise BrokenBenchError(f"slimoe serve --ram {room} does not say how much it needs.")


def _asked(server: Victim, skip: int) -> tuple[int, str]:
    """Status, and the text or the error's message; tokens are never those of the request before."""
    prompt = _PROMPT if skip == 40 else [token + 41 + skip for token in _PROMPT]
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "cache_prompt": False}
    data = json.dumps(body).encode()
    request = urllib.request.Request(server.url + "/v1/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE_SECONDS) as response:
            return response.status, json.loads(response.read())["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        try:
            return error.code, json.loads(error.read())["error"]["message"]
        except (ValueError, KeyError, TypeError):
            return error.code, ""
    except OSError as error:
        return 0, str(error)


def _judged(server: Victim, answer: tuple[int, str], right: tuple[int, str]) -> tuple[str, str]:
    """The answer under the fault, and that the server is well again behind it."""
    if findings := server.log_findings():
        return WRONG, f"in the log: {findings[0]}"
    if answer[0] == 200 and answer != right:
        return WRONG, f"the answer is another: {answer[1]!r}"
    if answer[0] != 200 and (answer[0] < 500 or not answer[1]):
        return WRONG, f"no clear error: {answer}"
    end = time.monotonic() + _PATIENCE_SECONDS
    while (again := _asked(server, 40)) != right:
        if again[0] == 200:
            return WRONG, f"a later answer is another: {again[1]!r}"
        if server.process.poll() is not None:
            return WRONG, f"the server ended: {os.linesep.join(server.log().splitlines()[-3:])}"
        if time.monotonic() > end:
            return WRONG, f"the server does not recover: {again}"
        time.sleep(0.5)
    return (RIGHT, "") if answer[0] == 200 else (CLEAR, answer[1])
