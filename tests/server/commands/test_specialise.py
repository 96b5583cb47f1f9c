"""`slimoe convert --specialise TEXT`: experts joined for a task, and texts and flags that do not go with it."""

import json
import random
import shutil
from pathlib import Path

import pytest
import transformers

from slimoe.converter.source.model_source import active_weights
from slimoe.converter.source.open_source import open_source
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.gguf.keys import CALIBRATION_TOKENS, RECIPE, SPECIALISED
from slimoe.offload.model.native_format import read_layout
from slimoe.offload.model.spec import ModelSpec
from slimoe.server.cli import run
from tests.models.tiny_checkpoint import TinyConfig, save_checkpoint

WORDS = ("river", "stone", "the", "of", "and", "light", "for", "in", "water", "a", "house", "is", "small", "good")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, sentencepiece_path: Path) -> Path:
    """2 layers of 6 experts, top 3."""
    return save_checkpoint(tmp_path_factory.mktemp("task") / "tiny", sentencepiece_path, TinyConfig(n_layer=2))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, path = random.Random(3), tmp_path_factory.mktemp("text") / "task.txt"
    path.write_text("\n".join(" ".join(rng.choices(WORDS, k=12)) for _ in range(300)), "utf-8")
    return path


def told(arguments: list[str | Path], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, output and error output, whose lines are joined as a terminal's width does not matter."""
    status = run([*map(str, arguments), "--no-report", "--threads", "1"])
    captured = capsys.readouterr()
    return status, captured.out, " ".join(captured.err.split())


@pytest.mark.parametrize(
    ("flags", "n_left"),
    [
        ([], 3),
        (["--keep-experts", "4"], 4),
        (["--stock"], 3),
        (["--type", "Q4_0", "--feedback", "1h"], 3),
    ],
    ids=str,
)
def test_half_of_the_experts_or_as_many_as_are_wanted_are_left(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], n_left: int
) -> None:
    target = tmp_path / "m.gguf"
    status, out, err = told(
        ["convert", model, target, "--type", "Q8_0", "--specialise", text, "--json", *flags], capsys
    )
    assert status == 0, err
    assert f"{text}: " in err
    assert "tokens to specialise on" in err
    gguf = read_gguf(target)
    if "--stock" in flags:
        assert gguf.metadata["llama.expert_count"] == n_left
        return
    layout = read_layout(gguf, ModelSpec.from_gguf(gguf))
    assert [len(layer.buckets) for layer in layout.layers] == [n_left] * 2
    for layer in json.loads(out)["layers"]:
        members = [member for expert in layer["experts"] for member in expert["members"]]
        assert sorted(members) == [*range(6)], "every expert is part of one"


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever measures the model on a text fails."""
    monkeypatch.setattr("slimoe.converter.stats.forward_pass.calibrate", forbidden)


@pytest.fixture
def nothing_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever chooses neurons of merged experts fails."""
    monkeypatch.setattr("slimoe.converter.budget.merging.with_joined_neurons", forbidden)


def forbidden(*_arguments: object, **_named: object) -> None:
    raise AssertionError("this takes minutes of a real model")


