"""Conversations wait in turn for the model's template, and no longer than it is worth while."""

import queue
import threading
from typing import Any, cast

import pytest

from slimoe.offload.text.generation import GenerationRequest
from slimoe.server import messages
from slimoe.server.api_error import from_failure
from slimoe.server.chat.prompts import Prepared, Prompts
from slimoe.server.chat.template_error import TemplateLimitError
from slimoe.server.process.preparer import MOST_STOPPED, Job, Preparer

TIMEOUT = 30.0


class Scripted:
    """Prompts whose template is stopped for what begins with `bomb`; nothing goes on until `may_go_on` is set."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()

    def prepare(self, request: GenerationRequest, source: messages.PromptSource) -> Prepared:
        assert self.may_go_on.wait(TIMEOUT)
        if isinstance(source, messages.ChatPrompt) and source.messages[0].content.startswith("bomb"):
            raise TemplateLimitError("0.5 seconds of processor time")
        return Prepared(request)


class Waiting:
    """A preparer, what it says, and the jobs that it is given."""

    def __init__(self) -> None:
        self.prompts = Scripted()
        self.said: queue.SimpleQueue[messages.Message] = queue.SimpleQueue()
        self.preparer = Preparer(cast(Prompts, self.prompts), self.said.put, lambda job: None)

    def put(self, *texts: str) -> None:
        for n, text in enumerate(texts):
            prompt = messages.ChatPrompt((messages.Turn("user", text),))
            self.preparer.prepare(Job(messages.Submit(n, prompt, GenerationRequest((1,)))))

    def told(self, n_answers: int) -> list[Any]:
        self.prompts.may_go_on.set()
        return [self.said.get(timeout=TIMEOUT) for _ in range(n_answers)]


@pytest.fixture
def waiting() -> Waiting:
    return Waiting()


def kinds(answers: list[Any]) -> list[str]:
    return [answer.kind if isinstance(answer, messages.Failure) else "accepted" for answer in answers]


def test_those_that_wait_for_too_many_bombs_are_refused(waiting: Waiting) -> None:
    waiting.put(*["bomb"] * (MOST_STOPPED + 2), "hello")
    waiting.preparer.answer(messages.Render(9, messages.ChatPrompt((messages.Turn("user", "hello"),))))
    answers = waiting.told(MOST_STOPPED + 4)
    assert kinds(answers) == ["template"] * MOST_STOPPED + ["template_busy"] * 4
    error = from_failure(answers[-1])
    assert (error.status, error.info.code) == (503, "overloaded")
    assert int(error.headers["Retry-After"]) > 0
    assert "chat template was stopped for 2 other conversations" in error.info.message


def test_those_that_come_later_are_not(waiting: Waiting) -> None:
    waiting.put(*["bomb"] * MOST_STOPPED)
    waiting.told(MOST_STOPPED)
    waiting.put("hello", "bomb", "hello")
    assert kinds(waiting.told(3)) == ["accepted", "template", "accepted"]


def test_a_plain_text_waits_for_no_template(waiting: Waiting) -> None:
    waiting.put(*["bomb"] * MOST_STOPPED)
    waiting.preparer.prepare(Job(messages.Submit(9, messages.TextPrompt("hello"), GenerationRequest((1,)))))
    assert sorted(kinds(waiting.told(MOST_STOPPED + 1))) == ["accepted", *["template"] * MOST_STOPPED]


def test_others_may_take_long(waiting: Waiting) -> None:
    waiting.put(*["hello"] * 50, "bomb", "hello")
    assert kinds(waiting.told(52)) == ["accepted"] * 50 + ["template", "accepted"]
