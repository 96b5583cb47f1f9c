"""The seed's table: which file stands for a method, what is measured again, and what a picture has."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from bench.quality.lab import Lab
from bench.quality.seed_report import Table, markdown, picture
from bench.quality.seed_rows import Rows, measured, memory_bytes
from bench.quality.seed_table import Settings, file_of, main, measure
from bench.quality.seed_trials import F16, FITS_WHOLE, FOUR, METHODS, RecipeBytes, Refusal, Trial
from bench.quality.smoke_model import smoke_model
from slimoe.converter.recipe.recipe import ExpertRecipe, Recipe, StorageRecipe
from slimoe.converter.source.model_source import active_weights
from slimoe.converter.source.open_source import open_source
from slimoe.offload.errors import UsageError
from slimoe.offload.files.whole_file import BusyError, Destination


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    directory = tmp_path_factory.mktemp("lab")
    source, statistics, reference = smoke_model(directory / "checkpoint")
    return Lab(directory / "checkpoint", source, statistics, reference, directory, 1)


def row(method: str, n_bytes: int, kl: float) -> dict[str, object]:
    rise = {"prose": 0.01, "code": 0.25}
    figures = {"same_top": 0.9, "perplexity_rise": rise, "cloze": [0.5, 0.25], "memory": 2_000_000, "active": 3_000_000}
    return {"id": f"{method}: {n_bytes}", "method": method, "name": "x", "n_bytes": n_bytes, "kl": kl} | figures


ROWS = [row("slimoe", 100, 0.5), row("slimoe", 200, 0.7), row("slimoe", 300, 0.1), row("Layer Drop", 150, 2.0)]


def test_a_method_is_shown_by_its_best_file_within_the_size() -> None:
    refusals = [Refusal("Layer Drop", 250, FITS_WHOLE), Refusal("Layer Drop", 120, "the least is 15 %")]
    table = Table(ROWS, (120, 250, 300), 1000, refusals)
    assert [found and found["n_bytes"] for found in (table.best("slimoe", size) for size in (50, 250, 300))] == [
        None,
        100,
        300,
    ]
    assert [one["n_bytes"] for one in table.frontier("slimoe")] == [100, 300]
    overview = markdown(table).splitlines()
    assert overview[0] == "| method | 12 % | 25 % | 30 % |"
    assert "| Layer Drop | the least is 15 % | 4 bits alone fit | 2.00000 |" in overview
    assert "| 30 % | slimoe | x | 300 | 0.10000 | 90.0 % | +25.0 % | 25.0 % |  | 2.0 | 3.00 |" in overview


def test_the_picture_has_a_line_and_a_name_for_each_method() -> None:
    table = Table(ROWS, (300,), 1000)
    drawn = picture(table, "tiny")
    assert picture(table, "tiny") == drawn
    texts = {element.text for element in ElementTree.fromstring(drawn).iter() if element.tag.endswith("}text")}
    assert {"slimoe", "Layer Drop", "tiny"} <= texts
    assert "HC-SMoE" not in texts


def test_rows_are_kept_and_others_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = Rows.open(path, {"source": "a"})
    rows.add({"id": "one", "kl": 1.0})
    rows.add({"id": "two", "refused": "too small"})
    rows.add({"id": "one", "decode_vs_f16": 2.0})
    path.write_text(path.read_text("utf-8") + '{"id": "three", "kl"', "utf-8")
    again = Rows.open(path, {"source": "a"})
    assert again.by_id == {"one": {"id": "one", "kl": 1.0, "decode_vs_f16": 2.0}, "two": rows.by_id["two"]}
    again.add({"id": "three", "kl": 3.0})
    assert Rows.open(path, {"source": "a"}).by_id["three"]["kl"] == 3.0
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"rows\.jsonl has rows of another checkpoint"):
        Rows.open(path, {"source": "b"})
    assert path.read_bytes() == before


def test_what_is_measured_is_not_measured_again(lab: Lab, tmp_path: Path) -> None:
    rows, told = Rows.open(tmp_path / "rows.jsonl", {}), list[str]()
    settings = Settings((F16, "Layer Drop"), (20.0,), n_rounds=0)
    table = measure(lab, rows, settings, 0.0, told.append)
    assert told[0].startswith("to measure: 2 files of ")
    (dropped,) = [one for one in table.rows if one["method"] == "Layer Drop"]
    path = file_of(lab, Trial("Layer Drop", str(dropped["name"])))
    assert path.stat().st_size == dropped["n_bytes"] <= 0.2 * lab.bf16_bytes
    path.unlink()
    told.clear()
    again = measure(lab, Rows.open(tmp_path / "rows.jsonl", {}), settings, 0.0, told.append)
    assert (told, path.exists(), again.rows) == ([], False, table.rows)
    timed = measure(lab, rows, Settings((F16, "Layer Drop"), (20.0,), n_rounds=1), 0.0, told.append)
    assert [one["method"] for one in timed.rows if "decode_vs_f16" in one] == ["Layer Drop"]
    assert not path.exists()


def test_bytes_are_known_before_experts_are_joined(lab: Lab, tmp_path: Path) -> None:
    memory = []
    for experts in (ExpertRecipe(keep=3), ExpertRecipe(keep=3, merge="hc-smoe")):
        recipe = Recipe(experts=experts, types=FOUR, hints=False)
        lab.write(recipe, tmp_path / "m.gguf")
        n_bytes, expected = (tmp_path / "m.gguf").stat().st_size, RecipeBytes(lab).of(recipe)
        assert n_bytes <= expected < 1.05 * n_bytes
        memory.append(memory_bytes(tmp_path / "m.gguf"))
    # Merged experts lie in slots, dropped ones' neighbours do not: both have as many in memory.
    assert max(memory) < 1.1 * min(memory)
    assert RecipeBytes(lab).of(Recipe(experts=ExpertRecipe(keep=1), types=FOUR)) == float("inf")


def test_a_token_uses_fewer_weights_where_layers_are_gone_and_as_many_where_experts_are(
    lab: Lab, tmp_path: Path
) -> None:
    spec, path = lab.source.spec, tmp_path / "m.gguf"
    lab.write(Recipe(experts=ExpertRecipe(keep=2), hints=False), path)
    assert active_weights(open_source(path)) == active_weights(lab.source) - spec.n_layer * 2 * spec.n_embd
    lab.write(Recipe(drop_ffn=1, hints=False), path)
    experts = spec.n_expert_used * 3 * spec.n_embd * spec.n_ff
    router_and_norm = spec.n_expert * spec.n_embd + spec.n_embd
    assert active_weights(open_source(path)) == active_weights(lab.source) - experts - router_and_norm


def test_every_method_says_what_it_has_or_why_not(lab: Lab) -> None:
    sizes = [int(share * lab.bf16_bytes) for share in (0.05, 0.2, 0.5)]
    # Where calibration priced no types, Mixture Compressor's would be priced first, which takes long.
    for method, trials in METHODS.items() - {("Mixture Compressor", METHODS["Mixture Compressor"])}:
        found = list(trials(method, lab, sizes))
        assert found
        assert {one.method for one in found} == {method}
    reasons = {
        one.n_bytes: one.reason for one in METHODS["Block Drop"]("Block Drop", lab, sizes) if isinstance(one, Refusal)
    }
    assert reasons == {sizes[0]: reasons[sizes[0]], sizes[2]: FITS_WHOLE}
    assert reasons[sizes[0]].startswith("the least is ")


def test_a_command_without_texts_says_what_is_missing(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "at least one --text" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_second_run_on_a_folder_is_refused_at_once(tmp_path: Path) -> None:
    words = [f"--{name}" for name in ("checkpoint", "stats", "text")]
    words = [word for name in words for word in (name, str(tmp_path / "none"))]
    with Destination(tmp_path / "rows.jsonl", resumes=True):
        done = CliRunner().invoke(main, [*words, "--out", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (2, "")
    told = f"{tmp_path / 'rows.jsonl'} is being written by another run. Wait for its end, or choose another name."
    assert "".join(done.stderr.split()) == "".join(told.split())  # lines end where the terminal does


def test_a_file_that_another_run_has_is_no_refusal_of_its_recipe(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    types = StorageRecipe(expert="Q8_0", attention="Q8_0", token="Q8_0", output="Q8_0")
    with Destination(path), pytest.raises(BusyError):
        measured(lab, Trial("one type", "Q8_0", Recipe(types=types)), path)


def test_the_row_of_a_recipe_that_is_refused_says_why(lab: Lab, tmp_path: Path) -> None:
    few = StorageRecipe(candidates=("Q4_0", "Q8_0"))
    found = measured(lab, Trial("slimoe", "at 1 %", Recipe(target_size=1000, types=few)), tmp_path / "m.gguf")
    assert "1,000" in found["refused"] or "1000" in found["refused"]
    rows = Rows.open(tmp_path / "rows.jsonl", {})
    rows.add(found)
    assert rows.lacking([Trial("slimoe", "at 1 %"), Trial("slimoe", "at 2 %")], "kl") == [Trial("slimoe", "at 2 %")]
