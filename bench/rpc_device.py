"""Experts in a device's slots: the engine against the replay of what it recorded, and against the CPU.

For each share of the experts that have room on the device, and each policy: a prompt and then natural tokens one by
one, recorded, and the recording replayed with the same decisions (`cache_replay`). Bytes uploaded per token and the
share of selected experts found on the device must be the same; the logits must be the CPU's, to the last bit on an RPC
device, whose kernels are the same. Without --device an RPC server over this machine's CPU stands in for a card: nothing
here is a matter of time. A swap costs and gains what it would on a card (`bench.replay`) or, with --rule measured, what
the engine measured. The table goes to stderr, the last line of stdout is one JSON document.

With --link the device lies behind a simulated network (`bench.baselines.shaped_link`): milliseconds per token with half
of the experts there and with all of the model, beside what `slimoe plan` predicts, and this machine alone, with memory
for all of the model and with half of the experts on its disk. A link written as A/B/A changes while an answer is
written, by two engines in turn: one whose experts stay, and one that notices what becomes of its link. Their devices
have two threads, so that they gain something.

    python -m bench.rpc_device --model natural_medium
    python -m bench.rpc_device --model natural_medium --link 1Gbit,2ms --link 10Gbit,0.2ms
    python -m bench.rpc_device --model natural_medium --link 10Gbit,0.2ms/1Gbit,0.2ms/10Gbit,0.2ms
"""

import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.baselines.rpc_server import rpc_server
from bench.baselines.shaped_link import Link, ShapedLink, parse_link, shaped_link
from bench.baselines.stepping import WARM_STEPS, kl_divergence, time_decode, time_prefill
from bench.limits import machine
from bench.limits.link_runs import (
    LinkRun,
    Stretch,
    keep_still,
    link_table,
    links_as_json,
    over_changes,
    stretch_table,
)
from bench.models.random_model import random_model_file
from bench.models.shapes import MODELS
from bench.models.topics import STYLES, TOKENS
from bench.replay import GB, RATES
from bench.traces.cache_replay import CacheReplay, Tally, Tier
from bench.traces.candidate import Online
from bench.traces.demand import demands
from slimoe.offload.cache.policy import POLICIES, PolicyContext, make_policy
from slimoe.offload.cache.router_trace import read_trace
from slimoe.offload.cache.swap import SwapRule
from slimoe.offload.engine import Engine
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.ggml.devices import available_devices
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.machine.measurement_cache import MeasurementCache
from slimoe.offload.plan.engine_config import ContextConfig, EngineConfig, changed
from slimoe.offload.plan.engine_plan import EnginePlan, plan_engine
from slimoe.offload.plan.prediction import measure_machine, predict_plan

Logits = NDArray[np.float32]
SHARES = (0.25, 0.5, 0.75)
_MOVE, _HIT, _MISS = RATES["device"]
CARD = Tier(GB * _MOVE, GB * _HIT, GB * _MISS, computes_misses=True)
N_PROMPT, N_ANSWER = 64, 192
N_LINK_PROMPT, N_LINK_ANSWER = 256, 48
N_SMOKE_OVER_EACH, N_DEVICE_THREADS = 96, 2
HALF = 0.5
TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class Job:
    """What is run: `tokens` are a prompt of `n_prompt`, and what is read one by one after it."""

    config: EngineConfig
    tokens: tuple[int, ...]
    n_prompt: int
    rule: str


@dataclass(frozen=True, slots=True)
class Figures:
    """What was counted over the tokens read one by one."""

    hit_share: float
    uploaded_bytes_per_token: float


@dataclass(frozen=True, slots=True)
class Run:
    """What an engine and its replay counted; `kl` is the largest KL divergence of a token from the CPU's logits."""

    share: float
    policy: str
    slots: int
    engine: Figures
    replay: Figures
    swaps: int
    swap_gain_seconds: float
    swap_cost_seconds: float
    is_exact: bool
    kl: float

    @property
    def bytes_difference(self) -> float:
        """The difference of uploaded bytes between engine and replay, relative to the larger ones."""
        counts = self.engine.uploaded_bytes_per_token, self.replay.uploaded_bytes_per_token
        return abs(counts[0] - counts[1]) / max(1.0, *counts)

    @property
    def hit_difference(self) -> float:
        """The difference of the hit shares of engine and replay."""
        return abs(self.engine.hit_share - self.replay.hit_share)


