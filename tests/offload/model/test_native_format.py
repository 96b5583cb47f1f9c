"""The native format: what is written is read, what cannot be is refused, stock loaders refuse all of it."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.converter.source.inventory import take_inventory
from slimoe.offload.engine import Engine
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf.header import GGUFFile, read_gguf
from slimoe.offload.model.expert_spec import LayerShape
from slimoe.offload.model.experts import ExpertLayer, expert_layers
from slimoe.offload.model.native_format import read_layout
from slimoe.offload.model.native_layout import NO_HINTS, LayerHints
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensor_list import check_tensors
from slimoe.offload.model.tensors import ModelSources, WeightSource
from slimoe.offload.model.weight_reader import model_sources
from tests.models.configs import engine_config
from tests.models.gguf_content import Array, GGUFContent, StoredTensor, read_content, write_content
from tests.models.native_files import (
    NativeFfn,
    StoredExpert,
    dequantised,
    native_content,
    native_logits,
    plain_ffn,
    set_array,
    write_native,
)

TOKENS = [1, 17, 305, 4, 99, 306, 211, 42, 7, 500, 333, 12]
CONSTANTS = np.random.default_rng(5).standard_normal((2, 64), np.float32)


@pytest.fixture(scope="module")
def stock(moe_gguf: Path) -> GGUFContent:
    return read_content(moe_gguf)


HINTS = LayerHints(
    use=(0.5, 0.25, 1.0),
    share_square=(0.125, 0.5, 0.25),
    error=((0.0, 0.5), (0.25, 0.125), (0.0625,)),
    fallback=(0, -1, 1),
    fallback_error=(1.0, 0.0, 2.0),
    skip_error=(2.0, 3.0, 4.0),
    sensitivity=0.75,
    low_weight=(0.5, 0.25, 0.0),
    skip_ratio=0.5,
)
MIXED = NativeFfn(
    experts=(
        StoredExpert(4, (Type.Q8_0, Type.Q4_0)),
        StoredExpert(1, (Type.F16, Type.Q8_0)),
        StoredExpert(3, (Type.Q4_0,), width=64),
    ),
    target=(1, -1, 0, 2, 0, -2),
    constants=CONSTANTS,
    hints=HINTS,
)
"""Three types, two widths, two copies of some, an alias, two constant experts, fewer experts than rows."""


def opened(path: Path) -> tuple[ModelSpec, ModelSources, tuple[ExpertLayer | None, ...]]:
    return read(read_gguf(path))


def read(file: GGUFFile) -> tuple[ModelSpec, ModelSources, tuple[ExpertLayer | None, ...]]:
    spec = ModelSpec.from_gguf(file)
    check_tensors(file, spec)
    sources = model_sources(file, spec)
    return spec, sources, expert_layers(sources, spec)


def values(path: Path, source: WeightSource) -> Array:
    raw = path.read_bytes()
    data = b"".join(raw[span.offset : span.offset + span.n_bytes] for span in source.spans)
    rows = np.frombuffer(data, np.uint8).reshape(source.ne[1], -1)
    decoded: Array = gguf.quants.dequantize(rows, source.type)
    return decoded


def scores(path: Path) -> Array:
    config = engine_config(path, n_ctx=256, n_threads=1, kv_type="f32", weights="mapped")
    with closing(Engine.open(config)) as engine:
        return engine.read(TOKENS, len(TOKENS)).copy()


# --- what is written is read -------------------------------------------------------------------------------


def test_everything_at_once_is_read_back(tmp_path: Path, stock: GGUFContent) -> None:
    path = write_native(tmp_path / "m.gguf", stock, [MIXED, None])
    spec, sources, (first, second) = opened(path)
    assert [spec.layer_shape(n) for n in range(2)] == [LayerShape(6, 96), LayerShape(0, 0)]
    assert (spec.n_expert, spec.n_ff, spec.n_expert_used) == (6, 96, 3)
    assert second is None
    assert first is not None
    assert (first.target, first.hints, first.low_error) == (MIXED.target, HINTS, (0.5, 0.0, 0.0))
    assert first.constants is not None
    np.testing.assert_array_equal(values(path, first.constants), CONSTANTS)
    for expert, copies in zip(MIXED.experts, first.experts, strict=True):
        assert len(copies) == len(expert.types)
        for number, copy in enumerate(copies):
            for part, source in zip(("gate", "up", "down"), copy.matrices, strict=True):
                assert source.type is expert.types[number]
                expected = dequantised(stock, 0, expert, part, number)
                np.testing.assert_array_equal(values(path, source), expected)
    classes = [[copy.slot_class for copy in copies] for copies in first.experts]
    assert classes[0][0] == classes[1][1], "one type and shape: one bucket"
    assert classes[0][1] != classes[2][0], "two widths"
    assert (sources.layers[0].gate_up, sources.layers[0].down) == ((), None)
    last = sources.layers[1]
    assert (last.ffn_norm, last.router, last.gate_up, last.down) == (None, None, (), None)


def test_the_keys_are_those_of_the_documentation(tmp_path: Path, stock: GGUFContent) -> None:
    path = write_native(tmp_path / "m.gguf", stock, [MIXED, None], measured_kl=(0.5, 1.5))
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    expected = {
        "format.version": 1,
        "expert_count": [6, 0],
        "feed_forward_length": [96, 0],
        "expert_used_count": 3,
        "expert.stored_count": [3, 0],
        "expert.copy_count": 2,
        "expert.bucket": [0, 1, 2, 0, 3, -1],
        "expert.target": [1, -1, 0, 2, 0, -2],
        "expert.use": [0.5, 0.25, 1.0],
        "expert.share_square": [0.125, 0.5, 0.25],
        "expert.error": [0.0, 0.5, 0.25, 0.125, 0.0625, 0.0],
        "expert.fallback": [0, -1, 1],
        "expert.fallback_error": [1.0, 0.0, 2.0],
        "expert.skip_error": [2.0, 3.0, 4.0],
        "expert.low_weight": [0.5, 0.25, 0.0],
        "layer.sensitivity": [0.75, 0.0],
        "layer.skip_ratio": [0.5, 0.0],
        "measured_kl": [0.5, 1.5],
    }
    assert {key: fields[f"slimoe.{key}"] for key in expected} == expected
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors if ".ffn_" in tensor.name}
    stacks = {f"blk.0.ffn_{part}_exps.b{n}.weight" for part in ("gate", "up", "down") for n in range(4)}
    assert names == stacks | {f"blk.0.ffn_{name}.weight" for name in ("norm", "gate_inp", "novice")}
    file = read_gguf(path)
    assert read_layout(file, ModelSpec.from_gguf(file)).measured_kl == (0.5, 1.5)


def test_a_layer_can_be_constants_only(tmp_path: Path, stock: GGUFContent) -> None:
    constants = np.ones((3, 64), np.float32)
    path = write_native(tmp_path / "m.gguf", stock, [plain_ffn(6), NativeFfn((), (-1, -2, -3), constants)])
    layer = opened(path)[2][1]
    assert layer is not None
    assert (layer.experts, layer.target) == ((), (-1, -2, -3))


def test_the_inventory_counts_copies_and_not_tensors(tmp_path: Path, stock: GGUFContent) -> None:
    inventory = take_inventory(write_native(tmp_path / "m.gguf", stock, [MIXED, None], measured_kl=(0.5, 1.5)))
    weights = {(count.kind, count.type): count.n_weights for count in inventory.counts}
    full, cut = 3 * 64 * 96, 3 * 64 * 64
    assert (weights["experts", "Q8_0"], weights["low-bit copies", "Q8_0"]) == (full, full), "they share a bucket"
    assert (weights["experts", "F16"], weights["experts", "Q4_0"], weights["low-bit copies", "Q4_0"]) == (
        full,
        cut,
        full,
    )
    assert weights["constant experts", "F32"] == 2 * 64
    expected = {
        "stored": [3, 0],
        "copies": 2,
        "layers_without": 1,
        "aliases": 1,
        "constant_rows": 2,
        "novice_rows": 2,
        "hints": True,
    }
    assert inventory.experts == expected
    assert inventory.sizes["n_expert"] == [6, 0]
    assert inventory.provenance["slimoe.measured_kl"] == [0.5, 1.5]


# --- layers that a single graph runs -----------------------------------------------------------------------


def test_fewer_experts_in_a_layer(tmp_path: Path, stock: GGUFContent, moe_checkpoint: Path) -> None:
    layers = [plain_ffn(4), plain_ffn(6)]
    path = write_native(tmp_path / "m.gguf", stock, layers)
    np.testing.assert_allclose(scores(path), native_logits(moe_checkpoint, stock, layers, TOKENS), atol=1e-3)
    assert [len(source.gate_up) for source in opened(path)[1].layers] == [2, 2]


@pytest.mark.parametrize("dropped", [0, 1])
def test_a_layer_without_feed_forward_part(
    tmp_path: Path, stock: GGUFContent, moe_checkpoint: Path, dropped: int
) -> None:
    layers = [None if n == dropped else plain_ffn(6) for n in range(2)]
    path = write_native(tmp_path / "m.gguf", stock, layers)
    np.testing.assert_allclose(scores(path), native_logits(moe_checkpoint, stock, layers, TOKENS), atol=1e-3)


def test_narrower_experts_in_a_layer(tmp_path: Path, stock: GGUFContent, moe_checkpoint: Path) -> None:
    narrow = NativeFfn(tuple(StoredExpert(e, width=40) for e in range(6)), tuple(range(6)))
    path = write_native(tmp_path / "m.gguf", stock, [plain_ffn(6), narrow])
    expected = native_logits(moe_checkpoint, stock, [plain_ffn(6), narrow], TOKENS)
    np.testing.assert_allclose(scores(path), expected, atol=1e-3)


def test_the_resident_stacks_are_the_best_copies(tmp_path: Path, stock: GGUFContent) -> None:
    path = write_native(tmp_path / "m.gguf", stock, [plain_ffn(6, Type.Q8_0, Type.Q4_0)] * 2)
    same = write_content(tmp_path / "same.gguf", stock.quantised(Type.Q8_0, lambda name: "_exps" in name))
    np.testing.assert_array_equal(scores(path), scores(same))
    low = write_native(tmp_path / "low.gguf", stock, [plain_ffn(6, Type.Q4_0)] * 2)
    assert (scores(path) != scores(low)).any()


# --- refusals ----------------------------------------------------------------------------------------------


def refused(tmp_path: Path, content: GGUFContent, message: str, error: type[ModelFileError] = ModelFileError) -> None:
    path = write_content(tmp_path / "m.gguf", content)
    with pytest.raises(error, match=message) as raised:
        opened(path)
    assert str(path) in str(raised.value)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory, stock: GGUFContent) -> GGUFContent:
    scratch = tmp_path_factory.mktemp("native") / "scratch.gguf"
    layers = [replace(MIXED, hints=NO_HINTS), plain_ffn(4, Type.Q8_0, Type.Q4_0)]
    return native_content(scratch, stock, layers, (0.1, 0.2))


def test_the_file_that_is_damaged_below_is_sound(tmp_path: Path, native: GGUFContent) -> None:
    opened(write_content(tmp_path / "m.gguf", native))


PAIRS = [0, 1, 2, 0, 3, -1, *[0, 1] * 4]
ROWS = [1, -1, 0, 2, 0, -2, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("key", "entries", "message"),
    [
        (
            "expert.target",
            [3, *ROWS[1:]],
            r"row 0 of the router means 3 in expert\.target, but 3 experts and 2 constants",
        ),
        ("expert.target", [1, -3, *ROWS[2:]], "row 1 of the router means -3"),
        ("expert.target", ROWS[:-1], r"slimoe\.expert\.target has 9 entries, but 10"),
        ("expert.target", [0, -1, 0, 2, *ROWS[4:]], "layer 0: expert 1 is stored, but no row of the router means it"),
        ("expert.target", [0.5] * 10, r"slimoe\.expert\.target is no array of integers"),
        ("expert.bucket", [0, 1, 2, 0, 4, -1, *PAIRS[6:]], r"expert\.bucket has numbers above 3, but not 3"),
        ("expert.bucket", [*PAIRS[:-1], 1 << 30], r"tensor blk\.1\.ffn_gate_exps\.b1\.weight has the shape"),
        ("expert.bucket", [-1, 1, *PAIRS[2:]], "without a best one"),
        ("expert.bucket", [-2, *PAIRS[1:]], r"entry 0 of slimoe\.expert\.bucket is -2"),
        ("expert.bucket", [1, 0, *PAIRS[2:]], "each must be smaller than the last"),
        ("expert.bucket", [1, 1, *PAIRS[2:]], r"b0\.weight has the shape .* belongs to expert\.bucket"),
        ("expert.bucket", PAIRS[:-1], r"slimoe\.expert\.bucket has 13 entries, but 14"),
        ("expert.stored_count", [3, 5], r"slimoe\.expert\.bucket has 14 entries, but 16"),
        ("expert.stored_count", [3, -1], r"entry 1 of slimoe\.expert\.stored_count is -1"),
        ("expert.use", [0.1] * 6, r"slimoe\.expert\.use has 6 entries, but 7"),
        ("expert.use", [0.1, float("nan"), *[0.1] * 5], r"entry 1 of slimoe\.expert\.use is nan"),
        ("expert.use", [0.1, 0.1, -0.5, *[0.1] * 4], r"entry 2 of slimoe\.expert\.use is -0\.5"),
        ("expert.error", [0.1] * 13 + [float("inf")], r"entry 13 of slimoe\.expert\.error is inf"),
        ("expert.fallback", [2, *[-1] * 6], r"expert\.fallback names constant 2 of 2"),
        ("expert.fallback", [-1] * 6 + [0], r"layer 1: expert\.fallback names constant 0 of 0"),
        ("layer.sensitivity", [1.0], r"slimoe\.layer\.sensitivity has 1 entries, but 2"),
        ("measured_kl", [0.1, 0.2, 0.3], r"slimoe\.measured_kl has 3 entries, but 2"),
        ("expert_count", [6, 3], r"ffn_gate_inp\.weight has the shape \(64, 4\), but \(64, 3\)"),
        ("expert_count", [6, 0], "layer 1 has 0 experts of width 96"),
        ("expert_count", [6, 2], "it uses 3 of 2 experts"),
        ("expert_count", [0, 0], "layer 0 has 0 experts of width 96"),
        ("feed_forward_length", [96, 64], r"tensor blk\.1\.ffn_gate_exps\.b0\.weight has the shape"),
        ("feed_forward_length", [96], r"slimoe\.feed_forward_length has 1 entries, but 2"),
        ("attention.present", [1, 2], r"entry 1 of slimoe\.attention\.present is 2, which cannot be"),
        ("attention.present", [0, 0], "no layer has attention"),
        ("attention.present", [1], r"slimoe\.attention\.present has 1 entries, but 2"),
    ],
)
def test_a_wrong_map_or_prior_is_named(
    tmp_path: Path, native: GGUFContent, key: str, entries: list[Any], message: str
) -> None:
    refused(tmp_path, set_array(native, key, entries), message)


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("format.version", 2, UnsupportedModelError, "format version 2, .* Update slimoe"),
        ("format.version", None, ModelFileError, r"slimoe\.format\.version is missing"),
        ("expert.copy_count", 3, UnsupportedModelError, "up to 3 copies; 2 are supported"),
        ("expert.copy_count", 1, ModelFileError, r"slimoe\.expert\.bucket has 14 entries, but 7"),
        ("expert.copy_count", None, ModelFileError, r"slimoe\.expert\.copy_count is missing"),
        ("expert.target", None, ModelFileError, r"slimoe\.expert\.target is missing"),
        ("expert.use", "often", ModelFileError, r"slimoe\.expert\.use is no array of numbers"),
        ("expert_used_count", 5, ModelFileError, "it uses 5 of 4 experts"),
    ],
)
def test_a_wrong_key_is_named(
    tmp_path: Path, native: GGUFContent, key: str, value: Any, error: type[ModelFileError], message: str
) -> None:
    refused(tmp_path, native.with_keys({f"slimoe.{key}": value}), message, error)


def changed(name: str, change: Callable[[StoredTensor], StoredTensor | None]) -> Callable[[GGUFContent], GGUFContent]:
    def apply(content: GGUFContent) -> GGUFContent:
        tensors = {n: change(tensor) if n == name else tensor for n, tensor in content.tensors.items()}
        return replace(content, tensors={n: tensor for n, tensor in tensors.items() if tensor is not None})

    return apply


UP, CONSTANT = "blk.0.ffn_up_exps.b0.weight", "blk.0.ffn_novice.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (UP, lambda t: None, r"tensor blk\.0\.ffn_up_exps\.b0\.weight is missing"),
        (UP, lambda t: replace(t, data=t.data[:1]), r"ffn_up_exps\.b0\.weight has the shape \(64, 96, 1\), but"),
        (UP, lambda t: replace(t, data=t.data[:, :64]), r"ffn_up_exps\.b0\.weight has the shape \(64, 64, 2\), but"),
        (UP, lambda t: replace(t, data=t.data[0]), r"ffn_up_exps\.b0\.weight has the shape \(64, 96\), but"),
        (CONSTANT, lambda t: None, "3 experts and 0 constants are stored"),
        (CONSTANT, lambda t: replace(t, data=t.data[:1]), "3 experts and 1 constants are stored"),
        (
            CONSTANT,
            lambda t: replace(t, data=t.data[:, :32]),
            r"ffn_novice\.weight is F32 \(32, 2\), not F32 \[64, n\]",
        ),
        (CONSTANT, lambda t: StoredTensor(t.data.astype(np.float16), Type.F16), "is F16"),
        ("blk.1.ffn_norm.weight", lambda t: None, r"tensor blk\.1\.ffn_norm\.weight is missing"),
        ("blk.1.ffn_gate_inp.weight", lambda t: replace(t, data=t.data[:3]), r"ffn_gate_inp\.weight has the shape"),
    ],
)
def test_a_wrong_tensor_is_named(
    tmp_path: Path,
    native: GGUFContent,
    name: str,
    change: Callable[[StoredTensor], StoredTensor | None],
    message: str,
) -> None:
    refused(tmp_path, changed(name, change)(native), message)


@pytest.mark.parametrize(
    "name", ["blk.0.ffn_up_exps.b4.weight", "blk.0.ffn_up_exps.weight", "blk.1.ffn_gate_exps.b2.weight", "blk.1.x"]
)
def test_a_tensor_without_a_place_is_refused(tmp_path: Path, native: GGUFContent, name: str) -> None:
    added = native.with_values({name: np.ones((1, 32, 32), np.float32)})
    refused(tmp_path, added, f"tensor {name} has no place", UnsupportedModelError)


def test_no_damage_to_the_keys_is_more_than_an_error(tmp_path: Path, stock: GGUFContent) -> None:
    hints = replace(HINTS, use=(0.5, 0.5, 0.5))
    path = write_native(tmp_path / "m.gguf", stock, [replace(MIXED, hints=hints), None], measured_kl=(0.5, 1.5))
    file = read_gguf(path)
    names = [name for name in file.metadata if name.startswith("slimoe.") and "tokenizer" not in name]
    rng = np.random.default_rng(7)
    junk: tuple[Any, ...] = (-1, 0, 3, 1 << 31, -(1 << 40), 0.5, float("nan"), True, "x", [], ["a"], None)
    n_refused = 0
    for _ in range(400):
        name = names[rng.integers(len(names))]
        value = file.metadata[name]
        damaged = np.array(value) if isinstance(value, np.ndarray) and rng.random() < 0.7 else None
        if damaged is not None:
            damaged[rng.integers(damaged.size)] = rng.choice([-2, -1, 0, 2, 5, 99, 1 << 30])
        other = damaged if damaged is not None else junk[rng.integers(len(junk))]
        metadata = {key: v for key, v in (file.metadata | {name: other}).items() if v is not None}
        try:
            read(replace(file, metadata=metadata))
        except ModelFileError:
            n_refused += 1
    assert 200 < n_refused < 400


def test_experts_of_a_layer_without_feed_forward_part(tmp_path: Path, stock: GGUFContent) -> None:
    content = native_content(tmp_path / "s.gguf", stock, [plain_ffn(6), None])
    refused(tmp_path, set_array(content, "expert.stored_count", [5, 1]), "layer 1: 1 experts are stored, but")


def test_fewer_experts_than_are_used(tmp_path: Path, stock: GGUFContent) -> None:
    aliases = NativeFfn((StoredExpert(0), StoredExpert(1)), (0, 1, 1, 0))
    content = native_content(tmp_path / "s.gguf", stock, [plain_ffn(6), aliases])
    refused(tmp_path, content, "layer 1: it has 2 experts, but 3 are used per token")


def test_no_experts_anywhere(tmp_path: Path, native: GGUFContent) -> None:
    content = set_array(set_array(native, "expert_count", [0, 0]), "feed_forward_length", [0, 0])
    refused(tmp_path, content, "no layer has experts")


def test_a_stock_loader_refuses_the_file(tmp_path: Path, stock: GGUFContent) -> None:
    path = write_native(tmp_path / "m.gguf", stock, [plain_ffn(6)] * 2)
    with pytest.raises(ValueError, match="Failed to load model"):
        llama_cpp.Llama(str(path), verbose=False)
