"""`POST /slots/ID?action=save|restore|erase`: conversations' keys and values in files, as llama-server has them."""

from pathlib import Path

import msgspec
from aiohttp import web

from slimoe.server import messages
from slimoe.server.api.backends import Backends
from slimoe.server.api.endpoint import Endpoint, json_answer
from slimoe.server.api.request_body import read_body
from slimoe.server.api_error import UNSUPPORTED, ApiError, ErrorInfo, from_failure, invalid
from slimoe.server.process.request_handle import EngineFailure

_QUERY = {"action": "save, restore or erase."}
_LONGEST_NAME = 200


class SlotFileBody(msgspec.Struct):
    """`POST /slots/ID?action=save` and `restore`: a name in the directory of --slot-save-path."""

    filename: str


class SlotTimings(msgspec.Struct, frozen=True, omit_defaults=True):
    """Milliseconds that it took."""

    save_ms: float | None = None
    restore_ms: float | None = None


class SlotInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was done, by llama-server's names: tokens saved, restored or erased, and the file's bytes."""

    id_slot: int
    filename: str | None = None
    n_saved: int | None = None
    n_written: int | None = None
    n_restored: int | None = None
    n_read: int | None = None
    n_erased: int | None = None
    timings: SlotTimings | None = None


class SlotsApi:
    """The endpoint's handler; files lie in `directory`, and without one there is none of this."""

    def __init__(self, backends: Backends, directory: Path | None) -> None:
        self._backends, self._directory = backends, directory

    def endpoints(self) -> list[Endpoint]:
        """The endpoint."""
        return [Endpoint("POST", "/slots/{id_slot}", self.change, SlotFileBody, SlotInfo, query=_QUERY)]

    async def change(self, request: web.Request) -> web.Response:
        """Saves a slot's keys and values to a file, restores or erases them; raises ApiError."""
        if self._directory is None:
            message = "This server does not save slots. Start it with --slot-save-path DIR."
            raise ApiError(501, ErrorInfo(message, UNSUPPORTED, None, "unsupported_value"))
        backend = self._backends.current
        slot, n_slots = request.match_info["id_slot"], backend.supervisor.n_parallel
        if not (slot.isascii() and slot.isdecimal() and len(slot) < 10 and int(slot) < n_slots):
            raise invalid(f"There is no slot {slot[:20]!r}: this server has 0 to {n_slots - 1}.", "id_slot")
        action = request.query.get("action", "")
        if action not in ("save", "restore", "erase"):
            raise invalid(f"action is {action[:40]!r}, but must be save, restore or erase.", "action")
        name = "" if action == "erase" else _name(await read_body(request, SlotFileBody))
        path = str(self._directory / name)
        try:
            done = await backend.supervisor.ask(lambda id: messages.ChangeSlot(id, action, int(slot), path))  # type: ignore[arg-type]
        except EngineFailure as error:
            failure = msgspec.structs.replace(error.failure, param=None if action == "erase" else "filename")
            raise from_failure(failure) from None
        assert isinstance(done, messages.SlotChanged)
        return json_answer(_told(int(slot), name, action, done))


def _told(slot: int, name: str, action: str, done: messages.SlotChanged) -> SlotInfo:
    milliseconds = 1000 * done.seconds
    if action == "erase":
        return SlotInfo(slot, n_erased=done.n_tokens)
    if action == "save":
        timings = SlotTimings(save_ms=milliseconds)
        return SlotInfo(slot, name, n_saved=done.n_tokens, n_written=done.n_bytes, timings=timings)
    timings = SlotTimings(restore_ms=milliseconds)
    return SlotInfo(slot, name, n_restored=done.n_tokens, n_read=done.n_bytes, timings=timings)


def _name(body: SlotFileBody) -> str:
    """The file's name; raises ApiError for what could lie in another directory, or be no file."""
    name = body.filename
    is_plain = name.isprintable() and not any(mark in name for mark in "/\\:") and not name.startswith(".")
    if not is_plain or not 0 < len(name.encode()) <= _LONGEST_NAME:
        raise invalid(
            f"filename is {name[:60]!r}, but must be a plain name of 1 to {_LONGEST_NAME} bytes, without a directory, "
            "and not begin with a dot.",
            "filename",
        )
    return name
