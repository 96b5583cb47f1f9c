"""Serves in a control group of the budget's size while greedy clients take what they can get."""

import asyncio
import contextlib
import os
import re
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.attacks.greedy_clients import Answers, Greed, greedy_clients
from bench.limits.cgroup import MemoryGroup, NoControlGroupError, memory_group
from bench.limits.finding import Finding, Outcome
from bench.limits.least_budget import LeastBudget, least_budget
from bench.limits.victim import Victim, meanwhile, victim, watched_health, watched_memory

HEALTH_MS, WORST_HEALTH_MS = 100.0, 1000.0
_FLAGS = ("--ctx", "256", "--parallel", "2", "--threads", "1")
_RESTARTS = re.compile(r"^slimoe_engine_restarts (\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class BudgetPlan:
    """Seconds of `greed` in a server of a model, the demo if None, with `budget_mib` or the least that starts."""

    seconds: float
    greed: Greed = field(default_factory=Greed)
    model: Path | None = None
    budget_mib: int | None = None


@dataclass(slots=True)
class Ordinary:
    """How a client fared that asks one plain question after the other: right answers, requests to wait, and faults."""

    n_right: int = 0
    n_told_to_wait: int = 0
    faults: list[str] = field(default_factory=list)

    def findings(self) -> list[Finding]:
        """What the client was told wrongly, or that it was told nothing."""
        found = [Finding(f"an ordinary client: {fault.partition(':')[0]}", "ordinary", fault) for fault in self.faults]
        return found if self.n_right else [*found, Finding("an ordinary client gets no answer", "ordinary")]


def attack_budget(plan: BudgetPlan) -> Outcome:
    """Finds the least budget that the server advises, and attacks it there; raises VictimError."""
    budget = LeastBudget((plan.budget_mib,)) if plan.budget_mib else least_budget(plan.model, *_FLAGS)
    findings = []
    if len(budget.tried) > 2:
        findings.append(Finding("the advised --ram does not start", "advice", str(budget.tried)))
    ordinary, answers = Ordinary(), Answers()
    with ExitStack() as stack:
        group: MemoryGroup | None = None
        with contextlib.suppress(NoControlGroupError):
            group = stack.enter_context(memory_group(budget.mib << 20))
        wrap = list if group is None else group.entering
        server = stack.enter_context(victim(plan.model, "--ram", f"{budget.mib}MiB", *_FLAGS, wrap=wrap))
        expected = server.greedy()
        memory = stack.enter_context(watched_memory(server.process.pid))
        with watched_health(server.url) as health, ThreadPoolExecutor(1, initializer=_give_way) as attackers:
            attackers.submit(asyncio.run, _attack(plan, server, expected, answers, ordinary)).result()
        findings += server.log_findings() + ordinary.findings()
        if server.process.poll() is None:
            time.sleep(1)
            try:
                with urllib.request.urlopen(server.url + "/metrics", timeout=10) as response:
                    restarts = _RESTARTS.search(response.read().decode())
                if restarts is not None and float(restarts[1]):
                    findings.append(Finding("the engine was started again", "after", restarts[1]))
            except OSError as error:
                findings.append(Finding("no metrics after the attack", "after", str(error)))
        findings += server.aftermath(expected)
        usage = None if group is None else group.usage()
        memory_now = memory.peak
    findings += health.findings(HEALTH_MS, WORST_HEALTH_MS)
    if usage is not None and usage.n_oom_kills:
        findings.append(Finding("the control group killed something", "group", str(usage)))
    figures: dict[str, Any] = {
        "budget_mib": budget.mib,
        "group": "none can be made here" if usage is None else asdict(usage),
        "peak_mib": round(memory_now / 2**20, 1),
        "seconds": plan.seconds,
        "health": health.figures,
        "ordinary": {"n_right": ordinary.n_right, "n_told_to_wait": ordinary.n_told_to_wait},
        "answers": {name: dict(sorted(counter.items())) for name, counter in answers.statuses.items()},
    }
    return Outcome(figures, findings)


def _give_way() -> None:
    """Lets every other thread of the machine go first: real attackers have processors of their own."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)


async def _attack(plan: BudgetPlan, server: Victim, expected: str, answers: Answers, ordinary: Ordinary) -> None:
    def ask() -> None:
        try:
            if server.greedy() == expected:
                ordinary.n_right += 1
            else:
                ordinary.faults.append("another answer than before")
        except urllib.error.HTTPError as error:
            if error.headers.get("Retry-After"):
                ordinary.n_told_to_wait += 1
            else:
                ordinary.faults.append(f"status {error.code}: {error.read()[:200]!r}")
        except (OSError, ValueError) as error:
            ordinary.faults.append(f"{type(error).__name__}: {error}")

    with meanwhile(ask, 0.1):
        clients = [asyncio.create_task(one) for one in greedy_clients(server.place, plan.greed, answers)]
        await asyncio.sleep(plan.seconds)
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
