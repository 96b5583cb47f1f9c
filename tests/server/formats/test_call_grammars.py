"""Grammars of calls, held against llguidance itself: what they let through, the family's reader reads as wanted."""

import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher, LLTokenizer

from slimoe.offload.text.generation import Constraint
from slimoe.offload.text.grammar_source import grammar_of as source_of
from slimoe.server.formats.answer_reader import Parts, joined
from slimoe.server.formats.families import FAMILIES, grammar_of, reader_of
from slimoe.server.messages import ChatPrompt, Reading, Tool, ToolChoice, Turn

NAMES = [family.name for family in FAMILIES]
MARKS: tuple[str, ...] = (
    "[TOOL_CALLS]",
    "[ARGS]",
    "[THINK]",
    "[/THINK]",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|start|>",
)
MARKS += ("<|constrain|>", "<|tool_call>", "<tool_call|>", "<|channel>", "<channel|>", "<think>", "</think>")
MARKS += tuple(f"<｜tool▁{name}｜>" for name in ("call▁begin", "call▁end", "calls▁begin", "calls▁end", "sep"))
PLAIN_MARKS = ("<think>", "</think>", "[TOOL_CALLS]")
HARMONY = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|constrain|>")
CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}, "days": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["city", "days"],
    "$defs": {"name": {"enum": ["Paris", 'R "ö"']}},
}
TOOLS = (Tool("weather", parameters=json.dumps(CITY)), Tool("clock"))
STRICT = (Tool("weather", parameters=json.dumps({**CITY, "additionalProperties": False}), strict=True), Tool("clock"))
ONE = ToolChoice("required", is_parallel=False)


