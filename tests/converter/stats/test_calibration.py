"""A calibration's sums against transformers and a loop over tokens, and a pass that is interrupted."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import slimoe.converter.stats.forward_pass as calibration
from slimoe.converter.forward.expert import Expert, Linear
from slimoe.converter.forward.texts import CalibrationText
from slimoe.converter.source.held_source import HeldSource
from slimoe.converter.source.model_source import MatrixKey, ModelSource
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.forward_pass import CalibrationSettings, calibrate
from slimoe.converter.stats.observer import Samples
from slimoe.converter.stats.statistics import LayerStatistics, Statistics
from slimoe.converter.stats.statistics_file import to_arrays
from slimoe.converter.stats.sums import spread_rows
from slimoe.converter.stats.type_errors import TypeErrorTable, inclusion
from slimoe.offload.errors import DoesNotFitError, ModelFileError
from tests.models.naive_statistics import Array, NaiveModel, expected_sums, hidden_and_output
from tests.models.tiny_checkpoint import TinyConfig, save_checkpoint

EXACT = CalibrationSettings(Samples(("Q8_0", "Q4_K"), n_tokens=10**6, n_rows=10**6, n_gram=10**6), n_sensitivity=0)
N_LAYER = 5


def random_text(n_sequences: int = 4, n_vocab: int = 520) -> CalibrationText:
    random = np.random.default_rng(7)
    lengths = [3 + 7 * n for n in range(n_sequences)]
    tokens = tuple(tuple(random.integers(0, n_vocab, length).tolist()) for length in lengths)
    return CalibrationText(tokens, tuple("ab"[n % 2] for n in range(n_sequences)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, sentencepiece_path: Path) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "model"
    return save_checkpoint(path, sentencepiece_path, TinyConfig(n_layer=N_LAYER))


def learn(path: Path, directory: Path, text: CalibrationText, settings: CalibrationSettings = EXACT) -> Statistics:
    return calibrate(open_source(path), text, settings, directory / "stats.partial")


@pytest.fixture(scope="module")
def learnt(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return learn(checkpoint, tmp_path_factory.mktemp("partial"), random_text())


@pytest.fixture(scope="module")
def naive(checkpoint: Path) -> NaiveModel:
    return NaiveModel(checkpoint, random_text().tokens)


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal but for a share of the greatest value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0) <= tolerance * max(1e-30, np.abs(expected).max(initial=0))


@pytest.mark.parametrize("layer", range(N_LAYER))
def test_every_sum_is_that_of_a_loop_over_tokens(learnt: Statistics, naive: NaiveModel, layer: int) -> None:
    found, expected = to_arrays(learnt.layers[layer]), expected_sums(naive, layer)
    sampled = {name for name in found if name.split(".")[0] in ("sketch", "type_errors")}
    assert set(found) - sampled == set(expected)
    for name, values in expected.items():
        if name.startswith("similarity"):
            # Cosines of either sign add up to little.
            assert found[name] / learnt.n_tokens == pytest.approx(values / learnt.n_tokens, rel=1e-5, abs=1e-6)
            continue
        half_precision = name in ("trace.shares", "trace.received")
        close(found[name].reshape(np.shape(values)), values, 1e-3 if half_precision else 2e-5)


def test_sums_that_must_hold(learnt: Statistics) -> None:
    n_tokens = learnt.n_tokens
    for layer in learnt.layers:
        assert layer.router is not None
        assert layer.outputs is not None
        assert layer.router.rank_count.sum() == layer.outputs.n_pick.sum() == n_tokens * 3
        assert (layer.router.rank_count.sum(0) == n_tokens).all()
        assert layer.router.probability.sum() == pytest.approx(n_tokens)
        assert layer.router.share.sum() == pytest.approx(n_tokens)
        assert layer.router.top_bins.sum() == layer.router.ratio_bins.sum() == n_tokens
        assert (np.diag(layer.router.together) == layer.outputs.n_pick).all()


def test_what_the_output_reads_and_the_tokens(learnt: Statistics, naive: NaiveModel) -> None:
    close(learnt.output_input, (np.concatenate(naive.last) ** 2).sum(0))
    flat = [token for one in learnt.tokens for token in one]
    assert learnt.token_count.tolist() == [flat.count(token) for token in range(520)]


def test_gram_matrices_are_all_inner_products(learnt: Statistics, naive: NaiveModel) -> None:
    """Also the error of a policy that it was not made for: a token's second expert left out, the rest renormalised."""
    for n, layer in enumerate(learnt.layers):
        sample, outputs = layer.sketch, layer.outputs
        assert sample is not None
        assert outputs is not None
        assert sample.rows.tolist() == list(range(learnt.n_tokens))
        means = outputs.share_square_output / np.maximum(outputs.share_square, 1e-30)[:, None]
        x, middle = (np.concatenate(part) for part in (naive.layers[n].x, naive.layers[n].middle))
        for row in range(0, learnt.n_tokens, 11):
            answers = [hidden_and_output(naive.matrices(n, expert), x[row])[1] for expert in range(6)]
            vectors = np.stack([*answers, *means, middle[row]])
            close(sample.gram[row], vectors @ vectors.T)
            logits, _, selected, weights = naive.select(n, x[row])
            close(sample.logits[row], logits)
            change = np.zeros(13)
            change[selected] = -weights
            change[selected[[0, 2]]] += weights[[0, 2]] / weights[[0, 2]].sum()
            added = change @ vectors
            assert change @ sample.gram[row] @ change == pytest.approx(added @ added, rel=1e-4)


