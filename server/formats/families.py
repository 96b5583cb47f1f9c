"""The families of models by the marks of their chat templates. Apart: each has a reader in a file of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from slimoe.server.formats.answer_reader import AnswerReader, PlainReader
from slimoe.server.formats.call_grammar import CallForm, CallGrammar
from slimoe.server.formats.deepseek import DeepSeekReader
from slimoe.server.formats.gemma4 import Gemma4Reader
from slimoe.server.formats.harmony import HarmonyReader
from slimoe.server.formats.llama3 import Llama3Reader
from slimoe.server.formats.mistral import MistralReader
from slimoe.server.formats.tagged_calls import GlmReader, HermesReader, MiniMaxReader, QwenCoderReader
from slimoe.server.messages import Reading

PLAIN = "hermes"
"""The family whose calls a model is asked for if its template knows no tools."""
TAGGED = CallForm('<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>", "<tool_call>", between="\n")
_CALL, _CALLS = "<｜tool▁call▁begin｜>", "<｜tool▁calls▁begin｜>"
_DEEPSEEK = CallForm(
    f"{_CALL}NAME<｜tool▁sep｜>", "<｜tool▁call▁end｜>", _CALLS, _CALLS, closing="<｜tool▁calls▁end｜>"
)
_DEEPSEEK_R1 = replace(
    _DEEPSEEK,
    before=f"{_CALL}function<｜tool▁sep｜>NAME\n```json\n",
    after="\n```<｜tool▁call▁end｜>",
    between="\n",
)

_INVOCATIONS = "<minimax:tool_call>"
_MINIMAX = CallForm(
    '<invoke name="NAME">\n',
    "\n</invoke>\n",
    _INVOCATIONS,
    f"{_INVOCATIONS}\n",
    between="",
    closing="</minimax:tool_call>",
)


@dataclass(frozen=True, slots=True)
class Family:
    """How its models write: a template of theirs has all of `marks`, and `think[0]` if they reason.

    `form` is how calls are written that a grammar asks for. With `is_framed` marks stand around all that they say: a
    text after `prefix`, reasoning between the marks `thought`.
    """

    name: str
    reader: Callable[[Reading], AnswerReader]
    marks: tuple[str, ...]
    think: tuple[str, str] = ("<think>", "</think>")
    form: CallForm = TAGGED
    is_framed: bool = False
    prefix: str = ""
    thought: tuple[str, str] | None = None


FAMILIES = (
    Family(
        "harmony",
        HarmonyReader,
        ("<|channel|>", "<|message|>"),
        ("<|channel|>analysis", "<|end|>"),
        CallForm("<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>", "", between=None),
        is_framed=True,
        prefix="<|channel|>final<|message|>",
        thought=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    ),
    Family(
        "gemma4",
        Gemma4Reader,
        ("<|tool_call>",),
        ("<|channel>thought\n", "<channel|>"),
        CallForm("<|tool_call>call:NAME", "<tool_call|>", "<|tool_call>"),
    ),
    Family(
        "mistral-args",
        MistralReader,
        ("[TOOL_CALLS]", "[ARGS]"),
        ("[THINK]", "[/THINK]"),
        CallForm("[TOOL_CALLS]NAME[ARGS]", "", "[TOOL_CALLS]"),
    ),
    Family(
        "mistral",
        MistralReader,
        ("[TOOL_CALLS]",),
        ("[THINK]", "[/THINK]"),
        CallForm('{"name": "NAME", "arguments": ', "}", "[TOOL_CALLS]", "[TOOL_CALLS][", ", ", "]"),
    ),
    Family("deepseek-r1", DeepSeekReader, (_CALL, "```json"), form=_DEEPSEEK_R1),
    Family("deepseek", DeepSeekReader, (_CALL,), form=_DEEPSEEK),
    Family("glm", GlmReader, ("<arg_key>",)),
    Family("qwen-coder", QwenCoderReader, ("<function=", "<parameter=")),
    Family("minimax", MiniMaxReader, (_INVOCATIONS, "<invoke name="), form=_MINIMAX),
    Family(PLAIN, HermesReader, ("<tool_call>",)),
    Family(
        "llama3",
        Llama3Reader,
        ("<|start_header_id|>", '"parameters"'),
        form=CallForm('{"name": "NAME", "parameters": ', "}", between="; "),
    ),
)
"""In the order in which a template is held against them."""
_NAMED = {family.name: family for family in FAMILIES}


def family_of(template: str) -> Family | None:
    """The family whose marks a template has."""
    return next((family for family in FAMILIES if all(mark in template for mark in family.marks)), None)


def think_of(template: str) -> tuple[str, str] | None:
    """Between which marks a template's models reason; None if it tells of no reasoning."""
    family = family_of(template)
    pairs = [family.think] if family is not None else []
    return next((pair for pair in (*pairs, ("<think>", "</think>")) if pair[0].strip() in template), None)


def grammar_of(
    reading: Reading, control: Mapping[str, int], think: tuple[str, str] | None, *, goes_on: bool
) -> CallGrammar:
    """The grammar of an answer that is written as `reading` says, by a model that reasons between the marks `think`.

    If it `goes_on` in the midst of a message, no reasoning and no frame come before it, and no reasoning where the
    prompt has closed it.
    """
    family = _NAMED[reading.family]
    if goes_on:
        return CallGrammar(family.form, control)
    thought = None if reading.has_thought else family.thought or think
    begins = reading.begins_thinking
    return CallGrammar(family.form, control, thought, begins_thinking=begins, prefix=family.prefix)


def is_marked(reading: Reading) -> bool:
    """Whether marks are looked for in the answer."""
    return (
        reading.has_tools
        or reading.think is not None
        or (reading.family in _NAMED and _NAMED[reading.family].is_framed)
    )


def reader_of(reading: Reading) -> AnswerReader:
    """The reader for an answer that is written as `reading` says."""
    return _NAMED.get(reading.family, _NAMED[PLAIN]).reader(reading) if is_marked(reading) else PlainReader()
