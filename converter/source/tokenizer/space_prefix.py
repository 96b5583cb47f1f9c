"""When a sentencepiece-like tokenizer puts a space before a text, and what llama.cpp will read in a way of its own."""

from collections.abc import Mapping
from dataclasses import dataclass

from slimoe.offload.gguf import keys
from slimoe.offload.gguf.header import Value

ROUGH = ("gpt-4o", "tekken")
"""llama.cpp's names of splits that it follows in ASCII, but not in every word with capital letters or marks beyond."""


@dataclass(frozen=True, slots=True)
class SpacePrefix:
    """Whether there is one, also behind each special token, and also before a text that begins with a space.

    llama.cpp knows the first alone, and does the other two always.
    """

    is_added: bool = True
    after_special: bool = True
    before_space: bool = True

    def metadata(self) -> dict[str, Value]:
        """The keys that say so; what llama.cpp does anyway has none."""
        values: dict[str, Value] = {keys.ADD_SPACE_PREFIX: self.is_added}
        if self.is_added and not self.after_special:
            values[keys.PREFIX_AFTER_SPECIAL] = False
        if self.is_added and not self.before_space:
            values[keys.PREFIX_BEFORE_SPACE] = False
        return values


def notes(metadata: Mapping[str, Value]) -> tuple[str, ...]:
    """A sentence for a person about what llama.cpp will read otherwise than this program does, if there is anything."""
    places = [
        where
        for key, where in (
            (keys.PREFIX_AFTER_SPECIAL, "behind each control token"),
            (keys.PREFIX_BEFORE_SPACE, "before a text that begins with one"),
        )
        if metadata.get(key) is False
    ]
    if places:
        where = " and ".join(places)
        return (f"llama.cpp will read a space {where}, which this tokenizer does not add. slimoe does not.",)
    if metadata.get(keys.TOKENIZER_PRE) in ROUGH:
        what = "capital letters or marks beyond ASCII may become other tokens than this tokenizer's"
        return (f"Words with {what}, in llama.cpp and in slimoe, which reads text with its vocabulary.",)
    if keys.NORMALIZER in metadata:
        what = "will not join accents with their letters (Unicode's NFC) before it splits a text"
        return (f"llama.cpp {what}, as this tokenizer does. slimoe does.",)
    return ()
