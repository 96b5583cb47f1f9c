import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.offload.engine import Engine
from slimoe.offload.errors import DoesNotFitError, UsageError
from slimoe.offload.ggml.cpu_backend import can_repack
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.graph.weights import Form
from slimoe.offload.loaded_model import LoadedModel
from slimoe.offload.machine.probe import FormSpeed, KernelSpeed
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import ModelSources
from slimoe.offload.model.weight_reader import model_sources
from slimoe.offload.plan.engine_plan import plan_engine
from slimoe.offload.plan.weight_forms import Needs, WeightForms, choose_weight_forms, repackable_types
from tests.models.configs import engine_config, reconfigured, roomy_machine
from tests.models.gguf_content import read_content, write_content
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf

ROOM = 1 << 50
_POINTS = (1, 4, 256)
_FASTER = FormSpeed(_POINTS, (2.0, 8.0, 20.0), (1.0, 4.0, 10.0))
_BATCHES_SLOWER = FormSpeed(_POINTS, (2.0, 8.0, 20.0), (1.0, 7.0, 100.0))
_BATCHES_A_LITTLE_SLOWER = FormSpeed(_POINTS, (2.0, 8.0, 20.0), (1.0, 7.0, 30.0))
FASTER_REPACKED = KernelSpeed(_FASTER, _FASTER)
BATCHES_SLOWER_REPACKED = KernelSpeed(_BATCHES_SLOWER, _BATCHES_SLOWER)
EXPERTS_SLOWER_REPACKED = KernelSpeed(_BATCHES_SLOWER, _BATCHES_A_LITTLE_SLOWER)
NO_FASTER_REPACKED = KernelSpeed(*2 * (FormSpeed(_POINTS, (1.0, 8.0, 20.0), (0.99, 4.0, 10.0)),))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Q4_K, its down projections Q6_K."""
    directory = tmp_path_factory.mktemp("forms")
    shape = TinyShape(n_embd=256, n_ff=256, n_expert=2, n_expert_used=1)
    content = read_content(write_tiny_gguf(directory / "f32.gguf", None, shape=shape))
    content = content.quantised(Type.Q6_K, lambda name: "ffn_down" in name)
    content = content.quantised(Type.Q4_K, lambda name: "ffn_down" not in name)
    return write_content(directory / "m.gguf", content)


@pytest.fixture(scope="module")
def sources(model: Path) -> ModelSources:
    gguf = read_gguf(model)
    return model_sources(gguf, ModelSpec.from_gguf(gguf))


def decide(
    model: Path,
    mode: str,
    speed: KernelSpeed | None = None,
    available: int = ROOM,
    *,
    has_second: bool = True,
    has_all_logits: bool = False,
) -> WeightForms:
    gguf = read_gguf(model)
    spec = ModelSpec.from_gguf(gguf)
    sources = model_sources(gguf, spec)
    speeds = {kind.name: speed for kind in repackable_types(sources)} if speed else {}
    needs = Needs(kv=1000, program=100, n_masked=256, n_batch=32, has_all_logits=has_all_logits)
    return choose_weight_forms(sources, spec, mode, speeds, needs, available, has_second=has_second)


def tensor_bytes(model: Path) -> int:
    """All tensors."""
    return sum(tensor.n_bytes for tensor in read_gguf(model).tensors.values())


def loaded_bytes(model: Path) -> int:
    """All tensors but the token table, whose rows are read as they are needed."""
    return tensor_bytes(model) - read_gguf(model).tensors["token_embd.weight"].n_bytes


def test_this_machine_repacks(sources: ModelSources) -> None:
    """The tests below are about something."""
    assert Type.Q4_K in repackable_types(sources)
    assert can_repack(Type.Q4_K, 256, 256)
    assert not can_repack(Type.F32, 256, 256)
    assert not can_repack(Type.Q4_K, 256, 37)


def test_mapped_and_copied(model: Path) -> None:
    mapped, copied = decide(model, "mapped"), decide(model, "copied")
    assert (mapped.mapped, mapped.copied, mapped.repacked, mapped.staging) == (tensor_bytes(model), 0, 0, 0)
    assert (copied.mapped, copied.copied, copied.repacked, copied.staging) == (0, loaded_bytes(model), 0, 0)


def test_repacked_and_both(model: Path, sources: ModelSources) -> None:
    repacked, both = decide(model, "repacked"), decide(model, "both")
    assert repacked.repacked > 0
    assert repacked.mapped == both.mapped == 0
    assert repacked.copied + repacked.repacked == loaded_bytes(model)
    assert (both.copied, both.repacked) == (loaded_bytes(model), repacked.repacked)
    output = sources.layers[0].attn_output
    assert output is not None
    square = output.weight
    assert (both.form(square, 1), both.form(square, 2)) == ("repacked", "copied")
    assert {repacked.form(square, n) for n in (1, 2, 512)} == {"repacked"}


def test_a_table_that_is_the_output_too_is_copied_once(tmp_path: Path, model: Path) -> None:
    path = write_content(tmp_path / "tied.gguf", read_content(model).with_values({"output.weight": None}))
    mapped, copied = decide(path, "mapped"), decide(path, "copied")
    assert mapped.mapped == copied.copied == tensor_bytes(path)
    assert mapped.copied == copied.mapped == 0


@pytest.mark.parametrize(
    ("speed", "mode"),
    [
        (None, "copied"),
        (FASTER_REPACKED, "repacked"),
        (BATCHES_SLOWER_REPACKED, "both"),
        (EXPERTS_SLOWER_REPACKED, "both"),
        (NO_FASTER_REPACKED, "copied"),
    ],
)
def test_with_room_the_fastest_is_chosen(model: Path, speed: KernelSpeed | None, mode: str) -> None:
    assert decide(model, "auto", speed).mode == mode


@pytest.mark.parametrize(("speed", "mode"), [(FASTER_REPACKED, "repacked"), (BATCHES_SLOWER_REPACKED, "copied")])
def test_without_room_for_two_copies_the_better_one_is_chosen(model: Path, speed: KernelSpeed, mode: str) -> None:
    too_little = decide(model, "both").required - 1
    assert decide(model, "auto", speed, available=too_little).mode == mode


def test_steps_of_several_tokens_take_what_is_faster_for_so_many(model: Path, sources: ModelSources) -> None:
    """A matrix meets every token, an expert those that select it: half of them here."""
    forms = decide(model, "auto", BATCHES_SLOWER_REPACKED)
    output = sources.layers[0].attn_output
    assert output is not None
    expert = sources.layers[0].gate_up[0].weight
    assert [forms.form(output.weight, n) for n in (1, 4, 8, 32)] == ["repacked", "repacked", "copied", "copied"]
    assert [forms.form(expert, n) for n in (1, 4, 8, 32)] == ["repacked", "repacked", "repacked", "copied"]
    assert forms.forms(expert) == {"repacked", "copied"}


@pytest.mark.parametrize("available", [ROOM, 0])
def test_what_every_budget_can_have_is_the_same_in_all(model: Path, sources: ModelSources, available: int) -> None:
    """Matrices that are best repacked once, but never experts, which lie in slots as they are stored."""
    output = sources.layers[0].attn_output
    assert output is not None
    expert = sources.layers[0].gate_up[0].weight
    forms = decide(model, "auto", EXPERTS_SLOWER_REPACKED, available, has_second=False)
    assert (forms.forms(output.weight), forms.forms(expert)) == ({"repacked"}, {"copied"})
    tiered = decide(model, "auto", EXPERTS_SLOWER_REPACKED, available).in_tiers()
    assert tiered.repacked_tokens == forms.repacked_tokens
    slower = decide(model, "auto", BATCHES_SLOWER_REPACKED, available, has_second=False)
    assert (slower.mode, slower.in_tiers().mode) == ("copied", "copied")


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_output_matrix_is_chosen_for_single_rows(tmp_path: Path, is_tied: bool) -> None:
    """Of a prompt's batch it meets the last token alone, but where the logits of all are wanted."""
    shape = TinyShape(n_embd=256, n_ff=256, n_expert=2, n_expert_used=1)
    table = np.random.default_rng(0).standard_normal((304, 256), np.float32)
    tables = {"token_embd.weight": table, "output.weight": None if is_tied else table}
    content = read_content(write_tiny_gguf(tmp_path / "f32.gguf", None, shape=shape)).with_values(tables)
    model = write_content(tmp_path / "m.gguf", content.quantised(Type.Q4_K))
    gguf = read_gguf(model)
    sources = model_sources(gguf, ModelSpec.from_gguf(gguf))
    output, attention = sources.output.weight, sources.layers[0].attn_output
    assert attention is not None

    def forms(speed: KernelSpeed, **wanted: bool) -> list[set[Form]]:
        found = decide(model, "auto", speed, has_second=False, **wanted)
        tiered = decide(model, "auto", speed, **wanted).in_tiers()
        assert tiered.repacked_tokens == found.repacked_tokens
        return [found.forms(one) for one in (output, attention.weight)]

    assert forms(BATCHES_SLOWER_REPACKED) == [{"repacked"}, {"copied"}]
    assert forms(BATCHES_SLOWER_REPACKED, has_all_logits=True) == [{"copied"}, {"copied"}]
    assert forms(NO_FASTER_REPACKED) == [{"copied"}, {"copied"}]
    assert forms(FASTER_REPACKED, has_all_logits=True) == [{"repacked"}, {"repacked"}]


