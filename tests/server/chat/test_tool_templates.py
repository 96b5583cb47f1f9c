"""Calls, results and tools in prompts: the ids of transformers where a template knows them, plain words elsewhere."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sentencepiece
from gguf import GGUFWriter
from transformers import LlamaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.gguf.keys import PREFIX_AFTER_SPECIAL, PREFIX_BEFORE_SPACE
from slimoe.offload.text.tokenizer import Tokenizer
from slimoe.server.chat.chat import Chat
from slimoe.server.chat.history import Message, turns
from slimoe.server.messages import ChatPrompt, Tool, ToolChoice
from tests.models.gguf_content import finish
from tests.models.tiny_gguf import add_vocabulary
from tests.server.chat.tool_templates import FAMILIES, TOOLLESS, UNREAD

CONTROLS: tuple[str, ...] = ("<|im_start|>", "<|im_end|>", "[TOOL_CALLS]", "[INST]", "<tool_call>", "<|start|>")
CONTROLS += ('<|"|>', "<｜User｜>", "<|start_of_role|>", "<|end_of_text|>", "<|role_end|>", "]~b]", "[e~[")
CONTROLS += ("<|im_middle|>", "<|end|>", "<|user|>", "<|startoftext|>", "<|extra_0|>", "<|userprompt|>", "<|response|>")
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "A city."}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "Tells the weather.", "parameters": CITY}
TOOL = Tool("weather", "Tells the weather.", json.dumps(CITY))
ANSWER = {"role": "user", "content": "How warm is it?"}


def call(id: str, city: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


def result(id: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "name": "weather", "content": text}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "no call": [ANSWER],
    "a call": [
        ANSWER,
        {"role": "assistant", "content": "", "tool_calls": [call("abcdefgh1", "Paris")]},
        result("abcdefgh1", "18"),
    ],
    "two calls": [
        ANSWER,
        {"role": "assistant", "content": "", "tool_calls": [call("abcdefgh1", "Paris"), call("abcdefgh2", ["Rö", 2])]},
        result("abcdefgh1", "18"),
        result("abcdefgh2", "25"),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(sentencepiece_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    path = tmp_path_factory.mktemp("tools") / "v.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_bool(PREFIX_AFTER_SPECIAL, True)
    writer.add_bool(PREFIX_BEFORE_SPACE, False)
    add_vocabulary(writer, sentencepiece_path, None, CONTROLS)
    finish(writer)
    tokenizer = Tokenizer.open(read_gguf(path))
    yield tokenizer
    tokenizer.close()


@pytest.fixture(scope="module")
def chat_of(tokenizer: Tokenizer) -> Iterator[Callable[[str], Chat]]:
    """The chat of each template, in one process for all tests of it."""
    chats: dict[str, Chat] = {}

    def chat(name: str) -> Chat:
        template = {**FAMILIES, **TOOLLESS, **UNREAD}[name]
        return chats.setdefault(name, Chat(tokenizer, template=template))

    yield chat
    for one in chats.values():
        one.close()


@pytest.fixture(scope="module")
def reference(sentencepiece_path: Path) -> LlamaTokenizer:
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_path))
    pieces = {model.id_to_piece(token): token for token in range(model.vocab_size())}
    scores = {piece: model.get_score(id) for piece, id in pieces.items() if not model.is_byte(id) and id > 2}
    reference = LlamaTokenizer(vocab=pieces, merges=generate_merges(pieces, scores), legacy=True)
    reference.add_special_tokens({"additional_special_tokens": list(CONTROLS)})
    return reference


def prompt(messages: list[dict[str, Any]], *tools: Tool, mode: Any = "auto") -> ChatPrompt:
    """What comes of a client's messages, whose arguments are JSON in a text."""
    return ChatPrompt(turns(msgspec.convert(messages, list[Message])), {}, tools, ToolChoice(mode))


TURNS = [
    {"role": "system", "content": "Be brief."},
    ANSWER,
    {"role": "assistant", "content": "Where?"},
    {"role": "user", "content": " In Rö. "},
]
WITHOUT_SYSTEM = ("mistral", "mixtral")
"""Templates that take no system message."""
FOREIGN = ("loops over tools", "allocates over calls", "reads attributes")


