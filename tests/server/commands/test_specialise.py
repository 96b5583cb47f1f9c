"""`slimoe convert --specialise TEXT`: experts joined for a task, and texts and flags that do not go with it."""

import json
import random
from pathlib import Path

import pytest

from slimoe.offload.gguf.header import read_gguf
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


def test_a_text_too_short_is_refused_with_what_it_lacks(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the river of words " * 20, "utf-8")
    status, _, err = told(["convert", model, tmp_path / "m.gguf", "--specialise", short], capsys)
    assert status == 2
    assert "less than the least that a calibration needs. Give longer or more texts with --specialise." in err
    assert not (tmp_path / "m.gguf").exists()


def test_flags_that_do_not_go_with_it(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str | Path] = ["convert", model, tmp_path / "m.gguf", "--specialise", text]
    for flags, problem in (
        (["--stats", str(tmp_path / "s.stats")], "--stats is of other texts"),
        (["--width", "64"], "--specialise merges experts, which --width cannot trim as well"),
        (["--keep-experts", "2"], "Merging down to 2 experts is not possible: a token selects 3"),
        (["--specialise", str(tmp_path / "none.txt")], "none.txt: the text cannot be read"),
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
