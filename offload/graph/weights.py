"""Weights in memory: mapped from the file, copied, or copied into this CPU's own arrangement."""

import ctypes
import mmap
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.errors import ModelFileError
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import Backend, allocate, repack_buffer_type
from slimoe.offload.gguf.header import GGUFFile
from slimoe.offload.model.tensors import (
    LatentSources,
    LayerSources,
    LinearSource,
    ModelSources,
    RecurrentSources,
    SharedSources,
    Span,
    WeightSource,
)

Form = Literal["mapped", "copied", "repacked"]
"""`mapped`: the file's own pages, shared and evictable. `copied`: our memory, on huge pages, which the CPU walks
faster. `repacked`: our memory, rearranged for matrix-vector kernels."""

Progress = Callable[[int], None]
"""Called with the number of bytes that were just made ready."""

_STRIDE = 64 << 20
STAGED_BYTES = 16 << 20
"""A piece of a weight on its way to a device."""
_MADV_POPULATE_READ = 22


@dataclass(frozen=True, slots=True)
class Linear:
    """Tensor addresses of a matrix (or stack of them) and of its bias, 0 without one."""

    weight: int
    bias: int = 0


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """Tensor addresses of a shared expert, as in `SharedSources`; 0 for what it does not have."""

    gate_up: tuple[Linear, ...]
    down: Linear
    gate: int = 0
    norm: int = 0
    post_norm: int = 0


@dataclass(frozen=True, slots=True)
class PostWeights:
    """Tensor addresses of what a block's updates pass, as in `PostSources`; 0 for what it does not have."""

    attention: int = 0
    experts: int = 0
    ffn: int = 0
    scale: int = 0


@dataclass(frozen=True, slots=True)
class LatentWeights:
    """Tensor addresses of latent attention's matrices, as in `LatentSources`; 0 for what it does not have."""

    q: Linear
    k: Linear
    v: Linear


