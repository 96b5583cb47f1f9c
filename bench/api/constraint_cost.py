"""What it costs to hold an answer to a form: the time per token, next to the same model's free answers.

Free and held answers of a few dozen tokens take turns, so that both meet the same load of the machine. The ratio
`..._vs_free` of a form is the median over all turns of free seconds per token by held ones: 1 is no cost. The first
token of an answer is left out; `first_token_ms` has what a form adds to it when it is new, and when it is known.
`held_cpu_us` is the processor time of a token's mask and of going on behind it, without the model, which other
processes' load hardly changes. `memory_mib` is what the first form adds to this process, and the pages of the process
that tries forms out. The last line of stdout is one JSON document.

    python -m bench.api.constraint_cost
    python -m bench.api.constraint_cost --shape mixtral2
"""

import itertools
import json
import statistics
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil

from bench.limits import machine
from bench.limits.flags import run_flags, threads_flag, type_flag
from bench.models.random_model import random_model_file
from bench.models.shapes import MODELS
from slimoe.offload.engine import Engine
from slimoe.offload.errors import SlimoeError
from slimoe.offload.plan.engine_config import ContextConfig, EngineConfig
from slimoe.offload.resources.process_limits import resident_bytes
from slimoe.offload.resources.processors import default_threads
from slimoe.offload.text.generation import Constraint, GenerationRequest, SamplingParams, TokenStep
from slimoe.server.options.engine_options import DEMO

N_CTX = 512
_RECORD = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {}}},
    "required": ["name", "age", "tags"],
}
FORMS = {
    "anything": Constraint("regex", "(?s:.*)"),
    "long_text": Constraint("json_schema", json.dumps({"type": "string", "minLength": 4000})),
    "records": Constraint("json_schema", json.dumps({"type": "array", "items": _RECORD, "minItems": 100})),
    "grammar": Constraint("gbnf", 'root ::= (item "\\n"){100,}\nitem ::= "- " [a-zA-Z ]+'),
}
"""Forms that go on for longer than what is measured."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds to the first token, and from each token to the next in the median."""

    first: float
    per_token: float


def answer(engine: Engine, form: Constraint | None, n_tokens: int, seed: int) -> Answer:
    """Times one answer, which is never shorter; its prompt is known already."""
    sampling = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
    request = GenerationRequest((1, *range(300, 310)), n_tokens, sampling, ignore_eos=True, constraint=form)
    times = [time.perf_counter()]
    times += [time.perf_counter() for event in engine.generate(request) if isinstance(event, TokenStep)]
    assert len(times) > n_tokens, f"an answer ended after {len(times) - 1} tokens"
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return Answer(gaps[0], statistics.median(gaps[1:]))


def measure(engine: Engine, n_rounds: int, n_tokens: int) -> dict[str, Any]:
    """Every form in turn with free answers; one round goes before and counts only as the first."""
    ratios: dict[str, list[float]] = {name: [] for name in FORMS}
    known: dict[str, list[float]] = {name: [] for name in FORMS}
    new: dict[str, float] = {}
    free_times = []
    before_all = resident_bytes()
    memory: dict[str, float] = {}
    for round_no in range(n_rounds + 1):
        for name, form in FORMS.items():
            before = answer(engine, None, n_tokens, seed=round_no)
            held = answer(engine, form, n_tokens, seed=round_no)
            after = answer(engine, None, n_tokens, seed=round_no)
            free = Answer((before.first + after.first) / 2, (before.per_token + after.per_token) / 2)
            if round_no == 0:
                new[name] = 1e3 * (held.first - free.first)
                continue
            free_times.append(free.per_token)
            ratios[name].append(free.per_token / held.per_token)
            known[name].append(1e3 * (held.first - free.first))
    assert engine.grammars is not None
    memory["engine"] = (resident_bytes() - before_all) / 2**20
    memory["trials"] = psutil.Process(engine.grammars.pid).memory_full_info().uss / 2**20
    return {
        **{f"{name}_vs_free": statistics.median(values) for name, values in ratios.items()},
        "worst_vs_free": min(statistics.median(values) for values in ratios.values()),
        "free_ms_per_token": 1e3 * statistics.median(free_times),
        "first_token_ms": {"new": new, "known": {name: statistics.median(values) for name, values in known.items()}},
        "held_cpu_us": {name: held_cpu(engine, form, 8 * n_tokens) for name, form in FORMS.items()},
        "memory_mib": memory,
    }


def held_cpu(engine: Engine, form: Constraint, n_tokens: int) -> float:
    """Microseconds of the processor for each token that is drawn at random from those allowed, in the median."""
    assert engine.grammars is not None
    assert engine.tokenizer is not None
    held, random = engine.grammars.hold(form), np.random.default_rng(0)
    ends, times = list(engine.tokenizer.eog), []
    for _ in range(n_tokens):
        begin = time.thread_time()
        allowed = held.allowed()
        half = time.thread_time()
        allowed[ends] = False
        token = int(random.choice(np.flatnonzero(allowed)))
        again = time.thread_time()
        held.take(token)
        times.append(half - begin + time.thread_time() - again)
    return 1e6 * statistics.median(times)


@click.command()
@click.option("--shape", type=click.Choice(MODELS), help="A random model of this shape, not the demo.")
@type_flag
@click.option("--model", type=click.Path(path_type=Path), help="Measure with this file.")
@threads_flag
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=48, show_default=True, help="Tokens of an answer.")
@run_flags
def main(
    shape: str | None,
    kind: str | None,
    model: Path | None,
    threads: int | None,
    rounds: int,
    tokens: int,
    smoke: bool,
    allow_busy: bool,
) -> None:
    """Measure what constraints cost."""
    try:
        with ExitStack() as stack:
            load_before = machine.require_quiet(allow_busy=allow_busy, is_smoke=smoke)
            path = model or DEMO
            if model is None and (shape or smoke):
                name = shape or "smoke"
                path = stack.enter_context(random_model_file(name, kind, vocabulary=True))
            config = EngineConfig(path, n_threads=threads or default_threads(), context=ContextConfig(n_ctx=N_CTX))
            engine = stack.enter_context(closing(Engine.open(config)))
            found = measure(engine, 1 if smoke else rounds, 4 if smoke else tokens)
    except SlimoeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    about = {"rounds": rounds, "tokens": tokens, "threads": config.n_threads, "n_vocab": engine.spec.n_vocab}
    seen = {"model": path.name, "other_cores_before": load_before, "machine": machine.describe()}
    print(json.dumps(found | about | seen))


if __name__ == "__main__":
    main()