def plan_with_room(config: EngineConfig, share: float) -> EngineConfig:
    """The configuration whose device has slots for a `share` of the experts; raises UsageError without experts."""
    shortfall = plan_engine(changed(config, {"vram": ("1",)})).shortfall
    layers = [
        layer for layer in plan_engine(changed(config, {"device": "none", "rpc": ()})).layers if layer is not None
    ]
    sizes = {copies[0].slot_class: copies[0].n_bytes for layer in layers for copies in layer.experts}
    if shortfall is None or not sizes:
        raise UsageError("The model has no experts that a device could hold a part of. Take a mixture of experts.")
    wanted = share * sum(copies[0].n_bytes for layer in layers for copies in layer.experts)
    # The least that a device takes has a slot for one expert of each kind already.
    return changed(config, {"vram": (str(int(shortfall.required_bytes + wanted) - sum(sizes.values())),)})


def plan_with_memory(config: EngineConfig, share: float) -> EngineConfig:
    """The configuration without devices whose host memory has slots for a `share` of the experts, or some more."""
    config = changed(config, {"device": "none", "rpc": ()})
    shortfall = plan_engine(changed(config, {"ram": "0"})).shortfall
    experts = [copies[0] for layer in plan_engine(config).layers if layer is not None for copies in layer.experts]
    least = 0 if shortfall is None else shortfall.required_bytes
    return changed(config, {"ram": str(int(least + share * sum(one.n_bytes for one in experts)))})


def check(plan: EnginePlan) -> None:
    """Raises the plan's error, and UsageError where host memory does not hold all experts: a replay takes it to."""
    if plan.shortfall is not None:
        raise plan.shortfall
    if plan.tiers is not None and plan.tiers.n_resident < plan.tiers.n_experts:
        raise UsageError("The experts do not all fit into host memory, which a replay cannot know. Free some memory.")


def read_all(engine: Engine, job: Job) -> tuple[list[Logits], dict[str, float]]:
    """The logits after the prompt and after each further token, and what was counted for these."""
    logits = [engine.prefill(job.tokens[: job.n_prompt]).copy()]
    before = engine.counters()
    logits += [engine.decode(token).copy() for token in job.tokens[job.n_prompt :]]
    return logits, {name: value - before.get(name, 0) for name, value in engine.counters().items()}


def run_case(job: Job, share: float, policy: str, expected: Sequence[Logits], trace: Path) -> Run:
    """Runs an engine, replays its trace, and compares both; raises as `check` and `Engine.open` do."""
    config = changed(plan_with_room(job.config, share), {"policy": policy, "trace": trace})
    check(plan_engine(config))
    with closing(Engine.open(config)) as engine:
        (device,) = engine.device_experts
        assert device.swaps is not None
        device.uploads = device.watch = None  # the replay decides between tokens, by one rule
        if job.rule == "card":
            device.swaps.rule = CARD.swap_rule(max(copy.n_bytes for copy in device.copies.values()))
        rule, plan = device.swaps.rule, engine.plan
        logits, counted = read_all(engine, job)
    n_tokens = len(job.tokens) - job.n_prompt
    n_visits = sum(counted[name] for name in ("device_hits", "hits", "pending", "misses"))
    figures = Figures(counted["device_hits"] / n_visits, counted["bytes_uploaded"] / n_tokens)
    tally = replayed(plan, trace, policy, rule)
    return Run(
        share,
        policy,
        sum(own_slots(plan).values()),
        figures,
        Figures(tally.hit_share, tally.moved_bytes / n_tokens),
        int(counted["swaps"]),
        rule.gain_seconds,
        rule.cost_seconds,
        all(np.array_equal(*pair) for pair in zip(logits, expected, strict=True)),
        max(kl_divergence(*pair) for pair in zip(logits, expected, strict=True)),
    )


def own_slots(plan: EnginePlan) -> Counter[int]:
    """The device's slots for experts that stay there, by an expert's bytes."""
    slots: Counter[int] = Counter()
    for kind, n in plan.devices[0].n_own.items():
        sizes = {copies[0].slot_class: copies[0].n_bytes for layer in plan.layers if layer for copies in layer.experts}
        slots[sizes[kind]] += n
    return slots


def replayed(plan: EnginePlan, path: Path, policy: str, rule: SwapRule) -> Tally:
    """What the replay counts for the tokens that were read one by one."""
    trace = read_trace(path)
    header = trace.header
    context = PolicyContext(header.n_layer, header.n_expert, header.n_expert_used, plan.priors)
    cache = CacheReplay(header, own_slots(plan), Online(make_policy(policy, context)), CARD, rule)
    tally = cache.run(demands(trace))["answer"]
    cache.check()
    return tally


