"""Sends hostile requests to a server, some at once, and evaluates what comes back."""

import asyncio
import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from bench.attacks.bodies import HostileRequest, hostile_request
from bench.attacks.http_reply import BadReplyError, fault_of, split_replies
from bench.limits.finding import Finding, Outcome
from bench.limits.victim import Victim, VictimError, victim, watched_health, watched_memory

HANG_SECONDS = 10.0
GROWTH_BYTES = 512 << 20
LEFT_BYTES = 64 << 20
HEALTH_MS, WORST_HEALTH_MS = 100.0, 1000.0
N_CONNECTIONS = 8
_FLAGS = ("--ctx", "256", "--parallel", "4", "--queue", "64", "--threads", "1")
_LINGER_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class BodyPlan:
    """Cases `first` to `first + n_cases` of a seed; the demo is attacked unless a model is named."""

    seed: int
    n_cases: int
    first: int = 0
    model: Path | None = None


@dataclass(slots=True)
class Tally:
    """How often each status has come back until now, what was wrong, and the seconds of the slowest answer."""

    statuses: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    slowest: float = 0.0


def attack_bodies(plan: BodyPlan) -> Outcome:
    """Starts a server, sends it all cases, and asks it a plain question before and after; raises VictimError."""
    tally = Tally()
    with victim(plan.model, *_FLAGS) as server:
        expected = server.greedy()
        begin = time.perf_counter()
        with watched_memory(server.process.pid) as memory, watched_health(server.url) as health:
            asyncio.run(_send_all(plan, server, tally))
        seconds = time.perf_counter() - begin
        tally.findings += server.log_findings() + server.aftermath(expected)
        log_bytes = len(server.log())
    if memory.peak - memory.before > GROWTH_BYTES or memory.after - memory.before > LEFT_BYTES:
        tally.findings.append(Finding("memory grows", "memory", str(memory.figures())))
    tally.findings += health.findings(HEALTH_MS, WORST_HEALTH_MS)
    figures = {
        "n_cases": plan.n_cases,
        "seconds": round(seconds, 1),
        "statuses": dict(sorted(tally.statuses.items())),
        "slowest_s": round(tally.slowest, 2),
        "memory": memory.figures(),
        "health": health.figures,
        "log_bytes": log_bytes,
    }
    return Outcome(figures, tally.findings)


async def _send_all(plan: BodyPlan, server: Victim, tally: Tally) -> None:
    cases = iter(range(plan.first, plan.first + plan.n_cases))

    async def work() -> None:
        for case in cases:
            await _try(server, plan.seed, case, tally)

    await asyncio.gather(*(work() for _ in range(N_CONNECTIONS)))


async def _try(server: Victim, seed: int, case: int, tally: Tally) -> None:
    request = hostile_request(seed, case)
    begin = time.perf_counter()
    try:
        try:
            data, is_cut = await asyncio.wait_for(exchange(server.place, request), HANG_SECONDS)
        except TimeoutError:  # once more: on a busy machine this process waits for itself
            data, is_cut = await asyncio.wait_for(exchange(server.place, request), HANG_SECONDS)
    except TimeoutError:
        tally.findings.append(Finding(f"no whole answer in {HANG_SECONDS:g} s", str(case), _shown(request)))
        return
    except ConnectionRefusedError:
        if server.process.poll() is not None:
            raise VictimError(f"The server ended at case {case}: {server.log()[-2000:]}") from None
        tally.findings.append(Finding("connection refused", str(case)))
        return
    tally.slowest = max(tally.slowest, time.perf_counter() - begin)
    for status, fault in _evaluate(request, data, is_cut):
        tally.statuses[status] += 1
        if fault is not None:
            kind = fault[:60] if fault.startswith("status 5") else fault.split(":")[0].split("(")[0].strip()
            tally.findings.append(Finding(kind, str(case), f"{fault} to {_shown(request)}"))


def _evaluate(request: HostileRequest, data: bytes, is_cut: bool) -> list[tuple[str, str | None]]:
    """The status of each reply, or a word where there is none, and what is wrong with it, None for nothing."""
    if request.is_abandoned:
        return [("abandoned", None)]
    try:
        replies = split_replies(data, request.method)
    except BadReplyError as error:
        return [("broken", None if is_cut and not request.is_whole else str(error))]
    evaluated = [(str(reply.status), fault_of(reply, request.method)) for reply in replies]
    n_missing = request.n_replies - len(replies)
    if n_missing > 0 and request.is_whole:
        evaluated.append(("none", "no answer to a whole request"))
    elif not replies:
        evaluated.append(("none", None))
    return evaluated


async def exchange(place: tuple[str, int], request: HostileRequest) -> tuple[bytes, bool]:
    """Sends a request. Returns what the server answers until it closes the connection, and whether it was reset."""
    reader, writer = await asyncio.open_connection(*place, limit=1 << 20)
    data = bytearray()
    is_cut = False
    try:
        for piece in request.pieces:
            writer.write(piece)
            with contextlib.suppress(ConnectionError):  # refused already; the answer is there to read
                await writer.drain()
            if request.pause:
                await asyncio.sleep(request.pause)
        if request.is_abandoned:
            data += await reader.read(20)
            writer.transport.abort()
            return bytes(data), True
        if not request.is_whole:
            # An answer may come before the client shows that nothing more will follow.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_read_on(reader, data), _LINGER_SECONDS)
            with contextlib.suppress(OSError, RuntimeError):
                writer.write_eof()
        await _read_on(reader, data)
    except ConnectionError:
        is_cut = True
    finally:
        writer.transport.abort()
    return bytes(data), is_cut


async def _read_on(reader: asyncio.StreamReader, data: bytearray) -> None:
    """Appends to `data` whatever comes until the server closes the connection."""
    while piece := await reader.read(1 << 16):
        data += piece


def _shown(request: HostileRequest) -> str:
    text = request.bytes[:4000].decode("utf-8", "replace")
    first, _, rest = text.partition("\r\n")
    return repr(f"{first} ... {rest[-160:]}")
