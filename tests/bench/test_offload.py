"""The bench of models larger than their memory: its figures by hand, its children, its mistakes."""

from contextlib import closing
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.disk_speed import DiskSpeed, disk_speed
from bench.limits.cgroup import NoControlGroupError, Usage, smallest_check
from bench.limits.engine_changes import parse_changes
from bench.limits.isolated_plan import Expected
from bench.limits.isolated_run import OURS, Job, Outcome, carry_out
from bench.limits.limited_runs import Limit, Plan, Run, Runs, run_candidate
from bench.models.random_copies import write_random_native
from bench.models.random_model import write_random_model
from bench.models.shapes import SHAPES
from bench.offload import expert_matrix_bytes, limits_for, main, opened
from bench.quality.offload_report import as_json
from slimoe.offload.engine import Engine
from slimoe.offload.errors import ModelFileError, UsageError
from slimoe.offload.plan.engine_config import EngineConfig, changed
from tests.models.configs import engine_config
from tests.models.gguf_content import file_tensors

ROOT = Path(__file__).parents[2]
FREE, HALF = Limit("unlimited", None, fits=True), Limit("2", 1000, fits=False)
PLAIN, REARRANGED = "llama.cpp --no-repack", "llama.cpp"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("offload-bench") / "model.gguf"
    write_random_model(path, SHAPES["smoke"].spec, routing="natural")
    return path


def outcome(step: float, counters: dict[str, float] | None = None, checksum: int = 7) -> Outcome:
    """Two steps of this many seconds, half of them in graphs."""
    return Outcome(0.5, 0.25, [step, step], step, counters or {}, 40, 300, [1, 2], checksum)


def run_of(one: Outcome) -> Run:
    return Run(one, None, Usage(1000, 900, 3, 0))


@pytest.fixture
def plan(model: Path) -> Plan:
    return Plan(model, model, (FREE, HALF), 1, 2, (1,), (2, 3, 4), 1, 4096)


@pytest.fixture
def runs() -> Runs:
    killed = Run(None, "killed, because it needed more memory than the limit", Usage(1000, 1000, 9, 1))
    cached = {"hits": 6.0, "pending": 3.0, "misses": 1.0, "bytes_read": 1600.0, "bytes_wasted": 400.0}
    return Runs(
        {
            (FREE.name, OURS): [run_of(outcome(0.1)), run_of(outcome(0.1))],
            (FREE.name, REARRANGED): [run_of(outcome(0.09)), run_of(outcome(0.09))],
            (FREE.name, PLAIN): [run_of(outcome(0.12)), run_of(outcome(0.12))],
            (HALF.name, OURS): [run_of(outcome(step, cached)) for step in (0.2, 0.4)],
            (HALF.name, PLAIN): [run_of(outcome(2.0)), killed],
        },
        {HALF.name: [DiskSpeed(2000.0, 2, True), DiskSpeed(4000.0, 2, True)]},
        {HALF.name: [Expected(230.0, 9.0, 0.1), Expected(250.0, 9.0, 0.1)]},
    )


def test_figures_by_hand(plan: Plan, runs: Runs) -> None:
    """600 bytes of use a token at 3000 bytes a second are 200 ms, more than the 100 ms of computing; ours takes 300."""
    document = as_json(plan, runs)
    assert document["decode_vs_llamacpp"] == {"unlimited": pytest.approx(0.9), "2": pytest.approx(2.0 / 0.3)}
    assert document["share_of_bound"] == {"unlimited": None, "2": pytest.approx(2 / 3)}
    half = document["limits"]["2"]
    assert half["expected_vs_measured"] == pytest.approx(0.8)
    assert half["hit_share"] == pytest.approx(0.6)
    assert half["missed_bytes_per_token"] == pytest.approx(600)
    assert half["bound_ms"] == pytest.approx(200)
    assert half["bound_by"] == "disk"
    assert half["same_choices"] == 1
    assert half["same_logits"] is True
    assert half["contenders"] == half["candidates"], "the field's old name"
    ours = half["candidates"][OURS]
    assert ours["ms_per_token"] == pytest.approx(300)
    assert ours["ms_per_token_of_rounds"] == pytest.approx([200, 400])
    assert ours["disk_bytes_per_token"] == 20
    assert ours["peak_group_bytes"] == 900


def test_the_bound_takes_the_fastest_reading_that_was_seen(plan: Plan, runs: Runs) -> None:
    """3200 bytes in 0.2 seconds are 16000 bytes a second: more than the disk alone gave."""
    cached = {"hits": 6.0, "bytes_read": 3200.0, "bytes_wasted": 0.0, "read_seconds": 0.2}
    runs.candidates[HALF.name, OURS][:] = [run_of(outcome(0.2, cached))]
    half = as_json(plan, runs)["limits"]["2"]
    assert half["disk_bytes_per_second"] == 3000
    assert half["read_bytes_per_second"] == pytest.approx(16_000)
    assert half["disk_ms"] == pytest.approx(100)


