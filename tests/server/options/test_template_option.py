"""`--chat-template`: built-in templates by name, files, and what is neither."""

from pathlib import Path
from typing import Any

import click
import pytest

from slimoe.server.chat.template_child import TemplateChild
from slimoe.server.options.template_option import NAMES, ChatTemplate

OPTION = ChatTemplate()
SAID: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_built_in_templates_know_tools() -> None:
    assert NAMES == ("chatml", "llama3", "mistral", "plain")
    assert OPTION.convert("plain", None, None) == ""
    for name, mark in (("chatml", "<|im_start|>"), ("llama3", "<|start_header_id|>"), ("mistral", "[INST]")):
        child = TemplateChild(OPTION.convert(name, None, None), values={"bos_token": "<s>", "eos_token": "</s>"})
        caps = child.caps()
        assert (caps.tools, caps.calls) == (True, "object")
        text = child.render(SAID, {}, True).text
        assert mark in text
        assert text.index("Be brief.") < text.index("Hi")
        child.close()


def test_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0].content }}")
    assert OPTION.convert(str(path), None, None) == "{{ messages[0].content }}"


def test_what_is_no_template(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_bytes(b"x" * (1 << 20) + b"x")
    for value, words in (
        ("chatlm", "'chatlm' is none of chatml, llama3, mistral, plain, and no file"),
        (str(tmp_path), "none of chatml, llama3, mistral, plain, and no file that can be read"),
        (str(tmp_path / "empty"), "is empty. plain is the name for no template"),
        (str(tmp_path / "bytes"), "is no text"),
        (str(tmp_path / "large"), "has 1,048,577 bytes"),
    ):
        with pytest.raises(click.BadParameter, match=words):
            OPTION.convert(value, None, None)
