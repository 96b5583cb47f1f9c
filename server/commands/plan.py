"""`slimoe plan`: what opening a model would take, what lies where, and how fast it would be."""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import click
import msgspec

from slimoe.offload.errors import SlimoeError
from slimoe.offload.ggml.abort import end_with_error, on_device_abort
from slimoe.offload.machine.measurement_cache import MeasurementCache
from slimoe.offload.machine.speed import MachineSpeed
from slimoe.offload.plan.engine_config import EngineConfig, changed
from slimoe.offload.plan.engine_plan import EnginePlan, plan_each
from slimoe.offload.plan.prediction import PlanPrediction, measure_machine, predict_plan
from slimoe.offload.printable import printable
from slimoe.server.jobs.local_engine import say_notes
from slimoe.server.options.compress_options import OLD_SPELLINGS, compress_flags, compress_options, hf_bits_flag
from slimoe.server.options.engine_options import (
    OptionsCommand,
    draft_flag,
    engine_config,
    engine_flags,
    engine_settings,
)
from slimoe.server.options.idle_flags import refuse_idle
from slimoe.server.options.installed import CONVERTERS, check_installed
from slimoe.server.options.prompt_cache_flags import prompt_cache_flags
from slimoe.server.options.serving_memory import running_bytes, serving_bytes
from slimoe.server.telling import tell
from slimoe.server.terminal.interrupts import ending_at_interrupt
from slimoe.server.terminal.plan_report import PlanReport

_LEAST_CTX = 256
Measure = Callable[[EngineConfig, EnginePlan, Callable[[str], None], MeasurementCache], MachineSpeed]


class _UnmeasuredError(SlimoeError):
    """Something is not known of this machine, and nobody wants to wait for it."""


@click.command("plan", cls=OptionsCommand, context_settings=OLD_SPELLINGS)
@engine_flags
@draft_flag
@prompt_cache_flags
@compress_flags
@click.option(
    "-t", "--type", "type_name", help="Type of the weights as for slimoe convert, where no target size chooses types."
)
@click.option(
    "--hf", is_flag=True, help="Say which checkpoint slimoe convert --hf would write of the checkpoint MODEL."
)
@hf_bits_flag
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option(
    "--measure/--no-measure",
    default=True,
    show_default=True,
    help="Measure this machine for a prediction of speed, some seconds the first time; without it only what is known "
    "from earlier is used.",
)
@click.option(
    "--serve", "for_serve", is_flag=True, help="Plan for slimoe serve, whose other processes need memory too."
)
def command(values: Mapping[str, Any]) -> None:
    """Say what opening MODEL would take, what would lie where, and how fast it would be, without loading it.

    Ends with status 4 when it does not fit into the memory that is free now. Without MODEL the built-in demo is used.
    What lies where is told for slimoe run, and whether slimoe serve would fit as well; with --serve for serving.

    With a checkpoint directory, or any flag from --stats to --heal: say what slimoe convert would make of MODEL with
    these flags, layer by layer, how large, at what expected loss, and who loads it.
    """
    refuse_idle(["trace"], "records what a model selects while it runs, and a plan runs none. Leave it out.")
    compression, model = compress_options(values), values["model"]
    is_hf = values["hf"] or values["hf_bits"] is not None
    if not (is_hf or compression.is_asked or (model is not None and os.path.isdir(model))):
        advice = (
            "is for a model that is to be made. Leave it out; slimoe convert --dry-run says what one type comes to."
        )
        refuse_idle(["type_name"], advice)
        with ending_at_interrupt():
            tell_engine_plan(values)
        return
    if model is None:
        raise click.UsageError("Which model is to be compressed? Name its directory or GGUF file.")
    other = [name for name in engine_settings(values) if name not in ("model", "n_threads")]
    if other:
        flag = other[0].removeprefix("n_").replace("_", "-")
        raise click.UsageError(f"--{flag} is for a model that is opened, not for one that is to be made.")
    refuse_idle(
        ["measure", "for_serve"], "is for a model that is opened, not for one that is to be made. Leave it out."
    )
    if not (is_hf or compression.is_asked):
        from slimoe.converter.source.open_source import open_source

        open_source(model)  # what is wrong with it comes first
        hint = "Say what to make of it: --target-size or --recipe, with --stats; slimoe convert --dry-run for one type."
        raise click.UsageError(f"{model} is a checkpoint. {hint}")
    check_installed("Compressing", *CONVERTERS, source=model)
    if is_hf:
        from slimoe.server.jobs.hf_checkpoint import tell_checkpoint

        tell_checkpoint(values, compression)
        return
    from slimoe.server.jobs.compress import tell_plan

    tell_plan(values, compression)