def test_a_candidate_that_was_killed_is_told(plan: Plan, runs: Runs) -> None:
    baseline = as_json(plan, runs)["limits"]["2"]["candidates"][PLAIN]
    assert baseline["oom_kills"] == 1
    assert baseline["failures"] == ["killed, because it needed more memory than the limit"]
    assert baseline["ms_per_token"] == pytest.approx(2000), "the run that came to its end still counts"


def test_where_no_baseline_is_left_there_is_no_ratio(plan: Plan, runs: Runs) -> None:
    for key in ((HALF.name, PLAIN), (HALF.name, OURS)):
        failed = Runs(runs.candidates | {key: runs.candidates[HALF.name, PLAIN][1:]}, runs.disk)
        assert as_json(plan, failed)["decode_vs_llamacpp"]["2"] is None


def test_the_bound_counts_computing_where_it_takes_longer(plan: Plan, runs: Runs) -> None:
    fast = Runs(runs.candidates, {HALF.name: [DiskSpeed(60_000.0, 2, True)]})
    half = as_json(plan, fast)["limits"]["2"]
    assert (half["bound_by"], half["bound_ms"]) == ("compute", pytest.approx(100))
    alone = replace(plan, limits=(HALF,))
    assert as_json(alone, fast)["limits"]["2"]["bound_ms"] == pytest.approx(1e3 * 0.3 / 2), "the time in graphs"


@pytest.mark.parametrize(("checksums", "expected"), [((7, 7), True), ((7, 8), False)])
def test_another_bit_is_noticed(plan: Plan, runs: Runs, checksums: tuple[int, int], expected: bool) -> None:
    runs.candidates[HALF.name, OURS][:] = [run_of(outcome(0.2, checksum=checksum)) for checksum in checksums]
    assert as_json(plan, runs)["limits"]["2"]["same_logits"] is expected


def test_limits_are_shares_of_the_file(model: Path) -> None:
    free, wide, narrow = limits_for(model, ("0.5", "2"))
    assert (free.n_bytes, free.candidates) == (None, (OURS, REARRANGED, PLAIN))
    size = model.stat().st_size
    assert wide.n_bytes == pytest.approx(2 * size, rel=0.01)
    assert narrow.n_bytes == pytest.approx(size / 2, rel=0.01)
    assert narrow.candidates == (OURS, PLAIN), "rearranged weights need as much memory again"
    with pytest.raises(UsageError, match="--ratio"):
        limits_for(model, ("0.0",))
    (named,) = [limit for limit in limits_for(model, ("3MiB",)) if limit.n_bytes is not None]
    assert named.n_bytes == 3 << 20


def test_the_expert_matrix_that_times_the_disk(model: Path) -> None:
    shape = SHAPES["smoke"]
    assert expert_matrix_bytes(model) == shape.n_embd * shape.n_ff // 256 * 144


def test_an_isolated_run_reads_what_it_is_told(model: Path) -> None:
    """Its choices are those of llama.cpp, stepped here over the same tokens."""
    job = Job(PLAIN, str(model), 1, prompt=(5, 6, 7), tokens=(8, 9, 10, 11), n_warm=1)
    baseline = LlamaCpp(LlamaCppConfig(model, n_ctx=256, n_threads=1, extra_buffers=False))
    baseline.prefill([5, 6, 7, 8])
    expected = [int(np.argmax(baseline.decode(token))) for token in (9, 10, 11)]
    baseline.close()
    theirs, ours = carry_out(job), carry_out(replace(job, candidate=OURS))
    assert theirs.choices == expected
    assert ours.choices == expected
    assert len(ours.step_seconds) == 3
    assert 0 < ours.graph_seconds <= sum(ours.step_seconds)
    assert ours.peak_resident > 10 << 20


def test_a_run_that_cannot_begin_says_why(tmp_path: Path) -> None:
    run = run_candidate(Job(OURS, str(tmp_path / "missing.gguf"), 1, (1,), (2,), 0), None)
    assert run.outcome is None
    assert run.failure == f"{tmp_path / 'missing.gguf'}: there is no such file. Check the path."


def test_a_run_without_enough_memory_is_killed_and_told(model: Path) -> None:
    """Python alone needs more than 8 MiB; where no limit can be set, that is said before anything is run."""
    job = Job(PLAIN, str(model), 1, (1,), (2,), 0)
    if not smallest_check()["can_limit"]:
        with pytest.raises(NoControlGroupError, match="Run as root"):
            run_candidate(job, 8 << 20)
    else:
        run = run_candidate(job, 8 << 20)
        assert run.outcome is None
        assert run.failure == "killed, because it needed more memory than the limit"
        assert run.usage is not None
        assert run.usage.n_oom_kills >= 1


def test_random_copies_are_one_model_in_two_files() -> None:
    """The better copies of ours are llama.cpp's file's experts, byte for byte; both files go in the end."""
    with opened("smoke", "Q8_0,Q4_K", "natural") as (stock, native):
        theirs, ours = file_tensors(stock), file_tensors(native)
        stack = theirs["blk.1.ffn_down_exps.weight"]
        high, low = (ours[f"blk.1.ffn_down_exps.b{bucket}.weight"] for bucket in (0, 1))
        assert np.array_equal(stack.data.ravel(), high.data.ravel())
        assert (high.tensor_type.name, low.tensor_type.name) == ("Q8_0", "Q4_K")
        del theirs, ours, stack, high, low
    assert not stock.parent.exists()
    with pytest.raises(UsageError, match="--model must be one of"), opened("file.gguf", "Q8_0,Q4_K", "natural"):
        pass


