"""`/v1/memory`: the limits of memory, what is held within them, and other limits while answers go on."""

from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from slimoe.offload.requests.snapshot import IN_HOST, ON_DEVICE, ON_DISK, LayerMap, MemoryPlace, Snapshot
from slimoe.server import messages
from slimoe.server.api.backends import Backend, Backends
from slimoe.server.api.endpoint import Endpoint, json_answer
from slimoe.server.api.request_body import read_body
from slimoe.server.api_error import from_failure, invalid, unsupported
from slimoe.server.process.request_handle import EngineFailure

MAX_DEVICES, MAX_SIZE_CHARS = 64, 40
Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Words = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_SIZE_CHARS)]


class MemoryBody(msgspec.Struct, forbid_unknown_fields=True):
    """`POST /v1/memory`: sizes in bytes or in the words of --ram and --vram; what is left out stays as it is.

    `vram` is one size for all devices, or a list of one for each.
    """

    ram: Bytes | Words | None = None
    vram: Bytes | Words | list[Any] | None = None
    model: str | None = None


class LayerMemory(msgspec.Struct, frozen=True):
    """How many of a layer's experts are in each tier."""

    layer: int
    device: int
    host: int
    disk: int


class Change(msgspec.Struct, frozen=True):
    """How other limits were taken: for `seconds` nothing was computed, and `loaded_bytes` were read.

    With `is_kept` the model stayed open, and only its cache of experts has another size.
    """

    seconds: float
    loaded_bytes: int
    is_kept: bool


class MemoryInfo(msgspec.Struct, frozen=True):
    """The answer of `/v1/memory`; `ram` and `vram` are the limits, and can be sent back as they are.

    While the model `is_loaded`, the rest tells what it holds.
    """

    model: str
    is_loaded: bool
    ram: str
    vram: list[str]
    places: list[MemoryPlace] = []
    resident: int = 0
    peak: int = 0
    experts: list[LayerMemory] = []
    hit_share: float | None = None
    notes: tuple[str, ...] = ()
    change: Change | UnsetType = UNSET


class MemoryApi:
    """The endpoints' handlers."""

    def __init__(self, backends: Backends) -> None:
        self._backends = backends

    def endpoints(self) -> list[Endpoint]:
        """The endpoints."""
        return [
            Endpoint("GET", "/v1/memory", self.show, answer=MemoryInfo, statuses=(503,)),
            Endpoint("POST", "/v1/memory", self.change, MemoryBody, MemoryInfo),
        ]

    async def show(self, request: web.Request) -> web.Response:
        """The limits of memory, what is held by use, and experts by tier; raises ApiError."""
        backend = self._backends.current
        # Looking at a model is no use of it, which would keep it loaded.
        snapshot = await backend.supervisor.observe()
        if snapshot is not None:
            return json_answer(memory_info(backend, snapshot))
        if backend.supervisor.phase == "asleep":
            config = backend.supervisor.config
            limits = config.memory.ram or "auto", list(config.devices.vram)
            return json_answer(MemoryInfo(backend.model.id, False, *limits))
        answer = await backend.ask(messages.Observe, "model")
        assert isinstance(answer, messages.Observed)
        return json_answer(memory_info(backend, answer.snapshot))

    async def change(self, request: web.Request) -> web.Response:
        """Other limits, which hold at once and stay; answers in progress go on. Raises ApiError."""
        body = await read_body(request, MemoryBody)
        if body.ram is None and body.vram is None:
            raise invalid("There is nothing to change. Send `ram`, `vram` or both, such as 8GiB, 50% or auto.", "ram")
        if len(self._backends.all()) > 1:
            raise unsupported("Several models share the limits, which cannot change while they are served.", "ram")
        backend = self._backends.named(body.model)
        ram, vram, supervisor = None if body.ram is None else str(body.ram), _sizes(body.vram), backend.supervisor
        try:
            answer = await supervisor.ask(lambda id: messages.Rebudget(id, ram, vram, supervisor.held_bytes()))
        except EngineFailure as error:
            failure = error.failure
            param = "vram" if failure.kind == "invalid_request" and "--vram" in failure.message else "ram"
            raise from_failure(msgspec.structs.replace(failure, param=param), param) from None
        assert isinstance(answer, messages.Rebudgeted)
        change = Change(answer.seconds, answer.loaded_bytes, answer.is_kept)
        return json_answer(memory_info(backend, answer.snapshot, answer.notes, change))


def memory_info(
    backend: Backend, snapshot: Snapshot, notes: tuple[str, ...] = (), change: Change | UnsetType = UNSET
) -> MemoryInfo:
    """What clients are told of a snapshot."""
    host, *devices = snapshot.memory.places
    return MemoryInfo(
        model=backend.model.id,
        is_loaded=True,
        ram=host.setting,
        vram=[device.setting for device in devices],
        places=list(snapshot.memory.places),
        resident=snapshot.memory.resident,
        peak=snapshot.memory.peak,
        experts=[_layer(layer) for layer in snapshot.experts.layers],
        hit_share=snapshot.work.total.hit_share,
        notes=notes,
        change=change,
    )


def _layer(layer: LayerMap) -> LayerMemory:
    """Experts whose read is under way are on disk still."""
    device, host, disk = (layer.tiers.count(mark) for mark in (ON_DEVICE, IN_HOST, ON_DISK))
    return LayerMemory(layer.layer, device, host, disk)


def _sizes(vram: int | str | list[Any] | None) -> tuple[str, ...] | None:
    """The sizes of --vram; raises ApiError for a list of anything else."""
    if vram is None:
        return None
    sizes = vram if isinstance(vram, list) else [vram]
    if not 1 <= len(sizes) <= MAX_DEVICES:
        raise invalid(f"vram has {len(sizes)} sizes, but 1 to {MAX_DEVICES} are possible.", "vram")
    for index, size in enumerate(sizes):
        is_size = isinstance(size, str | int) and not isinstance(size, bool) and 0 < len(str(size)) <= MAX_SIZE_CHARS
        if not is_size or (isinstance(size, int) and size < 0):
            raise invalid("Expected a size such as 8GiB, bytes, 50% or auto.", f"vram[{index}]")
    return tuple(map(str, sizes))
