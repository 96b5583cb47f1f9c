"""Recipes in TOML: read back equal, percentages of the model, mistakes by name, contradictions, the shipped ones."""

import random
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest

from slimoe.converter.methods.scores import SCORES
from slimoe.converter.recipe.check import check_recipe, needs_statistics
from slimoe.converter.recipe.fields import SECTIONS, TOP, SourceSizes
from slimoe.converter.recipe.recipe import ExpertRecipe, FitRecipe, Merge, Recipe, StorageRecipe
from slimoe.converter.recipe.toml_file import make_recipe, parse_recipe, ready_recipes, recipe_tables, recipe_text
from slimoe.converter.recipe.words import Words
from slimoe.offload.errors import UsageError

SIZES = SourceSizes(n_layer=32, n_expert=8, n_ff=14336)
EVERYTHING = Recipe(
    name='a "name" with \\ and naïve 日本語 🙂',
    format="native",
    target_size=12 << 30,
    experts=ExpertRecipe(keep=5, score="reap", overall=True, replacement="constant", width=10752),
    drop_ffn=1,
    drop_attention=2,
    drop_blocks=3,
    types=StorageRecipe(
        expert="Q4_K", low="Q2_K", attention="Q6_K", token="IQ4_XS", output="F16", candidates=("Q2_K", "IQ3_S")
    ),
    fit=FitRecipe(importance=False, feedback=5400.0, refit=True),
    free_constants=True,
    free_layers=True,
    hints=False,
)


def drawn(seed: int) -> Recipe:
    """Some recipe without contradictions."""
    rng = random.Random(seed)
    keep = rng.choice([None, 1, 6, 8])
    merges: list[Merge | None] = [None, "m-smoe", "hc-smoe"]
    merge = rng.choice(merges) if keep else None
    is_constant = bool(keep) and not merge and rng.random() < 0.5
    experts = ExpertRecipe(
        keep,
        rng.choice(["subset", *SCORES]),
        False,
        "constant" if is_constant else "nothing",
        merge,
        rng.choice([None, 512]) if not merge else None,
    )
    size = rng.choice([None, 1, 1000, 12 << 30, (12 << 30) + 1, 3 << 20])
    types = StorageRecipe(rng.choice([None, "Q4_K"]) if size is None else None, low=rng.choice([None, "Q2_K"]))
    bits = 2.54 if size is None and types.expert is None else None
    return Recipe("", "native", size, bits, experts, rng.randrange(9), rng.randrange(9), types=types)


def test_words_of_the_version_before_are_understood() -> None:
    text = 'free_novices = true\ntarget_size = "1MB"\n[experts]\nkeep = 5\nreplacement = "novice"\n'
    today = text.replace("novices", "constants").replace("novice", "constant")
    assert parse_recipe(text, SIZES) == parse_recipe(today, SIZES)
    assert parse_recipe(text, SIZES).experts.replacement == "constant"


@pytest.mark.parametrize("recipe", [Recipe(), EVERYTHING, *map(drawn, range(12))], ids=str)
def test_a_recipe_reads_back_equal(recipe: Recipe) -> None:
    text = recipe_text(recipe)
    assert parse_recipe(text, SIZES) == recipe
    assert parse_recipe(text, SourceSizes(40, 60, 20000)) == recipe, "no percentage is left in it"


def test_every_field_has_a_key() -> None:
    assert {*TOP, *SECTIONS} == {field.name for field in fields(Recipe)}
    parts = {"experts": fields(ExpertRecipe), "types": fields(StorageRecipe), "fit": fields(FitRecipe)}
    assert {name: set(keys) for name, keys in SECTIONS.items()} == {
        name: {field.name for field in part} for name, part in parts.items()
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Recipe()),
        ('target_size = "1.5GiB"', Recipe(target_size=3 << 29)),
        ("target_size = 4096", Recipe(target_size=4096)),
        ("target_bpw = 3", Recipe(target_bpw=3.0)),
        ('drop_ffn = "25%"', Recipe(drop_ffn=8)),
        ('drop_blocks = "15.625%"', Recipe(drop_blocks=5)),
        ('[experts]\nkeep = "75 %"', Recipe(experts=ExpertRecipe(keep=6))),
        ('[fit]\nfeedback = "2h"', Recipe(fit=FitRecipe(feedback=7200.0))),
        ("[fit]\nfeedback = true", Recipe(fit=FitRecipe(feedback=True))),
        ('[types]\nexpert = "q4_k_m"\nlow = "iq2_xxs"', Recipe(types=StorageRecipe("Q4_K_M", "IQ2_XXS"))),
    ],
)
def test_what_a_person_writes(text: str, expected: Recipe) -> None:
    assert parse_recipe(text, SIZES) == expected


