"""Healing: a damaged file says more of what its source says, goes on after an interruption, and is never worse."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.converter.budget.compress import plan_compression
from slimoe.converter.heal.cost import heal_cost
from slimoe.converter.heal.heal import Divergences, HealReport, heal, write_healed
from slimoe.converter.heal.lesson import HealSettings, HealTexts, heal_texts
from slimoe.converter.heal.trained import trained_keys
from slimoe.converter.recipe.recipe import ExpertRecipe, Recipe, StorageRecipe
from slimoe.converter.report.evaluation import evaluate
from slimoe.converter.source.gguf_source import gguf_source
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.write.writer import write_planned
from slimoe.offload.errors import DoesNotFitError, ModelFileError, UsageError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.gguf.keys import HEALED
from tests.models.compress_plans import learnt, random_sequences

WHOLE = StorageRecipe("Q4_0", attention="Q4_0", token="Q8_0", output="Q8_0")


class Ticks:
    """A clock that goes on by a second each time it is asked; `stop` interrupts when so many have passed."""

    def __init__(self, stop: float = math.inf) -> None:
        self.now, self.stop = 0.0, stop

    def __call__(self) -> float:
        self.now += 1
        if self.now > self.stop:
            raise KeyboardInterrupt
        return self.now


def settings(seconds: float, stop: float = math.inf) -> HealSettings:
    return HealSettings(seconds, clock=Ticks(stop))


@pytest.fixture(scope="module")
def texts(source: ModelSource) -> HealTexts:
    sequences = random_sequences(8, 24, source.spec.n_vocab)
    return heal_texts(sequences, random_sequences(1, 24, source.spec.n_vocab, seed=9))


@pytest.fixture(scope="module")
def damaged(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the source with compressed experts, in 4 bits."""
    directory = tmp_path_factory.mktemp("damaged")
    statistics = learnt(source, directory, n_sequences=4, length=16)
    plan = plan_compression(source, statistics, Recipe(experts=ExpertRecipe(main=1), types=WHOLE))
    write_planned(source, plan, directory / "m.gguf", statistics)
    return directory / "m.gguf"


def copied(file: Path, directory: Path) -> Path:
    target = directory / "m.gguf"
    target.write_bytes(file.read_bytes())
    return target


@pytest.fixture(scope="module")
def healed(source: ModelSource, damaged: Path, texts: HealTexts) -> HealReport:
    return heal(source, damaged, texts, settings(60))


def test_a_healed_file_is_nearer_to_its_source(
    source: ModelSource, damaged: Path, texts: HealTexts, healed: HealReport, tmp_path: Path
) -> None:
    file = copied(damaged, tmp_path)
    write_healed(file, healed)
    assert healed.is_kept
    assert healed.is_whole
    assert healed.after.held < 0.97 * healed.before.held
    held = {str(n): one for n, one in enumerate(texts.held)}
    before, after = (evaluate(gguf_source(one), source, held).total.divergence.mean for one in (damaged, file))
    assert after < before
    told = json.loads(str(read_gguf(file).metadata[HEALED]))
    assert told["kl"] == pytest.approx([healed.before.held, healed.after.held], rel=1e-3)
    assert "layer by layer and as a whole: KL 0." in healed.text


def test_only_small_tensors_change_and_nothing_moves(damaged: Path, healed: HealReport, tmp_path: Path) -> None:
    file = copied(damaged, tmp_path)
    write_healed(file, healed)
    before, after = read_gguf(damaged), read_gguf(file)
    assert file.stat().st_size == damaged.stat().st_size
    assert before.tensors == after.tensors
    changed = set()
    for name, tensor in after.tensors.items():
        span = slice(tensor.offset, tensor.offset + tensor.n_bytes)
        if file.read_bytes()[span] != damaged.read_bytes()[span]:
            changed.add(name)
            assert tensor.type is Type.F32
    roles = {name.split(".")[-2] for name in changed}
    assert roles == {"attn_norm", "ffn_norm", "ffn_gate_inp", "ffn_aux_gain", "ffn_aux_shift", "output_norm"}


def test_what_is_trained_leaves_out_what_gets_no_gradient(damaged: Path) -> None:
    model = gguf_source(damaged)
    names = {key.name for key in trained_keys(model)}
    assert "blk.0.ffn_gate_inp.weight" in names
    assert not any("attn_q.weight" in name or "exps" in name or name.startswith("token") for name in names)


