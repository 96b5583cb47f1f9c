"""Serves models whose chat templates are bombs, sets each off, and watches what others notice of it."""

import tempfile
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.attacks.gguf_mutants import Header, rewritten
from bench.attacks.template_bombs import COMPILED, RENDERED, armed_template
from bench.limits.finding import Finding, Outcome
from bench.limits.victim import Victim, VictimError, meanwhile, victim, watched_health, watched_memory
from slimoe.offload.gguf.keys import CHAT_TEMPLATE

DEMO = Path(__file__).parents[2] / "server" / "demo" / "demo.gguf"
ANSWER_SECONDS, GROWTH_BYTES = 2.0, 256 << 20
_PATIENCE = 15.0
HEALTH_MS, WORST_HEALTH_MS = 100.0, 1000.0
_FLAGS = ("--ctx", "256", "--parallel", "2", "--threads", "1")


@dataclass(slots=True)
class _Tally:
    slowest: float = 0.0
    slowest_at_once: float = 0.0
    most_growth: int = 0
    worst_health: float = 0.0
    n_bombs: int = 0
    findings: list[Finding] = field(default_factory=list)


def attack_templates(n_bombs: int) -> Outcome:
    """Sets off `n_bombs` in all, as many of both kinds as there are in proportion; raises VictimError."""
    n_compiled = min(len(COMPILED), max(1, round(n_bombs * len(COMPILED) / (len(COMPILED) + len(RENDERED)))))
    tally = _Tally()
    with tempfile.TemporaryDirectory(prefix="slimoe-templates-") as folder:
        model = Path(folder) / "model.gguf"
        write_with_template(DEMO, model, armed_template())
        remaining = list(range(min(len(RENDERED), n_bombs - n_compiled)))
        while remaining:
            remaining = _rendered(model, remaining, tally)
        for number, source in enumerate(COMPILED[:n_compiled]):
            write_with_template(DEMO, model, source)
            _compiled(model, number, tally)
    figures = {
        "n_bombs": tally.n_bombs,
        "slowest_s": round(tally.slowest, 2),
        "slowest_at_once_s": round(tally.slowest_at_once, 2),
        "most_growth_mib": round(tally.most_growth / 2**20, 1),
        "worst_health_ms": tally.worst_health,
    }
    return Outcome(figures, tally.findings)


def write_with_template(source: Path, target: Path, template: str) -> None:
    """Writes a copy of a model with another chat template."""
    name = CHAT_TEMPLATE.encode()

    def replace_template(header: Header) -> None:
        header.keys = [replace(key, value=template.encode()) if key.name == name else key for key in header.keys]

    target.write_bytes(rewritten(source.read_bytes(), replace_template))


def _rendered(model: Path, bombs: list[int], tally: _Tally) -> list[int]:
    """Sets bombs off one after the other; returns those left over when a server had to be given up."""
    with victim(model, *_FLAGS) as server:
        expected = _chat(server, "Hello")
        for place, bomb in enumerate(bombs):
            if not _set_off(server, f"rendered {bomb}", f"bomb {bomb}", expected, tally):
                return bombs[place + 1 :]
        _all_at_once(server, bombs, tally)
        if _chat(server, "Hello") != expected:
            tally.findings.append(Finding("another answer than before", "at once"))
        tally.findings += server.log_findings()
    return []


