"""A link that becomes slower while a simulated machine answers, and well again: the engine, watched, against static.

The machines are those of the grid (`bench.simulated.grid`). The engine decides by its own classes, measures again what
they say is due, and pays for that; beside it stands one that goes on by what it measured at the start. All times are
over those of experts that stay. The table goes to stderr, the last line of stdout is one JSON document.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import click
import numpy as np

from bench.simulated.caches import Counts, most_used, placed
from bench.simulated.engine import Residents, measured
from bench.simulated.grid import DEVICES, HOSTS, LINKS, MODELS, TINY, Model, Scale, step_ms
from bench.simulated.machine import Machine
from bench.simulated.routing import Floats, Ids
from slimoe.offload.cache.policy import PolicyContext, make_policy
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.swap import SlotExchange, SwapRule
from slimoe.offload.experts.layer_uploads import LayerUploads
from slimoe.offload.machine.cost_model import expected_uses
from slimoe.offload.machine.watchdog import Watchdog

_EACH = Scale(n_warm=0)


@dataclass(frozen=True, slots=True)
class Course:
    """`n_warm` tokens, then `n_slow` over a link that is `slower` times as slow, then `n_after` as before."""

    n_warm: int = 320
    n_slow: int = 512
    n_after: int = 768
    slower: float = 10.0

    def machine(self, machine: Machine, token: int) -> Machine:
        """The machine at a token."""
        if self.n_warm <= token < self.n_warm + self.n_slow:
            return replace(machine, link_rate=machine.link_rate / self.slower)
        return machine

    def windows(self) -> dict[str, slice]:
        """Stretches of tokens by name."""
        slow, after = self.n_warm, self.n_warm + self.n_slow
        return {
            "before": slice(slow - 128, slow),
            "slow, first 64": slice(slow, slow + 64),
            "slow, first 256": slice(slow, slow + 256),
            "slow, later": slice(slow + 256, after),
            "well again, first 256": slice(after, after + 256),
            "well again, later": slice(after + 256, None),
        }


@dataclass(frozen=True, slots=True, eq=False)
class Watched:
    """Milliseconds of each token, measuring included, its mode, and the seconds that a copy was taken to need."""

    ms: Floats
    modes: list[str]
    copies: list[float]


class Engine:
    """The engine's decisions token by token, with the machine as it is at each."""

    def __init__(self, model: Model, priors: Floats, n_slots: int, machine: Machine, *, is_watched: bool) -> None:
        self._model, self._is_watched = model, is_watched
        context = PolicyContext(model.n_layer, model.n_expert, model.n_used, priors)
        self._policy = make_policy("lfu-decay", context)
        self._kinds = np.zeros(self._policy.shape, np.int32)
        self._residents = Residents(most_used(self._policy.values, n_slots))
        self.watchdog = Watchdog(measured(machine, model.expert_bytes), model.n_used)
        self._apply()

    def _apply(self) -> None:
        costs, mode = self.watchdog.costs, "static" if self.watchdog.is_still else self.watchdog.choice.mode
        rule, policy = SwapRule(costs.gain, costs.copy), self._policy
        self._uploads = LayerUploads(policy, costs, self._kinds) if mode == "upload" else None
        self._exchange = SlotExchange(policy, rule, lambda key: 0) if mode == "swap" else None

    def token(self, selected: Ids, machine: Machine) -> float:
        """Milliseconds of one token, whose experts are [n_layer, n_used]."""
        counts = self._counts(selected)
        ms = step_ms(self._model, machine, counts, _EACH)
        if not self._is_watched:
            return ms
        has_moved = counts.moved.sum() + counts.uploaded.sum()
        has_changed, part = self.watchdog.step(ms / 1e3, is_token=True, has_moved=bool(has_moved)), self.watchdog.due()
        if part is not None:
            found = getattr(measured(machine, self._model.expert_bytes), part)
            spent = (1 if part == "copy" else 2) * found + 4 * machine.link_delay
            has_changed |= self.watchdog.measured(part, found, spent)
            ms += 1e3 * spent
        if has_changed:
            self._apply()
        return ms

    def _counts(self, selected: Ids) -> Counts:
        counts, residents, missed = Counts.empty(1, len(selected)), self._residents, list[Key]()
        if self._uploads is not None:
            self._uploads.begin_token(residents.is_here)
        for layer, experts in enumerate(selected):
            self._policy.decode(layer, experts)
            is_here = residents.is_here[layer, experts]
            counts.here[0, layer] = np.count_nonzero(is_here)
            absent = experts[~is_here]
            missed += [(layer, expert) for expert in absent.tolist()]
            if self._uploads is not None and absent.size:
                chosen = self._uploads.choose(layer, absent, len(experts) - absent.size)
                counts.uploaded[0, layer] = len(chosen)
                for upload in chosen:
                    if upload.victim is not None:
                        residents.put((layer, upload.expert), upload.victim)
        if self._exchange is not None:
            swaps = self._exchange.choose(residents, missed, lambda key: True)
            counts.moved[0] = len(swaps)
            for victim, newcomer in swaps:
                residents.put(newcomer, victim)
        self._policy.end_token()
        return counts