@dataclass(frozen=True, slots=True)
class RecurrentWeights:
    """Tensor addresses of a recurrent layer, as in `RecurrentSources`; 0 for what it does not have."""

    inputs: tuple[Linear, ...]
    conv: int
    output: Linear
    decay: int = 0
    step_bias: int = 0
    norm: int = 0
    conv_bias: int = 0
    skip: int = 0


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Tensor addresses of one block, shaped as in `LayerSources`; None or 0 for what a block does not have."""

    attn_norm: Linear | None
    qkv: tuple[Linear, ...]
    attn_output: Linear
    ffn_norm: Linear | None
    router: Linear | None
    gate_up: tuple[Linear, ...]
    down: Linear
    q_norm: int = 0
    k_norm: int = 0
    choice_bias: int = 0
    shared: SharedWeights | None = None
    sinks: int = 0
    expert_biases: tuple[int, ...] = ()
    expert_scales: tuple[int, ...] = ()
    latent: LatentWeights | None = None
    aux: tuple[int, ...] = ()
    recurrent: RecurrentWeights | None = None
    router_scale: int = 0
    post: PostWeights = PostWeights()
    expert_latent: tuple[Linear, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """Tensor addresses of a whole model; `rope_freqs` is 0 when the file has none."""

    token_embd: int
    output_norm: Linear
    output: Linear
    rope_freqs: int
    layers: tuple[LayerWeights, ...]


class WeightFile:
    """The shards of a GGUF file, open for mapping and for reading."""

    def __init__(self, gguf: GGUFFile) -> None:
        self._paths = gguf.paths
        self._descriptors: list[int] = []
        self._maps: list[mmap.mmap] = []
        self._bytes: list[NDArray[np.uint8]] = []
        self.buffers: list[int] = []
        for path in gguf.paths:
            try:
                self._descriptors.append(os.open(path, os.O_RDONLY))
                self._maps.append(mmap.mmap(self._descriptors[-1], 0, access=mmap.ACCESS_READ))
            except OSError as error:
                raise ModelFileError(path, f"the file cannot be opened ({error.strerror}).") from None
            self._bytes.append(np.frombuffer(self._maps[-1], np.uint8))
            buffer = ggml_backend.ggml_backend_cpu_buffer_from_ptr(self._bytes[-1].ctypes.data, self._bytes[-1].nbytes)
            ggml_backend.ggml_backend_buffer_set_usage(buffer, ggml_backend.USAGE_WEIGHTS)
            self.buffers.append(buffer)

    def address(self, span: Span) -> int:
        """Where a span lies in the mapping."""
        return int(self._bytes[span.shard].ctypes.data) + span.offset

    def populate(self, span: Span, progress: Progress) -> None:
        """Brings the pages of a span into memory, in order, so that no computation waits for the disk."""
        for begin in range(span.offset, span.offset + span.n_bytes, _STRIDE):
            n_bytes = min(_STRIDE, span.offset + span.n_bytes - begin)
            page = begin // mmap.PAGESIZE * mmap.PAGESIZE
            try:
                self._maps[span.shard].madvise(_MADV_POPULATE_READ, page, begin + n_bytes - page)
            except (OSError, AttributeError):
                # Kernels before 5.14 and other systems: reading one byte a page does the same.
                self._bytes[span.shard][begin : begin + n_bytes : mmap.PAGESIZE].max()
            progress(n_bytes)

    def read(self, span: Span, address: int, progress: Progress) -> None:
        """Reads a span to `address`; unlike copying from the mapping this leaves no second copy resident."""
        target = memoryview((ctypes.c_uint8 * span.n_bytes).from_address(address)).cast("B")
        done = 0
        while done < span.n_bytes:
            part = target[done : done + _STRIDE]
            try:
                n_read = os.preadv(self._descriptors[span.shard], [part], span.offset + done)
            except OSError as error:
                raise ModelFileError(self._paths[span.shard], f"reading failed ({error.strerror}).") from None
            if n_read == 0:
                raise ModelFileError(self._paths[span.shard], "the file has become shorter while it was read.")
            done += n_read
            progress(n_read)

    def close(self) -> None:
        """Unmaps and closes the shards."""
        for buffer in self.buffers:
            ggml_backend.ggml_backend_buffer_free(buffer)
        self._bytes.clear()
        for mapped in self._maps:
            mapped.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self.buffers.clear()
        self._maps.clear()
        self._descriptors.clear()


class WeightStore:
    """Makes weights ready, each at most once per form, and owns their memory, a backend's.

    Memory that is not the host's takes copies only.
    """

    def __init__(self, gguf: GGUFFile, sources: ModelSources, progress: Progress, backend: Backend) -> None:
        self._file = WeightFile(gguf)
        self._backend = backend
        self._progress = progress
        capacity = 64 + 96 * len(sources.layers)
        self._ctx = ggml.ggml_init(ggml.InitParams(capacity * ggml.ggml_tensor_overhead(), None, True))
        self._buffers: list[int] = []
        self._ready: dict[tuple[str, Form], int] = {}
        self._staging = np.empty(0, np.uint8)

    @property
    def n_bytes(self) -> int:
        """Bytes of the backend's memory that the weights take; mapped ones take none."""
        return sum(ggml_backend.ggml_backend_buffer_get_size(buffer) for buffer in self._buffers)

    def weight(self, source: WeightSource, form: Form) -> int:
        """The tensor of a weight in the form asked for; parts of a weight that lie apart are always copied."""
        if form == "mapped" and len(source.spans) > 1:
            form = "copied"
        key = (source.name, form)
        if key not in self._ready:
            new = {1: ggml.ggml_new_tensor_1d, 2: ggml.ggml_new_tensor_2d, 3: ggml.ggml_new_tensor_3d}[len(source.ne)]
            tensor: int = new(self._ctx, source.type, *source.ne)
            ggml.ggml_set_name(tensor, source.name.encode()[:63])
            fill = {"mapped": self._map, "copied": self._copy, "repacked": self._repack}[form]
            fill(tensor, source)
            self._ready[key] = tensor
        return self._ready[key]

    def release_staging(self) -> None:
        """Gives the memory used for repacking back; call it after the last weight."""
        self._staging = np.empty(0, np.uint8)

    def _map(self, tensor: int, source: WeightSource) -> None:
        span = source.spans[0]
        ggml_backend.ggml_backend_tensor_alloc(self._file.buffers[span.shard], tensor, self._file.address(span))
        self._file.populate(span, self._progress)

    def _copy(self, tensor: int, source: WeightSource) -> None:
        address = self._allocate(tensor, self._backend.buft)
        if self._backend.is_host:
            self._read(source, address)
            return
        # Piece by piece: the host may not have room for a stack of experts.
        offset = 0
        for span in source.spans:
            for begin in range(0, span.n_bytes, STAGED_BYTES):
                piece = Span(span.shard, span.offset + begin, min(STAGED_BYTES, span.n_bytes - begin))
                self._make_staging(piece.n_bytes)
                self._file.read(piece, self._staging.ctypes.data, self._progress)
                self._backend.set(tensor, self._staging[: piece.n_bytes], offset)
                offset += piece.n_bytes

    def _repack(self, tensor: int, source: WeightSource) -> None:
        self._allocate(tensor, repack_buffer_type())
        self._make_staging(source.n_bytes)
        self._read(source, self._staging.ctypes.data)
        # The repack buffer takes whole tensors only.
        ggml_backend.ggml_backend_tensor_set(tensor, self._staging.ctypes.data, 0, source.n_bytes)

    def _make_staging(self, n_bytes: int) -> None:
        if self._staging.nbytes < n_bytes:
            self._staging = np.empty(n_bytes, np.uint8)

    def _read(self, source: WeightSource, address: int) -> None:
        for span in source.spans:
            self._file.read(span, address, self._progress)
            address += span.n_bytes

    def _allocate(self, tensor: int, buft: int | None) -> int:
        n_bytes = ggml_backend.ggml_backend_buft_get_alloc_size(buft, tensor)
        is_own = buft == self._backend.buft
        buffer = self._backend.allocate(n_bytes) if is_own else allocate(buft, n_bytes)
        if self._backend.is_host:
            ggml_backend.ggml_backend_buffer_set_usage(buffer, ggml_backend.USAGE_WEIGHTS)
        self._buffers.append(buffer)
        base: int = ggml_backend.ggml_backend_buffer_get_base(buffer)
        ggml_backend.ggml_backend_tensor_alloc(buffer, tensor, base)
        return base

    def close(self) -> None:
        """Frees all weights."""
        for buffer in self._buffers:
            ggml_backend.ggml_backend_buffer_free(buffer)
        self._buffers.clear()
        self._ready.clear()
        self._file.close()
        if self._ctx:
            ggml.ggml_free(self._ctx)
            self._ctx = 0


