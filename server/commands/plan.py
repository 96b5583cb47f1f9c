"""`slimoe plan`: what opening a model would take."""

from collections.abc import Mapping
from typing import Any

import click
import msgspec

from offload.engine_plan import EnginePlan, plan_engine
from offload.memory import human
from server.engine_options import OptionsCommand, engine_flags, engine_options
from server.local_engine import engine_config


@click.command("plan", cls=OptionsCommand)
@engine_flags
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def command(values: Mapping[str, Any]) -> None:
    """Say what opening MODEL would take, without loading it.

    Ends with status 4 when it does not fit into the memory that is free now. Without MODEL the built-in demo is used.
    """
    plan = plan_engine(engine_config(engine_options(values)))
    if values["as_json"]:
        click.echo(msgspec.json.encode(_as_json(plan)))
    else:
        click.echo("\n".join(_lines(plan)))
    if plan.shortfall is not None:
        raise plan.shortfall


def _bytes(plan: EnginePlan) -> dict[str, int]:
    """What it takes, by use."""
    placement, tiers = plan.placement, plan.tiers
    if tiers is not None:
        sizes = {"copied": tiers.weights, "arena": tiers.arena, "kv": tiers.kv, "compute": tiers.compute}
        return {"mapped": 0, "repacked": 0, **sizes, "program": tiers.program}
    return {
        "mapped": placement.mapped,
        "copied": placement.copied,
        "repacked": placement.repacked,
        "kv": placement.kv,
        "compute": placement.compute,
        "program": placement.program + placement.staging,
    }


def _as_json(plan: EnginePlan) -> dict[str, Any]:
    sizes = _bytes(plan)
    return {
        "model": str(plan.gguf.path),
        "n_ctx": plan.n_ctx,
        "n_threads": plan.n_threads,
        "weights": plan.placement.mode,
        "bytes": sizes,
        "required_bytes": sum(sizes.values()) if plan.shortfall is None else plan.shortfall.required_bytes,
        "available_bytes": plan.available,
        "fits": plan.shortfall is None,
    }


def _lines(plan: EnginePlan) -> list[str]:
    sizes = _bytes(plan)
    rows = {
        "weights, mapped": sizes["mapped"],
        "weights, copied": sizes["copied"],
        "weights, repacked": sizes["repacked"],
        "experts, read from disk": sizes.get("arena", 0),
        f"KV cache, {_contexts(plan)}": sizes["kv"],
        f"compute, batches of {plan.n_batch}": sizes["compute"],
        "program, at most": sizes["program"],
        "in all": sum(sizes.values()),
        "free now": plan.available,
    }
    head = f"{plan.gguf.path.name}: weights {plan.placement.mode}, {plan.n_threads} threads"
    return [head, *(f"{name:<28}{human(n_bytes):>12}" for name, n_bytes in rows.items() if n_bytes)]


def _contexts(plan: EnginePlan) -> str:
    times = f"{plan.n_parallel} x " if plan.n_parallel > 1 else ""
    return f"{times}{plan.n_ctx} tokens"