def _all_at_once(server: Victim, bombs: list[int], tally: _Tally) -> None:
    """Sets all bombs off at the same moment: some are stopped, the others told to come back, and none waits long."""

    def set_off(bomb: int) -> tuple[float, str | None]:
        begin = time.perf_counter()
        fault = _answer_fault(server, f"bomb {bomb}", may_be_told_to_wait=True)
        return time.perf_counter() - begin, fault

    with (
        watched_memory(server.process.pid) as memory,
        watched_health(server.url) as health,
        ThreadPoolExecutor(len(bombs)) as pool,
    ):
        answers = list(pool.map(set_off, bombs))
    tally.slowest_at_once = max(tally.slowest_at_once, *(seconds for seconds, _ in answers))
    tally.most_growth = max(tally.most_growth, memory.peak - memory.before)
    tally.findings += [Finding(fault.partition(":")[0], "at once", fault) for _, fault in answers if fault is not None]
    if tally.slowest_at_once > ANSWER_SECONDS:
        kind = f"bombs at once are answered after more than {ANSWER_SECONDS:g} s"
        tally.findings.append(Finding(kind, "at once", f"{tally.slowest_at_once:.1f}"))
    if memory.peak - memory.before > GROWTH_BYTES:
        tally.findings.append(Finding("bombs at once take more than 256 MiB", "at once", str(memory.figures())))
    tally.findings += [replace(finding, case="at once") for finding in health.findings(HEALTH_MS, WORST_HEALTH_MS)]


def _compiled(model: Path, number: int, tally: _Tally) -> None:
    case = f"compiled {number}"
    try:
        with victim(model, *_FLAGS) as server:
            _set_off(server, case, "Hello", None, tally)
            tally.findings += [replace(finding, case=case) for finding in server.log_findings()]
    except VictimError as error:
        tally.n_bombs += 1
        tally.findings.append(Finding("the model does not open", case, str(error)[-500:]))


def _set_off(server: Victim, case: str, content: str, expected: str | None, tally: _Tally) -> bool:
    """Sets off one bomb; False where the server is of no use afterwards."""
    tally.n_bombs += 1
    pid, url = server.process.pid, server.url
    with watched_memory(pid) as memory, watched_health(url) as health, _asking(server, expected) as faults:
        begin = time.perf_counter()
        fault = _answer_fault(server, content)
        seconds = time.perf_counter() - begin
    growth = memory.peak - memory.before
    tally.slowest, tally.most_growth = max(tally.slowest, seconds), max(tally.most_growth, growth)
    tally.worst_health = max(tally.worst_health, health.figures["max_ms"])
    if fault is not None:
        tally.findings.append(Finding(fault.partition(":")[0], case, fault))
    elif seconds > ANSWER_SECONDS:
        tally.findings.append(
            Finding(f"a bomb is answered after more than {ANSWER_SECONDS:g} s", case, f"{seconds:.1f}")
        )
    if growth > GROWTH_BYTES:
        tally.findings.append(Finding("a bomb takes more than 256 MiB", case, str(memory.figures())))
    found = [*health.findings(HEALTH_MS, WORST_HEALTH_MS)]
    found += [Finding("others are not answered meanwhile", case, one) for one in faults[:1]]
    tally.findings += [replace(finding, case=case) for finding in found]
    return fault is None or not fault.startswith("no answer")


def _answer_fault(server: Victim, content: str, *, may_be_told_to_wait: bool = False) -> str | None:
    try:
        _chat(server, content)
    except urllib.error.HTTPError as error:
        if may_be_told_to_wait and error.code == 503 and error.headers.get("Retry-After"):
            return None
        return None if error.code == 400 else f"status {error.code}: {error.read()[:300]!r}"
    except TimeoutError:
        return "no answer to a bomb"
    except (OSError, ValueError) as error:
        return f"no answer to a bomb: {error}"
    return None


def _chat(server: Victim, content: str) -> str:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
    return str(server.ask("/v1/chat/completions", body, _PATIENCE)["choices"][0]["message"]["content"])


@contextmanager
def _asking(server: Victim, expected: str | None) -> Iterator[list[str]]:
    """An ordinary client meanwhile: chats where `expected` is the right answer, otherwise plain completions.

    Yields the list of what it was told wrongly.
    """
    faults: list[str] = []

    def ask() -> None:
        try:
            if expected is None:
                server.greedy()
            elif _chat(server, "Hello") != expected:
                faults.append("another answer than before")
        except (OSError, ValueError) as error:
            faults.append(f"{error}")

    with meanwhile(ask, 0.1):
        yield faults
