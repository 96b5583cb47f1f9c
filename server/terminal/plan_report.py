"""What `slimoe plan` tells of a plan, as JSON and as lines for a person."""

from dataclasses import dataclass
from typing import Any

from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.machine.cost_model import CPU, DISK, LINK, Prediction
from slimoe.offload.plan.engine_plan import EnginePlan
from slimoe.offload.plan.expert_placement import expert_placement
from slimoe.offload.plan.prediction import PlanPrediction, known_as
from slimoe.offload.resources.memory import human

_DEVICE_BYTES = ("weights", "kv", "compute", "slots", "mtp")
_BOUNDS = {CPU: "the CPU", DISK: "the disk", LINK: "the link to the device"}


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What `slimoe plan` tells: the plan, the speed to expect, and what would fit where the plan does not.

    `nearest_ctx` is the largest context window found that would fit, None if the plan fits or no window does.
    `serve_shortfall` is what `slimoe serve` would lack, None if it fits. `alone` is the speed without other machines,
    None if the plan has none, or the model would not fit without them.
    """

    plan: EnginePlan
    prediction: PlanPrediction | None = None
    nearest_ctx: int | None = None
    serve_shortfall: DoesNotFitError | None = None
    alone: PlanPrediction | None = None

    def as_json(self) -> dict[str, Any]:
        """Everything as one JSON object. Bytes are of host memory unless they stand under a device."""
        plan = self.plan
        sizes = host_bytes(plan)
        fits = plan.shortfall is None
        return {
            "model": str(plan.gguf.path),
            "n_ctx": plan.n_ctx,
            "n_parallel": plan.n_parallel,
            "n_window_cells": plan.kv.n_window_cells,
            "n_batch": plan.n_batch,
            "n_threads": plan.n_threads,
            "weights": plan.weight_forms.mode,
            "bytes": sizes,
            "required_bytes": sum(sizes.values()) if plan.shortfall is None else plan.shortfall.required_bytes,
            "available_bytes": plan.available if plan.shortfall is None else plan.shortfall.available_bytes,
            "fits": fits,
            "shortfall": None if plan.shortfall is None else str(plan.shortfall),
            "serve": {
                "fits": self.serve_shortfall is None,
                "shortfall": None if self.serve_shortfall is None else str(self.serve_shortfall),
            },
            "nearest": None if self.nearest_ctx is None else {"n_ctx": self.nearest_ctx},
            "tiers": _tiers(plan) if fits else None,
            "prediction": _phases(self.prediction),
            "without_rpc": _phases(self.alone),
            "notes": list(plan.notes),
        }

    def memory_lines(self) -> list[str]:
        """Memory of the host by use, and what lies in which tier."""
        plan = self.plan
        head = f"{plan.gguf.path.name}: weights {plan.weight_forms.mode}, {_count(plan.n_threads, 'thread')}"
        if plan.shortfall is not None and plan.devices:
            return [head]
        sizes = host_bytes(plan)
        times = f"{plan.n_parallel} x " if plan.n_parallel > 1 else ""
        kv = f"KV cache, {times}{plan.n_ctx} tokens"
        rows = {
            "weights, mapped": sizes["mapped"],
            "weights, copied": sizes["copied"],
            "weights, repacked": sizes["repacked"],
            "experts, read from disk": sizes.get("host_pool", 0),
            kv: sizes["kv"],
            "tokens of the MTP block" if plan.devices else "MTP block, for drafts": sizes["mtp"],
            f"compute, batches of {plan.n_batch}": sizes["compute"],
            "pinned, on the way to devices": sizes.get("pinned", 0),
            "program, at most": sizes["program"],
            "drivers of devices, at most": sizes["drivers"],
            "other processes, at most": sizes["processes"],
            "in all": sum(sizes.values()),
            "needs at least": 0 if plan.shortfall is None else plan.shortfall.required_bytes,
            "may be taken": plan.available,
        }
        lines = {name: _row(name, human(n_bytes)) for name, n_bytes in rows.items() if n_bytes}
        if plan.kv.n_window_cells:
            lines[kv] += f" ({plan.kv.n_window_cells} tokens in windows)"
        return [head, *lines.values(), *_tier_lines(plan)]

    def speed_lines(self) -> list[str]:
        """The speeds to expect; no lines if they were not predicted."""
        if self.prediction is None:
            return []
        one, alone = self.prediction, self.alone
        lines = [
            _speed(f"answers, after {one.n_past} tokens", one.decode),
            _speed(f"prompts, {one.n_prompt} at a time", one.prefill),
        ]
        lines += [_row(name, choice.reason) for name, choice in one.exchange.items()]
        if one.exchange:
            lines.append(
                _row("while it runs", "measured again; experts move less, or more, when that is what pays then")
            )
        if alone is None:
            return lines
        speeds = f"answers about {alone.decode.tokens_per_second:.1f} tokens/s, prompts"
        lines.append(_row("without --rpc", f"{speeds} {alone.prefill.tokens_per_second:.1f}"))
        phases = {"answers": (one.decode, alone.decode), "prompts": (one.prefill, alone.prefill)}
        slower = [name for name, (far, near) in phases.items() if far.ms_per_token > near.ms_per_token]
        if slower:
            advice = "" if len(slower) < len(phases) else ": leave --rpc out"
            lines.append(f"The other machine is used as asked, but slows {' and '.join(slower)} down{advice}.")
        return lines


def host_bytes(plan: EnginePlan) -> dict[str, int]:
    """Bytes of host memory by use."""
    weight_forms, tiers = plan.weight_forms, plan.tiers
    if tiers is not None:
        sizes = {"copied": tiers.weights, "host_pool": tiers.host_pool, "kv": tiers.kv}
        sizes |= {"compute": tiers.compute - plan.pinned, "pinned": plan.pinned}
        others = {"drivers": plan.driver_bytes, "processes": plan.reserve}
        program = tiers.program - sum(others.values()) - plan.mtp_bytes
        return {"mapped": 0, "repacked": 0, **sizes, "mtp": plan.mtp_bytes, "program": program, **others}
    return {
        "mapped": weight_forms.mapped,
        "copied": weight_forms.copied,
        "repacked": weight_forms.repacked,
        "kv": weight_forms.kv,
        "compute": weight_forms.compute,
        "mtp": plan.mtp_bytes,
        "program": weight_forms.program + weight_forms.staging - plan.driver_bytes - plan.reserve - plan.mtp_bytes,
        "drivers": plan.driver_bytes,
        "processes": plan.reserve,
    }


# --- tiers -------------------------------------------------------------------------------------------------


def _tiers(plan: EnginePlan) -> dict[str, Any]:
    where = expert_placement(plan)
    devices = [
        {
            "name": device.device.name,
            "description": device.device.description,
            "layers": list(device.layers),
            "is_whole": device.is_whole,
            "n_experts": n_experts,
            "bytes": {name: getattr(device, name) for name in _DEVICE_BYTES},
            "required_bytes": device.required,
            "budget_bytes": device.budget,
        }
        for device, n_experts in zip(plan.devices, where.on_devices, strict=True)
    ]
    return {
        "devices": devices,
        "host": {
            "n_experts": where.on_host,
            "n_slots": plan.tiers.n_resident if plan.tiers else None,
            "prefetch_depth": plan.tiers.prefetch_depth if plan.tiers else 0,
            "n_ahead": plan.tiers.prefetch_depth if plan.tiers else 0,  # the field's old name, for one version
            "budget_bytes": plan.available,
        },
        "disk": {"n_experts": where.on_disk},
        "n_experts": where.n_experts,
        "expected_hits": {"devices": where.device_share, "host": where.found_share, "disk": where.missed_share},
    }


def _tier_lines(plan: EnginePlan) -> list[str]:
    """Where the experts are; nothing if they are all in host memory."""
    if plan.is_resident or plan.shortfall is not None:
        return []
    where = expert_placement(plan)
    lines = []
    for device, n_experts in zip(plan.devices, where.on_devices, strict=True):
        first, last = device.layers[0], device.layers[-1]
        layers = f"layer {first}" if first == last else f"layers {first} to {last}"
        what = "all of it" if device.is_whole else f"{_count(n_experts, 'expert')} of theirs"
        what += ", the MTP block" if device.mtp else ""
        taken = f"{layers}, {what}, {human(device.required)} of {human(device.budget)}"
        lines.append(_row(known_as(device.device), taken))
    if where.on_host:
        lines.append(_row("host memory", f"{where.on_host} of {_count(where.n_experts, 'expert')}"))
    if where.on_disk:
        lines.append(_row("disk only", f"{where.on_disk} of {_count(where.n_experts, 'expert')}"))
    if where.is_cut:
        hits = {"on devices": where.device_share, "in memory": where.found_share, "read from disk": where.missed_share}
        found = ", ".join(f"{100 * hit:.0f} % {name}" for name, hit in hits.items() if hit > 0)
        basis = "from the uses that the file tells" if plan.priors is not None else "a guess: as in other models' texts"
        lines.append(_row("experts are found", f"{found} ({basis})"))
    return ["", *lines]


# --- speed -------------------------------------------------------------------------------------------------


def _phases(one: PlanPrediction | None) -> dict[str, Any] | None:
    """Both phases, None if nothing was predicted."""
    if one is None:
        return None
    return {
        "decode": {"n_past": one.n_past, **_phase(one.decode)},
        "prefill": {"n_tokens": one.n_prompt, **_phase(one.prefill)},
        "exchange": {
            name: {"mode": choice.mode, "reason": choice.reason, "expected_ms": one.costs[name].as_ms()}
            for name, choice in one.exchange.items()
        },
    }


def _phase(one: Prediction) -> dict[str, Any]:
    return {
        "tokens_per_second": one.tokens_per_second,
        "ms_per_token": one.ms_per_token,
        "bound_tokens_per_second": 1000 / one.bound_ms,
        "bound_ms": one.bound_ms,
        "bound_tier": one.bound_name,
        "tier_ms": dict(one.tier_ms),
    }


def _speed(name: str, one: Prediction) -> str:
    bound = f"at most {1000 / one.bound_ms:.1f}: {_BOUNDS.get(one.bound_name, one.bound_name)} is the limit"
    return _row(name, f"about {one.tokens_per_second:.1f} tokens/s, {bound}")


# --- words -------------------------------------------------------------------------------------------------


def _row(name: str, value: str) -> str:
    width = 44 - max(32, len(name))
    return f"{name:<32}{value:>{max(width, len(value) + 1)}}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
