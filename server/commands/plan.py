"""`slimoe plan`: what opening a model would take."""

from collections.abc import Mapping
from typing import Any

import click
import msgspec

from offload.engine_plan import EnginePlan, plan_engine
from offload.memory import human, require
from server.engine_options import OptionsCommand, engine_flags, engine_options
from server.local_engine import engine_config


@click.command("plan", cls=OptionsCommand)
@engine_flags
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def command(values: Mapping[str, Any]) -> None:
    """Say what opening MODEL would take, without loading it.

    Ends with status 4 when it does not fit into the memory that is free now. Without MODEL the built-in demo is used.
    """
    config = engine_config(engine_options(values))
    plan = plan_engine(config)
    if values["as_json"]:
        click.echo(msgspec.json.encode(_as_json(plan)))
    else:
        click.echo("\n".join(_lines(plan)))
    require(plan.placement.required, plan.available, f"{config.model} with {plan.n_ctx} tokens of context")


def _as_json(plan: EnginePlan) -> dict[str, Any]:
    placement = plan.placement
    return {
        "model": str(plan.gguf.path),
        "n_ctx": plan.n_ctx,
        "n_threads": plan.n_threads,
        "weights": placement.mode,
        "bytes": {
            "mapped": placement.mapped,
            "copied": placement.copied,
            "repacked": placement.repacked,
            "kv": placement.kv,
            "compute": placement.compute,
            "program": placement.program + placement.staging,
        },
        "required_bytes": placement.required,
        "available_bytes": plan.available,
        "fits": placement.required <= plan.available,
    }


def _lines(plan: EnginePlan) -> list[str]:
    placement = plan.placement
    rows = {
        "weights, mapped": placement.mapped,
        "weights, copied": placement.copied,
        "weights, repacked": placement.repacked,
        f"KV cache, {plan.n_ctx} tokens": placement.kv,
        f"compute, batches of {plan.n_batch}": placement.compute,
        "program, at most": placement.program + placement.staging,
        "in all": placement.required,
        "free now": plan.available,
    }
    head = f"{plan.gguf.path.name}: weights {placement.mode}, {plan.n_threads} threads"
    return [head, *(f"{name:<28}{human(n_bytes):>12}" for name, n_bytes in rows.items() if n_bytes)]
