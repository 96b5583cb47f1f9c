"""Which models are loaded: a bounded number at once, in the order in which they are asked for, none idle for too long.

A model that somebody holds is never put asleep. When another is asked for and there is no room, one that nobody holds
makes room, the one first that was asked for longest ago; where all are held, such a one takes no new requests until
the other had its turn.
"""

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from slimoe.server.process.request_handle import EngineFailure, stopping
from slimoe.server.process.supervisor import Supervisor


@dataclass(eq=False, slots=True)
class _Member:
    """A model of the pool; `needs_bytes` of memory are planned for it, `last_turn` grows with each request."""

    supervisor: Supervisor
    needs_bytes: int
    keep_seconds: float | None
    n_holders: int = 0
    last_turn: int = 0
    is_leaving: bool = False
    is_moving: bool = False
    timer: asyncio.TimerHandle | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether it takes memory: it is loaded, being loaded, or not yet gone."""
        return self.is_moving or self.supervisor.phase in ("loading", "ready", "failed")


@dataclass(eq=False, slots=True)
class Turn:
    """A request's place in the line; `is_on` is done when its model is loaded, or is being loaded."""

    member: _Member
    is_on: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Pool:
    """The supervisors of all models, and which of them run an engine.

    At most `n_most` are loaded, and at most so many as `total_bytes` of memory hold, None for any number. One that
    nobody has held for `idle_seconds` is put asleep, None for never.
    """

    def __init__(
        self,
        needs: Mapping[Supervisor, int],
        n_most: int = 1,
        idle_seconds: float | None = None,
        total_bytes: int | None = None,
    ) -> None:
        """Takes charge of supervisors, with the bytes that their plans take."""
        self._n_most, self._idle_seconds, self._total_bytes = n_most, idle_seconds, total_bytes
        self._members = {one: _Member(one, n_bytes, idle_seconds) for one, n_bytes in needs.items()}
        for supervisor in needs:
            supervisor.hold = partial(self.hold, supervisor)
            # Where models come and go, one that cannot be opened now is tried again when it is asked for.
            supervisor.rests_on_failure = idle_seconds is not None or len(needs) > 1
        self._line: deque[Turn] = deque()
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[bool]] = set()
        self._is_stopped = False

    @property
    def n_waiting(self) -> int:
        """Requests that wait for room for their model."""
        return len(self._line)

    @property
    def loaded(self) -> list[Supervisor]:
        """Those that take memory, the one first that was asked for last."""
        members = sorted(self._members.values(), key=lambda member: -member.last_turn)
        return [member.supervisor for member in members if member.is_loaded]

    def start(self, first: Supervisor | None) -> None:
        """Starts with one model loaded, or none."""
        for supervisor in self._members:
            supervisor.start(is_awake=supervisor is first)

    @contextlib.contextmanager
    def hold(self, supervisor: Supervisor, keep: float | None = None) -> Iterator[asyncio.Future[None]]:
        """Keeps a model loaded until the end of the context, once the future is done; that raises EngineFailure.

        Afterwards it stays for `keep` seconds, for ever if below 0, or None for as long as usual.
        """
        member = self._members[supervisor]
        turn = Turn(member)
        must_wait = member.is_leaving or member.is_moving or not member.is_loaded
        if self._is_stopped or not (must_wait or any(other.member is member for other in self._line)):
            self._grant(turn)
        else:
            self._line.append(turn)
            self._advance()
        try:
            yield turn.is_on
        finally:
            if turn.is_on.cancel() or turn.is_on.cancelled() or turn.is_on.exception() is not None:
                with contextlib.suppress(ValueError):
                    self._line.remove(turn)
            else:
                member.n_holders -= 1
                member.keep_seconds = self._idle_seconds if keep is None else None if keep < 0 else keep
                self._begin_idling(member)
            self._advance()

    async def unload(self, supervisor: Supervisor) -> bool:
        """Puts a model asleep unless somebody holds it; says whether it is asleep now."""
        member = self._members[supervisor]
        if member.n_holders == 0 and member.is_loaded and not member.is_moving:
            _cancel_timer(member)
            member.is_moving = True
            await supervisor.sleep()
            member.is_moving = False
            self._advance()
        return supervisor.phase == "asleep"

    async def stop(self, grace: float = 0.0) -> None:
        """Ends all engines; who waits for a model gets an error at once."""
        self._is_stopped = True
        while self._line:
            turn = self._line.popleft()
            if not turn.is_on.done():
                turn.is_on.set_exception(EngineFailure(stopping(0)))
        for member in self._members.values():
            _cancel_timer(member)
        await asyncio.gather(*(supervisor.stop(grace) for supervisor in self._members))

    def _grant(self, turn: Turn) -> None:
        member = turn.member
        _cancel_timer(member)
        member.n_holders += 1
        member.last_turn = next(self._numbers)
        turn.is_on.set_result(None)

    def _advance(self) -> None:
        """Gives those in the line their turn, as far as there is room."""
        for member in self._members.values():
            member.is_leaving = False
        while self._line and not self._is_stopped:
            member = self._line[0].member
            if self._line[0].is_on.done():
                self._line.popleft()
                continue
            if member.is_moving:
                return
            if not member.is_loaded:
                if not self._has_room(member):
                    self._make_room()
                    return
                others = sum(other.needs_bytes for other in self._members.values() if other.is_loaded)
                member.supervisor.wake(None if self._total_bytes is None else self._total_bytes - others)
            self._grant(self._line.popleft())

    def _has_room(self, member: _Member) -> bool:
        loaded = [other for other in self._members.values() if other.is_loaded]
        needed = member.needs_bytes + sum(other.needs_bytes for other in loaded)
        fits = self._total_bytes is None or needed <= self._total_bytes
        return not loaded or (len(loaded) < self._n_most and fits)

    def _make_room(self) -> None:
        """Puts a model asleep that nobody holds, or else chooses one that takes no new requests until it is free."""
        loaded = [member for member in self._members.values() if member.is_loaded]
        if any(member.is_moving for member in loaded):
            return
        victim = min(loaded, key=lambda member: (member.n_holders > 0, member.last_turn))
        victim.is_leaving = True
        if victim.n_holders == 0:
            self._begin_unloading(victim)

    def _begin_idling(self, member: _Member) -> None:
        """Lets a model that nobody holds go asleep in its time."""
        if member.n_holders == 0 and member.keep_seconds is not None and not self._is_stopped:
            _cancel_timer(member)
            loop = asyncio.get_running_loop()
            member.timer = loop.call_later(member.keep_seconds, self._begin_unloading, member)

    def _begin_unloading(self, member: _Member) -> None:
        task = asyncio.create_task(self.unload(member.supervisor))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _cancel_timer(member: _Member) -> None:
    if member.timer is not None:
        member.timer.cancel()
        member.timer = None