def test_an_interrupted_run_goes_on(source: ModelSource, damaged: Path, texts: HealTexts, tmp_path: Path) -> None:
    """Whether it stops in the first phase or in the second, and what is saved is of the same run only."""
    for stop, phase in ((17, "layers"), (50, "whole")):
        folder = tmp_path / phase
        folder.mkdir()
        with pytest.raises(KeyboardInterrupt):
            heal(source, damaged, texts, settings(60, stop), folder=folder)
        saved = (folder / "heal.safetensors").read_bytes()
        clock = Ticks()
        again = heal(source, damaged, texts, HealSettings(60, clock=clock), folder=folder)
        assert again.is_kept
        fresh = Ticks()
        heal(source, damaged, texts, HealSettings(60, clock=fresh))
        assert clock.now < fresh.now, "no second phase or layer is trained again"
        (folder / "heal.safetensors").write_bytes(saved)
        other = Ticks()
        heal(source, damaged, texts, HealSettings(40, clock=other), folder=folder)
        assert other.now > 40, "the state of another run is of no use"


def test_a_file_that_healing_would_make_worse_stays(
    source: ModelSource, damaged: Path, texts: HealTexts, tmp_path: Path
) -> None:
    """A file in F32 has nothing to gain."""
    plan = plan_compression(
        source, None, Recipe(types=StorageRecipe("F32", attention="F32", token="F32", output="F32"))
    )
    file = tmp_path / "same.gguf"
    write_planned(source, plan, file)
    before = file.read_bytes()
    report = heal(source, file, texts, settings(20))
    assert not report.is_kept
    assert "Healing is undone, as it did not help: KL" in report.text
    write_healed(file, report)
    tensors = read_gguf(file).tensors
    begin = min(tensor.offset for tensor in tensors.values())
    assert file.read_bytes()[begin:] == before[begin:]
    assert json.loads(str(read_gguf(file).metadata[HEALED]))["kept"] is False


def test_less_memory_heals_layers_alone_and_too_little_is_refused(
    source: ModelSource, damaged: Path, texts: HealTexts
) -> None:
    model = gguf_source(damaged)
    sizes = [(key.name, math.prod(shape)) for key, shape in model.shapes.items()]
    cost = heal_cost(source, model.spec, sizes, texts)
    assert cost.layer_bytes < cost.whole_bytes
    report = heal(source, damaged, texts, replace(settings(60), memory=cost.layer_bytes))
    assert not report.is_whole
    assert report.after.held < report.before.held
    with pytest.raises(DoesNotFitError, match=r"Healing needs .* of memory, but .* Free some memory") as caught:
        heal(source, damaged, texts, replace(settings(60), memory=cost.layer_bytes - 1))
    assert caught.value.required_bytes == cost.layer_bytes


def test_bad_input(source: ModelSource, damaged: Path, texts: HealTexts, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Healing holds text out, and the calibration has one sequence only"):
        heal_texts(((1, 2, 3),))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(damaged.read_bytes()[:3000])
    with pytest.raises(ModelFileError):
        heal(source, broken, texts, settings(5))
    with pytest.raises(ModelFileError):
        heal(source, tmp_path / "absent.gguf", texts, settings(5))


def test_less_is_more_than_chance_and_nowhere_worse() -> None:
    before = Divergences(np.array([0.5, 0.7, 0.6]), np.array([0.4]))
    assert Divergences(before.held_each - [0.1, 0.2, 0.1], np.array([0.4])).is_below(before)
    assert not Divergences(before.held_each - [0.3, -0.2, 0.1], np.array([0.4])).is_below(before), "by chance"
    assert not Divergences(before.held_each - 0.1, np.array([0.41])).is_below(before), "worse on the other texts"
    assert not before.is_below(before)


def test_texts_are_split() -> None:
    sequences = tuple((n, n) for n in range(16))
    found = heal_texts(sequences)
    assert found.held == ((7, 7), (15, 15))
    assert len(found.train) == 14
    few = heal_texts(sequences[:2])
    assert (few.train, few.held) == (sequences[:1], sequences[1:2])
    assert np.isclose(found.n_train, 28)
