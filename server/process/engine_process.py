"""The engine's process: opens one model and generates for the HTTP server, several requests at once.

The main thread runs the engine. Another reads messages, so that a cancellation is seen in the middle of a prefill
and a closed pipe ends the process whatever it is doing. Two more prepare prompts, see `slimoe.server.process.preparer`.
`slimoe.server.process.engine_start` runs it.
"""

import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from slimoe.offload.cache.disk_reader import FileChangedError
from slimoe.offload.errors import DeviceError, DeviceFullError, LostModelError, SlimoeError
from slimoe.offload.ggml.abort import on_device_abort
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.requests.slots import SlotAction, SlotChange
from slimoe.offload.requests.snapshot import Rebudgeted, Snapshot
from slimoe.offload.text.generation import Failed, Finished, GenerationRequest, Outcome
from slimoe.server import messages
from slimoe.server.chat.prompts import Prompts
from slimoe.server.process.child_life import leave, settle_in
from slimoe.server.process.heartbeat import Heartbeat
from slimoe.server.process.pipe import Pipe
from slimoe.server.process.preparer import Job, Preparer
from slimoe.server.process.replies import OpenModel, Replies, describe, failure_of

PROGRESS_SECONDS = 0.1
_ENDS_THE_PROCESS = (DeviceError, DeviceFullError, FileChangedError)


class ServedSlots(Protocol):
    """The part of the engine's slots that this process uses."""

    def change(self, action: SlotAction, slot: int, path: Path) -> SlotChange:
        """Saves a slot to a file, restores or erases it; raises UsageError."""


class ServedEngine(OpenModel, Protocol):
    """The part of an engine's interface that this process uses; `slimoe.offload.engine.Engine` has it."""

    config: EngineConfig

    @property
    def slots(self) -> ServedSlots:
        """The conversations by slot."""

    @property
    def is_idle(self) -> bool:
        """Whether the engine has no request to work on."""

    def submit(self, request: GenerationRequest, is_cancelled: Callable[[], bool]) -> int:
        """Queues a request and gives it an id."""

    def step(self) -> list[Outcome]:
        """Computes one step of all running requests and returns what came of each."""

    def tidy(self) -> bool:
        """Does a little, for some hundredths of a second at most, of what can wait; whether more of it is left."""

    def snapshot(self) -> Snapshot:
        """What the engine holds and does; may be called from any thread."""

    def rebudget(
        self, ram: str | None, vram: Sequence[str], held_bytes: int, on_progress: Callable[[int, int], None]
    ) -> Rebudgeted:
        """Takes other limits of memory between two steps; raises before anything has changed, or LostModelError."""

    def check_files(self) -> None:
        """Raises FileChangedError when the model's file was written to; may be called from any thread."""


Order = messages.Rebudget | messages.ChangeSlot
"""What the engine's own thread does between two steps."""
OpenEngine = Callable[[EngineConfig, Callable[[int, int], None]], ServedEngine]


