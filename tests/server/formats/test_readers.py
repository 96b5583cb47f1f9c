"""Answers of every family, read whole, letter by letter and in random pieces: the same text, reasoning and calls."""

import json
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

from slimoe.server.formats.answer_reader import Parts
from slimoe.server.formats.families import FAMILIES, reader_of
from slimoe.server.formats.marked_reader import MAX_HEAD
from slimoe.server.messages import Reading

PARIS, ROME = ("weather", {"city": "Paris"}), ("weather", {"city": 'R "ö"\n<b>', "days": 2, "deep": {"a": [1, None]}})
THINKS = {family.name: family.think for family in FAMILIES}
SAME = {"mistral-args": "mistral, names", "deepseek-r1": "deepseek, blocks"}


class Case(NamedTuple):
    family: str
    answer: str
    text: str = ""
    reasoning: str = ""
    calls: Sequence[tuple[str, Any]] = ()


def hermes(*calls: tuple[str, Any]) -> str:
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>" for name, arguments in calls
    )


ROME_CODER = """<tool_call>
<function=weather>
<parameter=city>
R "ö"
<b>
</parameter>
<parameter=days>
2
</parameter>
<parameter=deep>
{"a": [1, null]}
</parameter>
</function>
</tool_call>"""
ROME_GLM = """<tool_call>weather
<arg_key>city</arg_key>
<arg_value>R "ö"
<b></arg_value>
<arg_key>days</arg_key>
<arg_value>2</arg_value>
<arg_key>deep</arg_key>
<arg_value>{"a": [1, null]}</arg_value>
</tool_call>"""
MINIMAX = """<minimax:tool_call>
<invoke name="weather">
<parameter name="city">R "ö"
<b></parameter>
<parameter name="days">2</parameter>
<parameter name="deep">{"a": [1, null]}</parameter>
</invoke>
<invoke name="weather">
<parameter name="city">Paris</parameter>
</invoke>
</minimax:tool_call>"""
ROME_GEMMA = '<|tool_call>call:weather{city:<|"|>R "ö"\n<b><|"|>,days:2,deep:{a:[1,null]}}<tool_call|>'
ROME_JSON = json.dumps(ROME[1], ensure_ascii=False)
V31 = f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{ROME_JSON}<｜tool▁call▁end｜>"
V31 += '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
R1 = f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{ROME_JSON}\n```"
R1 += "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
R1 += '{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
LONG = {"text": "word, {<tool_call|>} " * (MAX_HEAD // 20)}
HM = "Hm,  it may."
HARMONY = "<|channel|>analysis<|message|>Hm,  it may.\n<|end|><|start|>assistant"
CASES = {
    "hermes": Case("hermes", "Let me see.\n" + hermes(PARIS, ROME), "Let me see.", calls=(PARIS, ROME)),
    "hermes, reasoning": Case("hermes", "<think>\nHm,  it may.\n\n</think>\n\n" + hermes(PARIS), "", HM, [PARIS]),
    "hermes, other order": Case(
        "hermes", '<tool_call>{"arguments": "{\\"city\\": \\"Paris\\"}", "name": "weather"}</tool_call>', calls=[PARIS]
    ),
    "hermes, no end": Case("hermes", hermes(ROME).removesuffix("\n</tool_call>"), calls=[ROME]),
    "hermes, line break in a text": Case(
        "hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\ny\\d"}}</tool_call>', calls=[("f", {"a": "x\ny\\d"})]
    ),
    "hermes, no arguments": Case("hermes", '<tool_call>{"name": "f", "arguments": {}}</tool_call>', calls=[("f", {})]),
    "hermes, no JSON": Case("hermes", "a <tool_call>b</tool_call> c", "a <tool_call>b</tool_call> c"),
    "hermes, Python": Case(
        "hermes",
        "<tool_call>{'name': 'f', 'arguments': {'a': 1}}</tool_call>",
        "<tool_call>{'name': 'f', 'arguments': {'a': 1}}</tool_call>",
    ),
    "hermes, text only": Case("hermes", " a < b <tool <think", " a < b <tool <think"),
    "hermes, text of blanks": Case("hermes", "\n\n", "\n\n"),
    "hermes, cut off": Case("hermes", "a <tool_c", "a <tool_c"),
    "qwen-coder": Case("qwen-coder", f"Let me see.\n\n{ROME_CODER}\n{ROME_CODER}", "Let me see.", calls=(ROME, ROME)),
    "qwen-coder, no tags": Case(
        "qwen-coder", "<function=f>\n<parameter=a>true</parameter>\n</function>", calls=[("f", {"a": True})]
    ),
    "qwen-coder, JSON": Case("qwen-coder", hermes(PARIS), calls=[PARIS]),
    "qwen-coder, nothing": Case("qwen-coder", "<tool_call><function=f></function></tool_call>", calls=[("f", {})]),
    "qwen-coder, text": Case("qwen-coder", "a <function=\nb", "a <function=\nb"),
    "glm": Case("glm", f"\n<think>Hm,  it may.</think>\nSo.\n{ROME_GLM}\n{ROME_GLM}", "So.", HM, (ROME, ROME)),
    "glm, nothing": Case("glm", "<tool_call>f\n</tool_call>", calls=[("f", {})]),
    "glm, text": Case("glm", "a <tool_call>b c</tool_call>", "a <tool_call>b c</tool_call>"),
    "minimax": Case("minimax", f"<think>\nHm,  it may.\n</think>\n\nSo.\n{MINIMAX}", "So.", HM, (ROME, PARIS)),
    "minimax, nothing": Case(
        "minimax", '<minimax:tool_call>\n<invoke name="f">\n</invoke>\n</minimax:tool_call>', calls=[("f", {})]
    ),
    "minimax, JSON": Case(
        "minimax",
        '<minimax:tool_call><invoke name="weather">{"city": "Paris"}\n</invoke></minimax:tool_call>',
        calls=[PARIS],
    ),
    "minimax, no end": Case("minimax", MINIMAX.removesuffix("\n</minimax:tool_call>"), calls=(ROME, PARIS)),
    "minimax, text": Case("minimax", "a <minimax:tool_call> <invoke b", "a <minimax:tool_call> <invoke b"),
    "mistral": Case("mistral",
        'So. [TOOL_CALLS] [{"name": "weather", "arguments": ' + ROME_JSON + '}, {"name": "weather", '
        '"arguments": {"city": "Paris"}, "id": "abcdefgh1"}]', "So.", calls=(ROME, PARIS)),
    "mistral, names": Case("mistral", "[THINK]Hm,  it may.[/THINK]So.[TOOL_CALLS]weather[ARGS]" + ROME_JSON +
        '[TOOL_CALLS]weather[CALL_ID]abcdefgh1[ARGS]{"city": "Paris"}', "So.", HM, (ROME, PARIS)),
    "mistral, no mark of arguments": Case("mistral", '[TOOL_CALLS]weather{"city": "Paris"}', calls=[PARIS]),
    "mistral, text": Case("mistral", "a [TOOL_CALLS] b [c]", "a [TOOL_CALLS] b [c]"),
    "mistral, other order": Case("mistral",
        '[TOOL_CALLS][{"arguments": {"city": "Paris"}, "name": "weather"}]', calls=[PARIS]),
    "llama3": Case("llama3", '{"name": "weather", "parameters": ' + ROME_JSON + '}; {"name": "weather", "parameters": '
        '{"city": "Paris"}}', calls=(ROME, PARIS)),
    "llama3, tag": Case("llama3",
        '<|python_tag|>{"type": "function", "name": "weather", "parameters": {"city": "Paris"}}',
        calls=[PARIS]),
    "llama3, another object": Case("llama3",
        '{"name": "Ann", "parameters": {"a": 1}}', '{"name": "Ann", "parameters": {"a": 1}}'),
    "llama3, JSON": Case("llama3", '{"a": [1]} b', '{"a": [1]} b'),
    "llama3, code": Case("llama3", "<|python_tag|>print(1)", "<|python_tag|>print(1)"),
    "harmony": Case("harmony",
        f"{HARMONY}<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{ROME_JSON}"
        "<|call|>", "", HM, [ROME]),
    "harmony, addressed before": Case("harmony", f"{HARMONY} to=functions.weather<|channel|>commentary json<|message|>"
        f"{ROME_JSON}<|call|>", "", HM, [ROME]),
    "harmony, addressed at once": Case("harmony",
        " to=functions.f<|channel|>commentary json<|message|>{}", calls=[("f", {})]),
    "harmony, final": Case("harmony", f"{HARMONY}<|channel|>final<|message|>So  it is.<|return|>", "So  it is.", HM),
    "harmony, text": Case("harmony", "So it is.", "So it is."),
    "harmony, no object": Case("harmony", "<|channel|>commentary to=functions.f<|message|>x = 1<|call|>", "x = 1"),
    "deepseek": Case("deepseek", f"<think>Hm,  it may.</think>So.{V31}", "So.", HM, (ROME, PARIS)),
    "deepseek, blocks": Case("deepseek", f"<think>\nHm,  it may.\n</think>\n\nSo.\n{R1}", "So.", HM, (ROME, PARIS)),
    "deepseek, text": Case("deepseek", "a <｜tool▁calls▁begin｜> b", "a <｜tool▁calls▁begin｜> b"),
    "gemma4": Case("gemma4",
        f"<|channel>thought\nHm,  it may.\n<channel|>So.{ROME_GEMMA}{ROME_GEMMA}", "So.", HM, (ROME, ROME)),
    "gemma4, words": Case("gemma4", "<|tool_call>call:f{a:true,b:-1.5e3,c:yes,d:[],e:{}}<tool_call|>",
        calls=[("f", {"a": True, "b": -1500.0, "c": "yes", "d": [], "e": {}})]),
    "gemma4, JSON": Case("gemma4", f"<|tool_call>call:weather{ROME_JSON}<tool_call|>", calls=[ROME]),
    "gemma4, long JSON": Case("gemma4", f"<|tool_call>call:f{json.dumps(LONG)}<tool_call|>", calls=[("f", LONG)]),
    "gemma4, text": Case("gemma4", "a <|tool_call>b<tool_call|>", "a <|tool_call>b<tool_call|>"),
}  # fmt: skip


def read(reading: Reading, pieces: Sequence[str]) -> Parts:
    reader = reader_of(reading)
    parts = [*map(reader.feed, pieces), reader.finish()]
    calls = tuple(delta for part in parts for delta in part.calls)
    return Parts("".join(part.text for part in parts), "".join(part.reasoning for part in parts), calls)


def calls_of(parts: Parts) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []
    for delta in parts.calls:
        if delta.name:
            assert (delta.number, delta.arguments) == (len(calls), "")
            assert delta.id
            calls.append((delta.name, ""))
        else:
            assert delta.number == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.arguments)
    return calls


def pieces_of(answer: str, seed: int) -> list[str]:
    chance = random.Random(seed)
    cuts = sorted(chance.sample(range(len(answer) + 1), min(len(answer), chance.randrange(1, 9))))
    return [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]


def reading_of(family: str, **more: Any) -> Reading:
    return Reading(family, THINKS[family], has_tools=True, texts={"weather": ("city",)}, **more)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_answer_reads_the_same_however_it_comes(case: Case) -> None:
    reading = reading_of(case.family)
    whole = read(reading, [case.answer])
    assert (whole.text, whole.reasoning) == (case.text, case.reasoning)
    assert [(name, json.loads(arguments)) for name, arguments in calls_of(whole)] == list(case.calls)
    for pieces in (list(case.answer), *(pieces_of(case.answer, seed) for seed in range(20))):
        again = read(reading, pieces)
        assert (again.text, again.reasoning, calls_of(again)) == (whole.text, whole.reasoning, calls_of(whole))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_answer_that_breaks_off_never_raises(case: Case) -> None:
    """Wherever it ends, and whatever stands in the place of a character."""
    reading = reading_of(case.family)
    for n in range(len(case.answer)):
        read(reading, [case.answer[:n]])
        read(reading, [case.answer[:n], "}", case.answer[n + 1 :]])


_NAMED_LAST = ("hermes, other order", "mistral, other order", "glm, nothing")
CALLING = {name: case for name, case in CASES.items() if case.calls and name not in _NAMED_LAST}


@pytest.mark.parametrize("case", CALLING.values(), ids=CALLING)
def test_of_a_call_that_is_cut_off_nothing_is_said(case: Case) -> None:
    """Wherever that is, once its name is known."""
    reading = reading_of(case.family)
    whole = calls_of(read(reading, [case.answer]))
    n_cut = 0
    for n in range(len(case.answer)):
        for pieces in ([case.answer[:n]], list(case.answer[:n])):
            parts = read(reading, pieces)
            calls = calls_of(parts)
            if len(calls) == len(whole):
                n_cut += 1
                assert parts.text == case.text
                assert calls[:-1] == whole[:-1]
    assert n_cut > 1


@pytest.mark.parametrize("case", CALLING.values(), ids=CALLING)
def test_where_calls_are_demanded_nothing_else_is_said(case: Case) -> None:
    """Wherever the answer is cut off, before its first call or between two."""
    reading = reading_of(case.family, must_call=True)
    for n in range(len(case.answer)):
        assert read(reading, [case.answer[:n]]).text == ""
    assert len(calls_of(read(reading, [case.answer]))) == len(case.calls)


@pytest.mark.parametrize("family", THINKS)
def test_arguments_are_told_as_they_come(family: str) -> None:
    case = CASES[SAME.get(family, family)]
    reader = reader_of(reading_of(family))
    told = [reader.feed(char) for char in case.answer]
    n_with_arguments = sum(any(delta.arguments for delta in parts.calls) for parts in told)
    assert n_with_arguments > 20


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_without_tools_and_reasoning_all_is_text(case: Case) -> None:
    if case.family == "harmony":
        return
    assert read(Reading(case.family), list(case.answer)) == Parts(case.answer)
    if case.calls and not case.reasoning:
        assert read(Reading(case.family, THINKS[case.family]), [case.answer]) == Parts(case.answer)


def test_reasoning_that_the_prompt_has_begun() -> None:
    reading = Reading("hermes", ("<think>", "</think>"), begins_thinking=True, has_tools=True)
    assert read(reading, ["\nHm.\n</th", "ink>\n\nYes."]) == Parts("Yes.", "Hm.")
    assert read(reading, ["Hm."]) == Parts("", "Hm.")
    amid = read(reading, list("Hm. " + hermes(PARIS)))
    assert (amid.reasoning, calls_of(amid)) == ("Hm.", [("weather", json.dumps(PARIS[1]))])


def test_harmonys_channels_without_tools_or_split() -> None:
    final = f"{HARMONY}<|channel|>final<|message|>So it is.<|return|>"
    assert read(Reading("harmony", THINKS["harmony"]), [final]) == Parts("So it is.", HM)
    assert read(Reading("harmony", None, has_tools=True), [final]) == Parts("Hm,  it may.\n\n\nSo it is.")


def test_ids_are_new_and_of_the_length_that_the_template_takes() -> None:
    answer = hermes(PARIS, ROME)
    long, short = (
        [delta.id for delta in read(reading_of("hermes", has_short_ids=is_short), [answer]).calls if delta.id]
        for is_short in (False, True)
    )
    assert len({*long, *short}) == 4
    assert all(id.startswith("call_") and id[5:].isalnum() for id in long)
    assert all(len(id) == 9 and id.isalnum() for id in short)
