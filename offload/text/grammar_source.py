"""Constraints in llguidance's words, and compiled by it."""

import ctypes
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from slimoe.offload.text.gbnf import lark_of
from slimoe.offload.text.generation import Constraint

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

SPACE = r" |\n{1,2}[ \t]{0,20}"
"""White space between the parts of a JSON text, as llama.cpp allows it: a small model cannot write it for ever."""
_HEAD = '%llguidance {"no_forcing": true}\n'
"""Where a text is given, the model chooses how to spell it: there is no tokenizer here that could say."""
_DEFAULTS: "JsonCompileOptions" = {"whitespace_pattern": SPACE}
_OVERRIDES: "JsonCompileOptions" = {"lenient": False}
_LIMITS = LLParserLimits(
    max_items_in_row=20_000,
    step_max_items=25_000,
    step_lexer_fuel=100_000,
    max_lexer_states=20_000,
    verbose_errors=False,
)
"""A row has an item for each text of an enum. What a token takes grows with the square of the items of a step."""
_SHOWN = 400
"""Characters of llguidance's reasons, which may quote the whole grammar."""
_ELSEWHERE = re.compile(r"Resource ('.*') is not present in a registry")
_KEYWORDS = {"Pointer '": "$ref", "regex parse error": "pattern"}
"""What llguidance says of keywords without naming them."""
_JSON = "%json"
_NO_SCHEMAS = ("const", "enum", "default", "examples")
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


class UnusableGrammarError(Exception):
    """A constraint that cannot be held; the message is llguidance's reason, `param` the tool's field to blame."""

    def __init__(self, reason: str, param: str | None = None) -> None:
        super().__init__(reason)
        self.param = param


class _Vocabulary:
    """The tokens as llguidance asks for them; texts are only split for grammars that insist on it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, pieces: Sequence[bytes], control: Sequence[int], ends: Sequence[int]) -> None:
        self.tokens, self.special_token_ids = pieces, control
        self.eos_token_id = ends[0] if ends else None
        self.tokenizer: LLTokenizer | None = None

    def __call__(self, text: str) -> list[int]:
        assert self.tokenizer is not None
        return self.tokenizer.greedy_tokenize(text)


def tokenizer_of(pieces: Sequence[bytes], control: Sequence[int], ends: Sequence[int]) -> LLTokenizer:
    """llguidance's tree of tokens from the bytes of each; `control` tokens are named in grammars, and never spelt."""
    vocabulary = _Vocabulary(pieces, control, ends)
    vocabulary.tokenizer = LLTokenizer(vocabulary, eos_token=list(ends) or None)  # type: ignore[arg-type]
    return vocabulary.tokenizer


def compiled(tokenizer: LLTokenizer, constraint: Constraint, prefix: str = "") -> LLMatcher:
    """What holds an answer to a constraint, after `prefix`; raises UnusableGrammarError, also where no text fits."""
    try:
        return _compiled(tokenizer, grammar_of(constraint, prefix))
    except UnusableGrammarError:
        for param, name, schema in constraint.tools:
            try:
                _check_counts_in(f"{_JSON} {schema}")
                _compiled(tokenizer, json.dumps({"grammars": [{"json_schema": json.loads(schema)}]}))
            except UnusableGrammarError as error:
                raise UnusableGrammarError(f"of the tool {name!r}: {error}", param) from None
        raise


def _compiled(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
    n_words = -(-tokenizer.vocab_size // 32)
    mask = (ctypes.c_uint32 * n_words)()
    if not matcher.is_error():
        matcher.unsafe_compute_mask_ptr(ctypes.addressof(mask), ctypes.sizeof(mask))
    check(matcher)
    return matcher


def check(matcher: LLMatcher) -> None:
    """Raises UnusableGrammarError if llguidance gave up."""
    if matcher.is_error():
        raise UnusableGrammarError(reason_of(matcher))


def reason_of(matcher: LLMatcher) -> str:
    """Why llguidance gave up."""
    reason = matcher.get_error().split("\n<")[0]
    return "no text has this form" if reason.startswith("NoExtension") else _with_keyword(reason[:_SHOWN])


def _with_keyword(reason: str) -> str:
    """llguidance's reason, with the schema's keyword that is at fault where it names only the value."""
    if found := _ELSEWHERE.match(reason):
        return f"{found[1]}, which $ref or $schema names, is another document, and none is fetched"
    keyword = next((word for begin, word in _KEYWORDS.items() if reason.startswith(begin)), "")
    return f"{keyword}: {reason}" if keyword else reason


def grammar_of(constraint: Constraint, prefix: str = "") -> str:
    """The grammar of all answers that the constraint allows, after `prefix`; raises UnusableGrammarError."""
    parts = {"before": constraint.before, "instead": constraint.instead}
    others = [{"lark_grammar": text, "name": name} for name, text in parts.items() if text]
    start = f"{json.dumps(prefix) if prefix else ''} {'@before' if constraint.before else ''} "
    start += "(@held | @instead)" if constraint.instead else "@held"
    held = {**_held(constraint.kind, constraint.text), "name": "held"}
    for text in (constraint.text if constraint.kind == "lark" else "", *parts.values()):
        _check_counts_in(text)
    return json.dumps({"grammars": [{"lark_grammar": f"{_HEAD}start: {start}"}, held, *others]})


def _held(kind: str, text: str) -> dict[str, object]:
    if kind == "lark":
        return {"lark_grammar": text}
    try:
        if kind == "gbnf":
            return {"lark_grammar": lark_of(text)}
        if kind == "regex":
            made = LLMatcher.grammar_from_regex(text)
        else:
            schema = "{}" if text.strip() == "true" else text
            made = LLMatcher.grammar_from_json_schema(schema, _DEFAULTS, _OVERRIDES)
            _check_counts(json.loads(schema))
    except UnusableGrammarError:
        raise
    except RecursionError:
        raise UnusableGrammarError("it is nested too deeply") from None
    except Exception as error:
        # The converter raises bare exceptions.
        raise UnusableGrammarError(_with_keyword(str(error)[:_SHOWN])) from None
    grammar: dict[str, object] = json.loads(made)["grammars"][0]
    return grammar


def _check_counts_in(lark: str) -> None:
    """Checks the schemas that a grammar in Lark's words holds, except those of which not all need be followed."""
    _, *texts = lark.split(_JSON)
    for text in texts:
        try:
            schema, _ = json.JSONDecoder().raw_decode(text.lstrip())
        except (ValueError, RecursionError):
            # llguidance says so better, or it is no schema but a text.
            continue
        guidance = schema.get("x-guidance") if isinstance(schema, dict) else None
        if not (isinstance(guidance, dict) and guidance.get("lenient") is True):
            _check_counts(schema)


def _check_counts(schema: Any) -> None:
    """Raises UnusableGrammarError for a least number of properties that one written twice would make up.

    llguidance knows only of named properties that they have been written.
    """
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        if not isinstance(part, dict):
            continue
        least, required = part.get("minProperties"), part.get("required")
        n_named = len({name for name in required if isinstance(name, str)}) if isinstance(required, list) else 0
        is_free = bool(part.get("patternProperties")) or part.get("additionalProperties") is not False
        is_object = "object" in (part.get("type") or "object")
        if isinstance(least, int | float) and is_object and is_free and least > max(1, n_named):
            problem = f"minProperties is {least}, which a property written twice would reach"
            raise UnusableGrammarError(f"{problem}. Name the properties in required, or leave minProperties out")
        for name, value in part.items():
            if name not in _NO_SCHEMAS:
                waiting += value.values() if name in _NAMED_SCHEMAS and isinstance(value, dict) else [value]