def test_engine_changes_are_fields_and_values() -> None:
    changes = parse_changes(["policy=lru", "max_kl=0.01", "direct_io=false", "lossy=low:0.3"])
    assert changes == {"policy": "lru", "max_kl": 0.01, "direct_io": False, "lossy": "low:0.3"}
    assert changed(EngineConfig(Path("m")), changes).loss.max_kl == 0.01
    for wrong in ("policy", "polcy=lru", "model=other.gguf"):
        with pytest.raises(UsageError, match="FIELD=VALUE"):
            parse_changes([wrong])


def test_the_disk_is_timed_on_whole_pages(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    speed = disk_speed(path, 10_000, 0.01)
    assert speed.bytes_per_second > 0
    path.write_bytes(bytes(100))
    with pytest.raises(ModelFileError, match="too small"):
        disk_speed(path, 10_000, 0.01)
    with pytest.raises(ModelFileError, match="cannot be opened"):
        disk_speed(tmp_path / "missing", 10_000, 0.01)


@pytest.mark.parametrize(
    "arguments", [["--model", "missing.gguf"], ["--model", "smoke", "--ratio", "-1"], ["--engine", "polcy=lru"]]
)
def test_mistakes_are_answered_in_a_sentence(arguments: list[str]) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code in (2, 3)
    assert isinstance(done.exception, SystemExit)
    assert done.stdout == ""


def test_random_copies_run_exact_and_elastic(tmp_path: Path) -> None:
    path = tmp_path / "copies.gguf"
    n_bytes = write_random_native(path, SHAPES["smoke"].spec, ("Q4_K", "Q2_K"))
    assert n_bytes == path.stat().st_size
    for lossy in (None, "elastic"):
        with closing(Engine.open(engine_config(path, n_ctx=256, n_threads=1, lossy=lossy))) as engine:
            assert np.isfinite(engine.prefill([1, 2, 3])).all()


def test_a_random_model_with_main_experts_has_the_whole_models_weights(tmp_path: Path) -> None:
    """All weights but the vectors are the same."""
    spec, paths = SHAPES["smoke"].spec, (tmp_path / "all.gguf", tmp_path / "main.gguf")
    for path, n_main in zip(paths, (None, 1), strict=True):
        write_random_native(path, spec, ("Q4_K",), n_main=n_main, routing="natural")
    whole, main = map(file_tensors, paths)
    assert main.keys() - whole.keys() == {
        f"blk.{n}.ffn_aux_{role}.weight" for n in (0, 1) for role in ("gain", "shift")
    }
    assert all(np.array_equal(main[name].data, one.data) for name, one in whole.items())
    with closing(Engine.open(engine_config(paths[1], n_ctx=256, n_threads=1))) as engine:
        assert np.isfinite(engine.prefill([1, 2, 3])).all()
    with pytest.raises(UsageError, match="--main is 2, but a token selects 2"):
        write_random_native(paths[1], spec, ("Q4_K",), n_main=2)


def test_random_experts_in_buckets_are_of_the_types_and_widths_that_were_asked_for(tmp_path: Path) -> None:
    path, spec = tmp_path / "buckets.gguf", SHAPES["smoke"].spec
    write_random_native(path, spec, ("Q4_K",), buckets=("Q4_K/Q6_K", "Q3_K:256"))
    tensors = file_tensors(path)
    found = {
        name: (one.tensor_type.name, one.data.shape[0])
        for name, one in tensors.items()
        if "blk.1.ffn_down_exps" in name
    }
    assert found == {"blk.1.ffn_down_exps.b0.weight": ("Q6_K", 2), "blk.1.ffn_down_exps.b1.weight": ("Q3_K", 2)}
    with closing(Engine.open(engine_config(path, n_ctx=256, n_threads=1))) as engine:
        widths = [copies[0].n_ff for layer in engine.plan.layers if layer for copies in layer.experts]
        assert widths == [512, 256] * 4
        assert np.isfinite(engine.prefill([1, 2, 3])).all()
        assert np.isfinite(engine.decode(4)).all()
    with pytest.raises(UsageError, match="5 buckets are more than the 4 experts"):
        write_random_native(path, spec, ("Q4_K",), buckets=("Q4_K",) * 5)
    with pytest.raises(UsageError, match="600 is no width of experts in Q4_K:600"):
        write_random_native(path, spec, ("Q4_K",), buckets=("Q4_K:600",))


@pytest.mark.parametrize("bench", ["offload", "copies_quality"])
def test_the_old_spelling_of_two_copies_is_understood(bench: str) -> None:
    context = import_module(f"bench.{bench}").main.make_context("bench", ["--pair", "Q4_K,Q2_K"])
    assert context.params["copies"] == "Q4_K,Q2_K"
