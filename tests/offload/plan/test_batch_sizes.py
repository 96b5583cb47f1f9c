"""How many prompt tokens are computed at once where memory is short: what experts lose by it is counted."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from slimoe.offload.plan.engine_plan import EnginePlan, plan_each, plan_engine
from slimoe.offload.plan.prediction import predict_plan
from slimoe.server.options.engine_options import DEMO
from tests.models.configs import engine_config, roomy_machine
from tests.models.measured_machine import machine_for
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf

SHAPES = {
    "few": TinyShape(n_layer=3, n_embd=256, n_ff=256, n_expert=8, n_expert_used=2),
    "many": TinyShape(n_layer=2, n_embd=256, n_ff=128, n_expert=64, n_expert_used=4),
}
N_BUDGETS = 60
MACHINE = roomy_machine(60 << 20)


@pytest.fixture(scope="module", params=[None, *SHAPES], ids=["demo", *SHAPES])
def plans(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sequence[EnginePlan]:
    """Plans for ever larger budgets, from the least that a model can be opened in to all that it wants."""
    path: Path = DEMO
    if request.param is not None:
        path = write_tiny_gguf(tmp_path_factory.mktemp("batches") / "tiny.gguf", None, shape=SHAPES[request.param])
    least = plan_engine(engine_config(path, ram="1"), MACHINE).shortfall
    assert least is not None
    most = plan_engine(engine_config(path), MACHINE).weight_forms.required
    step = (most - least.required_bytes) // N_BUDGETS
    budgets = range(least.required_bytes, most + step, step)
    return plan_each([engine_config(path, ram=str(budget)) for budget in budgets], MACHINE)


def request_ms(plan: EnginePlan, disk: float) -> float:
    """Milliseconds that a prompt of 512 tokens and an answer of 128 are expected to take.

    What is read ahead of time takes slots, which predictions count against a plan and not for it: nothing is here.
    """
    tiers = None if plan.tiers is None else replace(plan.tiers, prefetch_depth=0)
    prediction = predict_plan(replace(plan, tiers=tiers), machine_for(plan, disk=disk))
    return 512 * prediction.prefill.ms_per_token + 128 * prediction.decode.ms_per_token


@pytest.mark.parametrize("disk", [1e7, 3e7, 1e8])
def test_more_memory_is_never_expected_to_be_slower(plans: Sequence[EnginePlan], disk: float) -> None:
    """With disks of a tenth of memory's speed, which is 1 GB/s here, and slower."""
    assert not any(plan.shortfall for plan in plans)
    assert len({(plan.tiers is None, plan.n_batch) for plan in plans}) > 2, "there was something to decide"
    taken = [request_ms(plan, disk) for plan in plans]
    worse = [
        (larger.available, larger.n_batch, after / before)
        for larger, before, after in zip(plans[1:], taken, taken[1:], strict=False)
        if after > before * (1 + 1e-9)
    ]
    assert not worse


def test_what_is_lacking_is_told_of_the_batch_that_was_tried_last() -> None:
    lacking = plan_engine(engine_config(DEMO, ram="1"), MACHINE)
    assert lacking.shortfall is not None
    asked, usual = (plan_engine(engine_config(DEMO, n_batch=n), MACHINE) for n in (lacking.n_batch, 512))
    assert lacking.weight_forms.compute == asked.weight_forms.compute < usual.weight_forms.compute
