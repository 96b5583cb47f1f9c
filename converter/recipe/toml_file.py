"""Recipes as TOML: read from a file or by the name of a shipped one, checked, and written into the file they made.

```toml
target_size = "12GiB"    # or target_bpw = 2.5
drop_ffn = "25%"         # a number of layers, or a percentage of them
[experts]
keep = 6
score = "reap"
[types]
attention = "Q6_K"
[fit]
feedback = true
```
"""

import difflib
import json
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from slimoe.converter.document import MAX_TOML_BYTES, BadDocumentError, decode_toml
from slimoe.converter.recipe.check import check_recipe
from slimoe.converter.recipe.fields import SECTIONS, TOP, NotExpectedError, Read, SourceSizes
from slimoe.converter.recipe.recipe import ExpertRecipe, FitRecipe, Recipe, StorageRecipe
from slimoe.converter.recipe.words import Words
from slimoe.offload.errors import UsageError
from slimoe.offload.files.regular_file import open_regular, reason
from slimoe.offload.resources.memory import bytes_text

Tables = Mapping[str, Any]
"""A recipe as TOML has it, not checked."""

_LONGEST_KEY = 40
_OWN = Path(__file__).parents[1] / "recipes"


def ready_recipes() -> dict[str, str]:
    """The shipped recipes: their names, and the first line of their files, which describes them."""
    paths = sorted(_OWN.glob("*.toml"), key=lambda path: (not path.stem[0].isdigit(), len(path.stem), path.stem))
    return {path.stem: path.read_text("utf-8").splitlines()[0].removeprefix("#").strip() for path in paths}


def recipe_tables(name: str) -> Tables:
    """The tables of the shipped recipe of that name, or else of the file of that name.

    Raises UsageError if there is neither, or it cannot be read.
    """
    ready = ready_recipes()
    path = _OWN / f"{name}.toml" if name in ready else Path(name)
    try:
        with open_regular(path) as file:
            text = file.read(MAX_TOML_BYTES + 1)
    except FileNotFoundError:
        hint = f"Name a file, or one of {', '.join(ready)}."
        raise UsageError(f"There is no recipe {name!r}.{_nearest(name, ready)} {hint}") from None
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise UsageError(f"{name} cannot be read ({why}). Name a recipe's file.") from None
    return text_tables(text, name)


def text_tables(text: bytes, origin: str) -> Tables:
    """Decodes TOML; raises UsageError, which begins with `origin`. Words of the version before become today's."""
    try:
        tables = decode_toml(text, dict[str, Any])
    except BadDocumentError as error:
        raise UsageError(f"{origin}: {error}. Correct it there.") from None
    if "free_novices" in tables:
        tables.setdefault("free_constants", tables.pop("free_novices"))
    experts = tables.get("experts")
    if isinstance(experts, dict) and experts.get("replacement") == "novice":
        experts["replacement"] = "constant"
    return tables


def make_recipe(tables: Tables, sizes: SourceSizes, words: Words) -> Recipe:
    """The recipe that tables describe, with percentages turned into numbers for a model of `sizes`.

    Raises UsageError, in `words`, for an unknown key, a value that its key does not allow, and parts that contradict
    each other.
    """
    top = {key: value for key, value in tables.items() if key not in SECTIONS}
    sections = {name: tables.get(name, {}) for name in SECTIONS}
    for name, section in sections.items():
        if not isinstance(section, Mapping):
            found = reprlib.repr(section)
            raise UsageError(f"{words.origin}: {name} is {found}, but must be a table. Begin it with [{name}].")
    values = _values(top, TOP, sizes, words, "")
    experts, types, fit = (_values(sections[name], SECTIONS[name], sizes, words, f"{name}.") for name in SECTIONS)
    recipe = Recipe(**values, experts=ExpertRecipe(**experts), types=StorageRecipe(**types), fit=FitRecipe(**fit))
    check_recipe(recipe, words)
    return recipe


def parse_recipe(text: str, sizes: SourceSizes, origin: str = "the recipe") -> Recipe:
    """The recipe in a text; raises UsageError as `make_recipe` and `text_tables` do."""
    return make_recipe(text_tables(text.encode(), origin), sizes, Words(origin))


def _values(table: Tables, known: Mapping[str, Read], sizes: SourceSizes, words: Words, prefix: str) -> dict[str, Any]:
    values = {}
    for key, value in table.items():
        if key not in known:
            names = [*known, *SECTIONS] if not prefix else list(known)
            hint = _nearest(key, names) or f" Those there are: {', '.join(names)}."
            # A key may be anything, and the message is one line.
            shown = key if key.isprintable() and len(key) <= _LONGEST_KEY else reprlib.repr(key)
            raise UsageError(f"{words.origin}: there is no key {prefix}{shown}.{hint}")
        try:
            values[key] = known[key](value, sizes)
        except NotExpectedError as error:
            problem = f"{words[key]} is {reprlib.repr(value)}, but must be {error}."
            raise UsageError(words.message([key], problem)) from None
    return values


def _nearest(name: str, known: Collection[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {found[0]}?" if found else ""


# --- writing -----------------------------------------------------------------------------------------------


def recipe_text(recipe: Recipe) -> str:
    """All of a recipe as TOML, with its defaults, so that it keeps its meaning if defaults change."""
    top = [field.name for field in fields(recipe) if not is_dataclass(getattr(recipe, field.name))]
    lines = _lines(recipe, top)
    for section in SECTIONS:
        part = getattr(recipe, section)
        lines += ["", f"[{section}]", *_lines(part, [field.name for field in fields(part)])]
    return "\n".join(lines) + "\n"


def _lines(part: object, names: Collection[str]) -> list[str]:
    values = {name: getattr(part, name) for name in names}
    if values.get("target_size") is not None:
        values["target_size"] = bytes_text(values["target_size"])
    if values.get("specialise") is not None:
        # Where a text lies is nobody's business who gets the file.
        values["specialise"] = Path(values["specialise"]).name
    for name in {"heal", "feedback", "search"} & values.keys():
        if isinstance(values[name], float):
            values[name] = f"{values[name]:g}s"
    # Booleans, numbers, printable texts and lists of them are written alike in JSON and TOML.
    return [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items() if value is not None]
