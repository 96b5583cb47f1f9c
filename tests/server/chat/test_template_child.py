"""Chat templates are programs of strangers: they render in a process that is stopped when it takes too much."""

from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from slimoe.server.chat.template_child import TemplateChild, TemplateLimits
from slimoe.server.chat.template_error import ChatTemplateError, TemplateLimitError, UnusableTemplateError

LIMITS = TemplateLimits(
    cpu_seconds=0.5, compile_seconds=30.0, wall_seconds=30.0, memory_bytes=16 << 20, max_output=1 << 20
)
"""Small ones, by the processor's clock: other tests may run beside."""

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
LOOPS += "{% endfor %}{% endfor %}"
TIME = [
    LOOPS,
    "{% set ns = namespace(n=9**60) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{% for i in range(9) %}{{ m(n - 1) }}{% endfor %}{% endif %}{% endmacro %}{{ m(60) }}",
    "{{ lipsum(n=99999)|length }}",
    "{% for i in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
]
MEMORY = [
    "{{ X.ljust(6000000000)|length }}",
    "{{ X.center(6000000000)|length }}",
    "{{ X.zfill(6000000000)|length }}",
    "{{ X|center(6000000000) }}",
    "{{ ('\t' * 1000).expandtabs(100000000)|length }}",
    "{{ '%6000000000s' % X }}",
    "{{ '{:6000000000}'.format(X) }}",
    "{{ '%6000000000s'|format(X) }}",
    "{{ (X ~ '\n' * 1000)|indent(100000000) }}",
    "{{ [1]|tojson(indent=2000000000) }}",
    "{{ ('a' * 100000).translate({97: 'b' * 100000})|length }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000)|length }}",
    "{{ range(9999)|join('a' * 99999)|length }}",
    "{{ X|batch(999999999, 'x')|list|length }}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
]
OUTPUT = ["{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}"]
DEPTH = [
    "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
]


def message(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def many_faced() -> Iterator[TemplateChild]:
    """A template that is a bomb only for a message that says which."""
    bombs = [*TIME, *MEMORY, *OUTPUT, *DEPTH]
    cases = "".join(f"{{% elif t == 'bomb {n}' %}}{bomb.replace('X', 't')}" for n, bomb in enumerate(bombs))
    child = TemplateChild(
        f"{{% set t = messages[0].content %}}{{% if t == 'x' %}}{cases}{{% endif %}}[{{{{ t }}}}]", LIMITS
    )
    yield child
    child.close()


@pytest.mark.parametrize(
    ("n", "limit"),
    list(
        enumerate(
            ["0.5 seconds of processor time"] * len(TIME)
            + ["16 MiB of memory"] * len(MEMORY)
            + ["1048576 characters of output"] * len(OUTPUT)
            + ["1000 nested calls"] * len(DEPTH)
        )
    ),
)
def test_bombs_are_stopped_and_the_next_conversation_is_not(many_faced: TemplateChild, n: int, limit: str) -> None:
    with pytest.raises(TemplateLimitError, match=f"chat template takes more than {limit}"):
        many_faced.render(message(f"bomb {n}"), {}, True)
    assert many_faced.render(message("hello"), {}, True).text == "[hello]"


def test_a_process_serves_until_it_must_be_stopped(many_faced: TemplateChild) -> None:
    assert [many_faced.render(message(f"{n}"), {}, True).text for n in range(3)] == ["[0]", "[1]", "[2]"]
    before = many_faced.pid
    assert many_faced.render(message("again"), {}, True).text == "[again]"
    assert many_faced.pid == before
    with pytest.raises(TemplateLimitError):
        many_faced.render(message("bomb 0"), {}, True)
    assert many_faced.pid is None
    assert before is not None
    assert not psutil.pid_exists(before)


def test_a_process_that_is_gone_is_replaced(many_faced: TemplateChild) -> None:
    assert many_faced.render(message("one"), {}, True).text == "[one]"
    assert many_faced.pid is not None
    process = psutil.Process(many_faced.pid)
    process.kill()
    psutil.wait_procs([process])
    assert many_faced.render(message("two"), {}, True).text == "[two]"


def test_a_process_that_does_not_answer_is_stopped_by_the_clock() -> None:
    child = TemplateChild("[{{ messages[0].content }}]", TemplateLimits(wall_seconds=0.3))
    child.check()
    assert child.pid is not None
    psutil.Process(child.pid).suspend()
    with pytest.raises(TemplateLimitError, match=r"more than 0\.3 seconds"):
        child.render(message("hello"), {}, True)
    child.close()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested too deeply"),
        ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "does not compile"),
        ("{% if %}", "does not compile"),
        ("{{ a }}" * 30_000, "compiling it takes more than 16 MiB of memory"),
        ("x" * (256 * 1024 + 1), "longer than 262144 characters"),
    ],
)
def test_templates_that_cannot_be_compiled(source: str, reason: str) -> None:
    child = TemplateChild(source, LIMITS)
    for _ in range(2):
        with pytest.raises(UnusableTemplateError, match=f"cannot chat.*{reason}"):
            child.check()
    with pytest.raises(UnusableTemplateError):
        child.render(message("hello"), {}, True)
    assert child.pid is None


def test_the_process_knows_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key in its environment, no engine in its memory, no other file open."""
    monkeypatch.setenv("SLIMOE_KEY", "sesame")
    child = TemplateChild("{{ 1 }}")
    child.check()
    assert child.pid is not None
    process = psutil.Process(child.pid)
    assert "SLIMOE_KEY" not in process.environ()
    maps = " ".join(entry.path for entry in process.memory_maps())
    assert not [name for name in ("numpy", "ggml", "llama", "aiohttp") if name in maps]
    assert process.open_files() == []
    child.close()


def test_long_conversations_fit(many_faced: TemplateChild) -> None:
    text = "hello 😀 " * 50_000
    assert many_faced.render(message(text), {}, True).text == f"[{text}]"


def test_refusals_are_the_templates_own_words_but_not_all_of_them() -> None:
    child = TemplateChild("{{ raise_exception(messages[0].content * 2) }}")
    with pytest.raises(ChatTemplateError, match="refuses these messages: nonono") as refusal:
        child.render(message("no" * 10_000), {}, True)
    assert len(str(refusal.value)) < 1000
    child.close()


def test_a_refusal_ends_with_one_full_stop() -> None:
    child = TemplateChild("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ChatTemplateError, match=r"attribute '__class__' of 'list' object is unsafe\.$"):
        child.render(message("hi"), {}, True)
    child.close()