def test_errors_of_types_are_those_of_requantised_experts(learnt: Statistics, naive: NaiveModel) -> None:
    """With the public quantiser of Q8_0, its gain taken out; rows of 64 and 96 are no blocks of Q4_K."""
    x = np.concatenate(naive.layers[1].x)
    errors = learnt.layers[1].type_errors
    assert errors is not None
    assert errors.types == ("Q8_0", "Q4_K")
    assert np.isinf(errors.error[1]).all()
    expected = np.zeros((6, 4))
    for expert in range(6):
        true = naive.matrices(1, expert)
        own = [x[t] for t in range(len(x)) if expert in naive.select(1, x[t])[2]]
        read, hidden = ((np.stack(one) ** 2).sum(0) for one in (own, [hidden_and_output(true, one)[0] for one in own]))
        gate, up, down = (without_gain(m, one) for m, one in zip(true, (read, read, hidden), strict=True))
        changes = [(gate, *true[1:]), (true[0], up, true[2]), (*true[:2], down), (gate, up, down)]
        for t in range(len(x)):
            _, _, selected, weights = naive.select(1, x[t])
            if expert in selected:
                weight = weights[selected.tolist().index(expert)]
                f = hidden_and_output(true, x[t])[1]
                differences = [hidden_and_output(change, x[t])[1] - f for change in changes]
                expected[expert] += [weight**2 * (d @ d) for d in differences]
    close(errors.error[0], expected, 1e-3)


_Q8 = gguf.GGMLQuantizationType.Q8_0


def without_gain(matrix: Array, importance: Array) -> Array:
    """The values of a matrix in Q8_0, divided by their gain."""
    values: Array = gguf.dequantize(gguf.quantize(matrix.astype(np.float32), _Q8), _Q8)
    gain = float((importance * matrix * values).sum() / (importance * matrix * matrix).sum())
    return values / gain


def test_errors_of_types_on_samples_are_near_those_of_all(k_quant_checkpoint: Path) -> None:
    source = open_source(k_quant_checkpoint)
    torch.manual_seed(0)
    shapes = ((512, 256), (512, 256), (256, 512))
    expert = Expert(*(Linear(torch.randn(shape) / shape[1] ** 0.5) for shape in shapes))
    x, weights = torch.randn(64, 256), torch.rand(64)
    importance = (np.ones(256, np.float32), np.ones(512, np.float32))
    found = {}
    for n_rows in (512, 128):
        table = TypeErrorTable(source, 0, ("Q2_K", "Q4_K"), n_rows, 2)
        found[n_rows] = (table.measure(3, expert, x, weights, importance), table.error[:, 3])
        assert (table.error[:, :3] == 0).all()
    assert found[512][0] == found[128][0]
    assert found[128][1] == pytest.approx(found[512][1], rel=0.25)
    assert (found[512][1][0] > 4 * found[512][1][1]).all()


def test_neurons_are_sampled_without_bias() -> None:
    weights = np.random.default_rng(3).random(400) ** 8
    weights[5] = 0
    chance = inclusion(weights, 100)
    assert chance.sum() == pytest.approx(100)
    assert chance.min() > 0
    assert chance.max() == 1
    free = (chance < 1) & (weights > 0.1)
    ratio = chance[free] / weights[free]
    assert ratio.max() / ratio.min() < 1.2
    assert (inclusion(weights, 400) == 1).all()
    assert inclusion(np.zeros(10), 4) == pytest.approx(np.full(10, 0.4))


