"""The families of models by the marks of their chat templates. Apart: each has a reader in a file of its own."""

from collections.abc import Callable
from dataclasses import dataclass

from slimoe.server.formats.answer_reader import AnswerReader, PlainReader
from slimoe.server.formats.deepseek import DeepSeekReader
from slimoe.server.formats.gemma4 import Gemma4Reader
from slimoe.server.formats.harmony import HarmonyReader
from slimoe.server.formats.llama3 import Llama3Reader
from slimoe.server.formats.mistral import MistralReader
from slimoe.server.formats.tagged_calls import GlmReader, HermesReader, QwenCoderReader
from slimoe.server.messages import Reading


@dataclass(frozen=True, slots=True)
class Family:
    """How its models write: a template of theirs has all of `marks`, and `think[0]` if they reason."""

    name: str
    reader: Callable[[Reading], AnswerReader]
    marks: tuple[str, ...]
    think: tuple[str, str] = ("<think>", "</think>")


PLAIN = "hermes"
"""The family whose calls a model is asked for if its template knows no tools."""
FAMILIES = (
    Family("harmony", HarmonyReader, ("<|channel|>", "<|message|>"), ("<|channel|>analysis", "<|end|>")),
    Family("gemma4", Gemma4Reader, ("<|tool_call>",), ("<|channel>thought\n", "<channel|>")),
    Family("mistral", MistralReader, ("[TOOL_CALLS]",), ("[THINK]", "[/THINK]")),
    Family("deepseek", DeepSeekReader, ("<｜tool▁call▁begin｜>",)),
    Family("glm", GlmReader, ("<arg_key>",)),
    Family("qwen-coder", QwenCoderReader, ("<function=", "<parameter=")),
    Family("hermes", HermesReader, ("<tool_call>",)),
    Family("llama3", Llama3Reader, ("<|start_header_id|>", '"parameters"')),
)
"""In the order in which a template is held against them."""
_READERS = {family.name: family.reader for family in FAMILIES}


def family_of(template: str) -> Family | None:
    """The family whose marks a template has."""
    return next((family for family in FAMILIES if all(mark in template for mark in family.marks)), None)


def think_of(template: str) -> tuple[str, str] | None:
    """Between which marks a template's models reason; None if it tells of no reasoning."""
    family = family_of(template)
    pairs = [family.think] if family is not None else []
    return next((pair for pair in (*pairs, ("<think>", "</think>")) if pair[0].strip() in template), None)


def reader_of(reading: Reading) -> AnswerReader:
    """The reader for an answer that is written as `reading` says."""
    if not reading.has_tools and reading.think is None:
        return PlainReader()
    return _READERS.get(reading.family, HermesReader)(reading)
