"""Answers with drafted tokens next to the same without: on text that repeats and on text that does not.

Four texts. `edit`: the prompt is a file, and the answer is held, by a grammar, to the same file with some names
changed, as when code is edited; so the model need not be able to. `new`: the answer is held to random letters, in which
nothing is said twice. `own`: what the model says by itself, greedily, about the file. `drawn`: the same, but drawn at a
high temperature, so that a random model repeats little. The file is a piece of Python. With vocabularies of far more
than 100000 tokens no answer is held to so long a text: there `own` and `drawn` can be measured.

Each runs alone in a process, --draft and none in turn, under the limits that --ratio names: 1.4 is a file so many times
as large as the memory, 0 no limit. `auto_vs_none`, or what --draft names in its place, is the time of a token without
drafts over that with them, medians over rounds: above 1 drafting is faster. The table goes to stderr, the last line of
stdout is one JSON document, with the cores that other programs took.

    python -m bench.drafts.gain --model design8
"""

import inspect
import json
import random
import statistics
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from bench.drafts import answers as answering
from bench.drafts.answers import DraftJob, DraftOutcome
from bench.limits import machine
from bench.limits.cgroup import NoControlGroupError, drop_cached, memory_group
from bench.limits.flags import run_flags, threads_flag
from bench.models.random_model import random_model_file
from bench.models.shapes import MODELS
from slimoe.offload.errors import SlimoeError
from slimoe.offload.resources.processors import default_threads

N_FILE = 800
"""Characters of the file. Spaces are written as underscores: so random models, whose made-up words begin with a space,
have one token for each character."""
IN_MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt, and what the answer is held to, None for nothing; it is greedy where the temperature is 0."""

    prompt: str
    answer: str | None
    temperature: float = 0.0


def texts(n_file: int = N_FILE) -> dict[str, Text]:
    """The texts by name."""
    file = inspect.getsource(answering).replace(" ", "_")[:n_file]
    edited = file.replace("answer", "reply").replace("job", "task")
    letters = "".join(random.Random(1).choices(string.ascii_letters + string.digits, k=n_file))
    held = {"edit": Text(file, edited), "new": Text(file, letters)}
    return held | {"own": Text(file, None), "drawn": Text(file, None, 2.0)}


def run(job: DraftJob, limit_bytes: int | None) -> DraftOutcome:
    """Runs a job in a process of its own, under a limit with nothing of the file cached; raises SlimoeError."""
    command = [sys.executable, "-m", "bench.drafts.answers"]
    with ExitStack() as stack:
        if limit_bytes is not None:
            drop_cached(Path(job.model))
            command = stack.enter_context(memory_group(limit_bytes)).entering(command)
        text = json.dumps(asdict(job))
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SlimoeError(f"An answer was not finished: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return DraftOutcome(**json.loads(done.stdout.splitlines()[-1]))


def figures(draft: str, none: Sequence[DraftOutcome], drafted: Sequence[DraftOutcome]) -> dict[str, float | bool]:
    """What rounds of both say, where `draft` is the mode of those with drafts."""
    mine, theirs = ([ms for one in runs for ms in one.token_ms] for runs in (drafted, none))
    return {
        "none_ms": statistics.median(theirs),
        "draft_ms": statistics.median(mine),
        f"{draft}_vs_none": statistics.median(theirs) / statistics.median(mine),
        "tokens_per_step": sum(one.n_tokens for one in drafted) / sum(one.n_steps for one in drafted),
        "drafted_per_step": sum(one.n_drafted for one in drafted) / sum(one.n_steps for one in drafted),
        "accepted_share": sum(one.n_accepted for one in drafted) / max(1, sum(one.n_drafted for one in drafted)),
        "is_same": {one.checksum for one in (*none, *drafted)} == {none[0].checksum},
    }


def table(document: Mapping[str, Mapping[str, Mapping[str, float | bool]]], draft: str) -> Table:
    """The figures for people, of a mode."""
    shown = Table(
        "memory",
        "text",
        "none, ms",
        "drafted, ms",
        f"{draft}_vs_none",
        "tokens a step",
        "drafted a step",
        "accepted",
        "same",
    )
    for limit, by_text in document.items():
        for name, row in by_text.items():
            cells = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()]
            shown.add_row(limit, name, *cells)
    return shown


@click.command()
@click.option("--model", default="design8", show_default=True, help="A file with a tokenizer, or a random shape.")
@click.option("--draft", type=click.Choice(["auto", "ngram", "mtp"]), default="auto", show_default=True)
@click.option("--ratio", "ratios", multiple=True, type=click.FloatRange(0), default=(0.0, 1.4), show_default=True)
@click.option("--text", "names", multiple=True, type=click.Choice(list(texts())), help="[default: all]")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--answers", type=click.IntRange(1), default=3, show_default=True, help="In a round; one more warms up.")
@click.option("--tokens", type=click.IntRange(2), default=300, show_default=True, help="Most of an answer.")
@threads_flag
@run_flags
def main(
    model: str,
    draft: str,
    ratios: tuple[float, ...],
    names: tuple[str, ...],
    rounds: int,
    answers: int,
    tokens: int,
    threads: int | None,
    smoke: bool,
    allow_busy: bool,
) -> None:
    """Measure what drafted tokens gain and cost."""
    console, chosen = Console(stderr=True), texts(120 if smoke else N_FILE)
    if smoke:
        model, rounds, answers, tokens, ratios = "smoke", 1, 1, 60, (0.0,)
    try:
        with ExitStack() as stack:
            is_file = model not in MODELS
            path = Path(model) if is_file else stack.enter_context(random_model_file(model, vocabulary=True))
            size = path.stat().st_size
            limits = {f"{ratio:g}" if ratio else IN_MEMORY: int(size / ratio) if ratio else None for ratio in ratios}
            load_before = machine.require_quiet(allow_busy=allow_busy, is_smoke=smoke)
            load = machine.OtherLoad()
            document: dict[str, dict[str, dict[str, float | bool]]] = {}
            for limit, n_bytes in limits.items():
                for name in names or chosen:
                    runs: dict[str, list[DraftOutcome]] = {"none": [], draft: []}
                    for number in range(rounds):
                        for mode in list(runs)[:: 1 if number % 2 else -1]:
                            console.print(f"memory {limit}, text {name}, round {number + 1} of {rounds}: {mode}")
                            text, ram = chosen[name], None if n_bytes is None else f"{n_bytes}B"
                            lengths = tokens, answers, threads or default_threads()
                            job = DraftJob(str(path), mode, text.prompt, text.answer, *lengths, text.temperature, ram)
                            runs[mode].append(run(job, n_bytes))
                    document.setdefault(limit, {})[name] = figures(draft, runs["none"], runs[draft])
            console.print(table(document, draft))
            loads = {"other_cores_before": load_before, "other_cores_during": load.cores()}
            if not smoke and (note := machine.busy_note(loads["other_cores_during"])):
                console.print(note)
    except (SlimoeError, NoControlGroupError) as error:
        console.print(str(error), markup=False)
        sys.exit(error.exit_code)
    about = {"model": path.name, "draft": draft, "rounds": rounds, "machine": machine.describe()}
    print(json.dumps({"memory": document} | loads | about))


if __name__ == "__main__":
    main()