def test_a_sample_of_tokens_stands_for_all(k_quant_checkpoint: Path, tmp_path: Path) -> None:
    text = random_text(7)
    both = []
    for n_tokens in (10**6, 24):
        settings = CalibrationSettings(Samples(("Q8_0",), n_tokens, n_gram=0), n_sensitivity=0)
        statistics = learn(k_quant_checkpoint, tmp_path, text, settings)
        assert statistics.layers[0].sketch is None
        errors = statistics.layers[0].type_errors
        assert errors is not None
        both.append(errors.error.sum(1))
    assert both[1] == pytest.approx(both[0], rel=0.1)
    assert (both[1] != both[0]).all()


def assert_same(one: LayerStatistics, other: LayerStatistics, tolerance: float = 0.0) -> None:
    first, second = to_arrays(one), to_arrays(other)
    assert set(first) == set(second)
    for name, values in first.items():
        finite = np.isfinite(values) if values.dtype.kind == "f" else np.ones(values.shape, bool)
        close(values[finite], second[name][finite], tolerance)


def test_the_order_of_sequences_does_not_matter(checkpoint: Path, learnt: Statistics, tmp_path: Path) -> None:
    text = random_text()
    other = learn(checkpoint, tmp_path, CalibrationText(text.tokens[::-1], text.domains[::-1]))
    assert other.text_hash != learnt.text_hash
    for one, two in zip(learnt.layers, other.layers, strict=True):
        without = {"trace": None, "sketch": None}
        assert_same(replace(one, **without), replace(two, **without), 1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_interrupted_pass_goes_on(checkpoint: Path, learnt: Statistics, tmp_path: Path, on_disk: bool) -> None:
    settings = replace(EXACT, max_state_bytes=0) if on_disk else EXACT
    source, text, partial = open_source(checkpoint), random_text(), tmp_path / "stats.partial"

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(source, text, settings, partial, interrupt)
    assert list(partial.glob("tmp*")) == []
    steps: list[tuple[str, int, int]] = []
    statistics = calibrate(source, text, settings, partial, lambda *step: steps.append(step))
    assert [done for _, done, _ in steps] == [2, 3, 4, 5]
    for one, two in zip(statistics.layers, learnt.layers, strict=True):
        assert_same(one, two)
    close(statistics.output_input, learnt.output_input, 0)


def test_a_disk_that_is_too_small(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(EXACT, max_state_bytes=0)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(DoesNotFitError, match=r"bytes of disk, but .* has only 1,000 free") as caught:
        learn(checkpoint, tmp_path, random_text(), settings)
    assert caught.value.required_bytes == 4 * 4 * 54 * 64
    assert caught.value.available_bytes == 1000


def test_what_another_pass_left_is_not_taken(checkpoint: Path, tmp_path: Path) -> None:
    learn(checkpoint, tmp_path, random_text())
    steps: list[int] = []
    partial = tmp_path / "stats.partial"
    calibrate(open_source(checkpoint), random_text(3), EXACT, partial, lambda _what, done, _all: steps.append(done))
    assert steps == [0, 1, 2, 3, 4, 5]
    (partial / "layer-0002.safetensors").write_bytes(b"nothing")
    steps.clear()
    calibrate(open_source(checkpoint), random_text(3), EXACT, partial, lambda _what, done, _all: steps.append(done))
    assert steps == [0, 1, 2, 3, 4, 5], "damaged, so from the start"


def test_the_sensitivity_belongs_to_it(checkpoint: Path, tmp_path: Path) -> None:
    settings = replace(EXACT, n_sensitivity=16, samples=Samples(()))
    statistics = learn(checkpoint, tmp_path, random_text(), settings)
    assert all(layer.sensitivity is not None and layer.type_errors is None for layer in statistics.layers)
    assert statistics.output_gradient is not None
    assert statistics.output_gradient.shape == (520,)
    assert statistics.token_gradient is not None


class WatchedSource(HeldSource):
    """Keeps the keys that are read."""

    def __init__(self, source: ModelSource) -> None:
        super().__init__(source)
        self.read_keys: list[MatrixKey] = []

    def read(self, key: MatrixKey) -> NDArray[np.float32]:
        self.read_keys.append(key)
        return super().read(key)


@pytest.mark.parametrize("damaged", [False, True])
def test_an_interrupted_sensitivity_goes_on(checkpoint: Path, tmp_path: Path, damaged: bool) -> None:
    settings = replace(EXACT, n_sensitivity=64, samples=Samples(()))
    source, text, partial = open_source(checkpoint), random_text(), tmp_path / "other.partial"
    whole = learn(checkpoint, tmp_path, text, settings)

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "sensitivity" and done == total - 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(source, text, settings, partial, interrupt)
    if damaged:
        next(partial.glob("backward-*.safetensors")).write_bytes(b"nothing")
    watched = WatchedSource(source)
    steps: list[tuple[str, int, int]] = []
    found = calibrate(watched, text, settings, partial, lambda *step: steps.append(step))
    assert watched.read_keys.count(MatrixKey("output.weight")) == damaged, "only the head's step reads it"
    n_steps = 2 * len(found.layers)
    assert [done for what, done, _ in steps if what == "sensitivity"] == list(range(1, n_steps + 1))
    for one, two in zip(found.layers, whole.layers, strict=True):
        assert one.sensitivity is not None
        assert one.removals is not None
        assert_same(one, two)
    close(found.output_gradient, whole.output_gradient, 0)
    close(found.token_gradient, whole.token_gradient, 0)


def spoilt(checkpoint: Path, target: Path, change: Any) -> Path:
    tensors = load_file(checkpoint / "model.safetensors")
    target.mkdir()
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        (target / name).write_bytes((checkpoint / name).read_bytes())
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def test_an_expert_that_no_token_selects(tmp_path: Path, sentencepiece_path: Path) -> None:
    """A row of zeros between rows and their negatives, one of each pair above 0, is never among the first three."""
    path = save_checkpoint(tmp_path / "seven", sentencepiece_path, TinyConfig(n_expert=7))

    def pairs(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("gate.weight")]:
            rows = tensors[name][:3]
            tensors[name] = torch.cat((rows, -rows, torch.zeros_like(rows[:1])))

    statistics = learn(spoilt(path, tmp_path / "pairs", pairs), tmp_path, random_text())
    assert statistics.notes is not None
    assert statistics.notes["coverage"] == "12 of 14 experts were routed to"
    for layer in statistics.layers:
        assert layer.outputs is not None
        assert layer.outputs.n_pick[6] == 0
        assert layer.type_errors is not None
        assert (layer.type_errors.error[0, 6] == 0).all()
        for name, values in to_arrays(layer).items():
            assert not np.isnan(values).any(), name


def test_weights_that_give_no_numbers(checkpoint: Path, tmp_path: Path) -> None:
    def put_nan(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if "layers.1" in name and "experts.0.w2" in name)
        tensors[name][3, 3] = torch.nan

    with pytest.raises(ModelFileError, match=r"layers\.1.*experts\.0\.w2.* NaN"):
        learn(spoilt(checkpoint, tmp_path / "nan", put_nan), tmp_path, random_text())

    def put_huge(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.3" in name and "w2" in name]:
            tensors[name][:] = 3e38

    with pytest.raises(ModelFileError, match="layer 3 computes NaN or infinity"):
        learn(spoilt(checkpoint, tmp_path / "huge", put_huge), tmp_path, random_text())

    def put_large(tensors: dict[str, torch.Tensor]) -> None:
        """Answers that are numbers, whose squares are not."""
        for name in [name for name in tensors if "layers.1" in name and "w2" in name]:
            tensors[name][3, 3] = 1e30

    path = spoilt(checkpoint, tmp_path / "large", put_large)
    with pytest.raises(ModelFileError, match="layer 1 computes NaN or infinity"):
        learn(path, tmp_path, random_text(), CalibrationSettings(Samples(types=()), n_sensitivity=0))


def test_rows_are_spread() -> None:
    rows = spread_rows(1000, 10)
    assert [int(row) // 100 for row in rows] == list(range(10))
    assert spread_rows(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert len(spread_rows(0, 3)) == 0


def test_notes_say_how(learnt: Statistics) -> None:
    assert learnt.notes is not None
    assert {"coverage", "device", "samples", "seconds", "torch"} <= set(learnt.notes)
    names = json.loads(learnt.notes["samples"])
    assert list(names) == ["types", "n_picks", "n_rows", "n_sketch"], "as in files of the version before"
    assert calibration.coverage(learnt.layers) == (30, 30)


def test_no_value_is_left_out(learnt: Statistics) -> None:
    arrays: dict[str, Array] = to_arrays(learnt.layers[2])
    assert all(np.any(values) for values in arrays.values()), [n for n, v in arrays.items() if not np.any(v)]
