"""`slimoe convert --heal`: what is told and written, how it goes on, and every mistake."""

import json
from pathlib import Path

import pytest

from slimoe.converter.report.make import report_paths
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.statistics_file import save_statistics
from slimoe.offload.files.whole_file import Destination
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.gguf.keys import HEALED, RECIPE
from slimoe.server.cli import run
from tests.models.compress_plans import learnt

Arguments = list[str | Path]


@pytest.fixture(scope="module")
def stats(moe_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stats")
    path = directory / "tiny.stats"
    save_statistics(learnt(open_source(moe_checkpoint), directory, n_sequences=4, length=16), path)
    return path


def told(arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, output, and error output as one line."""
    status = run([*map(str, arguments), "--threads", "1"])
    captured = capsys.readouterr()
    return status, captured.out, " ".join(captured.err.split())


def asked(source: Path, target: Path, stats: Path, *others: str) -> Arguments:
    return ["convert", source, target, "--type", "q4_0", "--stats", stats, "--main-experts", "1", *others]


def test_a_healed_file_says_so_in_its_header_and_its_report(
    moe_checkpoint: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "m.gguf"
    flags = ["--heal", "1500ms", "--eval-tokens", "64", "--json"]
    status, out, err = told(asked(moe_checkpoint, target, stats, *flags), capsys)
    assert status == 0, err
    fields = json.loads(out)
    assert "It will then be healed for 2 s and about" in err
    assert "layer by layer, then as a whole, on 48 tokens on cpu, in up to" in err
    healing, metadata = fields["healing"], read_gguf(target).metadata
    assert healing["n_tokens"] == 48
    assert json.loads(str(metadata[HEALED]))["kept"] is healing["is_kept"]
    assert 'heal = "1.5s"' in str(metadata[RECIPE])
    report = json.loads(report_paths(target)["json"].read_text())
    assert report["healing"]["kl_before"] == pytest.approx(healing["kl_before"], rel=1e-3)
    assert "on held-out calibration text" in report_paths(target)["markdown"].read_text()
    assert not Destination(target).left_bytes


def test_an_interrupted_healing_goes_on(
    moe_checkpoint: Path,
    stats: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "m.gguf"
    command = asked(moe_checkpoint, target, stats, "--heal", "200ms", "--no-report")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("slimoe.server.jobs.heal.write_healed", interrupted)
        status, _, err = told(command, capsys)
    assert status == 130
    assert "What is done lies in" in err
    assert not target.exists()
    left = tmp_path / "m.gguf.partial" / "unhealed.gguf"
    assert left.exists()
    status, _, err = told(command, capsys)
    assert status == 0, err
    assert f"{target}: {left.name}" not in err
    assert "bytes in" not in err, "the file is not written again"
    assert "healing layer by layer" not in err
    assert target.exists()
    assert not left.parent.exists()


def test_what_another_run_left_is_not_taken_up(
    moe_checkpoint: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, folder = tmp_path / "m.gguf", tmp_path / "m.gguf.partial"
    folder.mkdir()
    (folder / "lock").touch()
    (folder / "unhealed.gguf").write_bytes(b"another file")
    (folder / "heal.safetensors").write_bytes(b"another state")
    status, _, err = told(asked(moe_checkpoint, target, stats, "--heal", "200ms", "--no-report"), capsys)
    assert status == 0, err
    assert HEALED in read_gguf(target).metadata
    assert not folder.exists()


def test_a_recipe_asks_for_healing(
    moe_checkpoint: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, target = tmp_path / "mine.toml", tmp_path / "m.gguf"
    recipe.write_text('[types]\nexpert = "Q4_0"\n[fit]\nheal = "200ms"\n')
    command: Arguments = ["convert", moe_checkpoint, target, "--recipe", recipe, "--stats", stats, "--no-report"]
    status, _, err = told(command, capsys)
    assert status == 0, err
    assert HEALED in read_gguf(target).metadata
    recipe.write_text('[fit]\nheal = "soon"\n')
    status, _, err = told([*command, "--force"], capsys)
    assert status == 2
    assert "heal is 'soon', but must be a time such as" in err


@pytest.mark.parametrize("time", ["soon", "0", "-5m", "5 parsecs"])
def test_what_is_no_time_is_refused(
    moe_checkpoint: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], time: str
) -> None:
    status, _, err = told(asked(moe_checkpoint, tmp_path / "m.gguf", stats, "--heal", time), capsys)
    assert status == 2
    assert f"{time!r} is no time. Write one like 5m, 90s or 1h, or a number of minutes." in err


def test_mistakes(
    moe_checkpoint: Path,
    stats: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "m.gguf"
    status, _, err = told(["convert", moe_checkpoint, target, "--type", "q4_0", "--heal", "5"], capsys)
    assert status == 2
    assert "slimoe calibrate" in err
    status, _, err = told(["convert", moe_checkpoint, tmp_path / "new", "--hf", "--heal", "5"], capsys)
    assert status == 2
    assert "--heal is for GGUF files, and --hf writes a checkpoint." in err
    monkeypatch.setattr("slimoe.server.jobs.heal.memory_of", lambda _device: 1 << 20)
    status, _, err = told(asked(moe_checkpoint, target, stats, "--heal", "5", "--no-report"), capsys)
    assert status == 4
    assert "of memory, but 1.0 MiB are available. Free some memory" in err
    assert not target.exists()
    assert not (tmp_path / "m.gguf.partial").exists()
