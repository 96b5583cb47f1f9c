"""Lossy modes in the engine: exact where they should be, else what transformers makes of the same selected experts."""

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type

from slimoe.converter.convert import ConvertOptions, convert
from slimoe.offload.cache.router_trace import read_trace
from slimoe.offload.engine import Engine
from slimoe.offload.errors import UsageError
from slimoe.offload.lossy.modes import LOSSY
from slimoe.offload.model.native_layout import LayerHints
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.engine_plan import plan_engine
from tests.models.configs import engine_config
from tests.models.gguf_content import Array, GGUFContent, read_content, write_content
from tests.models.native_files import PROJECTIONS, NativeFfn, StoredExpert, dequantised, write_native
from tests.models.tiered import resident_engine, tiered_engine
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf
from tests.offload.devices import Devices

TOKENS = [1, 17, 305, 4, 99, 306, 211, 42, 7, 500, 333, 12, 88, 401, 3, 250]
N_EXPERT, N_USED = 6, 3
_RNG = np.random.default_rng(11)
CONSTANTS = _RNG.standard_normal((2, 64), np.float32)
HINTS = LayerHints(
    use=(0.7, 0.5, 0.4, 0.6, 0.3, 0.5),
    share_square=(0.2, 0.15, 0.2, 0.25, 0.12, 0.18),
    error=tuple((0.001, 0.001 + e) for e in (0.004, 0.002, 0.007, 0.003, 0.005, 0.001)),
    fallback=(-1, 0, 1, -1, 0, -1),
    fallback_error=(0.0, 0.02, 0.03, 0.0, 0.05, 0.0),
    skip_error=(0.08, 0.05, 0.07, 0.06, 0.09, 0.04),
    low_weight=(0.3, 0.5, 0.0, 0.4, 2.0, 0.25),
    sensitivity=0.5,
    skip_ratio=0.4,
)


def pair(*types: Type, hints: LayerHints = HINTS) -> NativeFfn:
    """All experts in the given types, with two constant experts."""
    experts = tuple(StoredExpert(e, types) for e in range(N_EXPERT))
    return NativeFfn(experts, tuple(range(N_EXPERT)), CONSTANTS, hints)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lossy")


@pytest.fixture(scope="module")
def stock(moe_gguf: Path) -> GGUFContent:
    return read_content(moe_gguf)


@pytest.fixture(scope="module")
def layers() -> list[NativeFfn]:
    """The file's layers: Q8_0 and Q4_0 of every expert."""
    return [pair(Type.Q8_0, Type.Q4_0), pair(Type.Q8_0, Type.Q4_0)]


@pytest.fixture(scope="module")
def file(directory: Path, stock: GGUFContent, layers: list[NativeFfn]) -> Path:
    return write_native(directory / "pair.gguf", stock, layers)


@pytest.fixture(scope="module")
def bare(directory: Path, stock: GGUFContent) -> Path:
    """The same without anything that a converter could have measured."""
    layer = pair(Type.Q8_0, Type.Q4_0, hints=LayerHints())
    return write_native(directory / "bare.gguf", stock, [layer] * 2)


def config(path: Path, lossy: str | None = None, **changed: Any) -> EngineConfig:
    values: dict[str, Any] = {"n_ctx": 256, "n_batch": 32, "n_threads": 1, "kv_type": "f32", "device": "none"}
    return engine_config(path, lossy=lossy, **values | changed)


def conversation(engine: Engine) -> Array:
    """Logits of a prompt, of single tokens, and of a few at once."""
    engine.truncate(0)
    told = [engine.read(TOKENS[:7], 7).copy()]
    told += [engine.decode(token)[None].copy() for token in TOKENS[7:13]]
    return np.concatenate([*told, engine.read(TOKENS[13:], 3).copy()])


@pytest.fixture(scope="module")
def exact(file: Path) -> Array:
    with closing(resident_engine(config(file))) as engine:
        return conversation(engine)


# --- exact modes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mode", ["gate:1", "gate:1,1", "skip:0", "constant:0", "adap:0", "rule:inf", None])
def test_modes_that_lose_nothing(file: Path, exact: Array, mode: str | None, share: float) -> None:
    with closing(tiered_engine(config(file, mode), share)) as engine:
        np.testing.assert_array_equal(conversation(engine), exact)
        counters = engine.counters()
        assert all(
            not counters.get(name) for name in ("low_selected", "skipped_selected", "constant_selected", "expected_kl")
        )


