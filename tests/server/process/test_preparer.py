"""Conversations wait in turn for the model's template, forms for each other, and no longer than is worth while."""

import queue
import threading
import time
from typing import Any, cast

import pytest

from slimoe.offload.text.generation import Constraint, GenerationRequest
from slimoe.offload.text.grammars import ConstraintError
from slimoe.server import messages
from slimoe.server.api_error import from_failure
from slimoe.server.chat.prompts import Prepared, Prompts
from slimoe.server.chat.template_error import TemplateLimitError
from slimoe.server.process.preparer import MOST_SLOW, MOST_STOPPED, Job, Preparer

TIMEOUT = 30.0
SLOW = 0.05


class Scripted:
    """Prompts whose template is stopped for what begins with `bomb`; nothing goes on until `may_go_on` is set.

    No form is tried before `may_try_forms` is.
    """

    def __init__(self) -> None:
        self.may_go_on, self.may_try_forms = threading.Event(), threading.Event()

    def prepare(self, request: GenerationRequest, source: messages.PromptSource) -> Prepared:
        assert self.may_go_on.wait(TIMEOUT)
        if isinstance(source, messages.ChatPrompt) and source.messages[0].content.startswith("bomb"):
            raise TemplateLimitError("0.5 seconds of processor time")
        return Prepared(request)

    def check_form(self, request: GenerationRequest) -> None:
        assert request.constraint is not None
        assert self.may_try_forms.wait(TIMEOUT)
        if request.constraint.text.startswith("bomb"):
            time.sleep(SLOW)
            raise ConstraintError(request.constraint, "compiling it takes more than 1 second of processor time")


class Waiting:
    """A preparer, what it says, and the jobs that it is given."""

    def __init__(self) -> None:
        self.prompts = Scripted()
        self.said: queue.SimpleQueue[messages.Message] = queue.SimpleQueue()
        self.preparer = Preparer(cast(Prompts, self.prompts), self.said.put, lambda job: None, slow_seconds=SLOW)

    def put(self, *texts: str) -> None:
        for n, text in enumerate(texts):
            prompt = messages.ChatPrompt((messages.Turn("user", text),))
            self.preparer.prepare(Job(messages.Submit(n, prompt, GenerationRequest((1,)))))

    def put_forms(self, *texts: str) -> None:
        for n, text in enumerate(texts):
            request = GenerationRequest((1,), constraint=Constraint("regex", text, "regex"))
            self.preparer.prepare(Job(messages.Submit(n, messages.TextPrompt("hello"), request)))

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
    assert kinds(answers) == ["template"] * MOST_STOPPED + ["busy"] * 4
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


def test_forms_that_wait_for_too_many_slow_ones_are_refused(waiting: Waiting) -> None:
    waiting.put_forms(*["bomb"] * (MOST_SLOW + 5), "a+")
    waiting.preparer.prepare(Job(messages.Submit(99, messages.TextPrompt("hello"), GenerationRequest((1,)))))
    assert [answer.id for answer in waiting.told(1)] == [99], "a text without a form waits for none"
    waiting.prompts.may_try_forms.set()
    answers = waiting.told(MOST_SLOW + 6)
    assert kinds(answers) == ["invalid_request"] * MOST_SLOW + ["busy"] * 6
    assert answers[0].param == "regex"
    error = from_failure(answers[-1])
    assert (error.status, error.info.code) == (503, "overloaded")
    assert int(error.headers["Retry-After"]) > 0
    assert "forms of 2 other requests took" in error.info.message
    waiting.put_forms("a+", "bomb", "b+")
    assert kinds(waiting.told(3)) == ["accepted", "invalid_request", "accepted"]


def test_a_form_that_nobody_waits_for_is_not_tried(waiting: Waiting) -> None:
    wanted = GenerationRequest((1,), constraint=Constraint("regex", "bomb", "regex"))
    given_up = Job(messages.Submit(0, messages.TextPrompt("hello"), wanted))
    waiting.put_forms("a+")
    waiting.preparer.prepare(given_up)
    waiting.put_forms("b+")
    waiting.prompts.may_go_on.set()
    given_up.cancelled.set()
    waiting.prompts.may_try_forms.set()
    assert kinds(waiting.told(2)) == ["accepted", "accepted"]
