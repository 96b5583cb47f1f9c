"""`slimoe convert --hf`: what is told and written, and every mistake."""

import json
from pathlib import Path

import pytest

from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.statistics_file import save_statistics
from slimoe.server.cli import run
from tests.models.compress_plans import learnt
from tests.models.tiny_checkpoint import TinyConfig, save_checkpoint

Arguments = list[str | Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, sentencepiece_path: Path) -> Path:
    """3 layers of 6 experts, top 3."""
    return save_checkpoint(tmp_path_factory.mktemp("hf") / "tiny", sentencepiece_path, TinyConfig(n_layer=3))


@pytest.fixture(scope="module")
def stats(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stats")
    path = directory / "tiny.stats"
    save_statistics(learnt(open_source(model), directory, n_sequences=4, length=16), path)
    return path


def told(arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, output and error output, whose lines are joined."""
    status = run([*map(str, arguments), "--threads", "1"])
    captured = capsys.readouterr()
    return status, captured.out, " ".join(captured.err.split())


def test_a_checkpoint_is_planned_and_written(
    model: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "smaller"
    asked: Arguments = ["--hf", "--keep-experts", "4", "--drop-blocks", "1", "--stats", stats, "--json"]
    status, out, err = told(["convert", model, target, *asked, "--dry-run"], capsys)
    planned = json.loads(out)
    assert (status, list(tmp_path.iterdir())) == (0, []), err
    assert "MixtralForCausalLM, 4 of 6 experts in a layer, 96 wide, 2 of 3 layers, 16 bits; expected loss" in err
    status, out, err = told(["convert", model, target, *asked], capsys)
    report = json.loads(out)
    assert (status, [one.name for one in tmp_path.iterdir()]) == (0, ["smaller"]), err
    assert planned | {"seconds": report["seconds"]} == report
    status, out, err = told(["plan", model, *asked], capsys)
    assert json.loads(out) | {"path": str(target), "seconds": report["seconds"]} == report
    status, out, err = told(["plan", model, *asked[:-1]], capsys)
    assert "MixtralForCausalLM, 4 of 6 experts in a layer, 96 wide, 2 of 3 layers, 16 bits; expected loss" in out
    assert f"{report['n_bytes']:,} bytes" in out
    first, last = (" ".join(str(one[0]) for one in layer["experts"]) for layer in report["layers"])
    assert [layer["block"] for layer in report["layers"]] in ([0, 1], [0, 2], [1, 2])
    lines, (_, block) = out.splitlines(), (layer["block"] for layer in report["layers"])
    assert lines[0].endswith(f": experts {first}")
    assert lines[1] == f"layer 1{'' if block == 1 else ', 2 of the source'}: experts {last}"
    assert report["n_bytes"] == (target / "model.safetensors").stat().st_size
    assert set(report["files"]) == {one.name for one in target.iterdir()}
    assert report["expected_kl"] > 0
    config = json.loads((target / "config.json").read_text())
    assert (config["num_local_experts"], config["num_hidden_layers"]) == (4, 2) == (report["n_expert"], 2)
    assert [len(layer["experts"]) for layer in report["layers"]] == [4, 4]
    status, _, err = told(["convert", model, target, *asked], capsys)
    assert (status, f"{target} exists, and no checkpoint is written over anything." in err) == (2, True)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--hf-bits", "4"], "--hf-bits is for checkpoints. Give --hf as well."),
        (["--hf", "--target-size", "1MB"], "--target-size is for GGUF files, and --hf writes a checkpoint."),
        (["--hf", "--type", "q8_0"], "--type is for GGUF files"),
        (["--hf", "--force"], "--force is for GGUF files"),
        (["--hf", "--recipe", "16GiB"], "16GiB: the recipe has a size, which types meet"),
        (["--hf", "--drop-layers", "1"], "layer 2 would be without experts, which no MixtralForCausalLM has."),
        (["--hf", "--keep-experts", "4", "--constants"], "would have constants in place of experts"),
        (
            ["--hf", "--main-experts", "2"],
            "would have vectors that stand for experts, which no MixtralForCausalLM has.",
        ),
        (["--hf", "--keep-experts", "2"], "Of 6 experts, 2 cannot be kept: a token selects 3."),
        (["--hf", "--keep-experts", "4", "--hf-bits", "8"], "would have rows of 64, which is no multiple of 128"),
    ],
)
def test_mistakes(
    model: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], problem: str
) -> None:
    status, out, err = told(["convert", model, tmp_path / "smaller", "--stats", stats, *flags], capsys)
    assert (status != 0, out, problem in err) == (True, "", True), err
    assert list(tmp_path.iterdir()) == []
    if "--force" not in flags:  # which the plan of nothing to be written does not have
        status, out, err = told(["plan", model, "--stats", stats, *flags], capsys)
        assert (status != 0, out, problem in err) == (True, "", True), err


def test_a_plan_of_a_checkpoint_opens_no_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, problem in (
        (["--hf", "--ctx", "64"], "--ctx is for a model that is opened, not for one that is to be made."),
        (["--hf"], ""),
    ):
        status, out, err = told(["plan", *([model] if problem else []), *flags], capsys)
        assert (status, out) == (2, ""), err
        assert (problem or "Which model is to be compressed?") in err


def test_types_of_a_recipe_are_left_out(
    model: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: Arguments = ["--hf", "--recipe", "unified-expert-drop", "--no-overall", "--stats", stats, "--dry-run"]
    status, _, err = told(["convert", model, tmp_path / "smaller", *asked], capsys)
    assert status == 0, err
    assert "unified-expert-drop: what the recipe says of types and of fitting them is for GGUF files" in err


def test_statistics_are_asked_for(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = told(["convert", model, tmp_path / "smaller", "--hf", "--keep-experts", "4"], capsys)
    assert status != 0
    assert "slimoe calibrate" in err