@pytest.mark.usefixtures("nothing_measured", "nothing_joined")
@pytest.mark.parametrize(
    ("flags", "status", "problem"),
    [
        (["--target-size", "20KB"], 4, "The smallest file that this can become has more than "),
        (["--keep-experts", "6"], 2, "merges none: layer 0 has 6. Keep 3 to 5 with --keep-experts."),
        (["--type", "Q4_K"], 3, "is no multiple of 256, as Q4_K in Q4_K needs."),
        (["--hf", "--hf-bits", "4"], 3, "which is no multiple of 128, as --hf-bits needs."),
        (["--type", "Q8_0", "--specialise", "other.txt"], 2, "a file is made for one text. Put several into one file."),
        (["--type", "Q8_0", "--main-experts", "1"], 2, "which --specialise changes. Leave one out."),
        (
            ["--type", "Q8_0", "--constants"],
            2,
            "--constants puts constants in place of experts, which --specialise merges",
        ),
        (
            ["--type", "Q8_0", "--score", "reap"],
            2,
            "--score ranks experts that are dropped, and --specialise merges them",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    status: int,
    problem: str,
) -> None:
    found, _, err = told(["convert", model, tmp_path / "m", "--specialise", text, *flags], capsys)
    assert (found, problem in err) == (status, True), err
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_measured")
def test_a_file_that_exists_is_refused_before_anything_is_measured(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "m.gguf"
    target.write_text("precious")
    status, _, err = told(["convert", model, target, "--type", "Q8_0", "--specialise", text], capsys)
    assert (status, "overwrite it with --force" in err) == (2, True)


@pytest.mark.usefixtures("nothing_joined")
def test_a_plan_that_would_wait_long_joins_nothing_and_has_the_files_size(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | Path] = ["--target-bpw", "9", "--specialise", text, "--json"]
    target = tmp_path / "m.gguf"
    with pytest.MonkeyPatch.context() as slow:
        slow.setattr("slimoe.converter.budget.merging.joining_seconds", lambda *_: 1000.0)
        status, out, err = told(["convert", model, target, *asked, "--dry-run"], capsys)
        assert status == 0, err
        assert "and what merged experts cost" in err
        assert "Choosing the neurons of merged experts takes about" in err
        assert run(["plan", str(model), *map(str, asked), "--threads", "1"]) == 0
        planned = json.loads(capsys.readouterr().out)
        assert planned["n_bytes"] == json.loads(out)["n_bytes"]
        assert planned["expected_kl_lacks"] == ["merged experts"]
        monkeypatch.undo()
        status, out, _ = told(["convert", model, target, *asked], capsys)
    made = json.loads(out)
    assert (status, target.stat().st_size) == (0, planned["n_bytes"])
    assert made["layers"] == planned["layers"]
    assert made["expected_kl_lacks"] == []
    assert made["expected_kl"] > planned["expected_kl"], "what merged experts lose is known when they are joined"


def test_a_plan_of_merged_experts_has_their_loss_and_weights(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str | Path] = ["--target-bpw", "9", "--specialise", text, "--json"]
    assert run(["plan", str(model), *map(str, asked), "--threads", "1"]) == 0
    planned, target = json.loads(capsys.readouterr().out), tmp_path / "m.gguf"
    status = run(["convert", str(model), str(target), *map(str, asked), "--threads", "1", "--eval-text", str(text)])
    made = json.loads(capsys.readouterr().out)
    assert (status, planned["expected_kl_lacks"]) == (0, [])
    assert planned["expected_kl"] == made["expected_kl"] == pytest.approx(made["quality"]["kl"], rel=0.5)
    assert planned["n_active_weights"] == active_weights(open_source(target))


def test_a_file_for_a_task_says_so(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = (tmp_path / name for name in ("first.gguf", "second.gguf", "third.gguf"))
    asked: list[str | Path] = ["--target-bpw", "9", "--specialise", text, "--keep-experts", "5", "--search", "1ms"]
    status = run(["convert", str(model), str(first), *map(str, asked), "--threads", "1", "--eval-tokens", "64"])
    assert (status, "Made for one task: what task.txt does not use is lost." in capsys.readouterr().err) == (0, True)
    metadata = read_gguf(first).metadata
    recipe = str(metadata[RECIPE])
    assert 'specialise = "task.txt"' in recipe, "its name, and not where it lies"
    assert 'search = "0.001s"' in recipe
    tasks = json.loads(str(metadata[SPECIALISED]))
    assert (list(tasks), tasks["task.txt"]["tokens"]) == (["task.txt"], metadata["slimoe.calibration.tokens"])
    assert "experts were merged by what they do on task.txt" in (tmp_path / "first.gguf.card.md").read_text()
    assert "experts were merged by what they do on task.txt" in (tmp_path / "first.gguf.report.md").read_text()
    assert run(["inspect", str(first)]) == 0
    assert "Made for one task: what task.txt does not use is lost." in capsys.readouterr().out
    # Once more for another task, and without one: what was lost stays lost.
    other = text.with_name("other.txt")
    other.write_bytes(text.read_bytes())
    status, _, err = told(["convert", first, second, "--type", "Q8_0", "--specialise", other], capsys)
    assert status == 0, err
    assert f"{first} was made for the task of task.txt already: what that does not use is lost in it." in err
    assert list(json.loads(str(read_gguf(second).metadata[SPECIALISED]))) == ["task.txt", "other.txt"]
    assert told(["convert", second, third, "--drop-layers", "0", "--type", "Q8_0"], capsys)[0] == 0
    assert list(json.loads(str(read_gguf(third).metadata[SPECIALISED]))) == ["task.txt", "other.txt"]


def test_a_text_too_short_is_refused_with_what_it_lacks(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the river of words " * 20, "utf-8")
    asked: list[str | Path] = ["convert", model, tmp_path / "m.gguf", "--type", "Q8_0", "--specialise", short]
    status, _, err = told(asked, capsys)
    assert status == 2
    assert "less than the least that a calibration needs. Give longer or more texts with --specialise." in err
    assert not (tmp_path / "m.gguf").exists()


def test_flags_that_do_not_go_with_it(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str | Path] = ["convert", model, tmp_path / "m.gguf", "--type", "Q8_0", "--specialise"]
    for flags, problem in (
        ([text, "--stats", tmp_path / "s.stats"], "--stats is of other texts"),
        ([text, "--width", "64"], "--specialise merges experts, which --width cannot trim as well"),
        ([text, "--keep-experts", "2"], "Merging down to 2 experts is not possible: a token selects 3"),
        ([tmp_path / "none.txt"], "none.txt: the text cannot be read"),
    ):
        status, _, err = told([*asked, *flags], capsys)
        assert status in (2, 3), flags
        assert problem in err


def test_a_model_without_experts_has_none_to_specialise(
    dense_checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = told(["convert", dense_checkpoint, tmp_path / "m.gguf", "--specialise", text], capsys)
    assert status != 0
    assert "the model has no experts to specialise. Convert it without --specialise." in err


def test_a_checkpoint_for_a_task_says_so_and_what_is_made_of_it_too(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, saved = (tmp_path / name for name in ("first", "second", "saved"))
    status, _, err = told(["convert", model, first, "--hf", "--specialise", text], capsys)
    assert status == 0, err
    assert run(["inspect", str(first)]) == 0
    assert "Made for one task: what task.txt does not use is lost." in capsys.readouterr().out
    # As who goes on training it would save it.
    transformers.AutoModelForCausalLM.from_pretrained(first).save_pretrained(saved)
    shutil.copy(first / "tokenizer.model", saved)
    shutil.copy(first / "tokenizer_config.json", saved)
    measured = json.loads(json.loads((saved / "config.json").read_text())["slimoe"][SPECIALISED])
    assert list(measured) == ["task.txt"]
    for source in (first, saved):
        target = tmp_path / f"{source.name}.gguf"
        status, _, err = told(["convert", source, target, "--type", "Q8_0"], capsys)
        assert status == 0, err
        metadata = read_gguf(target).metadata
        assert json.loads(str(metadata[SPECIALISED])) == measured
        assert metadata[CALIBRATION_TOKENS] == measured["task.txt"]["tokens"]
        assert RECIPE not in metadata or "specialise" not in str(metadata[RECIPE]), "its own recipe, not the source's"
    assert told(["convert", saved, second, "--hf", "--drop-blocks", "0"], capsys)[0] == 0
    config = json.loads((second / "config.json").read_text())
    assert json.loads(config["slimoe"][SPECIALISED]) == measured
    (second / "config.json").write_text(json.dumps(config | {"slimoe": [{}]}))
    assert run(["inspect", str(second)]) == 0, "what another program put there is of no account"
