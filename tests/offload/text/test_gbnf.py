"""Grammars in GBNF allow what is written in them, whatever their rules are called, left recursion included."""

import re

import pytest

from slimoe.offload.text.gbnf import lark_of
from slimoe.offload.text.generation import Constraint
from slimoe.offload.text.grammar_source import UnusableGrammarError, compiled, tokenizer_of

PIECES = [bytes([byte]) for byte in range(256)] + [b"</s>"]
TREE = tokenizer_of(PIECES, [256], [256])


def allows(grammar: str, text: str) -> bool:
    """Whether an answer may be this text, token by token, and end there."""
    matcher = compiled(TREE, Constraint("gbnf", grammar))
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting() if text else matcher.is_accepting()


NAMES = "root ::= fooBar foo-bar foo_bar FOO_BAR start rule-1 1x\n" + "\n".join(
    f'{name} ::= "{n}"' for n, name in enumerate(("fooBar", "foo-bar", "foo_bar", "FOO_BAR", "start", "rule-1", "1x"))
)


@pytest.mark.parametrize(
    ("grammar", "fits", "others"),
    [
        (NAMES, ["0123456"], ["0023456", "0123455"]),
        ('root ::= item{2} # item ::= "x"\nitem ::= "(item ::= .)" | [item]', ["it", "(item ::= .)m"], ["i", "x"]),
        ("root ::= aB | ab\naB ::= [0-9] root?\nab ::= [a-z]", ["1", "12z", "z"], ["zz", "1zz"]),
        ('root ::= "\\u00e9\\x41\\U0001F600" [\\u00e0-\\u00e9]', ["éA😀é", "éA😀à"], ["e", "éA😀e"]),
        ('root ::= [\\u0000-\\u001f]', ["\n", "\x00"], ["0", " "]),
        ("root ::= [+--]", ["+", ",", "-"], ["*"]),
        ("root ::= [&&a~~]", ["&", "a", "~"], ["b"]),
        ("root ::= .", ["x", "\n", "é"], ["", "xx"]),
        ('root ::= root "a" | "b"', ["b", "baa"], ["a", "ab"]),
        ('root ::= list\nlist ::= tail "," [0-9] | [0-9]\ntail ::= list', ["1", "1,2,3"], ["1,", ",1"]),
        ('root ::= maybe root "a" | "b"\nmaybe ::= "-"?', ["b", "-ba", "--baa"], ["a", "-a"]),
    ],
    ids=("names", "not names", "case", "escapes", "zeros", "range", "operators", "any", "left", "indirect", "hidden"),
)  # fmt: skip
def test_what_a_grammar_allows(grammar: str, fits: list[str], others: list[str]) -> None:
    assert [text for text in (*fits, *others) if allows(grammar, text)] == fits


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("root ::= x\nx ::= x", "no text has this form"),
        ('root ::= x\nx ::= y "a"\ny ::= x', "no text has this form"),
        ("root ::= fooBaz\nfooBar ::= [a]", "Rule 'fooBaz' not found"),
        ('root ::= "\\uD800"', r"\uD800 is no character"),
        ('root ::= "\\U00110000"', r"\U00110000 is no character"),
    ],
)
def test_what_cannot_be_held_is_refused(grammar: str, reason: str) -> None:
    with pytest.raises(UnusableGrammarError, match=re.escape(reason)):
        compiled(TREE, Constraint("gbnf", grammar))


def test_plain_names_stay() -> None:
    assert "digit_pair" in lark_of("root ::= digit_pair root?\ndigit_pair ::= [0-9] digit_pair?")
