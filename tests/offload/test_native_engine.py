"""The engine computes what a native file means, compared with transformers with its experts replaced."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from bench.baselines.stepping import kl_divergence
from slimoe.offload.cache.residency import Key
from slimoe.offload.engine import Engine
from slimoe.offload.model.native_layout import LayerHints
from slimoe.offload.plan.engine_plan import plan_engine
from tests.models.configs import engine_config, reconfigured
from tests.models.gguf_content import Array, GGUFContent, StoredTensor, read_content, write_content
from tests.models.native_files import NativeFfn, StoredExpert, native_logits, plain_ffn, write_native
from tests.models.tiered import tiered_plan

TOKENS = [1, 17, 305, 4, 99, 306, 211, 42, 7, 500, 333, 12]
_RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def stock(moe_gguf: Path) -> GGUFContent:
    return read_content(moe_gguf)


def scores(path: Path, n_batch: int, **settings: Any) -> Array:
    """Logits of every token, read `n_batch` at a time."""
    config = reconfigured(engine_config(path, n_ctx=256, n_threads=1, kv_type="f32"), **settings)
    with closing(Engine.open(config)) as engine:
        batches = [TOKENS[begin : begin + n_batch] for begin in range(0, len(TOKENS), n_batch)]
        return np.concatenate([engine.read(batch, len(batch)).copy() for batch in batches])


def four(*types: Type) -> tuple[StoredExpert, ...]:
    """Experts 4, 1, 3 and 0 of a layer, in types taken in turn."""
    return tuple(StoredExpert(e, (types[n % len(types)],)) for n, e in enumerate((4, 1, 3, 0)))


ALIASES = NativeFfn(four(Type.F32), (1, 3, 0, 2, 0, 1))
CONSTANTS = NativeFfn(four(Type.F32)[:3], (1, -1, 0, 2, -2, -1), _RNG.standard_normal((2, 64), np.float32))
ONLY_CONSTANTS = NativeFfn((), (-1, -2, -3, -1), _RNG.standard_normal((3, 64), np.float32))
WIDTHS = NativeFfn(tuple(replace(e, width=32 * n) for n, e in enumerate(four(Type.F32), 1) if n < 4), (0, 1, 2))
TYPES = NativeFfn(four(Type.F32, Type.F16, Type.BF16), (3, 2, 1, 0))
TWO_COPIES = NativeFfn((StoredExpert(0, (Type.F32, Type.Q8_0)), *four(Type.F16)[:2]), (0, 1, 2, 0))


@pytest.mark.parametrize(
    "layers",
    [
        [ALIASES, plain_ffn(4)],
        [CONSTANTS, ALIASES],
        [ONLY_CONSTANTS, plain_ffn(6)],
        [plain_ffn(6), ONLY_CONSTANTS],
        [WIDTHS, None],
        [None, TYPES],
        [TYPES, WIDTHS],
        [TWO_COPIES, CONSTANTS],
    ],
    ids=["aliases", "constants", "only constants", "only constants last", "widths", "no first", "types", "two copies"],
)
@pytest.mark.parametrize("n_batch", [1, 5, 12])
def test_layers_that_are_not_alike(
    tmp_path: Path, stock: GGUFContent, moe_checkpoint: Path, layers: Sequence[NativeFfn | None], n_batch: int
) -> None:
    path = write_native(tmp_path / "m.gguf", stock, layers)
    expected = native_logits(moe_checkpoint, stock, layers, TOKENS)
    # F16's kernels round activations to F16; what F32 leaves is far below that.
    np.testing.assert_allclose(scores(path, n_batch), expected, atol=2e-2)


@pytest.mark.parametrize("n_batch", [1, 12])
def test_quantised_types_in_one_layer(tmp_path: Path, stock: GGUFContent, moe_checkpoint: Path, n_batch: int) -> None:
    layers = [NativeFfn(four(Type.Q8_0, Type.Q5_1), (0, 1, 2, 3)), NativeFfn(four(Type.F16, Type.Q8_0), (0, 1, 2, 3))]
    got = scores(write_native(tmp_path / "m.gguf", stock, layers), n_batch)
    expected = native_logits(moe_checkpoint, stock, layers, TOKENS)
    assert np.mean([kl_divergence(a, b) for a, b in zip(got, expected, strict=True)]) < 1e-3


def test_one_type_in_other_places_is_bit_for_bit_the_stock_file(tmp_path: Path, stock: GGUFContent) -> None:
    """The same experts, stored backwards: paged instead of stacked, and nothing else may differ."""
    backwards = NativeFfn(tuple(StoredExpert(e, (Type.Q8_0,)) for e in (5, 4, 3, 2, 1, 0)), (5, 4, 3, 2, 1, 0))
    paged = write_native(tmp_path / "m.gguf", stock, [backwards] * 2)
    same = write_content(tmp_path / "same.gguf", stock.quantised(Type.Q8_0, lambda name: "_exps" in name))
    for n_batch in (1, 12):
        np.testing.assert_array_equal(scores(paged, n_batch), scores(same, n_batch))


@pytest.mark.parametrize("layers", [[TYPES, WIDTHS], [TWO_COPIES, CONSTANTS], [ALIASES, ONLY_CONSTANTS]])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_one_graph_computes_what_steps_that_stop_at_routers_do(
    tmp_path: Path, stock: GGUFContent, layers: Sequence[NativeFfn], n_threads: int
) -> None:
    """A router trace has every step stop; the logits are the same to the last bit."""
    path = write_native(tmp_path / "m.gguf", stock, layers)
    stopped = scores(path, 1, n_threads=n_threads, trace=tmp_path / "trace")
    np.testing.assert_array_equal(scores(path, 1, n_threads=n_threads), stopped)


def test_repacked_experts_of_a_native_file_are_those_of_the_stock_file(tmp_path: Path, stock: GGUFContent) -> None:
    """Two buckets of equal types, so that no stack is the stock file's; the kernels are, also of a stack of one."""
    matrices = [NativeFfn(tuple(StoredExpert(e, (Type.Q4_0,)) for e in (5, 4, 3, 2, 1, 0)), (5, 4, 3, 2, 1, 0))] * 2
    paged = write_native(tmp_path / "m.gguf", stock, matrices)
    same = write_content(tmp_path / "same.gguf", stock.quantised(Type.Q4_0, lambda name: "_exps" in name))
    repacked = scores(paged, 1, weights="both")
    np.testing.assert_array_equal(repacked, scores(same, 1, weights="both"))
    config = engine_config(paged, n_ctx=256, n_threads=1, weights="both")
    with closing(Engine.open(config)) as engine:
        assert engine.memory()["repacked"] > sum(6 * 3 * 64 * width * 18 // 32 for width in (32, 32))
    assert not np.array_equal(repacked, scores(paged, 1))


def test_a_constant_expert_is_what_an_expert_of_constant_output_is(tmp_path: Path, stock: GGUFContent) -> None:
    """A zero vector keeps its expert weight, as an expert does whose down matrix is zero."""
    name = "blk.0.ffn_down_exps.weight"
    silenced = stock.values(name).copy()
    silenced[[1, 4]] = 0
    zeroed = replace(stock, tensors=stock.tensors | {name: StoredTensor(silenced, Type.F32)})
    kept = tuple(StoredExpert(e) for e in (0, 2, 3, 5))
    layer = NativeFfn(kept, (0, -1, 1, 2, -1, 3), np.zeros((1, 64), np.float32))
    path = write_native(tmp_path / "m.gguf", stock, [layer, plain_ffn(6)])
    expected = scores(write_content(tmp_path / "zeroed.gguf", zeroed), len(TOKENS))
    np.testing.assert_allclose(scores(path, len(TOKENS)), expected, atol=1e-4)


def test_the_files_priors_reach_the_plan(tmp_path: Path, stock: GGUFContent) -> None:
    uses = ((0.5, 0.75, 0.0, 0.25), (0.5,) * 6)
    layers = [
        replace(ALIASES, hints=LayerHints(use=uses[0])),
        plain_ffn(6, hints=LayerHints(use=uses[1])),
    ]
    path = write_native(tmp_path / "m.gguf", stock, layers)
    priors = plan_engine(engine_config(path, n_ctx=256, n_threads=1)).priors
    assert priors is not None
    assert priors.tolist() == [[*uses[0], 0.0, 0.0], [*uses[1]]]
    scores(path, 5)
    without = write_native(tmp_path / "w.gguf", stock, [ALIASES, None])
    assert plan_engine(engine_config(without, n_ctx=256, n_threads=1)).priors is None


def test_at_the_start_the_most_used_experts_are_read_first(tmp_path: Path, stock: GGUFContent) -> None:
    """Where there is no room for all of them, and one after the other: who asks early finds these."""
    uses = np.random.default_rng(7).permutation(12).reshape(2, 6) / 12
    layers = [plain_ffn(6, hints=LayerHints(use=tuple(own))) for own in uses.tolist()]
    config = engine_config(write_native(tmp_path / "m.gguf", stock, layers), n_ctx=256, n_threads=1)
    plan = tiered_plan(config, 0.5)
    assert plan.tiers is not None
    with closing(Engine(config, plan, lambda *_: None)) as engine:
        assert engine.tiers is not None
        assert engine.tiers.host_pool is not None
        order: list[Key] = engine.tiers.host_pool.keys
        complete = {key for key, _, is_complete in engine.tiers.host_pool.places() if is_complete}
    hottest = sorted(np.ndindex(2, 6), key=lambda key: -uses[key])
    assert 0 < len(order) < 12
    assert order == hottest[: len(order)]
    assert complete == set(order)