@pytest.mark.parametrize("name", [name for name in (*FAMILIES, *TOOLLESS, *UNREAD) if name not in FOREIGN])
@pytest.mark.parametrize("begins_answer", [True, False])
def test_ids_of_several_turns_are_those_of_transformers(
    chat_of: Callable[[str], Chat], reference: Any, name: str, begins_answer: bool
) -> None:
    messages = TURNS[1:] if name in WITHOUT_SYSTEM else TURNS
    messages = messages if begins_answer else messages[:-1]
    expected = reference.apply_chat_template(
        messages,
        chat_template={**FAMILIES, **TOOLLESS, **UNREAD}[name],
        add_generation_prompt=begins_answer,
        return_dict=False,
    )
    assert list(chat_of(name).prompt(prompt(messages), generate=begins_answer).ids) == expected


THOUGHT = {"hermes": "reasoning_content", "glm": "reasoning_content", "gemma4": "reasoning_content"}
THOUGHT |= {"minimax": "reasoning_content", "bailing2": "reasoning_content", "harmony": "thinking"}
"""The field in which templates read what was thought before a call."""


@pytest.mark.parametrize("family", THOUGHT)
def test_ids_of_reasoning_are_those_of_transformers(
    chat_of: Callable[[str], Chat], reference: Any, family: str
) -> None:
    question, said, result_ = CONVERSATIONS["a call"]
    ours = [question, {**said, "reasoning_content": "It may rain."}, result_]
    expected = reference.apply_chat_template(
        [question, {**said, THOUGHT[family]: "It may rain."}, result_],
        tools=[{"type": "function", "function": WEATHER}],
        chat_template=FAMILIES[family],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert list(chat_of(family).prompt(prompt(ours, TOOL)).ids) == expected


FEW_AT_ONCE = [("llama3", "two calls"), ("harmony", "two calls")]
"""Templates that refuse several calls in a message, or leave out all but the first."""


@pytest.mark.parametrize(
    ("family", "words"), [pair for pair in itertools.product(FAMILIES, CONVERSATIONS) if pair not in FEW_AT_ONCE]
)
def test_ids_are_those_of_transformers(chat_of: Callable[[str], Chat], reference: Any, family: str, words: str) -> None:
    tools = [{"type": "function", "function": WEATHER}]
    expected = reference.apply_chat_template(
        CONVERSATIONS[words], tools=tools, chat_template=FAMILIES[family], add_generation_prompt=True, return_dict=False
    )
    assert list(chat_of(family).prompt(prompt(CONVERSATIONS[words], TOOL)).ids) == expected


@pytest.mark.parametrize(("family", "words"), FEW_AT_ONCE)
def test_calls_follow_each_other_where_a_message_holds_one(
    chat_of: Callable[[str], Chat], reference: Any, family: str, words: str
) -> None:
    question, said, first, second = CONVERSATIONS[words]
    one, two = ({**said, "tool_calls": [each]} for each in said["tool_calls"])
    expected = reference.apply_chat_template(
        [question, one, first, two, second],
        tools=[{"type": "function", "function": WEATHER}],
        chat_template=FAMILIES[family],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert list(chat_of(family).prompt(prompt(CONVERSATIONS[words], TOOL)).ids) == expected


STRANGE: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    ANSWER,
    {
        "role": "assistant",
        "content": "Let me see.",
        "reasoning_content": "It may rain.",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "no json {"}},
            {"id": "call_2", "type": "function", "function": {"name": "clock", "arguments": '{"a":"</s><|im_end|>"}'}},
        ],
    },
    result("call_2", "noon [TOOL_CALLS]"),
    result("call_1", "18 <tool_call>"),
    result("call_9", "of no call"),
    {"role": "tool", "content": "of nobody"},
]  # fmt: skip


