"""Every lossy mode of the page's table, opened on files that the page's own commands make."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.statistics_file import save_statistics
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.lossy.modes import LOSSY
from slimoe.server.cli import run
from tests.models.compress_plans import few_prices
from tests.models.tiny_checkpoint import TinyConfig, save_checkpoint

PAGE = (Path(__file__).parents[3] / "docs" / "lossy.md").read_text("utf-8")
COMMANDS = {
    Path(match[1]).stem: (match[2].strip(), match[3].split())
    for match in re.finditer(r"^slimoe convert SRC (\S+)([^#]*)# (.*)$", PAGE, re.MULTILINE)
}
FLAGS = {
    "low": [["--lossy", "low"]],
    "gate": [["--lossy", "gate"], ["--lossy", "gate:0.6"], ["--lossy", "gate:0.6,0.9"]],
    "skip": [["--lossy", "skip"], ["--lossy", "skip:0.2"]],
    "skip:R": [["--lossy", "skip:0.2"]],
    "constant": [["--lossy", "constant"], ["--lossy", "constant:0.3"]],
    "adap": [["--lossy", "adap:0.005"]],
    "rule": [["--lossy", "rule:100"], ["--lossy", "rule:0"], ["--lossy", "rule:inf"]],
    "elastic": [["--lossy", "elastic"], ["--lossy", "elastic:0.5"]],
    "--max-kl": [["--max-kl", "0.002"], ["--max-kl", "0.002", "--lossy", "rule"]],
}
LIMITED_COPIES = [["--max-kl", "10", "--lossy", name] for name in ("gate", "elastic")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, sentencepiece_path: Path) -> Path:
    """2 layers of 4 experts, whose rows fit every type."""
    sizes = TinyConfig(n_layer=2, n_embd=256, n_ff=256, n_head=8, n_head_kv=4, n_expert=4, n_expert_used=2)
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny", sentencepiece_path, sizes)


@pytest.fixture(scope="module")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file by each of the commands, of a model with rows for every type."""
    directory = tmp_path_factory.mktemp("lossy")
    stats = directory / "tiny.stats"
    save_statistics(few_prices(open_source(model), directory), stats)
    made = {}
    for name, (flags, _) in COMMANDS.items():
        made[name] = directory / f"{name}.gguf"
        words = [str(stats) if word == "STATS" else word for word in shlex.split(flags)]
        unreported = ["--no-report"] if "--stats" in words else []
        assert run(["convert", str(model), str(made[name]), *words, *unreported, "--threads", "1"]) == 0
    return made


def test_the_commands_lead_to_every_mode() -> None:
    told = set(re.findall(r"^\| `(\w+)", PAGE, re.MULTILINE))
    assert told == set(LOSSY)
    assert {mode.partition(":")[0] for _, modes in COMMANDS.values() for mode in modes} == told | {"--max-kl"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mode_opens_what_was_made_for_it(
    files: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    modes = COMMANDS[name][1]
    for flags in [one for mode in modes for one in FLAGS[mode]] + (LIMITED_COPIES if "elastic" in modes else []):
        if "--stats" not in COMMANDS[name][0] and "--max-kl" in flags:
            continue
        status = run(["run", str(files[name]), "-p", "a", "-n", "2", "--ctx", "64", "--threads", "1", *flags])
        assert (status, flags) == (0, flags), capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_other_modes_say_which_command_makes_a_file_for_them(
    files: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = FLAGS.keys() - {"skip:R"} - set(COMMANDS[name][1])
    assert missing
    for flags in (FLAGS[mode][0] for mode in missing):
        status = run(["run", str(files[name]), "-p", "a", "-n", "2", "--ctx", "64", "--threads", "1", *flags])
        err = capsys.readouterr().err
        assert (status, "slimoe convert SRC DST" in err, err.count("\n")) == (2, True, 1), (flags, err)


def test_fallbacks_stand_behind_the_constants_of_experts_that_are_gone(
    model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    stats, target = files["one"].with_name("tiny.stats"), tmp_path / "m.gguf"
    flags = ["--stats", str(stats), "--keep-experts", "3", "--constants", "--type", "Q8_0", "--no-report"]
    assert run(["convert", str(model), str(target), *flags]) == 0
    metadata, tensors = read_gguf(target).metadata, read_gguf(target).tensors
    target_of_rows, fallbacks = (np.asarray(metadata[f"slimoe.expert.{key}"]) for key in ("target", "fallback"))
    assert target_of_rows.min() == -1
    assert fallbacks.tolist() == [1, 2, 3] * 2
    assert [tensor.ne[1] for name, tensor in tensors.items() if "ffn_novice" in name] == [4, 4]