@contextmanager
def device_config(config: EngineConfig, device: str | None, link: Link | None = None) -> Iterator[EngineConfig]:
    """The configuration with a device of this machine, or one lent by an RPC server that is ended afterwards.

    The server is reached over the `link`, without one over loopback.
    """
    if device is not None:
        yield changed(config, {"device": device})
        return
    with rpc_server() as server, ExitStack() as stack:
        endpoint = server.endpoint if link is None else stack.enter_context(shaped_link(server.endpoint, link)).endpoint
        lent = available_devices([endpoint])[-1]
        yield changed(config, {"device": lent.name, "rpc": (endpoint,)})


def measure(job: Job, shares: Sequence[float], policies: Sequence[str]) -> list[Run]:
    """Carries out all runs, one after the other; raises as `run_case` does."""
    with closing(Engine.open(changed(job.config, {"device": "none", "rpc": (), "weights": "copied"}))) as engine:
        expected, _ = read_all(engine, job)
    with tempfile.TemporaryDirectory(prefix="slimoe-trace-") as directory:
        return [
            run_case(job, share, policy, expected, Path(directory) / f"{share}-{policy}")
            for share in shares
            for policy in policies
        ]


# --- over a network ----------------------------------------------------------------------------------------


def run_timed(job: Job, config: EngineConfig, link: str, room: str, cache: MeasurementCache) -> LinkRun:
    """Predicts and times a plan; raises as `check` and `Engine.open` do."""
    plan = plan_engine(config)
    if plan.shortfall is not None:
        raise plan.shortfall
    predicted = predict_plan(plan, measure_machine(config, plan, lambda _name: None, cache))
    prompt, answer = job.tokens[: job.n_prompt], job.tokens[job.n_prompt :]
    with closing(Engine.open(config)) as engine:
        prefill = min(time_prefill(engine, prompt) for _ in range(3))  # the first builds graphs
        engine.prefill(prompt)
        time_decode(engine, answer[:WARM_STEPS])
        decode = statistics.median(time_decode(engine, answer))
    measured = 1e3 * decode, predicted.decode.ms_per_token, 1e3 * prefill / job.n_prompt
    return LinkRun(link, room, *measured, predicted.prefill.ms_per_token)


def measure_links(job: Job, links: Sequence[Link]) -> list[LinkRun]:
    """This machine alone, also with too little memory, then over loopback and each link: half of the experts on the
    device, and all of the model; raises as `run_timed` does.
    """
    with tempfile.TemporaryDirectory(prefix="slimoe-speeds-") as directory:
        cache = MeasurementCache(Path(directory) / "measurements.json")
        runs = [run_timed(job, changed(job.config, {"device": "none"}), "", "none", cache)]
        runs.append(run_timed(job, plan_with_memory(job.config, HALF), "", "half on disk", cache))
        for link in (None, *links):
            with device_config(job.config, None, link) as config:
                for room, with_room in (("half", plan_with_room(config, HALF)), ("all", config)):
                    name = "loopback" if link is None else str(link)
                    runs.append(run_timed(job, with_room, name, room, cache))
    return runs


def measure_changes(job: Job, links: Sequence[Link], n_threads: int) -> list[Stretch]:
    """An answer over one link after the other, half of the experts on devices of `n_threads` each; raises as `check`
    and `Engine.open` do. A server serves one engine only.
    """
    with ExitStack() as stack:
        shaped, engines = list[ShapedLink](), list[Engine]()
        for _ in range(2):
            server = stack.enter_context(rpc_server(n_threads=n_threads))
            shaped.append(stack.enter_context(shaped_link(server.endpoint, links[0])))
            lent = available_devices([shaped[-1].endpoint])[-1]
            config = changed(job.config, {"device": lent.name, "rpc": (shaped[-1].endpoint,)})
            engines.append(stack.enter_context(closing(Engine.open(plan_with_room(config, HALF)))))
            engines[-1].prefill(job.tokens[: job.n_prompt])
        keep_still(engines[1])

        def change(link: Link) -> None:
            for one in shaped:
                one.change(link)

        return over_changes((engines[0], engines[1]), job.tokens[job.n_prompt :], links, change)


