"""Many streams for long, under a budget that misses: some are cut off by their clients, and the engine is killed.

What a client reads to its end is what it is told when it is alone. A stream that a kill ends is an error to its
client, never a shorter or another answer.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from bench.limits.finding import Finding, Outcome
from bench.limits.least_budget import least_budget
from bench.limits.victim import Victim, tree_bytes, victim, watched_health
from bench.models.random_model import write_random_model
from bench.models.shapes import Shape

FLAT_SHARE, MOST_HITS = 0.02, 0.7
FAIR_RATIO = 3.0
"""Of the 95th percentile of times to the first token to their median, at most: no request is left behind."""
_WORDS = (
    *("river", "mountain", "house", "garden", "winter", "letter", "song", "king"),
    *("water", "bread", "stone", "night", "morning", "horse", "ship", "tree"),
)
_N_TOKENS = 32
_SHAPE = Shape(4, 256, 512, 4, 2, 64, 16, 2, 512)
_KIND = "F32"  # in which no rounding of batches turns a close decision, so that answers are equal to the letter
_SPARE_SHARE = 0.4  # of the experts, in memory beside what is needed at least
_FLAGS = (
    *("--ctx", "256", "--queue", "64", "--threads", "1"),
    *("--weights", "copied", "--kv-type", "f32"),
)
_EVENT = re.compile(r'^slimoe_tier_events_total\{what="(hits|pending|misses)"\} (\S+)', re.MULTILINE)
_RUNNING = re.compile(r"^slimoe_num_requests_running (\S+)", re.MULTILINE)
_RESTART_SECONDS = 20
"""So long before a stream begins may a kill have been that explains its end: the next engine was not there yet."""
_PATIENCE = aiohttp.ClientTimeout(total=120)
HEALTH_MS, WORST_HEALTH_MS = 100.0, 2000.0


@dataclass(frozen=True, slots=True)
class SoakPlan:
    """How long `n_streams` clients ask `n_prompts` different prompts, and how often the engine is killed meanwhile.

    A stream is cut off with the probability `cut_share`. Without `budget_mib` the budget is what the server needs at
    least, and some more.
    """

    seed: int
    seconds: float
    n_streams: int = 50
    n_prompts: int = len(_WORDS)
    cut_share: float = 0.2
    n_kills: int = 5
    n_parallel: int = 8
    shape: Shape = _SHAPE
    budget_mib: int | None = None


@dataclass(slots=True)
class _Course:
    """How it went: how streams ended, kills, (time, bytes) of memory, seconds to first tokens, and counters."""

    ends: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)


def soak(plan: SoakPlan) -> Outcome:
    """Asks all prompts alone with everything in memory, then under a budget for long; raises VictimError."""
    prompts = [f"Define the noun {word}." for word in _WORDS[: plan.n_prompts]]
    course, flags = _Course(), (*_FLAGS, "--parallel", str(plan.n_parallel))
    with tempfile.TemporaryDirectory(prefix="slimoe-soak-") as folder:
        model = Path(folder) / "model.gguf"
        n_bytes = write_random_model(model, plan.shape.spec, kind=_KIND, vocabulary=True)
        with victim(model, *flags) as server:
            expected = {prompt: asyncio.run(_alone(server, prompt)) for prompt in prompts}
        budget = plan.budget_mib or least_budget(model, *flags).mib + round(_SPARE_SHARE * n_bytes / 2**20)
        with victim(model, "--ram", f"{budget}MiB", *flags) as server:
            with watched_health(server.url) as health:
                asyncio.run(_run(plan, server, expected, course))
            course.findings += server.log_findings()
    n_asked = sum(course.events.values())
    hit_share = course.events["hits"] / n_asked if n_asked else 1.0
    drift = memory_drift(course.memory, course.kills)
    fairness = unevenness(course.first_tokens)
    if not course.kills and fairness is not None and fairness > FAIR_RATIO:
        course.findings.append(Finding("some wait much longer than others", "first tokens", f"{fairness:.1f}"))
    if drift is not None and drift > FLAT_SHARE:
        course.findings.append(Finding("memory grows", "memory", f"{drift:.1%}"))
    if hit_share > MOST_HITS:
        course.findings.append(Finding("the budget does not miss enough to show anything", "hits", f"{hit_share:.0%}"))
    figures: dict[str, Any] = {
        "seconds": plan.seconds,
        "n_streams": plan.n_streams,
        "n_parallel": plan.n_parallel,
        "budget_mib": budget,
        "ends": dict(course.ends),
        "n_kills": len(course.kills),
        "hit_share": round(hit_share, 3),
        "memory_drift": None if drift is None else round(drift, 4),
        "first_token_p95_to_median": None if fairness is None else round(fairness, 2),
        "health": health.figures,
    }
    return Outcome(figures, course.findings)


def memory_drift(samples: list[tuple[float, int]], kills: list[float]) -> float | None:
    """The memory of the last engine over that of the second one, less 1, each the median of its second half.

    `samples` are (time, bytes). The first engine does not count, since it has still to allocate what is made once.
    Without kills the two halves of the time are compared in the place of engines. None where there are too few samples.
    """
    if samples and not kills:
        kills = [samples[0][0], (samples[0][0] + samples[-1][0]) / 2]
    ends = [*kills, samples[-1][0] + 1.0] if samples else []
    medians = []
    for begin, end in itertools.pairwise(ends):
        inside = [n_bytes for at, n_bytes in samples if (begin + end) / 2 <= at < end]
        medians += [statistics.median(inside)] if inside else []
    return medians[-1] / medians[0] - 1 if len(medians) > 1 else None


def unevenness(first_tokens: list[float]) -> float | None:
    """The 95th percentile of times to the first token over their median; None where there are too few."""
    if len(first_tokens) < 20:
        return None
    return statistics.quantiles(first_tokens, n=20)[-1] / statistics.median(first_tokens)


async def _run(plan: SoakPlan, server: Victim, expected: dict[str, str], course: _Course) -> None:
    """Serves all streams under kills, then checks that all slots answer at once and rightly, and that nothing runs."""
    end = time.monotonic() + plan.seconds
    async with aiohttp.ClientSession(timeout=_PATIENCE, connector=aiohttp.TCPConnector(limit=0)) as session:
        under_way = [_client(plan, n, session, server, expected, course, end) for n in range(plan.n_streams)]
        tasks = [asyncio.create_task(one) for one in (_sample(session, server, course, end), *under_way)]
        for _ in range(plan.n_kills):  # at equal distances, so that each engine has the same time
            await asyncio.sleep(plan.seconds / (plan.n_kills + 1))
            with contextlib.suppress(aiohttp.ClientError, ProcessLookupError):
                async with session.get(server.url + "/props") as response:
                    pid = (await response.json())["engine_pid"]
                os.kill(pid, signal.SIGKILL)
                course.kills.append(time.monotonic())
        await asyncio.gather(*tasks)
        prompts = list(expected)[: plan.n_parallel]
        answers = await asyncio.gather(*(_stream(session, server, prompt, None) for prompt in prompts))
        for prompt, (text, how) in zip(prompts, answers, strict=True):
            if how != "whole" or text != expected[prompt]:
                course.findings.append(Finding("another answer than alone after the soak", prompt, f"{how}: {text}"))
        await asyncio.sleep(1)
        async with session.get(server.url + "/metrics") as response:
            running = _RUNNING.search(await response.text())
        if running is None or float(running[1]):
            course.findings.append(Finding("slots are lost", "slots", "none" if running is None else running[1]))


async def _client(
    plan: SoakPlan,
    number: int,
    session: aiohttp.ClientSession,
    server: Victim,
    expected: dict[str, str],
    course: _Course,
    end: float,
) -> None:
    rng = random.Random(f"{plan.seed}/{number}")
    while time.monotonic() < end:
        prompt = rng.choice(list(expected))
        n_pieces = rng.randrange(1, _N_TOKENS) if rng.random() < plan.cut_share else None
        begin = time.monotonic()
        try:
            text, how = await _stream(session, server, prompt, n_pieces, course.first_tokens)
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            text, how = type(error).__name__, "broken"
        course.ends[how] += 1
        if how == "whole" and text != expected[prompt]:
            course.findings.append(
                Finding("another answer than alone", prompt, f"{text!r}, alone {expected[prompt]!r}")
            )
        elif how in ("error", "broken") and not any(kill > begin - _RESTART_SECONDS for kill in course.kills):
            course.findings.append(Finding(f"a stream ends with an {how} that no kill explains", prompt, text))
        if how in ("later", "error", "broken"):
            await asyncio.sleep(0.5)


async def _stream(
    session: aiohttp.ClientSession,
    server: Victim,
    prompt: str,
    n_pieces: int | None,
    first_tokens: list[float] | None = None,
) -> tuple[str, str]:
    """The text and how the stream ended: whole, cut, error, or later where the server asks to come again.

    The seconds to its first token are added to `first_tokens`.
    """
    begin = time.monotonic()
    body = {"prompt": prompt, "max_tokens": _N_TOKENS, "temperature": 0, "stream": True, "ignore_eos": True}
    pieces: list[str] = []
    async with session.post(server.url + "/v1/completions", json=body) as response:
        if response.status in (429, 503) and "Retry-After" in response.headers:
            return "", "later"
        if response.status != 200:
            return f"status {response.status}: {await response.text()}", "error"
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                return "".join(pieces), "whole"
            document = json.loads(line[6:])
            if "error" in document:
                return str(document["error"]), "error"
            if not pieces and first_tokens is not None:
                first_tokens.append(time.monotonic() - begin)
            pieces += [choice["text"] for choice in document["choices"]]
            if n_pieces is not None and len(pieces) >= n_pieces:
                return "".join(pieces), "cut"
    return "".join(pieces), "broken"


async def _alone(server: Victim, prompt: str) -> str:
    async with aiohttp.ClientSession(timeout=_PATIENCE) as session:
        text, how = await _stream(session, server, prompt, None)
    assert how == "whole", f"{how}: {text}"
    return text


async def _sample(session: aiohttp.ClientSession, server: Victim, course: _Course, end: float) -> None:
    """Notes the memory and the tiers' counters, which begin again with each engine."""
    last: Counter[str] = Counter()
    while time.monotonic() < end:
        course.memory.append((time.monotonic(), tree_bytes(server.process.pid)))
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(server.url + "/metrics") as response:
                now = Counter({name: int(float(value)) for name, value in _EVENT.findall(await response.text())})
            course.events += now - last if now.total() >= last.total() else now
            last = now
        await asyncio.sleep(0.5)
