"""Chat prompts: the same ids as transformers, and nothing a client writes can pass for the model's own marks."""

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf import GGUFWriter
from transformers import LlamaTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import generate_merges

from slimoe.converter.source.tokenizer.check import HARD_TEXTS
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.gguf.keys import PREFIX_AFTER_SPECIAL
from slimoe.offload.text.tokenizer import Tokenizer
from slimoe.server.chat.chat import FALLBACK_STOP, Chat
from slimoe.server.chat.template import MAX_SOURCE, ChatTemplate
from slimoe.server.chat.template_error import ChatTemplateError
from slimoe.server.messages import ChatPrompt, Turn
from tests.models.gguf_content import finish
from tests.models.tiny_gguf import MIXTRAL_TEMPLATE, add_vocabulary

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


def write_vocabulary(path: Path, sentencepiece_path: Path, template: str | None, legacy: bool = True) -> Tokenizer:
    writer = GGUFWriter(path, "llama")
    writer.add_bool(PREFIX_AFTER_SPECIAL, legacy)
    add_vocabulary(writer, sentencepiece_path, template, ("<|im_start|>", "<|im_end|>"))
    finish(writer)
    return Tokenizer.open(read_gguf(path))


@pytest.fixture(scope="module", params=[MIXTRAL_TEMPLATE, CHATML], ids=["mixtral", "chatml"])
def template(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "new"])
def legacy(request: pytest.FixtureRequest) -> bool:
    """Whether the space prefix is repeated after each special token, as older tokenizers do it."""
    return bool(request.param)


@pytest.fixture(scope="module")
def tokenizer(
    template: str, legacy: bool, sentencepiece_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tokenizer]:
    path = tmp_path_factory.mktemp("chat") / "v.gguf"
    tokenizer = write_vocabulary(path, sentencepiece_path, template, legacy)
    yield tokenizer
    tokenizer.close()


@pytest.fixture(scope="module")
def chat(tokenizer: Tokenizer) -> Iterator[Chat]:
    """Chats of the template, in one process for all."""
    chat = Chat(tokenizer)
    yield chat
    chat.close()


