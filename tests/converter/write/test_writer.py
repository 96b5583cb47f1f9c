"""Compressed files hold what plans say: byte for byte what converting makes, and what the source stores already."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.converter.convert import ConvertOptions, convert
from slimoe.converter.layout.layer import Matrix
from slimoe.converter.layout.offsets import plan_bytes
from slimoe.converter.layout.plan import CompressPlan, ExpertPlan, Format
from slimoe.converter.methods.expert_matrices import merged_matrix
from slimoe.converter.quant.gain import sampled_runs
from slimoe.converter.quant.quantize import dequantize_rows, quantize_rows
from slimoe.converter.source.checkpoint_source import checkpoint_source
from slimoe.converter.source.gguf_source import gguf_source
from slimoe.converter.source.model_source import MatrixKey, ModelSource, expert_key
from slimoe.converter.write.quantiser import PlainQuantiser
from slimoe.converter.write.writer import write_planned
from slimoe.offload.errors import ModelFileError, UsageError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.native_format import read_layout, stack_name
from slimoe.offload.model.spec import ModelSpec
from tests.models.compress_plans import RandomPlans, same_plan, statistics_of, with_layers
from tests.models.gguf_content import Array, quantise
from tests.models.held_model import hold, random_mixtral
from tests.models.tiny_checkpoint import TinyConfig

F32, F16, Q8_0, Q4_K = Type.F32, Type.F16, Type.Q8_0, Type.Q4_K


@pytest.fixture(scope="module")
def source(moe_checkpoint: Path) -> ModelSource:
    """Two layers of 6 experts, top 3, n_embd 64, n_ff 96."""
    return checkpoint_source(moe_checkpoint)


@pytest.fixture(scope="module")
def k_quant_source(k_quant_checkpoint: Path) -> ModelSource:
    return checkpoint_source(k_quant_checkpoint)


@pytest.fixture(scope="module")
def q4_k_m(tmp_path_factory: pytest.TempPathFactory, k_quant_checkpoint: Path) -> Path:
    target = tmp_path_factory.mktemp("compressed") / "q4_k_m.gguf"
    return convert(ConvertOptions(k_quant_checkpoint, target, "Q4_K_M", n_threads=1)).path


def tensors(path: Path) -> dict[str, tuple[Type, bytes]]:
    return {t.name: (t.tensor_type, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


def keys(path: Path) -> dict[str, Any]:
    return {name: one.contents() for name, one in gguf.GGUFReader(path).fields.items() if name[:5] != "GGUF."}


def stored_types(source: ModelSource) -> CompressPlan:
    """A native plan that changes nothing, in the types that a GGUF source has."""

    def kind(key: MatrixKey) -> Type:
        blocks = source.blocks(key)
        assert blocks
        return blocks.type

    plan = same_plan(source, "F32", "native")
    layers = {}
    for n, layer in enumerate(plan.layers):
        of = [[kind(expert_key(n, part, e.members[0])) for part in ("gate", "up", "down")] for e in layer.experts]
        experts = tuple(replace(e, types=(a, b, c)) for e, (a, b, c) in zip(layer.experts, of, strict=True))
        roles = layer.types if layer.has_attention else ()
        types = {role: kind(MatrixKey(f"blk.{n}.{role}.weight")) for role in roles}
        layers[n] = replace(layer, experts=experts, types=types)
    plan = with_layers(plan, layers)
    return replace(plan, token_type=kind(MatrixKey("token_embd.weight")), output_type=kind(MatrixKey("output.weight")))


# --- a plan that changes nothing ---------------------------------------------------------------------------


def test_a_plan_that_changes_nothing_is_the_plain_conversion(
    tmp_path: Path, k_quant_source: ModelSource, q4_k_m: Path
) -> None:
    plan = same_plan(k_quant_source, "Q4_K_M")
    report = write_planned(k_quant_source, plan, tmp_path / "m.gguf", n_threads=2)
    assert tensors(report.path) == tensors(q4_k_m)
    assert report.n_bytes == report.path.stat().st_size == plan_bytes(plan, k_quant_source)
    ours, theirs = keys(report.path), keys(q4_k_m)
    assert {k: v for k, v in ours.items() if k not in ("slimoe.recipe", "slimoe.reserved")} == {
        k: v for k, v in theirs.items() if k not in ("slimoe.recipe", "general.file_type")
    }


def test_a_native_file_holds_the_same_matrices(tmp_path: Path, source: ModelSource, moe_checkpoint: Path) -> None:
    native = tensors(write_planned(source, same_plan(source, "Q8_0", "native"), tmp_path / "n.gguf").path)
    plain = tensors(convert(ConvertOptions(moe_checkpoint, tmp_path / "p.gguf", "Q8_0", n_threads=1)).path)
    assert {name.replace(".b0.", "."): data for name, data in native.items()} == plain


def test_what_lies_in_blocks_is_copied(tmp_path: Path, q4_k_m: Path) -> None:
    source = gguf_source(q4_k_m)
    report = write_planned(source, same_plan(source, "Q4_K_M"), tmp_path / "m.gguf", quantiser=Refusing())
    assert tensors(report.path) == tensors(q4_k_m)
    assert report.n_copied == sum(len(data) for _, data in tensors(q4_k_m).values())


class Refusing(PlainQuantiser):
    """Nothing is to be made but constants."""

    def rows(
        self, matrix: Matrix, weights: NDArray[np.float32], first: int = 0, gain: float = 1.0
    ) -> NDArray[np.uint8]:
        assert matrix.is_constant, matrix.key
        return super().rows(matrix, weights, first, gain)


class Doubling:
    """Is told of what is copied, and doubles routers, which is all that is left."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def begin_layer(self, layer: int) -> None:
        self.told.append(f"layer {layer}")

    def quantise(self, matrix: Matrix, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        assert matrix.key.name.endswith("ffn_gate_inp.weight")
        return (2 * weights).reshape(-1).view(np.uint8)

    def kept(self, matrix: Matrix) -> None:
        self.told.append(matrix.key.name)

    def end_layer(self, layer: int) -> None:
        """Nothing to note."""


def test_routers_are_fitted_though_the_source_has_their_blocks(tmp_path: Path, q4_k_m: Path) -> None:
    source, quantiser = gguf_source(q4_k_m), Doubling()
    path = write_planned(source, same_plan(source, "Q4_K_M"), tmp_path / "m.gguf", quantiser=quantiser).path
    before, after = tensors(q4_k_m), tensors(path)
    changed = [name for name in before if after[name] != before[name]]
    assert changed == [name for name in before if name.endswith("ffn_gate_inp.weight")] != []
    for name in changed:
        np.testing.assert_array_equal(gguf_source(path).read(MatrixKey(name)), 2 * source.read(MatrixKey(name)))
    assert not any(name in changed for name in quantiser.told)


@pytest.mark.parametrize("seed", range(3))
def test_compressing_a_native_file_again_copies_it(tmp_path: Path, source: ModelSource, seed: int) -> None:
    plan = RandomPlans(source, seed).draw()
    bare = {
        n: replace(layer, experts=tuple(replace(expert, low_types=None) for expert in layer.experts))
        for n, layer in enumerate(plan.layers)
    }
    first = write_planned(source, with_layers(plan, bare), tmp_path / "a.gguf").path
    again = gguf_source(first)
    copied = stored_types(again)
    constants = {n: replace(layer, constants=bare[n].constants) for n, layer in enumerate(copied.layers)}
    second = write_planned(again, with_layers(copied, constants), tmp_path / "b.gguf", quantiser=Refusing()).path
    assert tensors(second) == tensors(first)


# --- what plans change -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_every_matrix_is_what_its_plan_says(tmp_path: Path, source: ModelSource, seed: int) -> None:
    plan = RandomPlans(source, seed + 10).draw()
    file = read_gguf(write_planned(source, plan, tmp_path / "m.gguf").path)
    layout, found = read_layout(file, ModelSpec.from_gguf(file)), tensors(file.path)
    for n, layer in enumerate(plan.layers):
        assert (f"blk.{n}.attn_q.weight" in found) is layer.has_attention
        assert (f"blk.{n}.ffn_norm.weight" in found) is bool(layer.rows)
        if layer.rows:
            router = source.read(MatrixKey(f"blk.{layer.block}.ffn_gate_inp.weight"))[list(layer.rows)]
            assert found[f"blk.{n}.ffn_gate_inp.weight"] == (F32, router.tobytes())
        if layer.constants is not None:
            assert found[f"blk.{n}.ffn_novice.weight"] == (F32, layer.constants.tobytes())
        for expert, copy, bucket, slot in layout.layers[n].slots():
            planned = layer.experts[expert]
            types = planned.low_types if copy else planned.types
            assert types
            for kind, part in zip(types, ("gate", "up", "down"), strict=True):
                stored, data = found[stack_name(n, part, bucket)]
                expected = encoded(merged_matrix(source, layer.block, planned, part), kind)
                assert stored is kind
                assert data[slot * len(expected) :][: len(expected)] == expected


def encoded(values: Array, kind: Type) -> bytes:
    return values.astype(F16_OR_F32[kind]).tobytes() if kind in F16_OR_F32 else quantise(values, kind).data.tobytes()


F16_OR_F32: dict[Type, Any] = {F32: np.float32, F16: np.float16}


def test_kept_experts_and_neurons_are_cut_out_of_blocks(tmp_path: Path, q4_k_m: Path) -> None:
    """Rows of gate and up are cut as they lie; the columns of down are made anew."""
    source, before = gguf_source(q4_k_m), tensors(q4_k_m)
    kept, down = np.arange(256) * 2, np.random.default_rng(1).standard_normal((256, 256), np.float32)
    plan = stored_types(source)
    experts = (replace(plan.layers[0].experts[4], kept=kept, down=down), *plan.layers[0].experts[1:3])
    layer = replace(plan.layers[0], experts=experts, rows=(4, 1, 2), target=(0, 1, 2))
    quantiser = Recording()
    after = tensors(write_planned(source, with_layers(plan, {0: layer}), tmp_path / "m.gguf", quantiser=quantiser).path)
    kind, stack = before["blk.0.ffn_up_exps.weight"]
    by_expert = np.frombuffer(stack, np.uint8).reshape(6, 512, -1)
    assert after["blk.0.ffn_up_exps.b0.weight"] == (kind, by_expert[4][kept].tobytes())
    assert after["blk.0.ffn_up_exps.b1.weight"] == (kind, by_expert[1:3].tobytes())
    assert [key for key in quantiser.fitted if key.expert >= 0] == [expert_key(0, "down", 0)]
    router = np.frombuffer(before["blk.0.ffn_gate_inp.weight"][1], np.float32).reshape(6, 256)
    assert after["blk.0.ffn_gate_inp.weight"] == (F32, router[[4, 1, 2]].tobytes())


def test_given_routers_and_dropped_blocks(tmp_path: Path, source: ModelSource) -> None:
    router = np.random.default_rng(2).standard_normal((6, 64), np.float32)
    plan = same_plan(source, "F16")
    plan = replace(plan, layers=(replace(plan.layers[1], router=router),))
    found = tensors(write_planned(source, plan, tmp_path / "m.gguf").path)
    assert found["blk.0.ffn_gate_inp.weight"] == (F32, router.tobytes())
    assert found["blk.0.attn_q.weight"][1] == encoded(source.read(MatrixKey("blk.1.attn_q.weight")), F16)
    assert not any(name.startswith("blk.1.") for name in found)


def test_a_tied_table_may_be_an_output_of_its_own(tmp_path: Path) -> None:
    held = hold(random_mixtral(TinyConfig()))
    tied = replace(held, matrices={k: v for k, v in held.matrices.items() if k.name != "output.weight"})
    plan = same_plan(tied, "F16")
    assert "output.weight" not in tensors(write_planned(tied, plan, tmp_path / "a.gguf").path)
    apart = tensors(write_planned(tied, replace(plan, output_type=Q8_0), tmp_path / "b.gguf").path)
    table = tied.read(MatrixKey("token_embd.weight"))
    assert apart["output.weight"] == (Q8_0, encoded(table, Q8_0))
    assert apart["token_embd.weight"] == (F16, encoded(table, F16))


# --- fitting -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Recording:
    """A plain quantiser that remembers what it was asked for; fails at a matrix if told to."""

    fails_at: MatrixKey | None = None
    failure: type[BaseException] = KeyboardInterrupt
    fitted: list[MatrixKey] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def begin_layer(self, layer: int) -> None:
        self.told.append(f"begin {layer}")

    def end_layer(self, layer: int) -> None:
        self.told.append(f"end {layer}")

    def kept(self, matrix: Matrix) -> None:
        self.told.append(f"kept {matrix.key}")

    def quantise(self, matrix: Matrix, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        if matrix.key == self.fails_at:
            raise self.failure
        self.fitted.append(matrix.key)
        self.told.append(str(matrix.key) + "'" * matrix.copy)
        return quantize_rows(weights, matrix.type)


def test_matrices_are_fitted_in_the_order_of_use(tmp_path: Path, source: ModelSource) -> None:
    plan = same_plan(source, "F16", "native")
    experts = tuple(ExpertPlan((e,), (F16,) * 3, (Q8_0,) * 3 if e == 0 else None) for e in range(3))
    layer = replace(plan.layers[0], experts=experts, rows=(0, 1, 2), target=(2, 1, 0))
    bare = replace(plan.layers[1], experts=(), rows=(), target=())
    quantiser = Recording()
    write_planned(source, replace(plan, layers=(layer, bare)), tmp_path / "m.gguf", quantiser=quantiser)
    parts = [f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
    attention = [f"attn_{part}.weight" for part in ("q", "k", "v", "output")]
    assert quantiser.told == [
        "token_embd.weight",
        "begin 0",
        *(f"blk.0.{name}" for name in attention),
        *(f"{part}[{e}]" for e in range(3) for part in parts),
        *(f"{part}[0]'" for part in parts),
        "blk.0.ffn_gate_inp.weight",
        "end 0",
        "begin 1",
        *(f"blk.1.{name}" for name in attention),
        "end 1",
        "output.weight",
    ]


def test_importance_of_each_matrix(tmp_path: Path, k_quant_source: ModelSource) -> None:
    statistics = statistics_of(k_quant_source)
    inputs = statistics.layers[0].inputs
    plan = replace(same_plan(k_quant_source, "Q4_0", "native"), importance=True)
    order, kept = np.random.default_rng(3).permutation(512), np.arange(256) + 7
    types = (Type.Q4_0,) * 3
    experts = (
        ExpertPlan((0,), types),
        ExpertPlan((1,), types),
        ExpertPlan((2, 3), types, weights=(0.5, 0.5), neurons=(order,), kept=kept),
    )
    attention = dict.fromkeys(plan.layers[0].types, Type.Q4_0)
    layer = replace(plan.layers[0], experts=experts, rows=(0, 1, 2), target=(0, 1, 2), types=attention)
    found = tensors(write_planned(k_quant_source, replace(plan, layers=(layer,)), tmp_path / "m.gguf", statistics).path)

    def expected(expert: int, part: str, importance: Array) -> bytes:
        return freed_of_gain(merged_matrix(k_quant_source, 0, experts[expert], part), importance)

    unseen = inputs.expert.sum(0)
    assert found["blk.0.ffn_gate_exps.b0.weight"][1] == expected(0, "gate", inputs.expert[0]) + expected(
        1, "gate", unseen
    )
    assert found["blk.0.ffn_down_exps.b0.weight"][1] == expected(0, "down", inputs.hidden[0]) + expected(
        1, "down", np.ones(512, np.float32)
    )
    both = (inputs.hidden[2] + inputs.hidden[3][order])[kept]
    assert found["blk.0.ffn_down_exps.b1.weight"][1] == expected(2, "down", both)
    assert found["blk.0.ffn_up_exps.b1.weight"][1] == expected(2, "up", inputs.expert[2] + inputs.expert[3])
    for role, importance in (("attn_k", inputs.attention), ("attn_output", inputs.mixed)):
        values = k_quant_source.read(MatrixKey(f"blk.0.{role}.weight"))
        assert found[f"blk.0.{role}.weight"][1] == freed_of_gain(values, importance)
        assert found[f"blk.0.{role}.weight"][1] != freed_of_gain(values, np.ones_like(importance))


def freed_of_gain(values: Array, importance: Array) -> bytes:
    """Blocks of Q4_0 without the gain that a sample of rows has."""
    some = np.concatenate([values[run] for run in sampled_runs(*values.shape)])
    plain = dequantize_rows(quantize_rows(some, Type.Q4_0, importance), Type.Q4_0, some.shape[1])
    weighted = some.astype(np.float64) * importance
    gain = (weighted * plain).sum() / (weighted * some).sum()
    assert abs(gain - 1) > 1e-5
    return quantize_rows((values / np.float32(gain)).astype(np.float32), Type.Q4_0, importance).tobytes()


@pytest.mark.parametrize("form", ["stock", "native"])
def test_plans_of_statistics_have_no_gain_and_named_types_keep_theirs(
    tmp_path: Path, k_quant_source: ModelSource, form: Format
) -> None:
    statistics = statistics_of(k_quant_source)
    plan = same_plan(k_quant_source, "Q2_K_PURE", form)
    fitted = replace(plan, importance=True)
    inputs = statistics.layers[1].inputs
    name = "blk.1.ffn_up_exps.weight" if form == "stock" else "blk.1.ffn_up_exps.b0.weight"

    def gains(path: Path) -> Array:
        """Of the experts that some token selected."""
        seen = inputs.expert.any(1)
        stored = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
        values = gguf.dequantize(stored.data, stored.tensor_type).reshape(6, 512, 256)
        before = np.stack([k_quant_source.read(expert_key(1, "up", expert)) for expert in range(6)])
        weighted = inputs.expert[:, None] * before.astype(np.float64)
        found: Array = ((weighted * values).sum((1, 2))[seen] / (weighted * before).sum((1, 2))[seen]) - 1
        return found

    freed = write_planned(k_quant_source, fitted, tmp_path / "a.gguf", statistics, n_threads=2).path
    assert np.abs(gains(freed)).max() < 0.002
    named = write_planned(k_quant_source, plan, tmp_path / "b.gguf").path
    assert np.abs(gains(named)).min() > 0.01


def test_types_that_need_statistics(tmp_path: Path, k_quant_source: ModelSource) -> None:
    plan = same_plan(k_quant_source, "Q2_K")
    with pytest.raises(UsageError, match="Give statistics"):
        write_planned(k_quant_source, replace(plan, importance=True), tmp_path / "m.gguf")
    layers = {
        0: replace(plan.layers[0], experts=tuple(replace(e, types=(Type.IQ2_XXS,) * 3) for e in plan.layers[0].experts))
    }
    with pytest.raises(UsageError, match=r"blk.0.ffn_gate_exps.weight\[0\] cannot be IQ2_XXS"):
        write_planned(k_quant_source, with_layers(plan, layers), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


# --- what goes wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [expert_key(1, "down", 2), MatrixKey("output.weight")])
def test_nothing_is_left_of_what_was_interrupted(
    tmp_path: Path, source: ModelSource, failure: type[BaseException], at: MatrixKey
) -> None:
    seen: list[list[str]] = []

    def look(done: int, total: int) -> None:
        seen.append([path.name for path in tmp_path.iterdir()])

    with pytest.raises(failure):
        write_planned(
            source, same_plan(source, "F16"), tmp_path / "m.gguf", quantiser=Recording(at, failure), on_progress=look
        )
    assert seen[-1] == ["m.gguf.partial"]
    assert list(tmp_path.iterdir()) == []


def test_progress_ends_with_all_bytes_of_tensors(tmp_path: Path, source: ModelSource) -> None:
    seen: list[tuple[int, int]] = []
    report = write_planned(
        source, same_plan(source, "F16"), tmp_path / "m.gguf", on_progress=lambda *both: seen.append(both)
    )
    done = [one for one, _ in seen]
    assert done == sorted(done)
    assert {total for _, total in seen} == {report.n_bytes}
    assert report.n_bytes - done[-1] < 32 * report.n_tensors


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    held = hold(random_mixtral(TinyConfig()))
    key = expert_key(1, "up", 3)
    large = held.read(key)
    large[5, 7] = 1e30
    with pytest.raises(ModelFileError, match=r"tensor blk.1.ffn_up_exps.weight\[3\] holds weights beyond"):
        write_planned(held.changed({key: large}), same_plan(held, "F16"), tmp_path / "m.gguf")
    large[5, 7] = np.nan
    with pytest.raises(ModelFileError, match=r"tensor blk.1.ffn_up_exps.weight\[3\] holds NaN"):
        write_planned(held.changed({key: large}), same_plan(held, "F16"), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_stays(tmp_path: Path, source: ModelSource) -> None:
    target = tmp_path / "m.gguf"
    target.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        write_planned(source, same_plan(source, "F16"), target)
    assert target.read_text() == "mine"
    write_planned(source, same_plan(source, "F16"), target, force=True)
    assert target.read_bytes()[:4] == b"GGUF"
