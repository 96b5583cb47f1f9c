"""Grammars in llama.cpp's GBNF, made Lark by llguidance's converter. Apart: what that cannot take is changed before.

The converter writes names in one case and with underscores, so that `fooBar`, `foo-bar` and `foo_bar` would be one. It
loses zeros of escapes, and its classes are a regular expression's, which knows operators in them.
"""

import itertools
import re

from llguidance.gbnf_to_lark import gbnf_to_lark

_PARTS = re.compile(
    r'(?P<text>"(?:[^"\\]|\\.)*")|(?P<set>\[(?:[^\]\\]|\\.)*\])|(?P<other>#[^\r\n]*|\{[^}]*\})'
    r"|(?P<name>[\w-]+)|(?P<any>\.)",
    re.DOTALL,
)
_DEFINED = re.compile(r"([\w-]+)[ \t]*::=")
_PLAIN_NAME = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)
_OPERATOR = re.compile(r"(?<=([&~-]))\1")
_ANY = "[\\x00-\U0010ffff]"
"""A point stands for line breaks, too."""


def lark_of(text: str) -> str:
    """The grammar in Lark's words; raises some Exception for what is no GBNF."""
    names = _names(text)

    def changed(part: re.Match[str]) -> str:
        if part["name"]:
            return names.get(part["name"], part["name"])
        if part["any"]:
            return _ANY
        written = part[0] if part["other"] else _ESCAPE.sub(_character, part[0])
        return _OPERATOR.sub(lambda found: f"\\x{ord(found[0]):02x}", written) if part["set"] else written

    return gbnf_to_lark(_PARTS.sub(changed, text))


def _names(text: str) -> dict[str, str]:
    """A name that the converter leaves unlike all others, for each rule that is defined."""
    bare = _PARTS.sub(lambda part: part["name"] or " ", text)
    found = dict.fromkeys(_DEFINED.findall(bare))
    names = {name: name for name in found if _PLAIN_NAME.fullmatch(name) and name != "start"}
    taken = {*names.values(), "root", "start"}
    for name in found:
        if name not in names:
            base = "rule_" + re.sub(r"[^a-z0-9]+", "_", name.lower())
            numbered = itertools.chain([base], (f"{base}_{n}" for n in itertools.count(2)))
            names[name] = next(one for one in numbered if one not in taken)
            taken.add(names[name])
    return names


def _character(escape: re.Match[str]) -> str:
    code = escape[1] or escape[2] or escape[3]
    if code is None:
        return escape[0]
    number = int(code, 16)
    if number > 0x10FFFF or 0xD800 <= number < 0xE000:
        raise ValueError(f"{escape[0]} is no character")
    return f"\\x{number:02x}" if number < 0x80 else chr(number)