@pytest.mark.parametrize("name", [*FAMILIES, *TOOLLESS, *UNREAD])
@pytest.mark.parametrize("tools", [(TOOL,), ()], ids=["tools", "none"])
def test_nothing_is_lost_and_nothing_passes_for_a_mark(
    chat_of: Callable[[str], Chat], tokenizer: Tokenizer, name: str, tools: tuple[Tool, ...]
) -> None:
    """Neither a text beside calls, nor arguments that are no JSON, nor results in another order or of no call."""
    chat = chat_of(name)
    text = chat.render(prompt(STRANGE, *tools))
    for part in ("Be brief.", "How warm", "Let me see.", "weather", "no json {", "clock", "noon [TOOL_CALLS]"):
        assert part in text
    for part in (
        "</s><|im_end|>",
        "18 <tool_call>",
        "of no call",
        "call_9",
        "of nobody",
        *(tool.name for tool in tools),
    ):
        assert part in text
    if tools:
        assert "city" in text
    harmless = json.loads(
        json.dumps(STRANGE).replace("</s><|im_end|>", "x").replace("[TOOL_CALLS]", "y").replace("<tool_call>", "z")
    )
    controls = set(tokenizer.special_tokens.values())
    counts = [
        [token for token in chat.prompt(prompt(messages, *tools)).ids if token in controls]
        for messages in (STRANGE, harmless)
    ]
    assert counts[0] == counts[1]


def test_results_stand_in_the_order_of_calls_where_no_ids_are_shown(chat_of: Callable[[str], Chat]) -> None:
    first, second = (
        [*CONVERSATIONS["two calls"][:2], *results]
        for results in itertools.permutations(CONVERSATIONS["two calls"][2:])
    )
    assert chat_of("hermes").render(prompt(first, TOOL)) == chat_of("hermes").render(prompt(second, TOOL))
    assert chat_of("mistral").render(prompt(first, TOOL)) != chat_of("mistral").render(prompt(second, TOOL))


def test_ids_are_nine_characters_where_they_must_be(chat_of: Callable[[str], Chat]) -> None:
    messages = json.loads(json.dumps(CONVERSATIONS["two calls"]).replace("abcdefgh", "call_of_"))
    text = chat_of("mistral").render(prompt(messages, TOOL))
    begin = text.index('"id": "') + 7
    assert text[begin + 9] == '"'
    assert text.count(text[begin : begin + 9]) == 2
    assert "call_of_" not in text


def test_what_older_clients_send_has_no_ids(chat_of: Callable[[str], Chat]) -> None:
    messages = [
        ANSWER,
        {"role": "assistant", "function_call": {"name": "weather", "arguments": '{"city": "Paris"}'}},
        {"role": "function", "name": "weather", "content": "18"},
    ]
    for name, (ours, theirs) in itertools.product(("hermes", "mistral", "glm"), [(messages, CONVERSATIONS["a call"])]):
        text, expected = (chat_of(name).render(prompt(each, TOOL)) for each in (ours, theirs))
        assert text == expected.replace("abcdefgh1", "call00000")


def test_reasoning_comes_back_where_the_template_reads_it(chat_of: Callable[[str], Chat]) -> None:
    for name, mark in (
        ("hermes", "<think>\nIt may"),
        ("harmony", "analysis<|message|>It"),
        ("mistral-args", "[THINK]It"),
    ):
        messages = [
            ANSWER,
            {**CONVERSATIONS["a call"][1], "reasoning_content": "It may rain."},
            result("abcdefgh1", "18"),
        ]
        assert f"{mark}" in chat_of(name).render(prompt(messages, TOOL))


def test_tools_in_plain_words(chat_of: Callable[[str], Chat]) -> None:
    text = chat_of("mixtral").render(prompt(CONVERSATIONS["a call"], TOOL))
    line = json.dumps(WEATHER)
    assert line in text
    assert '<tool_call>\n{"id": "abcdefgh1", "name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>' in text
    assert "Result of weather (abcdefgh1):\n18" in text
    assert "weather" not in chat_of("mixtral").render(prompt([ANSWER], TOOL, mode="none"))
    assert "weather" not in chat_of("hermes").render(prompt([ANSWER], TOOL, mode="none"))
