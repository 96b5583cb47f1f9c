"""Engines of a chosen number of expert slots, whatever memory the machine has."""

from dataclasses import replace

from slimoe.offload.cache.host_slots import slot_bytes
from slimoe.offload.cache.slots import LowSlots, TierPlan, low_classes, plan_tiers, slot_classes
from slimoe.offload.engine import Engine
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.lossy.modes import with_resident
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.engine_plan import EnginePlan, plan_engine
from tests.models.configs import reconfigured


def resident_engine(config: EngineConfig) -> Engine:
    """The whole model in memory, with the kernels that every budget can have."""
    return Engine.open(reconfigured(config, weights="copied", device="none"))


def tiered_engine(config: EngineConfig, share: float, prefetch_depth: int | None = None) -> Engine:
    """Reads experts from disk: with 0 there are slots for no more than a step of one token, with 1 for all experts.

    The routers of `prefetch_depth` layers are asked early, or as many as the plan says.
    """
    config = reconfigured(config, device="none")
    plan = tiered_plan(config, share)
    if prefetch_depth is not None:
        assert plan.tiers is not None
        plan = replace(plan, tiers=replace(plan.tiers, prefetch_depth=prefetch_depth))
    return Engine(config, plan, lambda done, total: None)


def least_vram(config: EngineConfig) -> int:
    """The smallest --vram that each of the config's devices can do with, if all get the same."""
    budget = 1
    while (shortfall := plan_engine(reconfigured(config, vram=(str(budget),))).shortfall) is not None:
        budget = shortfall.required_bytes
    return budget


def device_engine(config: EngineConfig, on_device: float, in_memory: float = 1.0) -> Engine:
    """Has slots on its devices for a share of the experts, and in host memory for a share as in `tiered_engine`.

    With 0 a device has a slot for one expert of each class. Above 1 nothing is cut.
    """
    least = least_vram(config)
    experts = [
        copies[0].n_bytes
        for layer in plan_engine(reconfigured(config, device="none", rpc=())).layers
        if layer
        for copies in layer.experts
    ]
    budget = 1 << 30 if on_device > 1 else least + int(on_device * sum(experts))
    config = reconfigured(config, vram=(str(budget),))
    return Engine(config, tiered_plan(config, in_memory), lambda done, total: None)


def tiered_plan(config: EngineConfig, share: float) -> EnginePlan:
    """The plan of such an engine."""
    plan = plan_engine(config)
    if plan.devices and not any(plan.cut_layers):
        return plan
    classes = slot_classes(plan.cut_layers) + low_classes(plan.cut_layers, _low(plan))
    whole = sum(n * slot_bytes(kind) for kind, n in classes.items())
    try:
        _tiers(plan, 0)
    except DoesNotFitError as error:
        least = error.required_bytes
    tiers = _tiers(plan, int(least + share * (whole - least)))
    lossy = plan.lossy and with_resident(plan.lossy, plan.layers, tiers, plan.priors)
    return replace(plan, tiers=tiers, shortfall=None, lossy=lossy)


def _tiers(plan: EnginePlan, budget: int) -> TierPlan:
    """With the slots that are planned, and not those that the test's process then has room for."""
    what = "a test's model"
    tiers = plan_tiers(plan.cut_layers, budget, program=0, weights=0, kv=0, compute=0, what=what, low=_low(plan))
    return replace(tiers, is_final=True)


def _low(plan: EnginePlan) -> LowSlots:
    return "none" if plan.lossy is None else plan.lossy.chooser.low_slots
