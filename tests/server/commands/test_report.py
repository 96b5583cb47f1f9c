"""`slimoe convert` with its report, and `slimoe report` of any file."""

import json
from pathlib import Path
from typing import Any

import pytest

from slimoe.converter.report.generation_check import greedy
from slimoe.converter.report.make import report_paths
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.statistics_file import save_statistics
from slimoe.offload.gguf import keys
from slimoe.offload.gguf.header import read_gguf
from slimoe.server.cli import run
from slimoe.server.jobs import evaluate
from tests.models.compress_plans import learnt


@pytest.fixture(scope="module")
def stats(moe_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stats")
    save_statistics(learnt(open_source(moe_checkpoint), directory, n_sequences=4, length=16), directory / "tiny.stats")
    return directory / "tiny.stats"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "fox.txt"
    path.write_text("the quick brown fox jumps over a lazy dog while hello world naïve café\n" * 20)
    return path


def convert(model: Path, target: Path, stats: Path, *more: str | Path) -> int:
    flags = ["--target-size", "300KB", "--stats", stats, "--threads", "1", "--json", *more]
    return run(["convert", *map(str, [model, target, *flags])])


def test_a_compressed_file_comes_with_its_report(
    moe_checkpoint: Path, stats: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "m.gguf"
    assert convert(moe_checkpoint, target, stats, "--eval-text", f"animals={text}", "--eval-tokens", "256") == 0
    captured = capsys.readouterr()
    told, report = json.loads(captured.out), json.loads(report_paths(target)["json"].read_text())
    assert told["quality"]["kl"] == report["quality"]["total"]["divergence"]["mean"] > 0
    assert told["quality"]["markdown"] == str(report_paths(target)["markdown"])
    assert list(report["quality"]["domains"]) == ["animals"]
    assert report["expected_kl"] == told["expected_kl"] > 0
    assert report["expected_lacks"] == told["expected_kl_lacks"] == []
    assert report["file"]["n_bytes"] == target.stat().st_size <= 300_000
    assert report["writing"]["n_texts"] == 2
    assert report["evaluated_on"]["n_tokens"] == 256
    assert not report["evaluated_on"]["is_own"]
    assert keys.QUALITY in read_gguf(target).metadata
    assert "evaluating it on 256 tokens: about" in captured.err
    assert "nats per token" in captured.err


def test_a_report_is_replaced_on_demand_and_keeps_what_converting_knew(
    moe_checkpoint: Path, stats: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "m.gguf"
    eval_flags: list[str | Path] = ["--eval-text", text, "--eval-tokens", "400"]
    assert convert(moe_checkpoint, target, stats, "--drop-layers", "1", *eval_flags, "--constants") == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("m.gguf*") if path.is_file()}
    first = json.loads(report_paths(target)["json"].read_text())
    again = ["report", *map(str, [moe_checkpoint, target, "--eval-text", text, "--eval-tokens", "100"])]
    capsys.readouterr()
    assert run(again) == 2
    assert "m.gguf.report.json exists. --force replaces the report" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("m.gguf*") if path.is_file()} == before
    assert run([*again, "--force"]) == 0
    second = json.loads(report_paths(target)["json"].read_text())
    kept = ("expected_kl", "expected_lacks", "blocks", "coverage")
    assert {key: second[key] for key in kept} == {key: first[key] for key in kept}
    assert second["provenance"] == first["provenance"]
    assert len(second["block_kl"]) == len(first["block_kl"])
    assert second["evaluated_on"]["n_tokens"] < first["evaluated_on"]["n_tokens"]


def test_converting_replaces_no_report_of_another_file(
    moe_checkpoint: Path, stats: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "m.gguf"
    card = report_paths(target)["card"]
    card.write_text("mine")
    assert convert(moe_checkpoint, target, stats, "--eval-text", text) == 2
    assert f"{card} exists. Choose another name, or overwrite it with --force." in capsys.readouterr().err
    assert (card.read_text(), target.exists()) == ("mine", False)


def test_every_report_has_a_yardstick(
    moe_checkpoint: Path, stats: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "m.gguf"
    size = ["--target-size", "450KB"]
    assert convert(moe_checkpoint, target, stats, *size, "--eval-text", text, "--eval-tokens", "200") == 0
    captured, paths = capsys.readouterr(), report_paths(target)
    told, report = json.loads(captured.out)["quality"], json.loads(paths["json"].read_text())
    below, above = report["yardstick"]["models"]
    assert below["n_bytes"] <= target.stat().st_size < above["n_bytes"]
    assert below["measured_kl"] >= told["plain_kl"] == report["yardstick"]["kl"] >= above["measured_kl"]
    assert told["kl_999"] == report["quality"]["total"]["divergence"]["percentile_999"]
    assert "Its evaluation will then take about" in captured.err
    # The model is random, so that it reads nothing.
    assert told["unread"] == ["fox"]
    assert "fox (unread)" in paths["markdown"].read_text()
    assert "The source cannot read any of the texts" in captured.err
    for shown in (captured.err, paths["markdown"].read_text(), paths["card"].read_text()):
        assert "Plain types of the whole model at as many bytes, measured alike: KL" in " ".join(shown.split())
    for name in ("markdown", "card"):
        assert f"{told['kl_999']:.4f}" in paths[name].read_text()
        assert f"{told['plain_kl']:.4f}, measured" in paths[name].read_text()


def test_what_an_engine_writes_is_what_the_weights_say(moe_checkpoint: Path, tmp_path: Path) -> None:
    source, target = open_source(moe_checkpoint), tmp_path / "plain.gguf"
    assert run(["convert", str(moe_checkpoint), str(target), "--type", "F32"]) == 0
    prompts = [[1, 300, 301, 302], [1, 70, 80]]
    written = greedy(source, ())(prompts, 6)
    assert written == evaluate.engine_writer(target, 128, (), 1)(prompts, 6)
    # What would be the third token ends the first text.
    end = {written[0][2]}
    assert evaluate.engine_writer(target, 128, end, 1)(prompts[:1], 6) == greedy(source, end)(prompts[:1], 6)


def test_any_file_is_evaluated(
    moe_checkpoint: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "plain.gguf"
    assert run(["convert", str(moe_checkpoint), str(target), "--type", "F32"]) == 0
    before = target.read_bytes()
    arguments = [moe_checkpoint, target, "--eval-text", text, "--eval-tokens", "200", "--threads", "1", "--json"]
    assert run(["report", *map(str, arguments)]) == 0
    report = json.loads(report_paths(target)["json"].read_text())
    assert json.loads(capsys.readouterr().out)["kl"] == pytest.approx(0, abs=1e-6)
    assert report["writing"]["n_texts"] == report["source_writing"]["n_texts"] == 1
    assert report["file"]["loads_in"] == ["llama.cpp", "slimoe"]
    assert report["expected_kl"] is None
    assert target.read_bytes() == before


def test_texts_are_looked_at_before_the_work(
    moe_checkpoint: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "m.gguf"
    assert convert(moe_checkpoint, target, stats, "--eval-text", tmp_path / "absent.txt") == 3
    assert "there is no file" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("")
    assert convert(moe_checkpoint, target, stats, "--eval-text", tmp_path / "empty.txt") == 2
    assert "The text empty has only 1 tokens" in capsys.readouterr().err
    assert run(["convert", str(moe_checkpoint), str(target), "--eval-text", str(tmp_path / "empty.txt")]) == 2
    assert "slimoe report evaluates any file" in capsys.readouterr().err
    assert not target.exists()


def test_a_report_can_be_left_out(moe_checkpoint: Path, stats: Path, tmp_path: Path) -> None:
    assert convert(moe_checkpoint, tmp_path / "m.gguf", stats, "--no-report") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_an_interrupted_report_leaves_the_file(
    moe_checkpoint: Path,
    stats: Path,
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_values: Any, record: bool, on_progress: Any, destination: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "write_report", interrupted)
    target = tmp_path / "m.gguf"
    assert convert(moe_checkpoint, target, stats, "--eval-text", text) == 130
    assert "is whole, but has no report" in capsys.readouterr().err
    assert target.stat().st_size > 200_000
    assert {path.name for path in tmp_path.iterdir()} == {"m.gguf", "fox.txt"}


def test_a_file_of_another_model(
    moe_checkpoint: Path,
    k_quant_checkpoint: Path,
    tmp_path: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "other.gguf"
    assert run(["convert", str(k_quant_checkpoint), str(target), "--type", "Q8_0"]) == 0
    assert run(["report", str(moe_checkpoint), str(target), "--eval-text", str(text), "--eval-tokens", "64"]) == 2
    assert "was not made of" in capsys.readouterr().err
    assert not report_paths(target)["json"].exists()
