"""Recipes as TOML: read from a person's file or from those that come along, checked, and written into what they made.

```toml
target_size = "12GiB"    # or target_bpw = 2.5
drop_ffn = "25%"         # layers, or a share of them
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
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from converter.recipe import ExpertRecipe, FitRecipe, Recipe, StorageRecipe
from converter.recipe_check import check_recipe
from converter.recipe_fields import SECTIONS, TOP, NotExpectedError, Read, SourceSizes
from offload.byte_size import bytes_text
from offload.errors import UsageError

Tables = Mapping[str, Any]
"""A recipe as TOML has it, nothing checked."""

_OWN = Path(__file__).with_name("recipes")


def ready_recipes() -> dict[str, str]:
    """Those that come along: name and what it is, the first line of its file."""
    paths = sorted(_OWN.glob("*.toml"), key=lambda path: (not path.stem[0].isdigit(), len(path.stem), path.stem))
    return {path.stem: path.read_text("utf-8").splitlines()[0].removeprefix("#").strip() for path in paths}


def recipe_tables(name: str) -> Tables:
    """The tables of a recipe that comes along, or else of the file of that name; raises UsageError."""
    ready = ready_recipes()
    path = _OWN / f"{name}.toml" if name in ready else Path(name)
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        hint = f"Name a file, or one of {', '.join(ready)}."
        raise UsageError(f"There is no recipe {name!r}.{_nearest(name, ready)} {hint}") from None
    except OSError as error:
        raise UsageError(f"{name} cannot be read ({error.strerror}). Name a recipe's file.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{name} is no recipe: it is not UTF-8 text. Name a TOML file.") from None
    return text_tables(text, name)


def text_tables(text: str, origin: str) -> Tables:
    """TOML as tables; raises UsageError, which begins with `origin`."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{origin}: this is not TOML ({error}). Correct it there.") from None


def make_recipe(tables: Tables, sizes: SourceSizes, origin: str) -> Recipe:
    """The recipe that tables describe, its shares as numbers of a model of `sizes`.

    Raises UsageError, which begins with `origin`, for a key that there is not, a value that its key does not hold, and
    what contradicts itself.
    """
    top = {key: value for key, value in tables.items() if key not in SECTIONS}
    sections = {name: tables.get(name, {}) for name in SECTIONS}
    for name, section in sections.items():
        if not isinstance(section, Mapping):
            raise UsageError(f"{origin}: {name} is {section!r}, but is a table. Begin it with [{name}].")
    values = _values(top, TOP, sizes, origin, "")
    experts, types, fit = (_values(sections[name], SECTIONS[name], sizes, origin, f"{name}.") for name in SECTIONS)
    recipe = Recipe(**values, experts=ExpertRecipe(**experts), types=StorageRecipe(**types), fit=FitRecipe(**fit))
    check_recipe(recipe, origin)
    return recipe


def parse_recipe(text: str, sizes: SourceSizes, origin: str = "the recipe") -> Recipe:
    """The recipe in a text; raises UsageError as `make_recipe` and `text_tables` do."""
    return make_recipe(text_tables(text, origin), sizes, origin)


def _values(table: Tables, known: Mapping[str, Read], sizes: SourceSizes, origin: str, prefix: str) -> dict[str, Any]:
    values = {}
    for key, value in table.items():
        if key not in known:
            names = [*known, *SECTIONS] if not prefix else list(known)
            hint = _nearest(key, names) or f" Those there are: {', '.join(names)}."
            raise UsageError(f"{origin}: there is no key {prefix}{key}.{hint}")
        try:
            values[key] = known[key](value, sizes)
        except NotExpectedError as error:
            raise UsageError(f"{origin}: {prefix}{key} is {value!r}, but must be {error}.") from None
    return values


def _nearest(name: str, known: Collection[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {found[0]}?" if found else ""


# --- writing -----------------------------------------------------------------------------------------------


def recipe_text(recipe: Recipe) -> str:
    """All of a recipe as TOML, defaults included, so that it says the same when defaults have changed."""
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
    return [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]


def _toml(value: bool | int | float | str | tuple[str, ...]) -> str:
    """Booleans, numbers, printable texts and lists of them are written alike in JSON and TOML."""
    return json.dumps(value, ensure_ascii=False)