def _recurrent_weights(source: RecurrentSources, weight: Callable[[WeightSource | None], int]) -> RecurrentWeights:
    """A recurrent layer's tensors, by `weight`, which makes one ready."""
    return RecurrentWeights(
        tuple(Linear(weight(part.weight)) for part in source.inputs),
        weight(source.conv),
        Linear(weight(source.output.weight)),
        *map(weight, source.parts),
    )


def _shared_weights(
    source: SharedSources, weight: Callable[[WeightSource | None], int], linear: Callable[[LinearSource], Linear]
) -> SharedWeights:
    """A shared expert's tensors, by `weight` and `linear`, which make one ready."""
    vectors = (weight(one) for one in (source.gate, source.norm, source.post_norm))
    return SharedWeights(tuple(linear(part) for part in source.gate_up), linear(source.down), *vectors)


class Tensors(Protocol):
    """Gives each weight its tensor, such as a `WeightStore`."""

    def weight(self, source: WeightSource, form: Form) -> int:
        """The tensor of a weight in the form asked for."""


FormRule = Callable[[WeightSource], Form]
"""Says in which form a weight is wanted."""


@dataclass(frozen=True, slots=True)
class WeightSubset:
    """Which weights of a model to load: those of `layers`, and whether the output matrix; by default all of them."""

    layers: Collection[int] | None = None
    output: bool = True


ALL = WeightSubset()
_ABSENT = LayerWeights(None, (), Linear(0), None, None, (), Linear(0))


def load_weights(
    store: Tensors, sources: ModelSources, form: FormRule, token_embd: int | None = None, subset: WeightSubset = ALL
) -> ModelWeights:
    """Makes a subset of the weights ready. The token table stays mapped: a step looks up a few of its rows.

    With `token_embd`, that tensor takes the table's place; 0 is for a subset that needs none.
    """

    def weight(source: WeightSource | None) -> int:
        return store.weight(source, form(source)) if source else 0

    def linear(source: LinearSource) -> Linear:
        return Linear(weight(source.weight), weight(source.bias))

    def optional(source: LinearSource | None) -> Linear | None:
        return linear(source) if source else None

    def latent(source: LatentSources | None) -> LatentWeights | None:
        parts = (source.q, source.k, source.v) if source else ()
        return LatentWeights(*(optional(part) or Linear(0) for part in parts)) if parts else None

    def layer(source: LayerSources) -> LayerWeights:
        return LayerWeights(
            attn_norm=optional(source.attn_norm),
            qkv=tuple(linear(part) for part in source.qkv),
            attn_output=optional(source.attn_output) or Linear(0),
            ffn_norm=optional(source.ffn_norm),
            router=optional(source.router),
            gate_up=tuple(linear(part) for part in source.gate_up),
            down=optional(source.down) or Linear(0),
            q_norm=weight(source.q_norm),
            k_norm=weight(source.k_norm),
            choice_bias=weight(source.choice_bias),
            shared=_shared_weights(source.shared, weight, linear) if source.shared else None,
            sinks=weight(source.sinks),
            expert_biases=tuple(weight(bias) for bias in source.expert_biases),
            expert_scales=tuple(weight(scale) for scale in source.expert_scales),
            latent=latent(source.latent),
            aux=tuple(weight(vectors) for vectors in source.aux),
            recurrent=_recurrent_weights(source.recurrent, weight) if source.recurrent else None,
            router_scale=weight(source.router_scale),
            post=PostWeights(*map(weight, source.post.parts)),
            expert_latent=tuple(linear(part) for part in source.expert_latent),
        )

    return ModelWeights(
        token_embd=store.weight(sources.token_embd, "mapped") if token_embd is None else token_embd,
        output_norm=linear(sources.output_norm) if subset.output else Linear(0),
        output=linear(sources.output) if subset.output else Linear(0),
        rope_freqs=weight(sources.rope_freqs),
        layers=tuple(
            layer(source) if subset.layers is None or index in subset.layers else _ABSENT
            for index, source in enumerate(sources.layers)
        ),
    )
