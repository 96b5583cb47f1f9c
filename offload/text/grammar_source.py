"""Constraints in llguidance's words. Apart: a grammar's process alone reads what strangers wrote."""

import json
from typing import TYPE_CHECKING

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from slimoe.offload.text.grammar_messages import GrammarRequest

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

SPACE = r" |\n{1,2}[ \t]{0,20}"
"""White space between the parts of a JSON text, as llama.cpp allows it: a small model cannot write it for ever."""
_HEAD = '%llguidance {"no_forcing": true}\n'
"""Where a text is given, the model chooses how to spell it: there is no tokenizer here that could say."""
_DEFAULTS: "JsonCompileOptions" = {"whitespace_pattern": SPACE}
_OVERRIDES: "JsonCompileOptions" = {"lenient": False}


class UnusableGrammarError(Exception):
    """A constraint that cannot be held; the message is llguidance's reason."""


def grammar_of(request: GrammarRequest, prefix: str = "") -> str:
    """The grammar of all answers that the constraint allows, after `prefix`; raises UnusableGrammarError."""
    parts = {"before": request.before, "instead": request.instead}
    others = [{"lark_grammar": text, "name": name} for name, text in parts.items() if text]
    start = f"{json.dumps(prefix) if prefix else ''} {'@before' if request.before else ''} "
    start += "(@held | @instead)" if request.instead else "@held"
    held = {**_held(request.kind, request.text), "name": "held"}
    return json.dumps({"grammars": [{"lark_grammar": f"{_HEAD}start: {start}"}, held, *others]})


def _held(kind: str, text: str) -> dict[str, object]:
    if kind == "lark":
        return {"lark_grammar": text}
    try:
        if kind == "gbnf":
            return {"lark_grammar": gbnf_to_lark(text)}
        if kind == "regex":
            made = LLMatcher.grammar_from_regex(text)
        else:
            schema = "{}" if text.strip() == "true" else text
            made = LLMatcher.grammar_from_json_schema(schema, _DEFAULTS, _OVERRIDES)
    except RecursionError:
        raise UnusableGrammarError("it is nested too deeply") from None
    except Exception as error:
        # The converter raises bare exceptions.
        raise UnusableGrammarError(str(error)) from None
    grammar: dict[str, object] = json.loads(made)["grammars"][0]
    return grammar
