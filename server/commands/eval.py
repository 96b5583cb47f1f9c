"""`slimoe eval`: lm-eval's tasks on a model, with everything that repeating the result needs."""

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import msgspec

from slimoe.offload.errors import UsageError
from slimoe.offload.files.whole_file import whole_file
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.text.generation import TierUse
from slimoe.server.api.served_model import ServedModel, model_id
from slimoe.server.evaluating import HARNESS, Evaluation, evaluate
from slimoe.server.jobs.harness_messages import Answered, HarnessEvent, HarnessRequest, Loaded, Planned
from slimoe.server.jobs.provenance import file_facts, run_facts
from slimoe.server.options.engine_options import (
    CommaSeparated,
    OptionsCommand,
    engine_config,
    engine_flags,
    engine_settings,
    joined,
)
from slimoe.server.options.idle_flags import refuse_idle
from slimoe.server.options.installed import check_installed
from slimoe.server.options.serving_memory import serving_bytes
from slimoe.server.telling import tell
from slimoe.server.terminal.progress_bars import duration, step_bar

_ANSWERING = "answering"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class EvalFlags:
    """The command's own flags."""

    tasks: tuple[str, ...]
    limit: int | None
    n_fewshot: int | None
    seed: int
    chat: bool
    keeps_samples: bool
    only_plans: bool
    hashes_all: bool
    output: Path | None
    force: bool
    as_json: bool


@click.command("eval", cls=OptionsCommand)
@engine_flags
@click.option(
    "--tasks",
    type=CommaSeparated(),
    multiple=True,
    required=True,
    callback=joined,
    metavar="NAME|FILE",
    help="Tasks of lm-eval, by name or as YAML files, with commas between. Repeatable.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N questions of each task.")
