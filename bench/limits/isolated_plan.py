"""What `slimoe plan` expects of a job, alone in a process: measured and predicted under the job's own memory limit.

A job comes as JSON on stdin, the milliseconds per token go as JSON to stdout. Nothing is remembered of earlier
measurements, so that each says what the machine is like at that moment.
"""

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.limits.isolated_run import Job, engine_config
from slimoe.offload.errors import SlimoeError
from slimoe.offload.machine.measurement_cache import MeasurementCache
from slimoe.offload.plan.engine_plan import plan_engine
from slimoe.offload.plan.expert_placement import expert_placement
from slimoe.offload.plan.prediction import measure_machine, predict_plan


@dataclass(frozen=True, slots=True)
class Expected:
    """Milliseconds per token, and the share of selected experts that are expected to need the disk."""

    decode_ms: float
    prefill_ms: float
    disk_share: float


def expect(job: Job) -> Expected:
    """Plans the job, measures the machine and predicts the speed; raises what planning and `measure_machine` do."""
    config = engine_config(job)
    plan = plan_engine(config)
    with tempfile.TemporaryDirectory(prefix="slimoe-plan-") as directory:
        cache = MeasurementCache(Path(directory) / "measurements.json")
        predicted = predict_plan(plan, measure_machine(config, plan, lambda _: None, cache))
    return Expected(predicted.decode.ms_per_token, predicted.prefill.ms_per_token, expert_placement(plan).missed_share)


def main() -> None:
    """Carries out the job on stdin; exits as the `slimoe` command does."""
    try:
        expected = expect(Job(**json.load(sys.stdin)))
    except SlimoeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(asdict(expected)))


if __name__ == "__main__":
    main()
