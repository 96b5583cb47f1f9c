"""Keeps built graphs by shape, all allocated in one buffer: only one of them runs at a time."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from slimoe.offload.errors import DeviceFullError, DoesNotFitError
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.resources.memory import advise_huge_pages, human, out_of_memory

Shape = TypeVar("Shape", bound=Hashable)
Prepared = TypeVar("Prepared")


@dataclass(frozen=True, slots=True)
class BuiltGraph(Generic[Prepared]):
    """A graph for which nothing is allocated yet, in a context of its own; `prepare` is called when it is."""

    ctx: int
    graph: int
    prepare: Callable[[], Prepared]


class GraphPool(Generic[Shape, Prepared]):
    """At most `n_graphs` graphs, the least recently used leave. `build` makes the graph of a shape.

    `check` is shown each graph that room is reserved for, and may raise.
    """

    def __init__(
        self,
        buft: int | None,
        build: Callable[[Shape], BuiltGraph[Prepared]],
        n_graphs: int,
        check: Callable[[int], None] = lambda graph: None,
    ) -> None:
        self._check = check
        self._build, self._n_graphs = build, n_graphs
        self._graphs: OrderedDict[Shape, tuple[int, Prepared]] = OrderedDict()
        self._allocator = ggml_backend.ggml_gallocr_new(buft)
        self._buft, self._is_host = buft, bool(ggml_backend.ggml_backend_buft_is_host(buft))
        self.n_bytes = 0
        """Size of the buffer that all intermediate results share."""

    def _measure(self) -> None:
        self.n_bytes = int(ggml_backend.ggml_gallocr_get_buffer_size(self._allocator, 0))

    def reserve(self, shape: Shape) -> None:
        """Makes the buffer big enough for a shape, so that it need not move later; raises DoesNotFitError."""
        built = self._build(shape)
        try:
            self._check(built.graph)
            reserved = ggml_backend.ggml_gallocr_reserve(self._allocator, built.graph)
        finally:
            ggml.ggml_free(built.ctx)
        if not reserved:
            raise self._out_of_memory()
        self._measure()

    def get(self, shape: Shape) -> Prepared:
        """The graph of a shape, ready to run; raises DoesNotFitError."""
        assert self._allocator, "the engine is closed"
        known = self._graphs.get(shape)
        if known is not None:
            self._graphs.move_to_end(shape)
            return known[1]
        built = self._build(shape)
        before = self.n_bytes
        # Else ggml may keep the last graph's arrangement, where results are overwritten that are outputs of this one.
        reserved = ggml_backend.ggml_gallocr_reserve(self._allocator, built.graph)
        if not (reserved and ggml_backend.ggml_gallocr_alloc_graph(self._allocator, built.graph)):
            ggml.ggml_free(built.ctx)
            raise self._out_of_memory()
        self._measure()
        if self.n_bytes != before:
            # The buffer has moved, and with it the tensors of every graph that was allocated in it.
            self._drop(keep=0)
        self._drop(keep=self._n_graphs - 1)
        prepared = built.prepare()
        self._graphs[shape] = (built.ctx, prepared)
        return prepared

    def _out_of_memory(self) -> DoesNotFitError:
        if self._is_host:
            return out_of_memory(self.n_bytes)
        name = ggml_backend.ggml_backend_buft_name(self._buft).decode()
        return DeviceFullError(
            f"{name} gave no memory for graphs beside the {human(self.n_bytes)} that they have. Lower --vram or "
            "--batch, or end what else uses it.",
            required_bytes=self.n_bytes,
            available_bytes=0,
        )

    def advise(self, tensor: int) -> None:
        """Asks for huge pages under the buffer, which is found by a tensor that is allocated in it."""
        buffer = ggml.tensor_at(tensor).buffer
        if self._is_host and buffer:
            advise_huge_pages(ggml_backend.ggml_backend_buffer_get_base(buffer), self.n_bytes)

    def _drop(self, keep: int) -> None:
        while len(self._graphs) > keep:
            ggml.ggml_free(self._graphs.popitem(last=False)[1][0])

    def close(self) -> None:
        """Frees graphs and buffer."""
        if self._allocator:
            self._drop(keep=0)
            ggml_backend.ggml_gallocr_free(self._allocator)
            self._allocator = 0