def table(runs: Sequence[Run]) -> Table:
    """The figures for a person."""
    drawn = Table("room", "slots", "policy", "swaps", "hits %", "replay", "MB/token", "replay", "exact", "KL")
    for run in runs:
        hits = (f"{100 * one.hit_share:.2f}" for one in (run.engine, run.replay))
        moved = (f"{one.uploaded_bytes_per_token / 1e6:.3f}" for one in (run.engine, run.replay))
        cells = (*hits, *moved, "yes" if run.is_exact else "no", f"{run.kl:.1e}")
        drawn.add_row(f"{run.share:.0%}", str(run.slots), run.policy, str(run.swaps), *cells)
    return drawn


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """All figures, and the worst of each kind."""
    return {
        "agrees": all(max(run.bytes_difference, run.hit_difference) <= TOLERANCE for run in runs),
        "largest_bytes_difference": max(run.bytes_difference for run in runs),
        "largest_hit_difference": max(run.hit_difference for run in runs),
        "is_exact": all(run.is_exact for run in runs),
        "largest_kl": max(run.kl for run in runs),
        "runs": [asdict(run) for run in runs],
    }


@click.command()
@click.option("--model", default="natural_medium", show_default=True, help="A file, or a shape for random Q4_K.")
@click.option("--share", "shares", type=click.FloatRange(0, 1, min_open=True, max_open=True), multiple=True)
@click.option("--policy", "policies", type=click.Choice(list(POLICIES)), multiple=True, default=["lfu-decay", "lru"])
@click.option("--rule", type=click.Choice(["card", "measured"]), default="card", show_default=True)
@click.option("--routing", type=click.Choice(list(STYLES)), default="natural", show_default=True)
@click.option(
    "--tokens", type=click.IntRange(1), default=N_ANSWER, show_default=True, help="Read one by one; over each link."
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--device", help="A device of this machine.  [default: an RPC server over the CPU]")
@click.option(
    "--link", "links", metavar="BANDWIDTH,DELAY", multiple=True, help="Time it over this network, or A/B/A in turn."
)
@click.option("--smoke", is_flag=True, help="Seconds only, on a tiny random model.")
def main(
    model: str,
    shares: tuple[float, ...],
    policies: tuple[str, ...],
    rule: str,
    routing: str,
    tokens: int,
    threads: int,
    device: str | None,
    links: tuple[str, ...],
    smoke: bool,
) -> None:
    """Compare an engine whose device holds a part of the experts with its replay and with the CPU."""
    lengths, changing = (N_LINK_PROMPT, N_LINK_ANSWER) if links else (N_PROMPT, tokens), "/" in "".join(links)
    name, n_prompt, n_answer = ("smoke", 8, 40) if smoke else (model, *lengths)
    try:
        if links and device is not None:
            raise UsageError(
                "--link leads to an RPC server, and --device names a device of this machine. Leave one out."
            )
        if changing and len(links) > 1:
            raise UsageError("A --link that changes, as 10Gbit,1ms/1Gbit,1ms, is the only one. Leave the others out.")
        networks = [parse_link(one) for link in links for one in link.split("/")]
        if changing:
            n_prompt, n_answer = N_PROMPT, (N_SMOKE_OVER_EACH if smoke else tokens) * len(networks)
        with ExitStack() as stack:
            is_shape = name in MODELS
            path = stack.enter_context(random_model_file(name, "Q4_K", routing=routing)) if is_shape else Path(name)
            n_tokens = n_prompt + n_answer
            words = TOKENS[routing](n_tokens, read_gguf(path).tensors["token_embd.weight"].ne[1])
            config = EngineConfig(
                path, n_threads=threads, context=ContextConfig(n_ctx=-(-n_tokens // 256) * 256, n_batch=n_prompt)
            )
            job, load = Job(config, tuple(words), n_prompt, rule), machine.OtherLoad()
            document: dict[str, Any] = {}
            if changing:
                stretches = measure_changes(job, networks, N_DEVICE_THREADS)
                drawn, document = stretch_table(stretches), {"runs": [one.as_json() for one in stretches]}
                document["other_cores_during"] = load.cores()
            elif links:
                timed = measure_links(job, networks)
                drawn, document = link_table(timed), {"other_cores_during": load.cores()}
                document |= links_as_json(timed, networks, 1 << 16 if smoke else 64 << 20)
            else:
                job = replace(job, config=stack.enter_context(device_config(config, device)))
                runs = measure(job, shares or SHARES, policies)
                drawn, document = table(runs), as_json(runs)
    except SlimoeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    Console(stderr=True, width=None if sys.stderr.isatty() else 100).print(drawn)
    about = {"model": path.name, "routing": routing, "rule": rule, "machine": machine.describe()}
    print(json.dumps(document | {"tokens": n_answer, "prompt_tokens": n_prompt} | about))


if __name__ == "__main__":
    main()