class EngineProcess:
    """Carries out the messages of one pipe with one engine."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._preparer: Preparer | None = None
        self._engine: ServedEngine | None = None
        self._heartbeat = Heartbeat(pipe.send)
        self._n_parallel = 1
        self._opening: queue.SimpleQueue[messages.Open] = queue.SimpleQueue()
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._running: dict[int, Replies] = {}
        self._handlers: Mapping[type[messages.ToEngine], Callable[[Any], None]] = {
            messages.Open: self._opening.put,
            messages.Submit: self._submit,
            messages.Cancel: self._cancel,
            messages.Encode: self._answer,
            messages.Decode: self._answer,
            messages.Render: self._answer,
            messages.Count: self._answer,
            messages.Observe: self._observe,
            messages.Rebudget: self._order,
            messages.ChangeSlot: self._order,
        }

    def run(self, open_engine: OpenEngine) -> None:
        """Opens the model that the first message names, then generates until the pipe closes."""
        threading.Thread(target=self._read, name="messages", daemon=True).start()
        opening = self._opening.get()
        config = opening.config
        self._n_parallel = config.context.n_parallel
        self._heartbeat.start()
        on_device_abort(config.devices.rpc, self._give_up)
        try:
            engine = open_engine(config, self._progress())
            if engine.tokenizer is not None and opening.chat_template is not None:
                engine.tokenizer.chat_template = opening.chat_template or None
            prompts = Prompts(engine.tokenizer, engine.spec.n_vocab, engine.n_ctx, engine.grammars, opening.thinks)
            info = describe(engine)
        except SlimoeError as error:
            self._pipe.send(failure_of(0, error))
            return
        self._engine = engine
        self._preparer = Preparer(prompts, self._pipe.send, self._take)
        problem = self._preparer.template_problem()
        self._pipe.send(messages.Ready(messages.with_notes(info, () if problem is None else (problem,))))
        self._serve(engine, prompts)

    def _read(self) -> None:
        try:
            for message in self._pipe.messages():
                self._handlers[type(message)](message)
        finally:
            leave()

    def _progress(self) -> Callable[[int, int], None]:
        last = [0.0]

        def report(done_bytes: int, total_bytes: int) -> None:
            now = time.monotonic()
            if now - last[0] >= PROGRESS_SECONDS or done_bytes >= total_bytes:
                last[0] = now
                self._pipe.send(messages.Loading(done_bytes, total_bytes))

        return report

    def _submit(self, message: messages.Submit) -> None:
        assert self._preparer is not None, "a request came before the model was ready"
        job = self._jobs[message.id] = Job(message)
        self._preparer.prepare(job)

    def _take(self, job: Job) -> None:
        """Takes a prepared job from the preparer's threads."""
        if job.request is None:
            self._jobs.pop(job.message.id, None)
        else:
            self._waiting.put(job)

    def _answer(self, question: messages.Question) -> None:
        assert self._preparer is not None
        self._preparer.answer(question)

    def _observe(self, message: messages.Observe) -> None:
        """Answers at once, in the middle of a step too: that is when there is most to see."""
        assert self._engine is not None
        try:
            self._pipe.send(messages.Observed(message.id, self._engine.snapshot()))
        except Exception as error:
            self._pipe.send(failure_of(message.id, error))

    def _order(self, message: Order) -> None:
        """Has the engine's thread do something between two steps."""
        self._orders.put(message)
        self._waiting.put(None)

    def _carry_out(self, engine: ServedEngine, order: Order) -> None:
        self._heartbeat.tick()
        try:
            if isinstance(order, messages.Rebudget):
                self._pipe.send(self._rebudget(engine, order))
            else:
                change = engine.slots.change(order.action, order.slot, Path(order.path))
                self._pipe.send(messages.SlotChanged(order.id, *change))
        except LostModelError as error:
            # As after a crash: the server opens the model again, within the limits that held before.
            self._pipe.send(messages.Failure(0, "engine_crashed", str(error)))
            leave()
        except Exception as error:
            self._pipe.send(failure_of(order.id, error))

    def _rebudget(self, engine: ServedEngine, order: messages.Rebudget) -> messages.Rebudgeted:
        memory, devices, report = engine.config.memory, engine.config.devices, self._progress()

        def tell(done_bytes: int, total_bytes: int) -> None:
            self._heartbeat.tick()
            report(done_bytes, total_bytes)

        ram = memory.ram if order.ram is None else order.ram
        vram = devices.vram if order.vram is None else order.vram
        done = engine.rebudget(ram, vram, order.held_bytes, tell)
        return messages.Rebudgeted(
            order.id, ram, vram, *done, engine.notes, engine.memory(), engine.counters(), engine.snapshot()
        )

    def _cancel(self, message: messages.Cancel) -> None:
        job = self._jobs.get(message.id)
        if job is not None:
            job.cancelled.set()

    # --- generating ----------------------------------------------------------------------------------------

    def _serve(self, engine: ServedEngine, prompts: Prompts) -> None:
        """Starts what has come and moves on what is running; sleeps while there is neither.

        The engine is given as many requests as it works on at once: those that wait here can be given to another.
        """
        self._heartbeat.progress = engine.counters
        self._heartbeat.check = lambda: self._check_files(engine)
        while True:
            while not self._orders.empty():
                self._carry_out(engine, self._orders.get())
            if engine.is_idle:
                self._heartbeat.rest()
                while self._waiting.empty() and engine.tidy():
                    pass
                self._start(engine, prompts, self._waiting.get())
                continue
            while len(self._running) < self._n_parallel and not self._waiting.empty():
                self._start(engine, prompts, self._waiting.get())
            self._heartbeat.tick()
            for id, event in engine.step():
                replies = self._running[id]
                if isinstance(event, Failed) and isinstance(event.error, _ENDS_THE_PROCESS):
                    self._give_up(event.error)
                message = replies.failure(event.error) if isinstance(event, Failed) else replies.event(event)
                self._pipe.send(message)
                if isinstance(event, Failed | Finished):
                    del self._running[id]
                    self._jobs.pop(replies.id, None)

    def _check_files(self, engine: ServedEngine) -> None:
        try:
            engine.check_files()
        except FileChangedError as error:
            self._give_up(error)
        except OSError:
            # A disk that does not answer now says nothing about the file; a request that needs it will be told.
            return

    def _give_up(self, error: SlimoeError) -> None:
        """Ends the process after a failure of a device or file; the server starts another."""
        self._pipe.send(failure_of(0, error))
        leave()

    def _start(self, engine: ServedEngine, prompts: Prompts, job: Job | None) -> None:
        if job is None:  # only to wake the thread for an order
            return
        assert job.request is not None
        if job.cancelled.is_set():
            self._jobs.pop(job.message.id, None)
            return

        def is_cancelled() -> bool:
            self._heartbeat.tick()
            return job.cancelled.is_set()

        self._pipe.send(messages.Progress(job.message.id, 0, len(job.request.prompt_ids), 0))
        replies = Replies(job.message.id, job.request, prompts.piece, engine.counters)
        try:
            self._running[engine.submit(job.request, is_cancelled)] = replies
        except Exception as error:
            self._pipe.send(replies.failure(error))
            self._jobs.pop(replies.id, None)


def open_engine(config: EngineConfig, on_progress: Callable[[int, int], None]) -> ServedEngine:
    """Opens the engine that the configuration describes."""
    from slimoe.offload.engine import Engine

    return Engine.open(config, on_progress)


def main(open_engine: OpenEngine = open_engine) -> None:
    """Runs the engine's process until its pipe closes."""
    settle_in(int(sys.argv[1]))
    EngineProcess(Pipe.over_stdio()).run(open_engine)
    leave()