@pytest.mark.parametrize("mode", ["low", "rule:0", "rule:1000"])
def test_nothing_is_lost_while_all_is_in_memory(file: Path, exact: Array, mode: str) -> None:
    with closing(tiered_engine(config(file, mode), 1.0)) as engine:
        np.testing.assert_array_equal(conversation(engine), exact)
        assert engine.counters()["low_selected"] == 0


def test_no_loss_allowed_is_the_exact_engine(file: Path, exact: Array) -> None:
    plan = plan_engine(config(file, max_kl=0.0))
    assert plan.lossy is None
    assert plan.is_resident
    with closing(tiered_engine(config(file, max_kl=0.0), 0.0)) as engine:
        np.testing.assert_array_equal(conversation(engine), exact)


def test_in_exact_mode_low_copies_take_no_memory(file: Path) -> None:
    with closing(tiered_engine(config(file), 1.0)) as engine:
        conversation(engine)
        assert engine.plan.tiers is not None
        assert {next(iter(kind))[0] for kind, _ in engine.plan.tiers.n_slots} == {Type.Q8_0}
        assert engine.counters() == {}  # nothing is missing


# --- what is computed --------------------------------------------------------------------------------------


class _Expected:
    """Replaces transformers' experts: a copy, a constant expert or nothing answers for each one, as `decide` says.

    `decide` gets a token's expert weights, the largest first, and its selected experts; it gives (action, weight) for
    each.
    """

    def __init__(self, stock: GGUFContent, layer: int, ffn: NativeFfn, decide: Callable[..., Any]) -> None:
        self.target, self.decide = ffn.target, decide
        self.constants = torch.from_numpy(CONSTANTS)
        self.experts = [
            [
                [torch.from_numpy(dequantised(stock, layer, e, part, copy).copy()) for part in PROJECTIONS]
                for e in ffn.experts
            ]
            for copy in (0, 1)
        ]

    def forward(self, hidden: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(hidden)
        for token, (selected, of_token) in enumerate(zip(rows.tolist(), weights.tolist(), strict=True)):
            ranked = sorted(zip(of_token, selected, strict=True), reverse=True)
            experts = [self.target[row] for _, row in ranked]
            for expert, (action, weight) in zip(experts, self.decide([w for w, _ in ranked], experts), strict=True):
                total[token] += weight * self._output(action, expert, hidden[token])
        return total

    def _output(self, action: str, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        if action == "skip":
            return torch.zeros_like(hidden)
        if action == "constant":
            assert HINTS.fallback is not None
            return self.constants[HINTS.fallback[expert]]
        gate, up, down = self.experts[("high", "low").index(action)][expert]
        return down @ (torch.nn.functional.silu(gate @ hidden) * (up @ hidden))


def transformers_logits(
    checkpoint: Path, stock: GGUFContent, layers: Sequence[NativeFfn], decide: Callable[..., Any]
) -> Array:
    """Logits of the conversation by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for n, (block, ffn) in enumerate(zip(model.model.layers, layers, strict=True)):
        block.mlp.gate.weight = torch.nn.Parameter(block.mlp.gate.weight[: len(ffn.target)])
        block.mlp.experts.forward = _Expected(stock, n, ffn, decide).forward
    with torch.no_grad():
        result: Array = model(torch.tensor([TOKENS])).logits[0].numpy()
    return result


def given_up(weights: list[float], experts: list[int], actions: list[str], constants: bool) -> list[tuple[str, float]]:
    """Fallbacks for "none" where there is one; what is left of the others grows by what was skipped."""
    assert HINTS.fallback is not None
    for rank, expert in enumerate(experts):
        if actions[rank] == "none":
            actions[rank] = "constant" if constants and HINTS.fallback[expert] >= 0 else "skip"
    kept = sum(weight for weight, action in zip(weights, actions, strict=True) if action != "skip")
    return [
        (action, 0.0 if action == "skip" else weight * sum(weights) / kept)
        for weight, action in zip(weights, actions, strict=True)
    ]


def gate(high: float, low: float) -> Callable[..., Any]:
    def decide(weights: list[float], experts: list[int]) -> list[tuple[str, float]]:
        before = [sum(weights[:rank]) for rank in range(len(weights))]
        return given_up(
            weights, experts, ["high" if s <= high else "low" if s <= low else "none" for s in before], constants=True
        )

    return decide


def small(ratio: float, constants: bool) -> Callable[..., Any]:
    def decide(weights: list[float], experts: list[int]) -> list[tuple[str, float]]:
        return given_up(weights, experts, ["high" if w >= ratio * weights[0] else "none" for w in weights], constants)

    return decide


def sensitive(limit: float) -> Callable[..., Any]:
    def decide(weights: list[float], experts: list[int]) -> list[tuple[str, float]]:
        threshold = (limit / 0.5) ** 0.5
        actions = ["high" if not rank or w >= threshold else "none" for rank, w in enumerate(weights)]
        return given_up(weights, experts, actions, constants=False)

    return decide


def below_own(weights: list[float], experts: list[int]) -> list[tuple[str, float]]:
    """A threshold of each expert's own, as the file has them."""
    assert HINTS.low_weight
    limits = [HINTS.low_weight[expert] for expert in experts]
    return [("low" if w < limit else "high", w) for w, limit in zip(weights, limits, strict=True)]


@pytest.mark.parametrize(
    ("mode", "decide"),
    [
        ("gate", below_own),
        ("gate:0", gate(0, 1)),
        ("gate:0.5,0.7", gate(0.5, 0.7)),
        ("gate:0.6,0.6", gate(0.6, 0.6)),
        ("skip:0.6", small(0.6, constants=False)),
        ("skip:1", small(1, constants=False)),
        ("skip", small(0.4, constants=False)),
        ("constant:0.7", small(0.7, constants=True)),
        ("novice:0.7", small(0.7, constants=True)),  # as the version before called it
        ("adap:0.05", sensitive(0.05)),
    ],
)
def test_selected_experts_are_what_transformers_makes_of_them(
    file: Path, stock: GGUFContent, moe_checkpoint: Path, layers: list[NativeFfn], mode: str, decide: Callable[..., Any]
) -> None:
    expected = transformers_logits(moe_checkpoint, stock, layers, decide)
    plain = transformers_logits(moe_checkpoint, stock, layers, gate(1, 1))
    with closing(tiered_engine(config(file, mode), 0.4)) as engine:
        got = conversation(engine)
    # Activations are quantised for kernels of Q8_0 and Q4_0.
    error, effect = np.abs(got - expected).mean(), np.abs(plain - expected).mean()
    assert error < 0.2 * effect
    assert error < 0.05


def test_a_layer_of_constants_alone_has_nothing_to_choose(directory: Path, stock: GGUFContent) -> None:
    only = NativeFfn((), (-1, -2, -3, -2), np.concatenate([CONSTANTS, CONSTANTS[:1]]))
    path = write_native(directory / "constants.gguf", stock, [only, pair(Type.Q8_0, Type.Q4_0)])
    with closing(tiered_engine(config(path), 0.5)) as engine:
        expected = conversation(engine)
    for mode in ("gate:1,1", "skip:0", "low"):
        with closing(tiered_engine(config(path, mode), 1.0)) as engine:
            np.testing.assert_array_equal(conversation(engine), expected)


# --- by weights alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["gate:0.4,0.7", "skip:0.5", "constant:0.5", "adap:0.03"])
def test_gates_do_not_care_what_lies_where(file: Path, exact: Array, mode: str) -> None:
    """Every budget and policy, a cache that is cold or warm: the same bits."""
    with closing(tiered_engine(config(file, mode), 1.0)) as engine:
        expected = conversation(engine)
    assert not np.array_equal(expected, exact)
    for share, policy in ((0.0, "lfu-decay"), (0.3, "lru"), (0.7, "lfu")):
        with closing(tiered_engine(config(file, mode, policy=policy), share)) as engine:
            for _ in ("cold", "warm"):
                np.testing.assert_array_equal(conversation(engine), expected, f"{share} {policy}")


def test_copies_split_as_the_traced_shares_say(directory: Path, file: Path) -> None:
    path = directory / "routes"
    with closing(tiered_engine(config(file, "gate:0.45,0.75", trace=path), 0.5)) as engine:
        conversation(engine)
        counters = engine.counters()
    weights = np.concatenate([layer.weights for step in read_trace(path).steps for layer in step.layers]).astype(float)
    before = np.array([[sum(row[:rank]) / sum(row) for rank in range(N_USED)] for row in weights])
    # A trace's weights have eleven bits.
    slack = 2 * int((np.abs(before - 0.45) < 2e-3).sum() + (np.abs(before - 0.75) < 2e-3).sum())
    assert abs(counters["low_selected"] - ((before > 0.45) & (before <= 0.75)).sum()) <= slack
    assert abs(counters["skipped_selected"] + counters["constant_selected"] - (before > 0.75).sum()) <= slack
    assert min(counters["low_selected"], counters["skipped_selected"], counters["constant_selected"]) > slack


# --- by what is in memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["low", "rule:0"])
def test_nobody_waits_while_the_low_copies_fit(file: Path, mode: str) -> None:
    with closing(tiered_engine(config(file, mode), 0.5)) as engine:
        conversation(engine)
        counters = engine.counters()
        assert counters["misses"] == 0
        assert counters["low_selected"] > 0
        assert counters["expected_kl"] > 0


def test_without_room_for_all_low_copies_the_rest_is_read(file: Path) -> None:
    with closing(tiered_engine(config(file, "low"), 0.0)) as engine:
        told = conversation(engine)
        assert engine.counters()["misses"] > 0
    assert np.isfinite(told).all()


def test_what_was_missing_is_read_when_nothing_else_is(file: Path) -> None:
    """With no other use of the disk, a recently used expert takes the place of one that was not."""
    with closing(tiered_engine(config(file, "low", policy="lru"), 0.55)) as engine:
        before = engine.counters()["bytes_read"]
        for _ in range(200):
            conversation(engine)
            if engine.counters()["bytes_read"] > before:
                break
        assert engine.counters()["bytes_read"] > before
        assert engine.counters()["misses"] == 0


@pytest.mark.parametrize("max_kl", [1e-3, 0.01, 1.0])
def test_a_limit_holds_by_the_files_own_reckoning(file: Path, max_kl: float) -> None:
    with closing(tiered_engine(config(file, max_kl=max_kl), 0.5)) as engine:
        for _ in range(3):
            conversation(engine)
        counters = engine.counters()
    assert 0 < counters["expected_kl"] <= 3 * len(TOKENS) * max_kl
    assert (counters["misses"] == 0) == (max_kl == 1.0)


def test_a_gate_that_keeps_to_a_limit(file: Path) -> None:
    engines = []
    for max_kl in (1e-4, 0.005, 1.0):
        with closing(tiered_engine(config(file, "gate", max_kl=max_kl), 1.0)) as engine:
            conversation(engine)
            engines.append(engine.counters())
    low_selected = [counters["low_selected"] for counters in engines]
    assert low_selected == sorted(low_selected)
    assert low_selected[0] < low_selected[-1] == 2 * len(TOKENS) * N_USED


def test_a_gate_without_thresholds_in_the_file_has_hobbits(bare: Path) -> None:
    found = []
    for mode in ("gate", "gate:0.6"):
        with closing(tiered_engine(config(bare, mode), 0.5)) as engine:
            found.append(conversation(engine))
            assert engine.counters()["low_selected"] > 0
    np.testing.assert_array_equal(found[0], found[1])


def test_what_nobody_measured_is_not_reported(bare: Path) -> None:
    with closing(tiered_engine(config(bare, "low"), 0.5)) as engine:
        conversation(engine)
        counters = engine.counters()
    assert counters["low_selected"] > 0
    assert "expected_kl" not in counters


# --- elastic files -----------------------------------------------------------------------------------------


def test_the_ends_of_an_elastic_file(directory: Path, file: Path, stock: GGUFContent, exact: Array) -> None:
    """All high is the exact engine; all low is, bit for bit, a stock file of the low type."""
    with closing(Engine.open(config(file, "elastic:1"))) as engine:
        assert engine.plan.is_resident
        np.testing.assert_array_equal(conversation(engine), exact)
    quantised = stock.quantised(Type.Q4_0, lambda name: "_exps" in name)
    with closing(resident_engine(config(write_content(directory / "low.gguf", quantised)))) as engine:
        expected = conversation(engine)
    with closing(Engine.open(config(file, "elastic:0"))) as engine:
        np.testing.assert_array_equal(conversation(engine), expected)
        assert engine.counters()["low_selected"] == 2 * len(TOKENS) * N_USED


def test_an_elastic_file_reads_nothing_while_it_runs(file: Path, exact: Array) -> None:
    told = []
    for _ in range(2):
        with closing(Engine.open(config(file, "elastic:0.5"))) as engine:
            begin = engine.counters()
            told.append(conversation(engine))
            counters = engine.counters()
            assert counters["bytes_read"] == begin["bytes_read"]
            assert counters["misses"] == counters["pending"] == counters["ahead"] == 0
            assert 0 < counters["low_selected"] < 2 * len(TOKENS) * N_USED
            assert counters["expected_kl"] > 0
            assert any("elastic" in note.lower() for note in engine.plan.notes)
    np.testing.assert_array_equal(told[0], told[1])
    assert not np.array_equal(told[0], exact)


def test_elastic_takes_the_best_that_fits(file: Path) -> None:
    assert plan_engine(config(file, "elastic")).lossy is None
    small = plan_engine(config(file, "elastic", ram="1MiB"))
    assert small.shortfall is not None
    assert "smallest copy" in str(small.shortfall)


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("hobbit", "Choose one of " + ", ".join(LOSSY)),
        ("", "Choose one of"),
        ("low:1", "at most 0 values"),
        ("gate:x", "gate:0.6"),
        ("gate:2", "from 0 to 1"),
        ("gate:0.1,0.2,0.3", "at most 2"),
        ("skip:-0.5", "from 0 to 1"),
        ("skip:nan", "from 0 to 1"),
        ("rule", "rule:100"),
        ("rule:-1", "from 0 up"),
        ("adap", "adap:0.005"),
        ("elastic:1.5", "from 0 to 1"),
    ],
)
def test_names_and_values_that_there_are_not(file: Path, mode: str, told: str) -> None:
    with pytest.raises(UsageError) as raised:
        plan_engine(config(file, mode))
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("adap:0.01", "sensitivities"),
        ("constant:0.1", "constants"),
        ("skip", "Give one"),
        ("rule:100", "measured errors"),
    ],
)
def test_what_a_file_does_not_say(bare: Path, mode: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        plan_engine(config(bare, mode))


def test_a_gate_without_thresholds_says_which_one_stands_in(file: Path, bare: Path) -> None:
    for path, is_told in ((file, False), (bare, True)):
        with closing(tiered_engine(config(path, "gate"), 1.0)) as engine:
            assert any("gate:0.6" in note for note in engine.plan.notes) == is_told


@pytest.mark.parametrize("mode", ["low", "gate", "elastic", "gate:0.5"])
def test_a_file_of_single_copies(directory: Path, mode: str) -> None:
    path = write_tiny_gguf(directory / "single.gguf", None, shape=TinyShape())
    with pytest.raises(UsageError, match="--two-copies"):
        plan_engine(config(path, mode))


@pytest.mark.parametrize(("mode", "value"), [(None, 0.1), ("rule", 0.1), ("gate", 0.1), ("elastic", 0.1)])
def test_a_limit_that_nobody_can_reckon_with(bare: Path, mode: str | None, value: float) -> None:
    with pytest.raises(UsageError, match="does not say what doing with less of its experts costs"):
        plan_engine(config(bare, mode, max_kl=value))


def test_limits_that_make_no_sense(file: Path) -> None:
    with pytest.raises(UsageError, match="at least 0"):
        plan_engine(config(file, max_kl=float("nan")))
    for mode in ("low", "gate:0.5", "rule:3"):
        with pytest.raises(UsageError, match="Use it alone"):
            plan_engine(config(file, mode, max_kl=0.1))
    with pytest.raises(UsageError, match="more than"):
        plan_engine(config(file, "elastic:0", max_kl=1e-6))


def test_a_model_without_experts(directory: Path, dense_checkpoint: Path) -> None:
    path = convert(ConvertOptions(dense_checkpoint, directory / "dense.gguf", "F32", n_threads=1)).path
    with pytest.raises(UsageError, match="no experts"):
        plan_engine(config(path, "skip:0.1"))


# --- beside a device ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["gate:0.4,0.7", "constant:0.5", "elastic:0.5", "low"])
def test_devices_change_no_selected_expert(
    file: Path, exact: Array, stock: GGUFContent, one_device: Devices, mode: str, tmp_path: Path
) -> None:
    """All best copies are in the device's slots, low ones and constant experts the host's; each has its own kernels."""
    with closing(tiered_engine(config(file, mode), 1.0)) as engine:
        expected, counters = conversation(engine), engine.counters()
    with closing(Engine.open(config(file, mode, **one_device.settings))) as engine:
        got, beside = conversation(engine), engine.counters()
        if mode != "low":
            assert beside["device_hits"] > 0
    if one_device.is_exact:  # but for products in another order
        assert np.abs(got - expected).max() < 1e-3
        assert beside.get("low_selected", 0) == counters["low_selected"]
    else:
        # The CPU rounds what it multiplies with experts of Q8_0, a device may not.
        alike = stock.quantised(Type.Q8_0, lambda name: "_exps" in name)
        one_device.check(got, expected, write_content(tmp_path / "stock.gguf", alike))
    assert (np.abs(expected - exact).max() > 1e-3) == (mode != "low")