def watched(engine: Engine, selected: Ids, machine: Machine, course: Course) -> Watched:
    """All tokens, one after the other."""
    found = Watched(np.empty(len(selected)), [], [])
    for token, experts in enumerate(selected):
        found.modes.append(engine.watchdog.choice.mode)
        found.copies.append(engine.watchdog.costs.copy)
        found.ms[token] = engine.token(experts, course.machine(machine, token))
    return found


@dataclass(frozen=True, slots=True)
class Row:
    """Times over those of experts that stay, by window, of the engine and of one that is not watched.

    `noticed` is after how many tokens over the slow link the engine decides by that, None if it never did; `modes` are
    those before, while it is slow at last, and at the end.
    """

    model: str
    habits: str
    host: str
    link: str
    ratios: dict[str, float]
    unwatched: dict[str, float]
    noticed: int | None
    modes: tuple[str, str, str]


def row(model: Model, habits: str, device: str, host: str, link: str, course: Course, seed: int = 1) -> Row:
    """One machine."""
    n_tokens = course.n_warm + course.n_slow + course.n_after
    routing = model.routing(habits, n_tokens, seed)
    uses = expected_uses(routing.likings, model.n_layer, model.n_expert, model.n_used)
    vram, device_rate = DEVICES[device]
    n_slots, machine = model.n_slots(vram), Machine(device_rate, *HOSTS[host], LINKS[link])
    runs = [
        watched(Engine(model, uses, n_slots, machine, is_watched=is_watched), routing.selected, machine, course)
        for is_watched in (True, False)
    ]
    staying = placed(routing.selected, most_used(uses, n_slots))
    still = np.array(
        [
            step_ms(
                model,
                machine,
                Counts(*(part[[token]] for part in (staying.here, staying.uploaded, staying.moved))),
                _EACH,
            )
            for token in range(n_tokens)
        ]
    )
    ratios = [
        {name: float(run.ms[at].sum() / still[at].sum()) for name, at in course.windows().items()} for run in runs
    ]
    modes, begin, end = runs[0].modes, course.n_warm, course.n_warm + course.n_slow
    copies = runs[0].copies
    noticed = next((token - begin for token in range(begin, end) if copies[token] > 2 * copies[begin]), None)
    return Row(model.name, habits, host, link, ratios[0], ratios[1], noticed, (modes[begin], modes[end - 1], modes[-1]))


def table(rows: Sequence[Row]) -> str:
    """Markdown: for each machine the engine's times, and behind them in brackets those of one that is not watched."""
    names = list(rows[0].ratios)
    lines = [
        f"| model, texts | host, link | {' | '.join(names)} | noticed after | modes |",
        f"| --- | --- |{' --: |' * (len(names) + 1)} --- |",
    ]
    for one in rows:
        cells = (f"{one.ratios[name]:.2f} ({one.unwatched[name]:.2f})" for name in names)
        noticed = "-" if one.noticed is None else str(one.noticed)
        head = f"| {one.model}, {one.habits} | {one.host}, {one.link} |"
        lines.append(f"{head} {' | '.join(cells)} | {noticed} | {', '.join(one.modes)} |")
    return "\n".join(lines)


@click.command()
@click.option("--device", type=click.Choice(list(DEVICES)), default="12 GiB", show_default=True)
@click.option("--link", "links", type=click.Choice(list(LINKS)), multiple=True, default=["4.0 x16"], show_default=True)
@click.option("--slower", type=click.FloatRange(1), default=Course().slower, show_default=True, help="So many times.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of the made-up routing.")
@click.option("--smoke", is_flag=True, help="Seconds only, a tiny model.")
def main(device: str, links: tuple[str, ...], slower: float, seed: int, smoke: bool) -> None:
    """Let the link of simulated machines become slower and well again while they answer."""
    course = Course(slower=slower)
    rows = []
    for model in (TINY,) if smoke else MODELS:
        for habits in list(model.texts)[: 1 if smoke else None]:
            for host in list(HOSTS)[: 1 if smoke else None]:
                for link in links:
                    rows.append(row(model, habits, "8 GiB" if smoke else device, host, link, course, seed))
                    print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows), file=sys.stderr)
    worst = {name: max(one.ratios[name] for one in rows) for name in rows[0].ratios}
    print(json.dumps({"slower": slower, "device": device, "worst": worst, "rows": [asdict(one) for one in rows]}))


if __name__ == "__main__":
    main()