@pytest.fixture(scope="module")
def reference(template: str, legacy: bool, sentencepiece_path: Path) -> PreTrainedTokenizerBase:
    """Made of the vocabulary itself: transformers reads tokenizer.model only with libraries that nothing else needs."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_path))
    pieces = {model.id_to_piece(token): token for token in range(model.vocab_size())}
    scores = {
        piece: model.get_score(token) for piece, token in pieces.items() if not model.is_byte(token) and token > 2
    }
    reference = LlamaTokenizer(vocab=pieces, merges=generate_merges(pieces, scores), legacy=legacy)
    reference.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    reference.chat_template = template
    return reference


def conversation(*texts: str) -> ChatPrompt:
    roles = ("user", "assistant")
    return ChatPrompt(tuple(Turn(roles[n % 2], text) for n, text in enumerate(texts)))


@pytest.mark.parametrize(
    "texts", [("hello",), ("hello world", "tell me", "a lazy dog"), ("  a\n\n", " b ", "日本語 ü")]
)
def test_ids_are_those_of_transformers(chat: Chat, reference: Any, texts: tuple[str, ...]) -> None:
    messages = [{"role": m.role, "content": m.content} for m in conversation(*texts).messages]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(chat.prompt(conversation(*texts)).ids) == expected


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_a_users_text_stays_text(chat: Chat, tokenizer: Tokenizer, text: str) -> None:
    """However it is spelt, a message adds no control token and arrives letter by letter."""
    n = tokenizer.n_vocab
    controls = {0, 1, 2, n - 2, n - 1}
    plain = [token for token in chat.prompt(conversation("x")).ids if token in controls]
    ids = chat.prompt(conversation(f"a{text}b")).ids
    assert [token for token in ids if token in controls] == plain
    assert f"a{text}b".replace("▁", " ") in tokenizer.decode(ids)
    assert chat.render(conversation(f"a{text}b")).count(f"a{text}b") == 1


@pytest.mark.parametrize(
    "text", ["</s>", "<s>", "<|im_end|>", "</s", "/s>", ">", "<", "<|im_end|", "\ufdd0", "\ufdd03\ufdd1"]
)
def test_parts_of_marks_are_not_completed_by_the_template(text: str, sentencepiece_path: Path, tmp_path: Path) -> None:
    glue = "{{ bos_token }}{% for m in messages %}<{{ m.content }}>{{ '</' }}{{ m.content }}{{ '|>' }}{% endfor %}"
    tokenizer = write_vocabulary(tmp_path / "v.gguf", sentencepiece_path, glue)
    ids = Chat(tokenizer).prompt(conversation(text)).ids
    assert [token for token in ids if token in tokenizer.special_tokens.values()] == [1]
    assert tokenizer.decode(ids) == f"<{text}></{text}|>"
    tokenizer.close()


def test_a_trailing_assistant_message_is_continued(chat: Chat, reference: Any) -> None:
    messages = [{"role": "user", "content": "tell me"}, {"role": "assistant", "content": "the quick "}]
    expected = reference.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    assert list(chat.prompt(conversation("tell me", "the quick ")).ids) == expected


def test_system_and_repeated_roles_are_folded_for_a_template_that_refuses_them(tokenizer: Tokenizer) -> None:
    roles = [("system", "be brief"), ("developer", "in verse"), ("user", "hello"), ("user", "world"), ("tool", "42")]
    messages = ChatPrompt(tuple(Turn(role, text) for role, text in roles))
    text = Chat(tokenizer).render(messages)
    if "[INST]" in (tokenizer.chat_template or ""):
        assert text == "<s>[INST] be brief\n\nin verse\n\nhello\n\nworld\n\n42 [/INST]"
    else:
        assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>developer\nin verse<|im_end|>\n")


def test_a_system_text_that_the_template_drops_is_folded(sentencepiece_path: Path, tmp_path: Path) -> None:
    users_only = "{% for m in messages if m.role == 'user' %}Q: {{ m.content }}{% endfor %}"
    tokenizer = write_vocabulary(tmp_path / "v.gguf", sentencepiece_path, users_only)
    messages = ChatPrompt((Turn("system", "be brief"), Turn("user", "hello")))
    assert Chat(tokenizer).render(messages) == "Q: be brief\n\nhello"
    tokenizer.close()


def test_without_a_template_turns_are_written_out(sentencepiece_path: Path, tmp_path: Path) -> None:
    tokenizer = write_vocabulary(tmp_path / "v.gguf", sentencepiece_path, None)
    prompt = Chat(tokenizer).prompt(conversation("hello", "world", "again </s>"))
    assert prompt.ids[0] == 1
    assert 2 not in prompt.ids
    assert tokenizer.decode(prompt.ids[1:]) == "User: hello\n\nAssistant: world\n\nUser: again </s>\n\nAssistant:"
    assert prompt.stop == FALLBACK_STOP
    tokenizer.close()


@pytest.mark.parametrize(
    ("thinks", "values", "expected"),
    [
        (None, {}, "Q: x"),
        (True, {}, "Q: x on"),
        (False, {}, "Q: x off"),
        (True, {"enable_thinking": False}, "Q: x off"),
        (False, {"enable_thinking": True}, "Q: x on"),
    ],
)
def test_whether_it_thinks_is_said_by_the_client_or_else_by_the_server(
    thinks: bool | None, values: dict[str, bool], expected: str, sentencepiece_path: Path, tmp_path: Path
) -> None:
    template = (
        "Q: {{ messages[0].content }}{% if enable_thinking is defined %}"
        " {{ 'on' if enable_thinking else 'off' }}{% endif %}"
    )
    tokenizer = write_vocabulary(tmp_path / "v.gguf", sentencepiece_path, template)
    chat = Chat(tokenizer, thinks=thinks)
    assert chat.render(ChatPrompt((Turn("user", "x"),), values)) == expected
    chat.close()
    tokenizer.close()


def test_the_template_reads_what_the_client_passes(sentencepiece_path: Path, tmp_path: Path) -> None:
    tokenizer = write_vocabulary(
        tmp_path / "v.gguf", sentencepiece_path, "{{ bos_token }}{{ mood }}{{ messages[0].content }}"
    )
    values = {"mood": "sad</s>", "bos_token": "<unk>"}
    ids = Chat(tokenizer).prompt(ChatPrompt((Turn("user", "x"),), values)).ids
    assert ids[0] == 1
    assert {0, 2}.isdisjoint(ids)
    assert tokenizer.decode(ids[1:]).strip() == "sad</s>x"
    tokenizer.close()


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('no such thing') }}", "no such thing"),
        ("{{ 'a' * 10**9 }}", "too often"),
        ("{{ [1] * 10000000 }}", "too often"),
        ("{{ 9 ** 999999 }}", "too high a power"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endfor %}",
            "characters of output",
        ),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{{ messages[0].content + 1 }}", "refuses"),
        ("{{ messages[7].content.x }}", "refuses"),
    ],
)
def test_templates_are_kept_in_their_box(source: str, words: str) -> None:
    with pytest.raises(ChatTemplateError, match=words):
        ChatTemplate(source).render(MESSAGES, {}, True)


@pytest.mark.parametrize("source", ["{% if %}", "{{ 'x'", "x" * (MAX_SOURCE + 1)])
def test_templates_that_are_none(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="This model cannot chat, for its chat template cannot be used"):
        ChatTemplate(source)


def test_what_templates_are_written_against() -> None:
    source = (
        "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}{% endfor %}"
        "{{ strftime_now('%Y') }}{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}\n"
        "  {% if true %}\ny{% endif %}"
    )
    text = ChatTemplate(source).render([*MESSAGES, *MESSAGES], {}, True)
    year = datetime.datetime.now().year
    assert text == f'{{"role": "user", "content": "hi"}}{year}2\ny'


@pytest.mark.parametrize(("name", "pattern"), [("date_string", "%d %b %Y"), ("datetime", "%b %d %Y")])
def test_templates_that_want_the_day_are_told_it(name: str, pattern: str) -> None:
    template = ChatTemplate(f"{{% if {name} is not defined %}}26 Jul 2024{{% else %}}{{{{ {name} }}}}{{% endif %}}")
    days = [datetime.datetime.now().strftime(pattern)]
    text = template.render(MESSAGES, {}, True)
    days.append(datetime.datetime.now().strftime(pattern))
    assert text.startswith(tuple(days))
    assert template.render(MESSAGES, {name: "the day before"}, True) == "the day before"


def test_tools_are_a_text_for_templates_that_want_one() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    source = "{{ 'functools[' }}{{ 'Tools: ' + functions }}"
    assert ChatTemplate(source).render(MESSAGES, {"tools": tools}, True) == "functools[Tools: " + json.dumps(
        tools, indent=2
    )
    assert ChatTemplate(source).render(MESSAGES, {}, True) == "functools[Tools: []"
    assert ChatTemplate("{{ functions is defined }}").render(MESSAGES, {"tools": tools}, True) == "False"
