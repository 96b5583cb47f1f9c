"""How messages name the parts of a recipe: by keys if they are in a file, by flags if they were on the command line."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from slimoe.converter.recipe.fields import SECTIONS

Flags = Mapping[str, str]
"""Flags by the last part of the recipe's key that they set, such as `keep`, which is different for all keys."""
_GIVE = "give_"
_FULL = {key: f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys}


@dataclass(frozen=True, slots=True)
class Words:
    """The names of a recipe's parts in messages.

    `origin` is the recipe's file or name, `typed` are the flags that set keys on the command line, and `offered` all
    flags of the command, none if a recipe is read without one.
    """

    origin: str
    typed: Flags = field(default_factory=dict)
    offered: Flags = field(default_factory=dict)

    def __getitem__(self, key: str) -> str:
        """The name of a key, for `str.format_map`: as it was set, or with the prefix `give_` as it can be set."""
        name = key.removeprefix(_GIVE)
        flags = self.typed if name == key else self.offered
        return flags.get(name, _FULL.get(name, name))

    def message(self, keys: Iterable[str], text: str) -> str:
        """The text, after the recipe's name unless flags alone set the keys that are at fault."""
        return text if all(key in self.typed for key in keys) else f"{self.origin}: {text}"