def test_all_budgets_give_the_same_logits(model: Path, tmp_path: Path) -> None:
    """A whole model, and one whose experts lie in slots, with steps that stop at routers: a trace has them do so."""
    speeds = {kind.name: EXPERTS_SLOWER_REPACKED for kind in (Type.Q4_K, Type.Q6_K)}
    machine = dataclasses.replace(roomy_machine(), kernels=speeds)
    config = engine_config(model, n_ctx=256, n_threads=1, ram="8GiB")
    configs = [config, reconfigured(config, trace=tmp_path / "trace")]
    found = []
    for one in configs:
        with closing(Engine.open(one, machine=machine)) as engine:
            assert engine.plan.weight_forms.mode == "repacked"
            logits = [engine.read(tokens, 1)[0].copy() for tokens in ([1, 2, 3, 4, 5], [6], [7, 8])]
            found.append((engine.tiers is None, np.stack(logits)))
    assert [is_whole for is_whole, _ in found] == [True, False]
    np.testing.assert_array_equal(found[0][1], found[1][1])
    plain = Engine.open(reconfigured(config, weights="copied"), machine=machine)
    assert not np.array_equal(plain.read([1, 2, 3, 4, 5], 1)[0], found[0][1][0])
    plain.close()


def test_unknown_mode(model: Path) -> None:
    with pytest.raises(UsageError, match=r"'fast' is unknown\. Use one of auto, mapped"):
        decide(model, "fast")