def test_percentages_are_of_the_model_at_hand() -> None:
    text = 'drop_ffn = "25%"\n[experts]\nkeep = "50%"'
    recipe = parse_recipe(text, SourceSizes(n_layer=3, n_expert=60, n_ff=512))
    assert (recipe.drop_ffn, recipe.experts.keep) == (1, 30)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('target_szie = "8GiB"', r"^r\.toml: there is no key target_szie\. Did you mean target_size\?$"),
        ("[expert]\nkeep = 3", r"no key expert\. Did you mean experts\?"),
        ("[experts]\nwdith = 3", r"no key experts\.wdith\. Did you mean width\?"),
        ("[fit]\nzzz = 3", r"no key fit\.zzz\. Those there are: importance, feedback, refit, heal\."),
        ("[fit]\nfeedback = 0", r"fit\.feedback is 0, but must be true, false or a time such as"),
        ("experts = 3", r"experts is 3, but must be a table\. Begin it with \[experts\]"),
        ('target_size = "12Gigs"', "target_size is '12Gigs', but must be a size"),
        ("target_size = 0", "target_size is 0"),
        ("target_size = true", "target_size is True"),
        ("target_bpw = -1", "target_bpw is -1"),
        ("target_bpw = nan", "target_bpw is nan"),
        ("target_bpw = inf", "target_bpw is inf"),
        ("drop_ffn = 33", "number of layers from 0 to 32"),
        ("drop_ffn = 0.25", "number of layers from 0 to 32, or a percentage"),
        ("drop_ffn = true", "drop_ffn is True"),
        ('drop_blocks = "101%"', "drop_blocks is '101%'"),
        ("[experts]\nkeep = 0", r"experts\.keep is 0, but must be a number of experts from 1 to 8"),
        ('[experts]\nkeep = "1%"', "number of experts from 1 to 8"),
        ("[experts]\nkeep = 9", "number of experts from 1 to 8"),
        ('[experts]\nscore = "luck"', "must be one of subset, frequency"),
        ('[experts]\nmerge = "all"', "must be one of m-smoe, hc-smoe"),
        ("[experts]\nwidth = -256", "number of neurons"),
        ("[experts]\nwidth = 14337", "from 1 to the 14336 of the model's experts"),
        ("target_bpw = 1e308", "a number of bits up to 64"),
        (f"target_size = {10**40}", r"target_size is 1000000\d*\.\.\.\d*, but must be a size"),
        (f"target_size = {'9' * 5000}", r"^r\.toml: this is not readable as TOML"),
        ("drop_ffn = " + "[" * 2000 + "]" * 2000, r"^r\.toml: this is TOML that is nested too deeply"),
        ("drop_ffn = " + "[" * 90 + "]" * 90, r"^r\.toml: drop_ffn is \[+\.\.\.\]+, but must be"),
        ("# " + "x" * 20000, r"^r\.toml: this is larger than 16,384 bytes"),
        ('"a\\nb" = 1', r"^r\.toml: there is no key 'a\\nb'\. Those"),
        ("name = 1979-05-27", "must be a text of one line"),
        ("a" + ".a" * 1000 + " = 1", "there is no key a"),
        ('[types]\nexpert = "Q9"', r"types\.expert is 'Q9', but must be a type: one of"),
        ('[types]\nlow = "Q4_K_M"', "must be a type"),
        ('[types]\ncandidates = "Q4_K"', "a list of types"),
        ('[types]\ncandidates = ["Q4_K", 3]', "must be a type"),
        ("hints = 1", "hints is 1, but must be true or false"),
        ('format = "gguf"', "one of native, stock"),
        ('name = "two\\nlines"', "a text of one line"),
        ("drop_ffn = ", r"^r\.toml: this is not readable as TOML"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_recipe(text, SIZES, "r.toml")


FITTING = Recipe(target_size=1 << 30)
CONTRADICTIONS = {
    "two budgets": (replace(FITTING, target_bpw=2.0), "two budgets"),
    "merge and constants": (
        Recipe(experts=ExpertRecipe(keep=4, merge="hc-smoe", replacement="constant")),
        "experts.merge leaves no expert out",
    ),
    "merge and free constants": (
        replace(FITTING, experts=ExpertRecipe(keep=4, merge="hc-smoe"), free_constants=True),
        "experts, which experts.merge merges",
    ),
    "merge into what": (Recipe(experts=ExpertRecipe(merge="m-smoe")), "Give experts.keep"),
    "merged and trimmed": (
        Recipe(experts=ExpertRecipe(keep=4, merge="hc-smoe", width=512)),
        "experts.merge merges experts, which experts.width cannot trim",
    ),
    "constants for none": (Recipe(experts=ExpertRecipe(replacement="constant")), "none is dropped"),
    "ranked but kept": (Recipe(experts=ExpertRecipe(score="reap", overall=True)), "Give experts.keep"),
    "ranked and merged": (
        Recipe(experts=ExpertRecipe(keep=4, score="reap", merge="m-smoe", overall=True)),
        "experts.merge drops none",
    ),
    "main experts and fewer": (Recipe(experts=ExpertRecipe(main=1, keep=4)), "experts.main fits vectors"),
    "main experts and others": (Recipe(experts=ExpertRecipe(main=1), fit=FitRecipe(refit=True)), "fit.refit changes"),
    "type and target": (replace(FITTING, types=StorageRecipe("Q4_K")), "which a target size leaves to the allocator"),
    "mix and target": (
        replace(FITTING, free_layers=True, types=StorageRecipe("Q4_K_M")),
        "a mix of types, which a target size does not allow",
    ),
    "free without target": (Recipe(free_constants=True), "there is none"),
    "candidates without target": (Recipe(types=StorageRecipe(candidates=("Q4_K",))), "there is none"),
    "larger low-bit copies": (Recipe(types=StorageRecipe("Q2_K", "Q4_K")), "no smaller than the first"),
    "equal low-bit copies": (Recipe(types=StorageRecipe("Q4_K_M", "Q4_K")), "no smaller than the first"),
}
BEYOND_STOCK = {
    "constants": (Recipe(experts=ExpertRecipe(keep=4, replacement="constant")), "constants in place of experts"),
    "free constants": (replace(FITTING, free_constants=True), "constants in place of experts"),
    "low-bit copies": (Recipe(types=StorageRecipe(low="Q2_K")), "low-bit copies of experts"),
    "main experts": (Recipe(experts=ExpertRecipe(main=1)), "compressed experts"),
    "layers": (Recipe(drop_ffn=1), "layers without experts"),
    "free layers": (replace(FITTING, free_layers=True), "layers without experts"),
    "attention": (Recipe(drop_attention=1), "layers without attention"),
    "numbers": (
        Recipe(experts=ExpertRecipe(keep=4, score="reap", overall=True)),
        "layers that differ in their number of experts",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions(case: str) -> None:
    recipe, message = CONTRADICTIONS[case]
    with pytest.raises(UsageError, match=message):
        check_recipe(recipe, Words("r.toml"))
    with pytest.raises(UsageError, match=r"^the recipe: "):
        parse_recipe(recipe_text(recipe), SIZES)


@pytest.mark.parametrize("case", BEYOND_STOCK)
def test_what_stock_cannot_hold(case: str) -> None:
    recipe, message = BEYOND_STOCK[case]
    check_recipe(recipe, Words("r.toml"))
    with pytest.raises(UsageError, match=f"^r.toml: format keeps to what llama.cpp loads, which cannot hold {message}"):
        check_recipe(replace(recipe, format="stock"), Words("r.toml"))


def test_all_that_stock_cannot_hold_is_named_at_once() -> None:
    recipe = Recipe(format="stock", drop_ffn=1, drop_attention=1, types=StorageRecipe(low="Q2_K"))
    with pytest.raises(
        UsageError, match=r"copies of experts \(types.low\) or layers without experts \(drop_ffn\) or layers w"
    ):
        check_recipe(recipe, Words("r.toml"))


def test_what_needs_statistics() -> None:
    assert not needs_statistics(Recipe(types=StorageRecipe("Q4_K", "Q2_K")))
    asking = [FITTING, Recipe(target_bpw=2.0), Recipe(drop_ffn=1), Recipe(drop_attention=1), Recipe(drop_blocks=1)]
    asking += [Recipe(experts=ExpertRecipe(keep=2)), Recipe(experts=ExpertRecipe(width=256))]
    asking += [Recipe(fit=FitRecipe(feedback=True)), Recipe(fit=FitRecipe(refit=True))]
    assert all(map(needs_statistics, asking))


# --- recipes that come along -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ready_recipes())
def test_ready_recipes_are_sound(name: str) -> None:
    recipe = make_recipe(recipe_tables(name), SIZES, Words(name))
    assert parse_recipe(recipe_text(recipe), SIZES) == recipe
    about = ready_recipes()[name]
    assert "arXiv" in about or recipe.target_size == int(name.removesuffix("GiB")) << 30


def test_the_papers_numbers() -> None:
    def read(name: str) -> Recipe:
        return make_recipe(recipe_tables(name), SIZES, Words(name))

    assert read("unified-expert-drop").experts.keep == 6
    assert read("unified-layer-drop").drop_ffn == 8
    assert read("unified-block-drop").drop_blocks == 5
    assert {read(f"unified-{what}-drop").types.expert for what in ("expert", "layer", "block")} == {"Q4_K"}
    assert read("mc").target_bpw == 2.54
    assert (read("hobbit").types.expert, read("hobbit").types.low, read("hobbit").hints) == ("Q4_K", "Q2_K", True)
    assert set(ready_recipes()) >= {"8GiB", "12GiB", "16GiB", "24GiB"}


def test_files_and_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("drop_ffn = 3")
    assert recipe_tables(str(path)) == tomllib.loads(path.read_text())
    with pytest.raises(UsageError, match=r"no recipe '12GB'\. Did you mean 12GiB\? Name a file, or one of 8GiB, "):
        recipe_tables("12GB")
    with pytest.raises(UsageError, match="cannot be read"):
        recipe_tables(str(tmp_path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not readable as TOML"):
        recipe_tables(str(path))