@click.option(
    "--num-fewshot",
    "n_fewshot",
    type=click.IntRange(min=0),
    metavar="N",
    help="Examples in each prompt.",
)
@click.option("--seed", type=int, default=1234, show_default=True, help="Seed of examples and of sampling.")
@click.option("--chat", is_flag=True, help="Ask in the model's chat template.")
@click.option("--samples", "keeps_samples", is_flag=True, help="Keep every question and answer in the result.")
@click.option("--dry-run", "only_plans", is_flag=True, help="Say what it would take, and end.")
@click.option("--hash-all", "hashes_all", is_flag=True, help="Hash the whole model file, not only its header.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result to this file as JSON.")
@click.option("-f", "--force", is_flag=True, help="Overwrite the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def command(values: Mapping[str, Any]) -> None:
    """Evaluate MODEL on tasks of lm-eval, within the memory that --ram names as for slimoe serve.

    Nothing is downloaded: a task's data are in the cache of Hugging Face's datasets, or beside a YAML file. Without
    MODEL the built-in demo is used. The result has tasks, budgets, memory, speed, tiers, versions, machine and command.
    """
    check_installed("Evaluating", "lm_eval", extra="eval")
    carry_out(values)


def carry_out(values: Mapping[str, Any], harness_command: Sequence[str] = HARNESS) -> None:
    """Does what the command's `values` say, with lm-eval's process as `harness_command` starts it."""
    flags = msgspec.convert(dict(values), EvalFlags)
    absent = next((task for task in flags.tasks if task.endswith((".yaml", ".yml")) and not Path(task).is_file()), None)
    if absent is not None:
        raise UsageError(f"There is no file {absent}. Name a YAML file, or a task of lm-eval.")
    if flags.output is None:
        refuse_idle(["force"], "overwrites the file of --output. Add --output, or leave it out.")
        if not flags.as_json:
            refuse_idle(
                ["keeps_samples", "hashes_all"], "adds to the whole result. Ask for that by --output or --json."
            )
    if flags.output is not None and flags.output.exists() and not flags.force:
        raise UsageError(f"{flags.output} exists. Choose another name, or overwrite it with --force.")
    engine = engine_config(values, serving_bytes())
    engine = replace(engine, model=engine.model.absolute(), context=replace(engine.context, has_all_logits=True))
    facts = file_facts(engine.model, whole=flags.hashes_all)
    asked = {name: getattr(flags, name) for name in ("tasks", "limit", "n_fewshot", "seed", "chat")}
    request = HarnessRequest(
        **asked,
        n_parallel=engine.context.n_parallel,
        keeps_samples=flags.keeps_samples,
        only_plans=flags.only_plans,
    )
    provenance = run_facts(sys.argv[1:], {})
    model = ServedModel(model_id(engine.model, None), engine.model, provenance["versions"]["slimoe"])
    planned: list[Planned] = []
    with step_bar() as on_step:
        evaluation = asyncio.run(evaluate(model, engine, request, _teller(planned, on_step), harness_command))
    report = {
        "format": _FORMAT,
        **_measured(evaluation, engine),
        "planned": msgspec.to_builtins(planned[0]) if planned else None,
        "settings": {**asked, "engine": msgspec.to_builtins(engine_settings(values), enc_hook=str)},
        "provenance": {"model": facts, **provenance},
    }
    if evaluation.evaluated is not None:
        report["provenance"]["versions"] |= evaluation.evaluated.versions
    document = msgspec.json.encode(report, enc_hook=str)
    if flags.output is not None:
        with whole_file(flags.output) as part:
            part.write_bytes(msgspec.json.format(document, indent=1) + b"\n")
        tell(f"{flags.output}: {len(document):,} bytes")
    if flags.as_json:
        click.echo(document)
    else:
        click.echo("\n".join(result_lines(report)))


def _teller(planned: list[Planned], on_step: Callable[[str, int, int], None]) -> Callable[[HarnessEvent], None]:
    def on_event(event: HarnessEvent) -> None:
        match event:
            case Loaded(tasks):
                tell(f"Tasks: {', '.join(tasks)}. Opening the model.")
            case Planned(requests, n_read, n_written, seconds):
                planned.append(event)
                written = f", and at most {n_written:,} to write" if n_written else ""
                tell(
                    f"{sum(requests.values()):,} requests, about {n_read:,} tokens to read{written}: "
                    f"about {duration(seconds)}"
                )
            case Answered(n_done, n_total):
                on_step(_ANSWERING, n_done, n_total)

    return on_event


def _measured(evaluation: Evaluation, engine: EngineConfig) -> dict[str, Any]:
    info, evaluated = evaluation.info, evaluation.evaluated
    assert info is not None
    timings = {} if evaluated is None else evaluated.timings
    speeds = {
        f"{name}_tokens_per_second": 1000 * timings[f"{phase}_n"] / timings[f"{phase}_ms"]
        if timings.get(f"{phase}_ms")
        else None
        for name, phase in (("prompt", "prompt"), ("written", "decoded"))
    }
    return {
        "results": {} if evaluated is None else evaluated.result,
        "budget": {"ram": engine.memory.ram, "vram": list(engine.devices.vram), "n_ctx": info.n_ctx},
        "memory": {"held_bytes": info.memory, "peak_bytes": evaluation.peaks},
        "speed": {
            "load_seconds": evaluation.load_seconds,
            "answer_seconds": evaluation.answer_seconds,
            "prompt_tokens": timings.get("prompt_n", 0),
            "written_tokens": timings.get("predicted_n", 0),
            **speeds,
        },
        "tiers": {**evaluation.counters, "hit_share": TierUse(evaluation.counters).hit_share},
    }


def result_lines(report: Mapping[str, Any]) -> list[str]:
    """The figures of each task, and what they took, for a person."""
    lines = []
    for task, figures in report["results"].get("results", {}).items():
        for name, value in figures.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            spread = f" ± {error:.4f}" if isinstance(error, float) else ""
            shown = metric if kind == "none" else f"{metric} ({kind})"
            lines.append(f"{task:<32}{shown:<28}{value:>10.4f}{spread}")
    if not lines:
        return ["Nothing was asked."]
    speed, hit_share = report["speed"], report["tiers"]["hit_share"]
    rate = speed.get("prompt_tokens_per_second")
    read = f"{speed['prompt_tokens']:,.0f} tokens read" + (f" at {rate:.1f}/s" if rate else "")
    found = "" if hit_share is None else f", {100 * hit_share:.0f} % of experts were in memory"
    return [*lines, "", f"{read}, in {duration(speed['answer_seconds'])}{found}"]
