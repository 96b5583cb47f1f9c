"""Prepares prompts for the engine: chat templates, tokens and checks, away from threads that must answer at once.

There are three threads, since each kind of work may take long. One renders conversations by the model's template,
another tokenizes plain texts, the last one tries the forms that answers are to have. Each works in order of arrival and
skips requests that were cancelled meanwhile. A conversation before which the template had to be stopped too often is
refused, and so is a form behind others that took long: many that do would add up.
"""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from slimoe.offload.text.generation import GenerationRequest
from slimoe.server import messages
from slimoe.server.chat.prompts import BusyError, Prompts, RequestError
from slimoe.server.chat.template_error import TemplateLimitError
from slimoe.server.process.replies import failure_of

Send = Callable[[messages.Message], None]
MOST_STOPPED = 2
"""How often the template may be stopped, each time after a second at most, while a conversation waits."""
MOST_SLOW, SLOW_SECONDS = 2, 0.5
"""How many forms may take so long while another waits."""


@dataclass(eq=False, slots=True)
class Job:
    """A generation: the message that asked for it, and the engine's request once it is prepared."""

    message: messages.Submit
    cancelled: threading.Event = field(default_factory=threading.Event)
    request: GenerationRequest | None = None


class Preparer:
    """Prepares generations and answers questions about text.

    `take` gets every job back, without a request if it has failed or nobody waits for it. A form that takes
    `slow_seconds` is a slow one.
    """

    def __init__(
        self, prompts: Prompts, send: Send, take: Callable[[Job], None], slow_seconds: float = SLOW_SECONDS
    ) -> None:
        self._prompts, self._send, self._take = prompts, send, take
        self._slow_seconds = slow_seconds
        self._n_stopped = self._n_slow = 0
        self._forms: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._chats: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._texts: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        for name, waiting in (("chats", self._chats), ("texts", self._texts), ("forms", self._forms)):
            threading.Thread(target=_work, args=(waiting,), name=name, daemon=True).start()

    def template_problem(self) -> str | None:
        """Why no chat is possible with the model's template, None if one is; waits until that is known."""
        problems: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._chats.put(lambda: problems.put(self._prompts.template_problem()))
        return problems.get()

    def prepare(self, job: Job) -> None:
        """Queues a generation."""
        n_before = self._n_stopped
        if isinstance(job.message.prompt, messages.ChatPrompt):
            self._chats.put(lambda: self._prepare(job, n_before))
        else:
            self._texts.put(lambda: self._prepare(job))

    def answer(self, question: messages.Question) -> None:
        """Queues a question."""
        n_before = self._n_stopped
        if isinstance(question, messages.Render | messages.Count):
            self._chats.put(lambda: self._answer(question, n_before))
        else:
            self._texts.put(lambda: self._answer(question))

    def _prepare(self, job: Job, n_before: int | None = None) -> None:
        message = job.message
        if not job.cancelled.is_set():
            try:
                self._check_turn(n_before)
                request, reading = self._prompts.prepare(message.request, message.prompt)
                if request.constraint is not None:
                    n_slow = self._n_slow
                    self._forms.put(lambda: self._try_form(job, request, reading, n_slow))
                    return
                self._accept(job, request, reading)
            except Exception as error:
                self._fail(message.id, error, message.request.max_tokens)
        self._take(job)

    def _try_form(self, job: Job, request: GenerationRequest, reading: messages.Reading, n_before: int) -> None:
        """Ends the preparation of a request that came with a form when `n_before` had been slow."""
        begin = time.perf_counter()
        if not job.cancelled.is_set():
            try:
                if self._n_slow - n_before >= MOST_SLOW:
                    problem = (
                        f"The forms of {self._n_slow - n_before} other requests took {self._slow_seconds:g} seconds"
                    )
                    raise BusyError(f"{problem} or more each while this one waited. Try again in a moment.")
                self._prompts.check_form(request)
                self._accept(job, request, reading)
            except Exception as error:
                self._fail(job.message.id, error, request.max_tokens)
            self._n_slow += time.perf_counter() - begin >= self._slow_seconds
        self._take(job)

    def _accept(self, job: Job, request: GenerationRequest, reading: messages.Reading) -> None:
        text = self._prompts.tokenizer.decode(request.prompt_ids, special=True) if job.message.shows_prompt else ""
        job.request = request
        self._send(messages.Accepted(job.message.id, len(request.prompt_ids), reading, text))

    def _answer(self, question: messages.Question, n_before: int | None = None) -> None:
        try:
            self._check_turn(n_before)
            self._send(self._answered(question))
        except Exception as error:
            self._fail(question.id, error)

    def _check_turn(self, n_before: int | None) -> None:
        """Raises BusyError for a conversation that came when the template had been stopped `n_before` times."""
        if n_before is not None and self._n_stopped - n_before >= MOST_STOPPED:
            problem = f"The model's chat template was stopped for {self._n_stopped - n_before} other conversations"
            raise BusyError(f"{problem} while this one waited. Try again in a moment.")

    def _fail(self, id: int, error: Exception, max_tokens: int | None = None) -> None:
        self._n_stopped += isinstance(error, TemplateLimitError)
        self._send(failure_of(id, error, max_tokens))

    def _answered(self, question: messages.Question) -> messages.Answer:
        prompts = self._prompts
        match question:
            case messages.Encode(id, text, add_special, parse_special, with_pieces):
                ids = prompts.text_ids(text, add_special=add_special, parse_special=parse_special)
                pieces = tuple(prompts.piece(token) for token in ids) if with_pieces else ()
                return messages.Encoded(id, tuple(ids), pieces)
            case messages.Decode(id, ids, shows_control):
                if len(ids) > prompts.n_told:
                    raise RequestError("tokens", f"{len(ids):,} tokens are too many: {prompts.n_told:,} are allowed.")
                known = prompts.prompt(messages.TokenPrompt(ids)).ids if ids else ()
                return messages.Text(id, prompts.tokenizer.decode(known, special=shows_control))
            case messages.Render(id, prompt, add_generation_prompt):
                return messages.Text(id, prompts.chat.render(prompt, add_generation_prompt))
            case messages.Count(id, prompt):
                return messages.Counted(id, len(prompts.prompt(prompt).ids))


def _work(waiting: "queue.SimpleQueue[Callable[[], None]]") -> None:
    while True:
        waiting.get()()
