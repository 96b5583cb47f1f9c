"""How messages name the parts of a recipe: by its keys in a file, by the flags that a person typed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from slimoe.converter.recipe.fields import SECTIONS

Flags = Mapping[str, str]
"""Flags by the last part of the recipe's key that they set, such as `keep`, which no two keys share."""
_GIVE = "give_"
_FULL = {key: f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys}


@dataclass(frozen=True, slots=True)
class Words:
    """`origin` is the recipe's file or name, `typed` the flags that set keys in its place, `offered` all flags that
    there are where a command line asks, none where a recipe is read by itself.
    """

    origin: str
    typed: Flags = field(default_factory=dict)
    offered: Flags = field(default_factory=dict)

    def __getitem__(self, key: str) -> str:
        """What a key is called for `str.format_map`: as it was set, or behind `give_` as it can be set."""
        name = key.removeprefix(_GIVE)
        flags = self.typed if name == key else self.offered
        return flags.get(name, _FULL.get(name, name))

    def message(self, keys: Iterable[str], text: str) -> str:
        """The text, behind the recipe's name unless flags alone set the keys that are at fault."""
        return text if all(key in self.typed for key in keys) else f"{self.origin}: {text}"