def tell_engine_plan(values: Mapping[str, Any], measure: Measure = measure_machine) -> None:
    """Tells what opening the model takes, and how fast it is on the machine that `measure` knows or measures.

    Raises DoesNotFitError after telling what is lacking.
    """
    config = engine_config(values, running_bytes())
    on_device_abort(config.devices.rpc, end_with_error)
    served = changed(config, {"reserve_bytes": serving_bytes()})
    config = served if values["for_serve"] else config
    plan, for_serving = plan_each([config, served])
    say_notes(plan.notes)
    report = PlanReport(plan, serve_shortfall=for_serving.shortfall)
    if plan.shortfall is not None:
        _tell(replace(report, nearest_ctx=nearest_ctx(config, plan)), as_json=values["as_json"])
        raise plan.shortfall
    if not values["as_json"]:
        _tell(report, as_json=False)
    # One for both predictions, so that nothing is measured twice, not even what is not to be remembered.
    cache, is_allowed = MeasurementCache(), values["measure"]
    prediction = _prediction(config, plan, measure, cache, is_allowed=is_allowed)
    alone = None
    if config.devices.rpc and prediction is not None:
        without = without_rpc(config)
        local = plan_each([without])[0]
        alone = None if local.shortfall else _prediction(without, local, measure, cache, is_allowed=is_allowed)
    if cache.disturbed:
        tell(disturbance(cache.disturbed))
    report = replace(report, prediction=prediction, alone=alone)
    if values["as_json"]:
        _tell(report, as_json=True)
        return
    speed = report.speed_lines()
    click.echo("\n".join(["", *speed]) if speed else "")


def disturbance(names: Sequence[str]) -> str:
    """What to tell of measurements that other programs disturbed, by their names: how many of which part."""
    parts = Counter(re.split(r"[,:]| [(0-9]", name)[0] for name in names)
    told = ", ".join(f"{n} of {part}" for part, n in parts.items())
    what = "1 measurement was" if len(names) == 1 else f"{len(names)} measurements were"
    return (
        f"{what} disturbed by other programs ({told}) and not remembered, so that speeds may be off by far. Run the "
        "command again when the programs are done."
    )


def without_rpc(config: EngineConfig) -> EngineConfig:
    """The configuration of this machine alone, with its own devices where these were not chosen by name."""
    device = config.devices.device if config.devices.device == "auto" else "none"
    return changed(config, {"rpc": (), "device": device, "vram": ()})


def nearest_ctx(config: EngineConfig, plan: EnginePlan) -> int | None:
    """The largest of ever halved context windows that fits, None if the context is not what is too large."""
    sizes = [plan.n_ctx >> n for n in range(1, plan.n_ctx.bit_length()) if plan.n_ctx >> n >= _LEAST_CTX]
    plans = plan_each([changed(config, {"n_ctx": n_ctx}) for n_ctx in sizes])
    return next((one.n_ctx for one in plans if one.shortfall is None), None)


def _tell(report: PlanReport, *, as_json: bool) -> None:
    click.echo(msgspec.json.encode(report.as_json()) if as_json else "\n".join(map(printable, report.memory_lines())))
    if report.serve_shortfall is not None and report.plan.reserve != serving_bytes() and not as_json:
        tell(f"slimoe serve would not fit: {report.serve_shortfall}")
    if report.nearest_ctx is not None and not as_json:
        tell(f"It would fit with --ctx {report.nearest_ctx}.")


def _prediction(
    config: EngineConfig, plan: EnginePlan, measure: Measure, cache: MeasurementCache, *, is_allowed: bool
) -> PlanPrediction | None:
    """What to expect; None when it is not known and measuring is not allowed, or fails."""
    told = False

    def before(name: str) -> None:
        nonlocal told
        if not is_allowed:
            raise _UnmeasuredError(f"{name} is not known.")
        if not told:
            tell(
                "Measuring this machine for a prediction: matrix kernels, links and the disk, some seconds. "
                "--no-measure or Ctrl-C leaves it out."
            )
        told = True

    try:
        return predict_plan(plan, measure(config, plan, before, cache))
    except _UnmeasuredError:
        tell("Speed is not predicted: this machine is not measured yet. Leave --no-measure out.")
    except KeyboardInterrupt:
        tell("Speed is not predicted: measuring was stopped.")
    except SlimoeError as error:
        tell(f"Speed is not predicted: {error}")
    return None
