"""Divergence, perplexity, agreement and route flips against transformers and by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from slimoe.converter.forward.head import Head, read_head
from slimoe.converter.forward.routing import Routing
from slimoe.converter.forward.stream import Observer, Sequences, run
from slimoe.converter.forward.windows import Windows, cut_windows
from slimoe.converter.layout.plan import CompressPlan, LayerPlan
from slimoe.converter.report.alignment import LayerMap, likely_layer_map, planned_layer_map
from slimoe.converter.report.evaluation import Reference, divergences, evaluate, flip_rate, token_scores
from slimoe.converter.report.layer_swap import divergence_by_block
from slimoe.converter.report.quality import Comparison, TokenScores, summarise
from slimoe.converter.source.model_source import MatrixKey, SourceLayer, block_key, constant_key
from slimoe.offload.errors import BadLogitsError, UsageError
from tests.models.held_model import HeldModel, hold, random_mixtral
from tests.models.tiny_checkpoint import TinyConfig

SIZES = TinyConfig(n_layer=3, n_embd=32, n_ff=48, n_vocab=150, n_expert=5, n_expert_used=2)


def texts(**lengths: int) -> dict[str, list[int]]:
    numbers = np.random.default_rng(2)
    return {name: numbers.integers(0, SIZES.n_vocab, n).tolist() for name, n in lengths.items()}


@pytest.fixture(scope="module")
def models() -> tuple[transformers.MixtralForCausalLM, transformers.MixtralForCausalLM]:
    """A model, and the same with noise on all its matrices."""
    plain, noisy = random_mixtral(SIZES, spread=0.2), random_mixtral(SIZES, spread=0.2)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    return plain, noisy


@pytest.fixture(scope="module")
def held(
    models: tuple[transformers.MixtralForCausalLM, transformers.MixtralForCausalLM],
) -> tuple[HeldModel, HeldModel]:
    return hold(models[0]), hold(models[1])


def test_windows_by_hand() -> None:
    windows = cut_windows({"a": range(10, 33), "b": range(5)}, length=8)
    assert windows.sequences.tokens == (tuple(range(10, 18)), tuple(range(18, 26)), tuple(range(5)))
    assert windows.domains == ("a", "a", "b")
    assert windows.targets.tolist() == [14, 15, 16, 17, 22, 23, 24, 25, 2, 3, 4]
    assert windows.rows.tolist() == [3, 4, 5, 6, 11, 12, 13, 14, 17, 18, 19]
    assert windows.owners.tolist() == [0] * 4 + [1] * 4 + [2] * 3
    assert {name: rows.sum() for name, rows in windows.domain_rows().items()} == {"a": 8, "b": 3}


def test_windows_are_evenly_spread_and_need_some_text() -> None:
    windows = cut_windows({"a": range(80)}, length=8, most=3)
    assert [window[0] // 8 for window in windows.sequences.tokens] == [0, 4, 9]
    with pytest.raises(UsageError, match="only 3 tokens"):
        cut_windows({"a": range(80), "b": range(3)}, length=8)


def test_a_model_is_like_itself(held: tuple[HeldModel, HeldModel]) -> None:
    quality = evaluate(held[0], held[0], texts(a=70, b=40), length=32)
    assert quality.total.divergence.largest == 0
    assert quality.total.same_top == 1
    assert quality.flips == quality.stream_error == (0, 0, 0)
    assert quality.total.perplexity_rise == 0
    assert list(quality.domains) == ["a", "b"]


def test_figures_are_those_of_transformers(
    models: tuple[transformers.MixtralForCausalLM, transformers.MixtralForCausalLM], held: tuple[HeldModel, HeldModel]
) -> None:
    """Its own loss over the scored labels, and the divergence of its logits."""
    given = texts(a=64, b=96)
    quality = evaluate(held[1], held[0], given, length=32)
    losses: dict[str, list[float]] = {}
    divergences, same = [], []
    for name, text in given.items():
        for window in torch.tensor(text).split(32):
            labels = window.clone()
            labels[:16] = -100
            with torch.no_grad():
                answers = [model(window[None], labels=labels[None]) for model in models]
            logs = [answer.logits[0, 15:31].double().log_softmax(-1) for answer in answers]
            divergences.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1))
            same.append(logs[0].argmax(-1) == logs[1].argmax(-1))
            losses.setdefault(name, []).append(answers[1].loss.item())
            losses.setdefault(f"reference {name}", []).append(answers[0].loss.item())
    values = torch.cat(divergences).numpy()
    found = quality.total.divergence
    assert values.mean() > 0.01
    expected = (values.mean(), np.median(values), np.quantile(values, 0.99), values.max())
    assert (found.mean, found.median, found.percentile_99, found.largest) == pytest.approx(expected, rel=1e-4)
    by_window = np.array([part.mean() for part in divergences])
    assert found.error == pytest.approx(by_window.std(ddof=1) / np.sqrt(len(by_window)), rel=1e-4)
    assert quality.total.same_top == torch.cat(same).double().mean().item()
    for name, one in quality.domains.items():
        assert one.perplexity == pytest.approx(np.exp(np.mean(losses[name])), rel=1e-5)
        assert one.reference_perplexity == pytest.approx(np.exp(np.mean(losses[f"reference {name}"])), rel=1e-5)


def test_logits_are_held_in_parts(held: tuple[HeldModel, HeldModel]) -> None:
    shapes: list[int] = []

    class Counted(Head):
        def __call__(self, h: torch.Tensor) -> torch.Tensor:
            shapes.append(len(h))
            return super().__call__(h)

    windows = cut_windows(texts(a=64), length=32)
    reference = Reference(held[0], windows)
    whole = reference.compare(held[1])
    reference.close()
    plain = [read_head(model) for model in held]
    heads = [Counted(head.norm, head.weight, max_logits=5 * SIZES.n_vocab) for head in plain]
    last = [run(model, windows.sequences)[torch.from_numpy(windows.rows)] for model in held]
    scores = token_scores(heads[1], last[1], windows.targets)
    divergence = divergences(heads[0], last[0], heads[1], last[1])
    assert max(shapes) == 5
    np.testing.assert_array_equal(scores.rank, whole.model.rank)
    assert divergence.mean() == pytest.approx(whole.divergence.mean(), rel=1e-5)


def test_flips_by_hand() -> None:
    wanted, found = torch.tensor([[0, 1], [2, 3], [4, 0]]), torch.tensor([[1, 0], [3, 1], [1, 2]])
    assert flip_rate(wanted, found) == pytest.approx(3 / 6)
    assert flip_rate(wanted, wanted[:, :1]) == pytest.approx(3 / 6)


def without_row(model: HeldModel, layer: int, row: int) -> HeldModel:
    """A router without one of its rows."""
    router = model.read(block_key(layer, "ffn_gate_inp"))
    keys = {block_key(layer, "ffn_gate_inp"): np.delete(router, row, axis=0)}
    return model.changed(keys)


class Watch(Observer):
    """Keeps the selected rows of the routers and the residual streams behind the blocks, by layer and sequence."""

    def __init__(self) -> None:
        self.selected: dict[int, list[torch.Tensor]] = {}
        self.behind: dict[int, list[torch.Tensor]] = {}

    def routed(self, layer: int, first_row: int, x: torch.Tensor, read: torch.Tensor, routing: Routing) -> None:
        self.selected.setdefault(layer, []).append(routing.selected)

    def block(self, layer: int, first_row: int, h: torch.Tensor, middle: torch.Tensor, after: torch.Tensor) -> None:
        self.behind.setdefault(layer, []).append(after.clone())


def test_flips_and_errors_of_models_that_lack_experts_and_blocks(held: tuple[HeldModel, HeldModel]) -> None:
    """Rows and blocks keep their names: what is left selects as before where nothing changed before it."""
    full = held[0]
    dropped = without_row(full, 2, 1).with_layer(2, SourceLayer(5, (0, 2, 3, 4)))
    windows = cut_windows(texts(a=96), length=32)
    reference = Reference(full, windows)
    rows: tuple[tuple[int, ...], ...] = ((0, 1, 2, 3, 4), (0, 1, 2, 3, 4), (0, 2, 3, 4))
    found = reference.compare(dropped, LayerMap((0, 1, 2), rows))
    watch = Watch()
    run(full, windows.sequences, watch)
    selected = torch.cat(watch.selected[2])
    assert found.flips[:2] == (0, 0)
    assert found.flips[2] == pytest.approx(float((selected == 1).double().mean()))
    assert float((selected == 1).double().mean()) > 0
    unnamed = reference.compare(dropped)
    assert unnamed.flips == (0, 0, None)
    assert unnamed.stream_error == found.stream_error
    assert found.stream_error[:2] == (0, 0)
    blockless = reference.compare(full.with_blocks((0, 2)), LayerMap((0, 2), rows[:1] + rows[:1]))
    assert blockless.flips[:2] == (0, None)
    error = blockless.stream_error[1]
    assert error is not None
    behind = [torch.cat(watch.behind[block]).double() for block in range(2)]
    ratio = (behind[0] - behind[1]).square().sum(-1) / behind[1].square().sum(-1)
    assert error == pytest.approx(float(ratio.mean().sqrt()))
    nameless = reference.compare(full.with_blocks((0, 2)))
    assert nameless.flips == nameless.stream_error == (None, None, None)
    np.testing.assert_array_equal(nameless.divergence, blockless.divergence)
    reference.close()


def mapped_files(directory: Path) -> int:
    """Files of a directory, also those without a name, that lie in this process's memory."""
    return sum(f" {directory}/" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_constants_missing_parts_and_files(held: tuple[HeldModel, HeldModel], tmp_path: Path) -> None:
    full = held[0]
    odd = full.changed({constant_key(0, 0): np.ones(SIZES.n_embd, np.float32)})
    odd = odd.with_layer(0, SourceLayer(5, (0, 1, -1, 3, 0))).with_layer(1, SourceLayer(has_ffn=False))
    odd = odd.with_layer(2, replace(full.layers[2], has_attention=False))
    reference = Reference(full, cut_windows(texts(a=64, b=64), length=32), directory=tmp_path, n_traced=40)
    assert mapped_files(tmp_path) == 4
    steps: list[tuple[int, int]] = []
    found = reference.compare(odd, on_progress=lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert mapped_files(tmp_path) == 4
    reference.close()
    assert mapped_files(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []
    assert found.flips[:2] == (0, None)
    assert found.divergence.mean() > 0


def test_models_of_other_sizes_are_refused(held: tuple[HeldModel, HeldModel]) -> None:
    other = hold(random_mixtral(replace(SIZES, n_vocab=140)))
    with pytest.raises(UsageError, match="150 tokens"):
        evaluate(other, held[0], texts(a=40), length=32)
    key = MatrixKey("output.weight")
    with pytest.raises(BadLogitsError):
        evaluate(held[0].changed({key: np.full_like(held[0].read(key), np.inf)}), held[0], texts(a=40), length=32)


def test_divergence_by_block_is_that_of_one_block_swapped(held: tuple[HeldModel, HeldModel]) -> None:
    full, noisy = held
    given = texts(a=64)
    found = divergence_by_block(noisy, full, cut_windows(given, 32))
    for block in range(SIZES.n_layer):
        swapped = full.changed({key: m for key, m in noisy.matrices.items() if key.name.startswith(f"blk.{block}.")})
        expected = evaluate(swapped, full, given, length=32).total.divergence.mean
        assert found[block] == pytest.approx(expected, rel=1e-5)
    rows = (tuple(range(SIZES.n_expert)),) * 2
    without = divergence_by_block(
        full.with_blocks((0, 2)), full, cut_windows(given, 32), layer_map=LayerMap((0, 2), rows)
    )
    assert without[0] == without[2] == 0
    gone = full.with_blocks((0, 2))
    assert without[1] == pytest.approx(evaluate(gone, full, given, length=32).total.divergence.mean, rel=1e-5)
    with pytest.raises(UsageError, match="has 2 blocks, but held has 3, and"):
        divergence_by_block(gone, full, cut_windows(given, 32))


def test_descent(held: tuple[HeldModel, HeldModel]) -> None:
    layer = LayerPlan(block=2, experts=(), rows=(3, 1), target=(0, 1), types={})
    plan = CompressPlan("native", (replace(layer, block=0), layer), GGMLQuantizationType.F16, None, recipe="")
    assert planned_layer_map(plan) == LayerMap((0, 2), ((3, 1), (3, 1)))
    assert likely_layer_map(held[0].with_blocks((0, 1)), held[0]) is None


def comparison(divergence: list[float], owners: list[int]) -> Comparison:
    n = len(divergence)
    numbers: NDArray[np.int64] = np.arange(n)
    windows = Windows(Sequences(((0,) * n,)), ("a",) * (max(owners) + 1), numbers, numbers, np.array(owners))
    same = TokenScores(np.zeros(n, np.float32), np.zeros(n, np.int32), np.zeros(n, np.int32))
    return Comparison(windows, same, same, np.array(divergence, np.float32), (), (), n)


def test_one_window_says_nothing_of_the_error() -> None:
    assert summarise(comparison([0.1, 0.3], [0, 0])).total.divergence.error is None
    assert summarise(comparison([0.1, 0.3], [0, 1])).total.divergence.error == pytest.approx(0.1)


def read_by(probabilities: dict[str, float]) -> Comparison:
    """Two domains of 8 tokens, all different, each of which a reference gives a probability."""
    tokens = tuple(range(16)), tuple(range(16, 32))
    owners = np.repeat([0, 1], 8)
    rows = np.array([*range(8, 16), *range(24, 32)]) - 1
    targets = rows + 1
    windows = Windows(Sequences(tokens), tuple(probabilities), rows, targets, owners)
    logs = np.log(np.repeat([*probabilities.values()], 8)).astype(np.float32)
    scores = TokenScores(logs, np.zeros(16, np.int32), np.zeros(16, np.int32))
    divergence = np.repeat(np.array([0.5, 2.0], np.float32), 8)
    return Comparison(windows, scores, scores, divergence, (), (), 32)


def test_domains_that_the_reference_cannot_read_are_left_out_of_the_whole() -> None:
    """All 32 tokens occur once: without any context each has a probability of 1 in 32."""
    found = summarise(read_by({"prose": 1 / 31, "klingon": 1 / 33}))
    assert found.unread == ("klingon",)
    assert found.total.n_tokens == 8
    assert found.total.divergence.mean == 0.5
    assert found.domains["klingon"].divergence.mean == 2.0
    both = summarise(read_by({"prose": 1 / 2, "poems": 1 / 3}))
    assert (both.unread, both.total.n_tokens) == ((), 16)
    neither = summarise(read_by({"noise": 1 / 100, "more": 1 / 100}))
    assert (neither.unread, neither.total.n_tokens) == (("noise", "more"), 16)


def test_quantiles_are_over_tokens() -> None:
    values = [*np.linspace(0, 1, 1001).tolist()]
    found = summarise(comparison(values, [0] * 1001)).total.divergence
    quantiles = found.median, found.percentile_99, found.percentile_999, found.largest
    assert quantiles == pytest.approx((0.5, 0.99, 0.999, 1.0), abs=1e-6)
