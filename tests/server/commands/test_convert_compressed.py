"""`slimoe convert` and `slimoe plan` with a size, a recipe or methods: what is told and written, and every mistake."""

import importlib.util
import json
import os
import re
import shutil
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest

from slimoe.converter.recipe.fields import SourceSizes
from slimoe.converter.recipe.toml_file import parse_recipe
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.statistics_file import save_statistics
from slimoe.offload.errors import ModelFileError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.gguf.keys import RECIPE
from slimoe.server.cli import run
from slimoe.server.commands.convert import command as convert_command
from slimoe.server.commands.plan import command as plan_command
from slimoe.server.options.compress_options import CompressOptions
from slimoe.server.options.engine_options import DEMO
from tests.models.compress_plans import learnt
from tests.models.tiny_checkpoint import TinyConfig, save_checkpoint
from tests.models.tiny_gguf import FineShape, write_family

SIZES = TinyConfig(n_layer=3)
RECIPE_SIZES = SourceSizes(n_layer=3, n_expert=6, n_ff=96)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, sentencepiece_path: Path) -> Path:
    """3 layers of 6 experts, top 3."""
    return save_checkpoint(tmp_path_factory.mktemp("slim") / "tiny", sentencepiece_path, SIZES)


@pytest.fixture(scope="module")
def stats(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stats")
    path = directory / "tiny.stats"
    save_statistics(learnt(open_source(model), directory, n_sequences=4, length=16), path)
    return path


Arguments = list[str | Path]


def told(arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, output and error output, whose lines are joined as a terminal's width does not matter."""
    unreported = ["--no-report"] if arguments[0] == "convert" else []
    status = run([*map(str, arguments), *unreported, "--threads", "1"])
    captured = capsys.readouterr()
    return status, captured.out, " ".join(captured.err.split())


# --- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--stock"]], ids=["native", "stock"])
def test_a_size_is_planned_and_written(
    model: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    asked: Arguments = ["--target-size", "450KB", "--stats", stats, "--json", *flags]
    status, out, _ = told(["plan", model, *asked], capsys)
    planned = json.loads(out)
    target = tmp_path / "m.gguf"
    assert (status, told(["convert", model, target, *asked, "--dry-run"], capsys)[0]) == (0, 0)
    assert not any(tmp_path.iterdir())
    status, out, err = told(["convert", model, target, *asked], capsys)
    report = json.loads(out)
    assert status == 0
    assert planned["n_bytes"] == report["n_bytes"] == target.stat().st_size <= 450_000
    assert planned["layers"] == report["layers"]
    assert planned["expected_kl"] == report["expected_kl"] > 0
    assert report["expected_kl_lacks"] == []
    assert f"{target}: {report['n_bytes']:,} bytes will be written in about " in err
    assert report["loads_in"] == (["llama.cpp", "slimoe"] if flags else ["slimoe"])
    assert read_gguf(target).metadata["general.architecture"] == ("llama" if flags else "slimoe")


def test_long_feedback_has_a_quicker_way(
    model: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Arguments = ["convert", model, tmp_path / "m.gguf", "--type", "q8_0", "--stats", stats, "--dry-run"]
    monkeypatch.setattr("slimoe.server.jobs.compress.LONG_SECONDS", 0)
    assert "with --no-feedback it would be about" in told([*asked, "--feedback"], capsys)[2]
    assert "--no-feedback" not in told([*asked, "--refit"], capsys)[2]


def test_feedback_in_a_given_time(model: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "m.gguf"
    asked: Arguments = ["--type", "q8_0", "--stats", stats]
    status, _, err = told(["convert", *asked, "--feedback", "1h", model, target], capsys)
    assert status == 0
    assert re.search(
        r"Feedback takes \d+ s of that, for (\d+) of \1 matrices, with 100% of what types are expected", err
    )
    assert 'feedback = "3600s"' in str(read_gguf(target).metadata[RECIPE])
    status, _, err = told(["convert", *asked, "--feedback", "1ms", model, target, "--force"], capsys)
    assert status == 2
    assert "--feedback is 0.001 s, but following the layers" in err
    # Without a time it takes nothing of what follows.
    assert told(["convert", *asked, "--feedback", model, target, "--dry-run", "--force"], capsys)[0] == 0
    assert told(["plan", *asked, "--feedback", model], capsys)[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--feedback=soon"], "'soon' is no time"),
        (["--feedback=0s"], "'0s' is no time"),
        (["--feedback", "--no-feedback"], "--feedback and --no-feedback contradict each other"),
    ],
)
def test_wrong_times_of_feedback(
    model: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    status, _, err = told(["convert", model, tmp_path / "m.gguf", "--stats", stats, *flags], capsys)
    assert status == 2
    assert message in err


def test_bits_per_weight(model: Path, stats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = told(["plan", model, "--target-bpw", "8", "--stats", stats, "--json"], capsys)
    assert status == 0
    assert 7 < json.loads(out)["bits_per_weight"] <= 8


def test_the_plan_is_a_table_of_layers(model: Path, stats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: Arguments = ["plan", model, "--drop-blocks", "1", "--type", "q8_0", "--stats", stats]
    status, out, _ = told(asked, capsys)
    lines = out.splitlines()
    assert status == 0
    assert " ".join(lines[0].split()) == "layers attention q k v o experts gate, up down each layer"
    assert lines[1].split()[1:6] == ["Q8_0", "6", "of", "6", "Q8_0"]
    gone = {0, 1, 2} - {layer["block"] for layer in json.loads(told([*asked, "--json"], capsys)[1])["layers"]}
    assert f"layers left out whole: {gone.pop()}\n" in out
    assert "nats of KL per token" in out
    assert "native format: loads in slimoe" in out
    assert f"{json.loads(told([*asked, '--json'], capsys)[1])['n_bytes']:,} bytes" in out


def test_main_experts_are_told_written_and_shown(
    model: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "m.gguf"
    asked: Arguments = [model, "--main-experts", "1", "--type", "q8_0", "--stats", stats]
    status, out, err = told(["plan", *asked], capsys)
    assert status == 0, err
    assert "6 of 6, 1 of 3 used computed" in out
    assert "nats of KL per token" in out
    assert "and what" not in out, "it was tried"
    status, _, err = told(["convert", model, target, *asked[1:]], capsys)
    assert status == 0, err
    assert json.loads(told(["plan", *asked, "--json"], capsys)[1])["n_bytes"] == target.stat().st_size
    run(["inspect", str(target)])
    shown = capsys.readouterr().out
    assert "computed 1 of 3 selected" in shown
    assert "compressed experts" in shown
    status, _, err = told(["report", model, target, "--stats", stats, "--eval-tokens", "64"], capsys)
    assert status == 0, err
    report = json.loads((tmp_path / "m.gguf.report.json").read_text())
    assert report["quality"]["total"]["divergence"]["mean"] > 0
    assert [block["layer"] for block in report["blocks"]] == [0, 1, 2]
    status, _, err = told(["convert", target, tmp_path / "again.gguf", "--type", "q8_0"], capsys)
    assert status == 3
    assert "has compressed experts, fitted to the weights that it has. Convert the model that it was made of." in err
    status, _, err = told(["convert", target, tmp_path / "hf", "--hf", "--keep-experts", "4"], capsys)
    assert status == 3
    assert "Convert the model that it was made of." in err, "a GGUF file cannot be made of it either"
    status, _, err = told(["plan", *asked[:2], "3", *asked[3:]], capsys)
    assert status == 2
    assert "--main-experts is 3, but must be a number of experts from 1 to 2, fewer than a token selects." in err
    status, _, err = told(["plan", *asked, "--stock"], capsys)
    assert status == 2
    assert "--stock keeps to what llama.cpp loads, which cannot hold compressed experts (--main-experts)." in err


def test_the_plan_tells_dense_layers_and_shared_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = FineShape(n_layer=2, n_embd=128, n_ff=256, n_head=2, n_embd_head=64, n_expert=8, n_expert_used=2)
    source = write_family(tmp_path / "m.gguf", "glm4moe", shape=shape, words=("re", "in"))
    asked: Arguments = ["plan", source, "--drop-layers", "0", "--type", "q8_0", "--stock"]
    status, out, err = told(asked, capsys)
    assert status == 0, err
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "layers attention q k v o experts gate, up down dense or shared each layer"
    assert lines[1].startswith("0 Q8_0 none - - Q8_0 ")
    assert lines[2].startswith("1 Q8_0 8 of 8 Q8_0 Q8_0 Q8_0 ")
    dense, shared = (layer["dense_or_shared"] for layer in json.loads(told([*asked, "--json"], capsys)[1])["layers"])
    assert [*dense] == ["ffn_gate", "ffn_up", "ffn_down"]
    assert [*shared] == ["ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"]


def test_the_plan_names_the_matrices_of_latent_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = FineShape(n_layer=2, n_expert=8, n_expert_used=4)
    source = write_family(tmp_path / "m.gguf", "deepseek2", shape=shape, words=("re", "in"))
    asked: Arguments = ["plan", source, "--drop-layers", "0", "--type", "q8_0"]
    status, out, err = told(asked, capsys)
    assert status == 0, err
    assert out.startswith("layers  attention q_a q_b kv_a_mqa k_b v_b o  experts")
    assert [*json.loads(told([*asked, "--json"], capsys)[1])["layers"][0]["attention"]] == [
        *("attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_k_b", "attn_v_b", "attn_output")
    ]


def test_what_the_plan_keeps_is_in_the_file(
    model: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "m.gguf"
    flags = ["--keep-experts", "4", "--constants", "--score", "reap", "--drop-attention", "1", "--type", "q8_0"]
    status, out, _ = told(["convert", model, target, *flags, "--stats", stats, "--json"], capsys)
    report: dict[str, Any] = json.loads(out)
    assert status == 0
    assert [len(layer["experts"]) for layer in report["layers"]] == [4, 4, 4]
    assert [layer["n_constants"] for layer in report["layers"]] == [2, 2, 2]
    assert [layer["n_novices"] for layer in report["layers"]] == [2, 2, 2], "as the version before called them"
    assert report["expected_kl_lacks"] == []
    assert report["expected_kl"] > 0
    assert sum(layer["attention"] is None for layer in report["layers"]) == 1
    tensors = read_gguf(target).tensors
    for index, layer in enumerate(report["layers"]):
        own = [tensor for name, tensor in tensors.items() if name.startswith(f"blk.{index}.")]
        assert layer["n_bytes"] == sum(tensor.n_bytes for tensor in own)
        assert (f"blk.{index}.attn_q.weight" in tensors) == (layer["attention"] is not None)
    assert report["n_bytes"] == target.stat().st_size


# --- recipes -----------------------------------------------------------------------------------------------


def test_flags_override_a_recipe_and_the_file_says_so(
    model: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, target = tmp_path / "mine.toml", tmp_path / "m.gguf"
    recipe.write_text('drop_ffn = "34%"\n[experts]\nkeep = 4\nscore = "ean"\n[types]\nexpert = "Q8_0"\n')
    asked: Arguments = ["--recipe", recipe, "--keep-experts", "5", "--stats", stats]
    assert told(["convert", model, target, *asked], capsys)[0] == 0
    text = read_gguf(target).metadata[RECIPE]
    made = parse_recipe(text, RECIPE_SIZES)
    assert (made.name, made.drop_ffn, made.experts.keep, made.experts.score) == ("mine", 1, 5, "ean")
    again = tmp_path / "again.toml"
    again.write_text(text)
    assert told(["convert", model, target, "--recipe", again, "--stats", stats, "--force"], capsys)[0] == 0
    assert read_gguf(target).metadata[RECIPE] == text, "what is in the file can be asked for again"


def test_ready_recipes_on_another_model(model: Path, stats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Percentages fit any model; where 4 bits do not, --type does."""
    for name, kept in {"unified-layer-drop": [0, 6, 6], "unified-block-drop": [6, 6, 6]}.items():
        asked: Arguments = ["--recipe", name, "--type", "q8_0", "--stats", stats, "--json"]
        status, out, _ = told(["plan", model, *asked], capsys)
        assert status == 0
        assert sorted(len(layer["experts"]) for layer in json.loads(out)["layers"]) == kept


def test_sizes_of_ready_recipes_are_for_stock_too(model: Path, stats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: Arguments = ["--recipe", "8GiB", "--stats", stats, "--json", "--no-feedback", "--no-refit"]
    for flags, where in (([], ["slimoe"]), (["--stock"], ["llama.cpp", "slimoe"])):
        status, out, _ = told(["plan", model, *asked, *flags], capsys)
        report = json.loads(out)
        assert (status, report["loads_in"]) == (0, where)
        made = parse_recipe(report["recipe"], RECIPE_SIZES)
        assert made.free_constants == made.free_layers == (not flags)


def test_second_copies_need_no_statistics(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "pair.toml"
    recipe.write_text('[types]\nexpert = "Q8_0"\nlow = "Q4_0"\n')
    status, out, err = told(["plan", model, "--recipe", recipe], capsys)
    assert (status, err) == (0, "")
    assert "Q8_0+Q4_0" in out
    assert "expected loss unknown: there are no statistics" in out


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("convert", "plan"):
        assert run([name, "--list-recipes"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert {"8GiB", "24GiB", "mc", "hobbit", "unified-layer-drop"} <= {line.split()[0] for line in lines}


# --- flags and recipes, without a model --------------------------------------------------------------------


def test_one_budget_takes_the_place_of_the_other() -> None:
    merged = CompressOptions(tables={"target_bpw": 2.0}).merged({"target_size": "8GiB", "hints": False})
    assert merged == {"target_bpw": 2.0, "hints": False}
    both = {"target_bpw": 2.0, "target_size": 5}
    assert CompressOptions(tables=both).merged({}) == both


def test_constants_stand_in_for_what_is_dropped_or_may_be() -> None:
    assert CompressOptions(constants=True).merged({"experts": {"keep": 3}})["experts"] == {
        "keep": 3,
        "replacement": "constant",
    }
    assert CompressOptions(constants=True).merged({"target_size": 5}) == {"target_size": 5, "free_constants": True}


def test_a_recipe_is_not_changed_by_flags() -> None:
    recipe = {"experts": {"keep": 3}}
    CompressOptions(constants=True, tables={"experts": {"keep": 4}}).merged(recipe)
    assert recipe == {"experts": {"keep": 3}}


# --- mistakes ----------------------------------------------------------------------------------------------

CONTRADICTING: dict[str, tuple[list[str], str]] = {
    "two budgets": (["--target-size", "1MB", "--target-bpw", "3"], "--target-size and --target-bpw are two budgets"),
    "merge and constants": (
        ["--merge", "hc-smoe", "--keep-experts", "3", "--constants"],
        "--merge leaves no expert out, and --constants puts",
    ),
    "merge and free constants": (
        ["--merge", "hc-smoe", "--target-size", "1MB", "--constants"],
        "--constants puts constants in place of experts, which --merge merges",
    ),
    "merge alone": (
        ["--merge", "hc-smoe"],
        "--merge needs the number of experts to merge down to. Give --keep-",
    ),
    "merge and width": (["--merge", "hc-smoe", "--keep-experts", "3", "--width", "64"], "which --width cannot trim"),
    "constants alone": (["--constants"], "nothing says how many. Give --keep-experts, --target-size or --target-bpw."),
    "overall alone": (
        ["--overall"],
        "--overall ranks the experts to drop, and none is dropped. Give --keep-",
    ),
    "main experts and fewer": (["--main-experts", "1", "--keep-experts", "4"], "which --keep-experts changes."),
    "type and size": (["--type", "q8_0", "--target-size", "1MB"], "chooses types by itself"),
    "no type": (["--type", "q9", "--drop-layers", "1"], "--type is 'q9', but must be a type"),
    "pair and size": (
        ["--two-copies", "q8_0,q4_0", "--target-size", "1MB"],
        "chooses types by itself. Leave --two-copies out",
    ),
    "pair of one": (["--two-copies", "q8_0", "--drop-layers", "1"], "--two-copies is 'q8_0', but takes two types"),
    "pair upside down": (
        ["--two-copies", "q4_0,q8_0"],
        "--two-copies is the type of low-bit copies, which would be no smaller",
    ),
    "pair of mixes": (["--two-copies", "q8_0,q4_k_m"], "--two-copies is 'q4_k_m', but must be a type"),
    "stock and constants": (
        ["--stock", "--keep-experts", "4", "--constants"],
        "--stock keeps to what llama.cpp loads, which cannot hold constants in place of experts (--constants). Leave",
    ),
    "stock and free constants": (
        ["--stock", "--target-size", "1MB", "--constants"],
        "in place of experts (--constants)",
    ),
    "stock and layers": (["--stock", "--drop-layers", "1"], "cannot hold layers without experts (--drop-layers)"),
    "stock and attention": (["--stock", "--drop-attention", "1"], "layers without attention (--drop-attention)"),
    "stock and copies": (["--stock", "--recipe", "hobbit"], "hobbit: --stock keeps to what llama.cpp loads"),
    "stock and pair": (
        ["--stock", "--two-copies", "q8_0,q4_0"],
        "cannot hold low-bit copies of experts (--two-copies)",
    ),
    "stock and counts": (
        ["--stock", "--recipe", "unified-expert-drop"],
        "number of experts (experts.overall)",
    ),
    "unknown recipe": (["--recipe", "12GB"], "Did you mean 12GiB?"),
    "unknown score": (["--keep-experts", "3", "--score", "luck"], "--score is 'luck', but must be one of subset, freq"),
    "unknown merge": (["--keep-experts", "3", "--merge", "glue"], "--merge is 'glue', but must be one of m-smoe"),
    "too many": (["--keep-experts", "7"], "--keep-experts is 7, but must be a number of experts from 1 to 6"),
    "none": (["--keep-experts", "0%"], "--keep-experts is '0%', but must be a number of experts from 1 to 6"),
    "score alone": (["--score", "reap"], "Give --keep-experts"),
    "search alone": (["--search", "1"], "--search improves types that a target leaves open"),
    "no search": (["--search", "nan", "--target-size", "1MB"], "'nan' is no time"),
    "search in seconds": (["--search", "90s"], "--search improves types that a target leaves open"),
    "too wide": (["--width", "97"], "--width is 97, but must be a number of neurons from 1 to the 96 of the model's"),
    "no bits": (["--target-bpw", "nan"], "--target-bpw is nan, but must be a number of bits up to 64"),
    "many bits": (["--target-bpw", "1e300"], "--target-bpw is 1e+300, but must be a number of bits up to 64"),
    "too few merged": (["--keep-experts", "2", "--merge", "hc-smoe"], "a token selects 3"),
    "too few": (["--keep-experts", "2", "--score", "reap"], "Keep 3 to 6 of them"),
    "all layers": (["--drop-layers", "4"], "--drop-layers is 4, but must be a number of layers from 0 to 3"),
    "all attention": (["--drop-attention", "4"], "--drop-attention is 4, but must be a number of layers from 0 to 3"),
    "all blocks": (["--drop-blocks", "4"], "--drop-blocks is 4, but must be a number of layers from 0 to 3"),
    "no number": (["--drop-layers", "some"], "neither a number nor a percentage like 25%"),
    "no size": (["--target-size", "12Gigs"], "Write one like 12GiB"),
    "blocks": (["--width", "72", "--type", "q8_0"], "into blocks of 32, the smallest there are. Keep 64 or 96."),
}


@pytest.mark.parametrize("case", CONTRADICTING)
def test_contradictions_are_usage_errors(
    model: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    flags, message = CONTRADICTING[case]
    status, out, err = told(["convert", model, tmp_path / "m.gguf", "--stats", stats, *flags], capsys)
    assert (status, out) == (2, "")
    assert message in err
    assert not any(tmp_path.iterdir())


def test_unknown_keys(model: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("[experts]\nkepe = 3\n")
    commands: list[Arguments] = [["convert", model, tmp_path / "m.gguf"], ["plan", model]]
    for arguments in commands:
        status, _, err = told([*arguments, "--recipe", recipe, "--stats", stats], capsys)
        assert (status, err) == (2, f"slimoe: {recipe}: there is no key experts.kepe. Did you mean keep?")
    assert list(tmp_path.iterdir()) == [recipe]


def test_what_was_not_measured(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--target-size", "1MB"], ["--drop-layers", "1"], ["--recipe", "mc"], ["--refit"]):
        status, _, err = told(["convert", model, tmp_path / "m.gguf", *flags], capsys)
        assert status == 2
        assert f"slimoe calibrate {model} -o STATS" in err
    assert not any(tmp_path.iterdir())


def test_statistics_of_another_checkpoint(
    stats: Path, moe_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "m.gguf"
    status, _, err = told(["convert", moe_checkpoint, target, "--target-size", "1MB", "--stats", stats], capsys)
    assert status == 3
    assert f"these are statistics of another checkpoint than {moe_checkpoint}" in err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [[], ["--stock"], ["--constants"]], ids=str)
def test_a_size_that_no_plan_meets(
    model: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    target = tmp_path / "m.gguf"
    status, _, err = told(["convert", model, target, "--target-size", "20KB", "--stats", stats, *flags], capsys)
    assert status == 4
    assert "but the target allows 20,000" in err
    assert not any(tmp_path.iterdir())
    least = next(word for word in err.split() if word[0].isdigit()).replace(",", "")
    assert told(["plan", model, "--target-size", least, "--stats", stats, *flags], capsys)[0] == 0
    assert told(["plan", model, "--target-size", str(int(least) - 1), "--stats", stats, *flags], capsys)[0] == 4


def test_plan_of_a_checkpoint_asks_what_to_make_of_it(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = told(["plan", model], capsys)
    assert status == 2
    assert "is a checkpoint. Say what to make of it" in err
    status, _, err = told(["plan", model, "--recipe", "mc", "--ram", "8GiB"], capsys)
    assert (status, "--ram is for a model that is opened" in err) == (2, True)
    status, _, err = told(["plan", "--recipe", "mc"], capsys)
    assert (status, "Which model is to be compressed" in err) == (2, True)


def test_what_exists_is_not_overwritten(
    model: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "m.gguf"
    target.write_text("precious")
    status, _, err = told(["convert", model, target, "--drop-layers", "1", "--stats", stats], capsys)
    assert (status, "overwrite it with --force" in err) == (2, True)
    assert target.read_text() == "precious"


def test_the_source_is_not_overwritten(model: Path, stats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = model / "model.safetensors"
    before = weights.read_bytes()
    flags: Arguments = ["--force", "--drop-layers", "1", "--type", "q8_0", "--stats", stats]
    status, _, err = told(["convert", model, weights, *flags], capsys)
    assert (status, "is a file of the model that is read" in err) == (2, True)
    assert weights.read_bytes() == before


def test_the_statistics_are_not_overwritten(model: Path, stats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stats.read_bytes()
    status, _, err = told(["convert", model, stats, "--force", "--drop-layers", "1", "--stats", stats], capsys)
    assert (status, "holds the statistics that are read" in err) == (2, True)
    assert stats.read_bytes() == before


def test_a_model_without_experts_is_not_compressed(dense_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = told(["plan", dense_checkpoint, "--keep-experts", "2"], capsys)
    assert (status, "the model has no experts" in err) == (2, True)


def test_main_experts_of_models_that_select_none_or_one(
    dense_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sentencepiece_path: Path
) -> None:
    single = save_checkpoint(tmp_path / "single", sentencepiece_path, TinyConfig(n_layer=1, n_expert_used=1))
    for model, problem in ((dense_checkpoint, "the model has no experts"), (single, "a token selects one expert")):
        status, _, err = told(["plan", model, "--main-experts", "1"], capsys)
        assert (status, f"--main-experts is 1, but must be left out, as {problem}" in err) == (2, True), err


def test_a_directory_is_no_statistics(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = told(["plan", model, "--target-size", "1MB", "--stats", model], capsys)
    assert (status, "this is a directory" in err) == (3, True)


def test_an_interruption_leaves_nothing(
    model: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written, pwrite = [], os.pwrite

    def interrupted(*arguments: Any) -> int:
        written.append(arguments)
        if len(written) > 20:
            raise KeyboardInterrupt
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", interrupted)
    asked: Arguments = ["--target-size", "450KB", "--stats", stats, "--threads", "1"]
    status, out, err = told(["convert", model, tmp_path / "m.gguf", *asked], capsys)
    assert (status, out) == (130, "")
    assert "bytes will be written" in err
    assert "m.gguf was not written, and no part of it is left" in err
    # Of the two pieces that are under way for a thread, the other may have been begun.
    assert len(written) in {21, 22}
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_said_before_anything_is_written(
    model: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: types.SimpleNamespace(free=1000))
    asked: Arguments = ["--drop-layers", "1", "--type", "q8_0", "--stats", stats]
    status, _, err = told(["convert", model, tmp_path / "m.gguf", *asked], capsys)
    assert (status, "has only 1,000 free" in err) == (4, True)
    assert not any(tmp_path.iterdir())


def test_help_names_every_key_of_a_recipe_that_has_a_flag() -> None:
    flags = {flag for parameter in convert_command.params for flag in parameter.opts}
    asked = "--target-size --target-bpw --stats --recipe --list-recipes --stock --keep-experts --score --drop-layers"
    asked += " --drop-blocks --drop-attention --merge --constants --width --feedback --refit"
    assert set(asked.split()) <= flags


def test_the_recipe_in_a_plan_is_toml(model: Path, stats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = told(["plan", model, "--drop-layers", "34%", "--type", "q8_0", "--stats", stats, "--json"], capsys)[1]
    assert tomllib.loads(json.loads(out)["recipe"])["drop_ffn"] == 1


def test_what_must_be_installed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else name)
    status, _, err = told(["convert", model, tmp_path / "m.gguf", "--drop-layers", "1"], capsys)
    assert (status, err) == (
        2,
        "slimoe: Compressing needs torch. Install it: scripts/install convert, or pip install 'slimoe[convert]'",
    )


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "HERE"],
        ["plan", "HERE", "--keep-experts", "2"],
        ["plan", "HERE", "--hf", "--keep-experts", "2"],
        ["convert", "HERE", "to.gguf"],
        ["convert", "HERE", "to.gguf", "--keep-experts", "2"],
        ["convert", "HERE", "to", "--hf", "--keep-experts", "2"],
        ["calibrate", "HERE", "-o", "stats"],
        ["report", "HERE", "DEMO"],
        ["inspect", "HERE"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("lacks", [None, "torch"])
def test_what_is_no_checkpoint_is_told_before_what_must_be_installed(
    words: list[str],
    lacks: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "letters.txt").write_text("dear all")
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == lacks else find(name, *rest))
    places = {"HERE": str(tmp_path), "DEMO": str(DEMO)}
    assert run([places.get(word, word) for word in words]) == ModelFileError.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(
        f"slimoe: {tmp_path}: this directory is no checkpoint: it has no config.json"
    )
    assert "torch" not in err


def test_old_spellings_of_flags_are_understood() -> None:
    context = convert_command.make_context("convert", ["source", "target", "--pair", "Q4_K,Q2_K", "--novices"])
    assert (context.params["two_copies"], context.params["constants"]) == ("Q4_K,Q2_K", True)
    assert not {"--pair", "--novices"} & set(convert_command.get_help(context).split())
    assert plan_command.make_context("plan", ["model", "--novices"]).params["constants"]
