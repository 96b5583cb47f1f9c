"""Keeps one engine process running and hands requests to it.

An abort in C code ends only that process: whoever waits for it gets an error, and a new one is started, later and
later when it keeps ending. A process that does not respond or get on is ended likewise. Requests that it had not begun
go to the next one. Requests that come while the model is being opened wait for it.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import msgspec

from slimoe.offload.plan.engine_config import EngineConfig, changed
from slimoe.offload.printable import printable
from slimoe.offload.requests.snapshot import Snapshot
from slimoe.offload.resources.memory import private_bytes
from slimoe.offload.text.generation import GenerationRequest
from slimoe.server import messages
from slimoe.server.log_format import JOURNAL
from slimoe.server.process.engine_child import COMMAND, EngineChild, how_it_ended
from slimoe.server.process.outbox import Outbox
from slimoe.server.process.request_handle import (
    EngineFailure,
    Hold,
    QueueFullError,
    RequestHandle,
    Slots,
    always_loaded,
    stopping,
)
from slimoe.server.process.watchdog import USUAL_PATIENCE, Patience, Watchdog

Phase = Literal["loading", "ready", "asleep", "failed", "stopped"]
FIRST_PAUSE, LONGEST_PAUSE, PATIENCE = 0.1, 30.0, 5.0
KILL_SECONDS = 2.0
DEFAULT_N_QUEUE = 64


class Supervisor:
    """The engine as the HTTP server uses it: `start` it, `submit` requests, `stop` it."""

    def __init__(
        self,
        config: EngineConfig,
        n_queue: int = DEFAULT_N_QUEUE,
        command: Sequence[str] = COMMAND,
        patience: Patience = USUAL_PATIENCE,
        held_bytes: Callable[[], int] = private_bytes,
        chat_template: str | None = None,
        thinks: bool | None = None,
    ) -> None:
        """Prepares an engine for `config`; `held_bytes` tells how much memory this process holds itself.

        A `chat_template` is used in place of the model's own, and none if it is empty. `thinks` says whether answers
        begin with reasoning where a request does not.
        """
        self.phase: Phase = "loading"
        self.progress = messages.Loading(0, 0)
        self.info: messages.ModelInfo | None = None
        self.failure: messages.Failure | None = None
        self.n_admitted = 0
        self.n_restarts = 0
        self.n_parallel = config.context.n_parallel
        self.config = config
        self._chat_template, self._thinks = chat_template, thinks
        self._n_queue = n_queue
        self._command = command
        self._child: EngineChild | None = None
        self._outbox = Outbox(self.n_parallel)
        self._pause = 0.0
        self._changed = asyncio.Event()
        self._launching: asyncio.Task[None] | None = None
        self._told: set[str] = set()
        self._watchdog = Watchdog(patience)
        self.held_bytes = held_bytes
        self.on_change: Callable[[], None] = lambda: None
        self.hold: Hold = always_loaded
        self.rests_on_failure = False
        self._watching: asyncio.Task[None] | None = None
        self._crash: messages.Failure | None = None

    @property
    def pid(self) -> int | None:
        """The engine process's id while there is one."""
        return None if self._child is None else self._child.pid

    @property
    def slots(self) -> Slots:
        """Who is worked on."""
        return self._outbox.slots

    @property
    def n_busy(self) -> int:
        """Requests at the engine or waiting for it."""
        return sum(handle.is_work for handle in self._outbox.handles.values())

    def start(self, *, is_awake: bool = True) -> None:
        """Starts the engine's process, unless it is to wait for `wake`; `wait_ready` tells when the model is open."""
        self._watching = asyncio.create_task(self._watch())
        self.phase = "asleep"
        if is_awake:
            self.wake()
        self._note_change()

    def wake(self, ram_bytes: int | None = None) -> None:
        """Starts the engine's process if it is asleep, with `ram_bytes` of memory or what was configured."""
        if self.phase != "asleep":
            return
        self.phase, self.progress, self.failure, self._crash = "loading", messages.Loading(0, 0), None, None
        if ram_bytes is not None:
            self.config = changed(self.config, {"ram": str(ram_bytes)})
        self._launching = asyncio.create_task(self._launch())
        self._note_change()

    async def sleep(self) -> None:
        """Ends the engine's process, which nobody uses now, until `wake`; its memory has gone back then."""
        if self.phase == "stopped":
            return
        self._rest(None)
        if self._launching is not None:
            self._launching.cancel()
            await asyncio.wait([self._launching])
        while self._child is not None:
            self._child.kill()
            self._changed.clear()
            await self._changed.wait()

    def _rest(self, failure: messages.Failure | None) -> None:
        """Goes without an engine, because of `failure` if there is one; figures stay to be asked for."""
        self.phase, self.failure, self._pause = "asleep", failure, 0.0
        self._outbox.fail(self._outbox.handles, stopping)
        if self.info is not None:
            self.info = msgspec.structs.replace(self.info, memory={})
        self._note_change()

    @property
    def trouble(self) -> str | None:
        """Why requests are not answered now although they may be soon; None when they are, or when nobody knows."""
        if self.phase not in ("ready", "loading"):
            return None
        awaited = self._watchdog.device_silence
        if self.phase == "ready":
            return self._watchdog.silence or awaited
        return awaited or (None if self._crash is None else self._crash.message)

    async def _watch(self) -> None:
        """Kills an engine that is silent or stuck for too long, and tells the log of a device that does not answer."""
        was_deaf = False
        while True:
            await asyncio.sleep(messages.BEAT_SECONDS)
            if self.trouble is not None:
                self._note_change()
            deaf = self._watchdog.device_silence
            if deaf is not None and not was_deaf:
                JOURNAL.tell(deaf, "error")
            was_deaf = deaf is not None
            problem = None if self._child is None else self._watchdog.tick()
            if self._child is not None and problem is not None:
                self._crash = problem
                self._child.kill()

    async def wait_ready(self) -> messages.ModelInfo:
        """Waits for the model and returns its facts; raises EngineFailure when it cannot be opened."""
        with self.hold(None) as is_on:
            await is_on
            while self.phase == "loading":
                self._changed.clear()
                await self._changed.wait()
        if self.info is None or self.phase != "ready":
            raise EngineFailure(self.failure or stopping(0))
        return self.info

    @contextlib.contextmanager
    def admit(self, keep: float | None = None) -> Iterator[asyncio.Future[None]]:
        """Holds a place in the queue for one client's request, which may `submit` once the future is done.

        The engine is kept for `keep` seconds afterwards, see `Hold`. Raises QueueFullError when there is no place.
        """
        n_waiting = self.n_admitted - self.n_parallel
        if n_waiting >= self._n_queue:
            raise QueueFullError(n_waiting)
        self.n_admitted += 1
        try:
            with self.hold(keep) as is_on:
                yield is_on
        finally:
            self.n_admitted -= 1

    def submit(
        self, prompt: messages.PromptSource, request: GenerationRequest, *, shows_prompt: bool = False
    ) -> RequestHandle:
        """Queues one generation, behind those submitted before."""
        return self._send(lambda id: messages.Submit(id, prompt, request, shows_prompt))

    async def ask(self, question: Callable[[int], messages.Question | messages.Order]) -> messages.Answer:
        """Asks something of the engine and returns the answer; raises EngineFailure."""
        with self.hold(None) as is_on:
            await is_on
            handle = self._send(question)
            try:
                return (await handle.next())[0]
            finally:
                handle.close()

    async def observe(self) -> Snapshot | None:
        """What the engine holds and does, None while there is nothing to see; wakes nobody, and is no work."""
        if self.phase != "ready":
            return None
        handle = self._send(messages.Observe)
        handle.is_work = False
        try:
            answer = (await handle.next())[0]
        except EngineFailure:
            return None
        finally:
            handle.close()
        return answer.snapshot if isinstance(answer, messages.Observed) else None

    async def stop(self, grace: float = 0.0) -> None:
        """Ends the engine's process; requests still there after `grace` seconds get an error."""
        self.phase = "stopped"
        self._note_change()
        self._outbox.fail(self._outbox.unsent, stopping)
        await self._wait(lambda: not self._outbox.handles or self._child is None, grace)
        self._outbox.fail(self._outbox.handles, stopping)
        for task in (self._launching, self._watching):
            if task is not None:
                task.cancel()
        if self._child is not None:
            self._child.kill()
        self._note_change()
        await self._wait(lambda: self._child is None, KILL_SECONDS)

    async def _wait(self, is_true: Callable[[], bool], seconds: float) -> None:
        """Waits until a condition holds, or until the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not is_true():
                    self._changed.clear()
                    await self._changed.wait()

    def _send(self, make: Callable[[int], messages.Message]) -> RequestHandle:
        id = next(self._outbox.ids)
        handle = RequestHandle(id, self._close)
        if self.phase == "stopped":
            handle.push(stopping(id))
        elif self.phase == "failed":
            assert self.failure is not None
            handle.push(msgspec.structs.replace(self.failure, id=id))
        else:
            self._outbox.add(handle, make(id))
            self._flush()
        return handle

    def _flush(self) -> None:
        if self.phase == "ready" and self._child is not None:
            self._outbox.send_all(self._child.send)

    def _close(self, handle: RequestHandle) -> None:
        if handle.id not in self._outbox.handles:
            return
        _, was_sent = self._outbox.drop(handle.id)
        if was_sent and not handle.is_over and self._child is not None:
            self._child.send(messages.Cancel(handle.id))
        self._changed.set()
        if handle.is_work:
            self.on_change()

    async def _launch(self) -> None:
        await asyncio.sleep(self._pause)
        self._pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * self._pause))
        child = EngineChild(self._on_message, self._on_exit)
        try:
            await child.start(self._command)
        except OSError as error:
            problem = f"The engine's process cannot be started ({error.strerror})."
            self.failure = messages.Failure(0, "internal", problem)
            self._on_exit(1)
            return
        self._child, self.progress = child, messages.Loading(0, 0)
        self._watchdog.begin()
        # What this process holds now, and may have grown to since the engine was first started, need not be free.
        config = changed(self.config, {"held_bytes": self.held_bytes()})
        child.send(messages.Open(config, self._chat_template, self._thinks))

    def _on_message(self, message: messages.FromEngine) -> None:
        self._watchdog.note(message)
        if self.phase == "asleep":
            return
        if isinstance(message, messages.Rebudgeted):
            # Also where nobody waits for the answer any more.
            self.config = changed(self.config, {"ram": message.ram, "vram": message.vram})
        match message:
            case messages.Loading():
                self.progress = message
                self.on_change()
            case messages.Beat():
                pass
            case messages.Ready(info):
                self.info, self.failure, self._crash = info, None, None
                self._tell(info.notes)
                if self.phase != "stopped":
                    self.phase = "ready"
                self._flush()
                self._note_change()
            case messages.Failure(id=0):
                self.failure = message
            case _ if handle := self._outbox.handles.get(message.id):
                self._outbox.note(handle, message)
                if isinstance(message, messages.Done | messages.Rebudgeted):
                    self._pause = 0.0
                    self.info = None if self.info is None else messages.with_figures(self.info, message)
                    self.on_change()

    def _tell(self, notes: Sequence[str]) -> None:
        """Writes notes to standard error, each once."""
        for note in notes:
            if note not in self._told:
                JOURNAL.tell(note, shown=printable(note))
        self._told.update(notes)

    def _on_exit(self, returncode: int) -> None:
        self._child = None
        if self.phase == "stopped":
            self._outbox.fail(self._outbox.handles, stopping)
            self._note_change()
            return
        if self.phase == "asleep":
            self._note_change()
            return
        crash = self.failure or self._crash or messages.Failure(0, "engine_crashed", how_it_ended(returncode))
        self._crash = crash
        self._outbox.fail(self._outbox.lost(), lambda id: msgspec.structs.replace(crash, id=id))
        leaves_devices = crash.kind == "device" and self._leave_devices()
        if self.info is None and not leaves_devices:
            self._give_up(crash)
        else:
            # A device that failed in use may be back; one that failed at once will fail again.
            failed_in_use = crash.kind == "device" and self.phase == "ready"
            may_heal = leaves_devices or failed_in_use or crash.kind in ("engine_crashed", "engine_stuck")
            self._restart(crash, may_heal=may_heal)
        self._note_change()

    def _leave_devices(self) -> bool:
        """Goes on without devices that nobody asked for by name; says so, and whether there were any to leave."""
        config = self.config
        devices = config.devices
        if devices.device != "auto" or devices.vram or devices.rpc:
            return False
        self.config = changed(config, {"device": "none"})
        self._tell(["Going on without devices. Start the server again to use them again."])
        return True

    def _restart(self, crash: messages.Failure, *, may_heal: bool) -> None:
        """Starts the engine again; requests that cannot be answered soon are not kept waiting."""
        JOURNAL.tell(crash.message, "error")
        self.n_restarts += 1
        is_hopeless = not may_heal or self._pause > PATIENCE
        self.failure, self.phase = None, "loading"
        if is_hopeless:
            self._give_up(crash)
        if not is_hopeless or not self.rests_on_failure:
            self._launching = asyncio.create_task(self._launch())

    def _give_up(self, failure: messages.Failure) -> None:
        """Answers everybody that the engine cannot be opened, for now."""
        self.failure, self.phase = failure, "failed"
        self._outbox.fail(self._outbox.handles, lambda id: msgspec.structs.replace(failure, id=id))
        if self.rests_on_failure:
            self._rest(failure)

    def _note_change(self) -> None:
        self._changed.set()
        self.on_change()