def test_what_is_required_is_the_sum(model: Path) -> None:
    weight_forms = decide(model, "both")
    parts = (weight_forms.mapped, weight_forms.copied, weight_forms.repacked, weight_forms.kv, weight_forms.compute)
    assert weight_forms.required == sum(parts) + weight_forms.staging + 100
    assert weight_forms.staging > 0


@pytest.mark.parametrize("mode", ["mapped", "copied", "repacked", "both"])
@pytest.mark.parametrize("changed", [{}, {"kv_type": "q8_0"}, {"n_ctx": 20000}, {"n_batch": 1}], ids=str)
def test_as_much_is_allocated_as_was_planned(model: Path, mode: str, changed: dict[str, Any]) -> None:
    config = engine_config(model, n_ctx=300, n_threads=1, weights=mode)
    engine = Engine.open(reconfigured(config, **changed))
    weight_forms = engine.plan.weight_forms
    with closing(LoadedModel(engine.config, engine.plan, lambda *_: None)) as loaded:
        assert loaded.store is not None
        assert loaded.store.n_bytes == weight_forms.copied + weight_forms.repacked
    assert engine.memory()["kv"] == weight_forms.kv
    engine.prefill([1] * 250)
    engine.decode(2)
    assert 0 < engine.memory()["compute"] <= weight_forms.compute
    engine.close()


def test_progress_ends_with_all_bytes(model: Path) -> None:
    seen: list[tuple[int, int]] = []
    engine = Engine.open(engine_config(model, n_threads=1, weights="both"), lambda *now: seen.append(now))
    weight_forms = engine.plan.weight_forms
    engine.close()
    total = weight_forms.mapped + weight_forms.copied + weight_forms.repacked
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {whole for _, whole in seen} == {total}
    assert 0.99 * total <= seen[-1][0] <= total


@pytest.mark.parametrize("mode", ["mapped", "repacked", "both"])
def test_what_does_not_fit_is_refused_before_loading(model: Path, mode: str) -> None:
    """Modes that keep a model whole; others read what does not fit from disk."""
    config, machine = engine_config(model, n_threads=1, n_batch=64, weights=mode), roomy_machine()
    required = plan_engine(config, machine).weight_forms.required

    def progress(done: int, total: int) -> None:
        raise AssertionError("a weight was loaded")

    with pytest.raises(DoesNotFitError, match=r"needs at least .* MiB of memory, but the budget is .* MiB") as caught:
        Engine.open(reconfigured(config, ram=str(required - 1)), progress, machine)
    assert (caught.value.required_bytes, caught.value.available_bytes) == (required, required - 1)
    with pytest.raises(AssertionError, match="a weight was loaded"):
        Engine.open(reconfigured(config, ram=str(required)), progress, machine)


def test_smaller_batches_come_before_reading_from_disk(model: Path) -> None:
    config, machine = engine_config(model, n_threads=1, n_batch=512), roomy_machine()
    plans = [plan_engine(config, machine)]
    for _ in range(3):
        ram = str(plans[-1].weight_forms.required - 1)
        plans.append(plan_engine(reconfigured(config, ram=ram), machine))
    assert [plan.n_batch for plan in plans[:3]] == [512, 256, 128]
    assert [plan.tiers is None for plan in plans] == [True, True, True, False]


def test_a_huge_context_is_refused(model: Path) -> None:
    with pytest.raises(DoesNotFitError, match=r"with 1000000000 tokens of context needs at least"):
        Engine.open(engine_config(model, n_threads=1, n_ctx=10**9))