class Vocabulary:
    """All bytes, the marks as control tokens, and one that ends the answer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, marks: Sequence[str]) -> None:
        self.tokens = [bytes([n]) for n in range(256)] + [mark.encode() for mark in marks] + [b"</s>"]
        self.control = {mark: 256 + n for n, mark in enumerate(marks)}
        self.special_token_ids = [*self.control.values(), 256 + len(marks)]
        self.eos_token_id = 256 + len(marks)
        self.tokenizer = LLTokenizer(self, eos_token=[self.eos_token_id])  # type: ignore[arg-type]

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.greedy_tokenize(text)


@cache
def vocabulary(*marks: str) -> Vocabulary:
    return Vocabulary(marks)


def matcher(tokens: Vocabulary, constraint: Constraint) -> LLMatcher:
    made = LLMatcher(tokens.tokenizer, source_of(constraint), log_level=0)
    assert not made.is_error(), made.get_error()
    return made


def reading_of(family: str, tools: Sequence[Tool] = TOOLS, **more: Any) -> Reading:
    think = next(each.think for each in FAMILIES if each.name == family)
    texts = {"weather": ("city",), "clock": ()}
    return Reading(family, think, has_tools=bool(tools), texts=texts if tools else {}, **more)


def constraint_of(
    tokens: Vocabulary, reading: Reading, tools: Sequence[Tool], choice: ToolChoice, wanted: Constraint | None = None
) -> Constraint | None:
    conversation = ChatPrompt((Turn("user", "x"),), {}, tuple(tools), choice)
    return grammar_of(reading, tokens.control, reading.think, goes_on=False).constraint(conversation, wanted)


def walked(tokens: Vocabulary, held: LLMatcher, seed: int, ends: Callable[[str], bool] = lambda text: True) -> str:
    """An answer of random tokens that the grammar allows, which ends as soon as it may."""
    chance, written = random.Random(seed), bytearray()
    while not held.is_stopped():
        mask = held.compute_bitmask()
        allowed = [token for token in range(len(tokens.tokens)) if mask[token // 8] >> token % 8 & 1]
        if tokens.eos_token_id in allowed and ends(written.decode("utf-8", "replace")):
            break
        token = chance.choice([one for one in allowed if one != tokens.eos_token_id])
        assert held.consume_token(token)
        written += tokens.tokens[token]
        assert len(written) < 20_000
    return written.decode("utf-8", "replace")


def accepts(tokens: Vocabulary, held: LLMatcher, text: str) -> bool:
    """Whether a whole answer is allowed, whose marks are control tokens where there are such."""
    while text:
        mark = next((mark for mark in tokens.control if text.startswith(mark)), None)
        ids = list(text[0].encode()) if mark is None else [tokens.control[mark]]
        text = text[1:] if mark is None else text.removeprefix(mark)
        for token in ids:
            mask = held.compute_bitmask()
            if not mask[token // 8] >> token % 8 & 1 or not held.consume_token(token):
                return False
    return held.is_accepting()


def read(reading: Reading, text: str) -> Parts:
    reader = reader_of(reading)
    return joined(reader.feed(text), reader.finish())


def calls_of(parts: Parts) -> list[tuple[str, Any]]:
    names = [delta.name for delta in parts.calls if delta.name]
    texts = ["".join(delta.arguments for delta in parts.calls if delta.number == n) for n in range(len(names))]
    return [(name, json.loads(text)) for name, text in zip(names, texts, strict=True)]


def is_valid(name: str, arguments: Any) -> bool:
    if name == "clock":
        return bool(arguments == {})
    return (
        arguments.keys() == {"city", "days"}
        and arguments["city"] in ("Paris", 'R "ö"')
        and 0 <= arguments["days"] < 100
    )


@pytest.mark.parametrize("marks", [MARKS, PLAIN_MARKS], ids=["control", "plain"])
@pytest.mark.parametrize("family", NAMES)
def test_a_required_call_is_one_that_follows_its_schema(family: str, marks: tuple[str, ...]) -> None:
    tokens, reading = vocabulary(*dict.fromkeys((*marks, *HARMONY))), reading_of(family)
    if marks is PLAIN_MARKS:
        # Chance alone does not write out what ends reasoning.
        reading = msgspec.structs.replace(reading, think=None)
    constraint = constraint_of(tokens, reading, TOOLS, ONE)
    assert constraint is not None
    for seed in range(6):
        parts = read(reading, walked(tokens, matcher(tokens, constraint), seed))
        ((name, arguments),) = calls_of(parts)
        assert is_valid(name, arguments)
        assert parts.text == "" or (family == "harmony" and reading.think is None)


@pytest.mark.parametrize("family", NAMES)
def test_a_named_tool_and_several_calls(family: str) -> None:
    tokens, reading = vocabulary(*MARKS), reading_of(family)
    named = constraint_of(tokens, reading, TOOLS, ToolChoice("required", "weather"))
    several = constraint_of(tokens, reading, TOOLS, ToolChoice("required"))
    assert named is not None
    assert several is not None
    for seed in range(3):
        calls = calls_of(read(reading, walked(tokens, matcher(tokens, named), seed)))
        assert [name for name, _ in calls] == ["weather"]
    answer = walked(tokens, matcher(tokens, several), 1, lambda text: text.count("weather") + text.count("clock") > 2)
    calls = calls_of(read(reading, answer))
    assert len(calls) >= (3 if family in ("hermes", "glm", "mistral-args", "gemma4") else 1)
    assert all(is_valid(*call) for call in calls)


WRITTEN = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>',
    "llama3": '{"name": "weather", "parameters": {"city": "Paris", "days": 2}}',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris", "days": 2}}]',
    "mistral-args": '[TOOL_CALLS]weather[ARGS]{"city": "Paris", "days": 2}',
    "harmony": '<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.weather '
    '<|constrain|>json<|message|>{"city": "Paris", "days": 2}',
    "deepseek": '<think>Hm.</think>\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>'
    '{"city": "Paris", "days": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "gemma4": '<|channel>thought\nHm.<channel|><|tool_call>call:weather{"city": "Paris", "days": 2}<tool_call|>',
}  # fmt: skip


@pytest.mark.parametrize(("family", "answer"), WRITTEN.items(), ids=WRITTEN)
@pytest.mark.parametrize("choice", [ONE, ToolChoice("auto", is_parallel=False)], ids=["required", "auto"])
def test_what_models_write_is_allowed(family: str, answer: str, choice: ToolChoice) -> None:
    tokens, reading = vocabulary(*MARKS), reading_of(family)
    constraint = constraint_of(tokens, reading, TOOLS, choice)
    assert constraint is not None
    assert accepts(tokens, matcher(tokens, constraint), answer)
    assert calls_of(read(reading, answer)) == [("weather", {"city": "Paris", "days": 2})]
    for wrong in (answer.replace("weather", "wether"), answer.replace("2", "200"), answer.replace("Paris", "Bonn")):
        assert not accepts(tokens, matcher(tokens, constraint), wrong)


@pytest.mark.parametrize("marks", [MARKS, PLAIN_MARKS], ids=["control", "plain"])
@pytest.mark.parametrize("family", NAMES)
def test_strict_tools_are_held_where_an_answer_may_be_text(family: str, marks: tuple[str, ...]) -> None:
    tokens, reading = vocabulary(*marks), reading_of(family)
    constraint = constraint_of(tokens, reading, STRICT, ToolChoice())
    assert constraint is not None
    said = "So it is.\n\n1 < 2"
    framed = f"<|channel|>final<|message|>{said}" if family == "harmony" else said
    assert accepts(tokens, matcher(tokens, constraint), framed)
    assert read(reading, framed).text == said
    assert constraint_of(tokens, reading, TOOLS, ToolChoice()) is None
    assert constraint_of(tokens, reading, (), ToolChoice()) is None


def test_calls_may_follow_text_once_or_more_often() -> None:
    tokens, reading, call = vocabulary(), reading_of("hermes"), WRITTEN["hermes"]
    for choice, n_most in ((ToolChoice(), 3), (ToolChoice(is_parallel=False), 1)):
        constraint = constraint_of(tokens, reading, STRICT, choice)
        assert constraint is not None
        for n_calls in (1, 2, 3):
            answer = "So.\n" + "\n".join([call] * n_calls)
            assert accepts(tokens, matcher(tokens, constraint), answer) == (n_calls <= n_most)
        assert not accepts(tokens, matcher(tokens, constraint), "So. <tool_call>nothing")


@pytest.mark.parametrize("family", ["hermes", "harmony", "mistral-args"])
def test_reasoning_and_calls_beside_another_form(family: str) -> None:
    """An answer that must follow a schema may be thought about first, or be a call in its place."""
    tokens, reading = vocabulary(*MARKS), reading_of(family)
    wanted = Constraint("json_schema", '{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}')
    constraint = constraint_of(tokens, reading, TOOLS, ToolChoice(), wanted)
    alone = constraint_of(tokens, reading_of(family, ()), (), ToolChoice(), wanted)
    assert constraint is not None
    assert alone is not None
    think = {"hermes": "<think>Hm.</think>\n", "mistral-args": "[THINK]Hm.[/THINK]"}.get(family)
    thought = think or "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    prefix = "" if think else "<|channel|>final<|message|>"
    for form, allows_calls in ((constraint, think is not None), (alone, False)):
        for answer in (f'{thought}{prefix}{{"a": 1}}', f'{prefix}{{"a": 1}}'):
            assert accepts(tokens, matcher(tokens, form), answer)
            assert read(reading, answer).text == '{"a": 1}'
        assert not accepts(tokens, matcher(tokens, form), f'{thought}{prefix}{{"a": 2}}')
        assert not accepts(tokens, matcher(tokens, form), f"{prefix}So.")
        if think:
            assert accepts(tokens, matcher(tokens, form), think + WRITTEN[family]) == allows_calls


def test_reasoning_that_the_prompt_has_closed_does_not_begin_again() -> None:
    tokens = vocabulary()
    for has_thought in (False, True):
        form = constraint_of(
            tokens, reading_of("hermes", has_thought=has_thought), (), ToolChoice(), Constraint("regex", "[a-z]+")
        )
        assert form is not None
        assert accepts(tokens, matcher(tokens, form), "<think>so</think>word") is not has_thought
        assert accepts(tokens, matcher(tokens, form), "word")


def test_reasoning_that_the_prompt_has_begun_ends_before_a_call() -> None:
    tokens, reading = vocabulary(), reading_of("hermes", begins_thinking=True)
    constraint = constraint_of(tokens, reading, TOOLS, ONE)
    assert constraint is not None
    assert accepts(tokens, matcher(tokens, constraint), f"Hm.\n</think>\n\n{WRITTEN['hermes']}")
    assert not accepts(tokens, matcher(tokens, constraint), WRITTEN["hermes"])
