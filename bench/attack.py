"""Attacks slimoe as strangers could: hostile requests to its server, and damaged or malicious files to its readers.

A seed gives always the same attack. What did not hold is told on standard error, by kind; `--only NAME --case N`
repeats one case. The last line of stdout is one JSON document, in which `holds` says whether everything did.

    python -m bench.attack
    python -m bench.attack --only files --kinds config,tokenizer --n-files 500
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import msgspec

from bench.attacks.body_attack import BodyPlan, attack_bodies
from bench.attacks.budget_attack import BudgetPlan, attack_budget
from bench.attacks.file_attack import FilePlan, attack_files
from bench.attacks.greedy_clients import Greed
from bench.attacks.soak import SoakPlan, soak
from bench.attacks.specimens import KINDS
from bench.attacks.template_attack import attack_templates
from bench.limits import machine
from bench.limits.finding import Finding, Outcome, tell
from bench.models.shapes import SHAPES
from slimoe.offload.errors import SlimoeError
from slimoe.server.options.engine_options import OptionsCommand

ATTACKS = ("bodies", "files", "templates", "budget", "soak", "faults")
_SMOKE_KINDS = tuple(kind for kind in KINDS if kind not in ("statistics", "recipe"))  # those need a calibration
_SMOKE_MIB = 500
_FAULT_FIGURES = ("cases", "clear_errors", "right_results", "wrong", "not_met", "seconds")


class FaultBenchError(SlimoeError):
    """The bench of faults ended without its figures."""


@dataclass(frozen=True, slots=True)
class AttackOptions:
    """How much of each attack is carried out. With a `case`, only that one of the bodies or files is tried."""

    seed: int
    n_bodies: int
    n_files: int
    n_bombs: int
    budget_seconds: float
    soak_seconds: float
    n_parallel: int
    n_kills: int
    kinds: tuple[str, ...]
    n_jobs: int
    model: Path | None
    case: int | None
    keeps: bool
    is_smoke: bool


def carry_out(name: str, options: AttackOptions) -> Outcome:
    """Carries out one of ATTACKS; raises SlimoeError where it could not even begin."""
    first = 0 if options.case is None else options.case

    budget = BudgetPlan(options.budget_seconds, model=options.model)
    endurance = SoakPlan(options.seed, options.soak_seconds, n_kills=options.n_kills, n_parallel=options.n_parallel)
    if options.is_smoke:
        budget = BudgetPlan(1, Greed(1 << 16, 1 << 16, 2, 1000, 1, 2), budget_mib=_SMOKE_MIB)
        endurance = SoakPlan(options.seed, 1, 4, 2, n_kills=1, shape=SHAPES["smoke"], budget_mib=_SMOKE_MIB)

    def count(number: int) -> int:
        return number if options.case is None else 1

    attacks: dict[str, Callable[[], Outcome]] = {
        "bodies": lambda: attack_bodies(BodyPlan(options.seed, count(options.n_bodies), first, options.model)),
        "templates": lambda: attack_templates(options.n_bombs),
        "budget": lambda: attack_budget(budget),
        "soak": lambda: soak(endurance),
        "faults": lambda: attack_system(options.seed),
        "files": lambda: attack_files(
            FilePlan(
                options.seed,
                count(options.n_files),
                first,
                options.kinds,
                options.n_jobs,
                options.keeps,
                tries_specimens=options.case is None and not options.is_smoke,
            )
        ),
    }
    return attacks[name]()


class Names(click.ParamType[tuple[str, ...]]):
    """Some of `known` names, separated by commas."""

    name = "names"

    def __init__(self, known: tuple[str, ...]) -> None:
        self.known = known

    def convert(
        self, value: str | tuple[str, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """The names as a tuple."""
        names = tuple(value.split(",")) if isinstance(value, str) else value
        unknown = next((name for name in names if name not in self.known), None)
        if unknown is not None:
            self.fail(f"{unknown!r} is none of {', '.join(self.known)}.", param, ctx)
        return names


def attack_system(seed: int) -> Outcome:
    """Has `bench.system_faults` make the system fail; raises FaultBenchError."""
    command = [sys.executable, "-m", "bench.system_faults", "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if not lines:
        raise FaultBenchError(f"{' '.join(command[1:])} ended with status {done.returncode}: {done.stderr[-2000:]}")
    document = json.loads(lines[-1])
    findings = [
        Finding("a wrong file or answer, or no clear line", one.partition(":")[0], one) for one in document["found"]
    ]
    return Outcome({name: document[name] for name in _FAULT_FIGURES}, findings)


@click.command("attack", cls=OptionsCommand)
@click.option("--only", type=Names(ATTACKS), default=ATTACKS, help=f"Some of {','.join(ATTACKS)}.")
@click.option("--seed", default=1, show_default=True)
@click.option("--case", type=click.IntRange(min=0), help="Only this one of bodies or files.")
@click.option("--n-bodies", type=click.IntRange(1), default=20_000, show_default=True)
@click.option("--n-files", type=click.IntRange(1), default=5_000, show_default=True)
@click.option("--n-bombs", type=click.IntRange(2), default=65, show_default=True, help="Chat templates.")
@click.option("--budget-seconds", type=click.FloatRange(1), default=60, show_default=True)
@click.option("--soak-seconds", type=click.FloatRange(1), default=600, show_default=True)
@click.option("--parallel", "n_parallel", type=click.IntRange(1), default=8, show_default=True, help="Of the soak.")
@click.option("--kills", "n_kills", type=click.IntRange(0), default=5, show_default=True, help="Of the engine.")
@click.option("--kinds", type=Names(KINDS), default=KINDS, help=f"Files of these kinds: {','.join(KINDS)}.")
@click.option("--jobs", "n_jobs", type=click.IntRange(1), default=2, show_default=True, help="Files read at once.")
@click.option("--model", type=click.Path(path_type=Path), help="Serve this file instead of the demo.")
@click.option("--keep", "keeps", is_flag=True, help="Leave mutants and specimens where they are.")
@click.option("--smoke", "is_smoke", is_flag=True, help="Seconds only: shows that the attacks work, proves nothing.")
def main(values: Mapping[str, Any]) -> None:
    """Attack slimoe, and say what did not hold."""
    only, is_smoke = values["only"], values["is_smoke"]
    options: AttackOptions = msgspec.convert(
        {name: value for name, value in values.items() if name != "only"}, AttackOptions
    )
    if is_smoke:
        only = tuple(name for name in only if name != "faults")  # which has a smoke of its own
        options = replace(options, n_bodies=60, n_files=len(_SMOKE_KINDS), n_bombs=2, kinds=_SMOKE_KINDS, n_jobs=1)
    document: dict[str, object] = {"seed": options.seed}
    holds = True
    for name in only:
        try:
            outcome = carry_out(name, options)
        except SlimoeError as error:
            outcome = Outcome({}, [Finding("the attack could not be carried out", name, str(error))])
        tell(name, outcome)
        document[name] = outcome.as_json()
        holds = holds and not outcome.findings
    print(json.dumps(document | {"holds": holds, "machine": machine.describe()}))
    sys.exit(0 if holds or is_smoke else 1)


if __name__ == "__main__":
    main()
