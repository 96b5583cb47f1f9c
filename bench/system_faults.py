"""What the system does to programs at its worst: reads that fail or are short, full disks, refused memory and threads.

A preloaded library makes calls fail that were drawn by a seed, in `slimoe convert`, `calibrate`, `run`, `inspect` and
under a server that reads from disk. Each case is to end in the right result or in one clear line, never in a wrong file
or answer. The last line of stdout is one JSON document.

    python -m bench.system_faults
    python -m bench.system_faults --only convert --case 7
"""

import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click

from bench.faults.cases import CLEAR, RIGHT, WRONG, Places, Scenario, drawn, evaluate, expected, make_scenarios
from bench.faults.forked_commands import ForkedCommands
from bench.faults.library import Fault, FaultLibrary
from bench.faults.served import serve_cases

_ENDLESS = ("short", "EINTR")
"""Kinds that a program has to go on after: with them for ever, EINTR would be a loop that only a signal ends."""
_LIMITS = ("thread",)
"""What the system refuses once it goes on to refuse."""
_SMOKE = {"convert": 6, "run": 4, "inspect": 2}


@dataclass(frozen=True, slots=True)
class Case:
    """A scenario's fault, and whether an older file is in the place of the result."""

    scenario: Scenario
    fault: Fault
    with_old: bool


class Tally:
    """How all cases ended until now."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.by_command: dict[str, Counter[str]] = {}
        self.wrong: list[str] = []
        self.n_unhit = 0

    def add(self, name: str, fault: Fault, outcome: str, why: str, *, is_hit: bool) -> None:
        """Counts a case, and tells of it where it went wrong."""
        self.outcomes[outcome] += 1
        self.by_command.setdefault(name, Counter())[outcome] += 1
        self.n_unhit += not is_hit
        if outcome == WRONG:
            self.wrong.append(f"{name}: {fault}: {why}")
            print(f"WRONG {self.wrong[-1]}", file=sys.stderr, flush=True)

    def document(self, seconds: float) -> dict[str, object]:
        """The counts as a JSON document."""
        return {
            "bench": "system_faults",
            "cases": self.outcomes.total(),
            "clear_errors": self.outcomes[CLEAR],
            "right_results": self.outcomes[RIGHT],
            "wrong": self.outcomes[WRONG],
            "not_met": self.n_unhit,
            "by_command": {name: dict(counts) for name, counts in self.by_command.items()},
            "found": self.wrong,
            "seconds": round(seconds, 1),
        }


def draw_cases(scenario: Scenario, counts: dict[Fault, int], n_cases: int, draw: random.Random) -> list[Case]:
    """Draws faults of all kinds in turn that the command can meet, each somewhere among the calls that it makes."""
    met = [fault for fault in scenario.faults() if counts[fault]]
    draw.shuffle(met)
    cases = []
    for n in range(n_cases):
        fault = met[n % len(met)]
        always = fault.call in _LIMITS or (fault.kind not in _ENDLESS and draw.random() < 0.4)
        place = 0.0 if n < len(met) and draw.random() < 0.3 else draw.random()
        cases.append(Case(scenario, drawn(fault, counts[fault], place, always=always), draw.random() < 0.5))
    return cases


def count_calls(
    scenario: Scenario, places: Places, commands: ForkedCommands, library: FaultLibrary
) -> dict[Fault, int]:
    """How many calls of each fault's kind the command makes, counted in runs without any fault."""
    counts: dict[str, dict[str, int]] = {}
    for pattern in {fault.pattern for fault in scenario.faults()}:
        places.clear(with_old=True)
        with library.counting(pattern) as counts[pattern]:
            commands.run(scenario.arguments)
    return {fault: counts[fault.pattern][fault.call] for fault in scenario.faults()}


def run_scenario(
    scenario: Scenario,
    n_cases: int,
    seed: int,
    only: int | None,
    places: Places,
    commands: ForkedCommands,
    library: FaultLibrary,
    tally: Tally,
) -> None:
    """Carries out a command's cases."""
    right = expected(scenario, places, commands)
    counts = count_calls(scenario, places, commands, library)
    cases = draw_cases(scenario, counts, n_cases, random.Random(f"{seed} {scenario.name}"))
    for number, case in enumerate(cases):
        if only is not None and number != only:
            continue
        places.clear(with_old=case.with_old)
        with library.armed(case.fault):
            ended = commands.run(scenario.arguments)
        outcome, why = evaluate(ended, scenario, places, right, with_old=case.with_old)
        tally.add(scenario.name, case.fault, outcome, why, is_hit=library.n_hit > 0)
        if only is not None:
            print(f"{case.fault}: {outcome} {why}\n{ended.err}", file=sys.stderr)


@click.command()
@click.option("--seed", default=1, show_default=True, help="Chooses the calls that fail.")
@click.option("--cases", "n_cases", default=30, show_default=True, help="Cases of each command.")
@click.option("--only", "name", help="One command's cases, such as convert or serve.")
@click.option("--case", "number", type=int, help="One case of them.")
@click.option("--smoke", is_flag=True, help="A few cases of the quick commands, to see that all of this works.")
def main(seed: int, n_cases: int, name: str | None, number: int | None, smoke: bool) -> None:
    """Makes calls of the system fail in slimoe's commands, and evaluates how they end."""
    begin, tally = time.monotonic(), Tally()
    with tempfile.TemporaryDirectory(prefix="slimoe-faults-") as folder:
        directory = Path(folder)
        library, places = FaultLibrary(directory), Places.make(directory)
        if name != "serve":
            environment = {**library.environment, "SLIMOE_CACHE": str(directory / "cache")}
            calibrates = not smoke and name in (None, "compress", "calibrate")
            with ForkedCommands(directory, environment, calibrates=calibrates) as commands:
                for scenario in make_scenarios(places, commands, calibrates=calibrates):
                    wanted = _SMOKE.get(scenario.name, 0) if smoke else n_cases
                    if wanted and name in (None, scenario.name):
                        run_scenario(scenario, wanted, seed, number, places, commands, library, tally)
        if not smoke and name in (None, "serve"):
            for fault, outcome, why, is_hit in serve_cases(places.exact_model, n_cases, seed, library):
                tally.add("serve", fault, outcome, why, is_hit=is_hit)
    print(json.dumps(tally.document(time.monotonic() - begin)))
    sys.exit(1 if tally.wrong else 0)


if __name__ == "__main__":
    main()
