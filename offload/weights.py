"""Weights in memory: mapped from the file, copied, or copied into this CPU's own arrangement."""

import mmap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offload import ggml
from offload.backend import repack_buffer_type
from offload.errors import ModelFileError
from offload.gguf_file import GGUFFile
from offload.weight_source import LayerSources, LinearSource, ModelSources, WeightSource

Progress = Callable[[int], None]
"""Called with the number of bytes that were just made ready."""

_STRIDE = 64 << 20
_MADV_POPULATE_READ = 22


@dataclass(frozen=True, slots=True)
class Linear:
    """Tensor addresses of a matrix (or stack of them) and of its bias, 0 without one."""

    weight: int
    bias: int = 0


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Tensor addresses of one block, shaped as in `LayerSources`; `router` is 0 in a dense block."""

    attn_norm: int
    qkv: tuple[Linear, ...]
    attn_output: Linear
    ffn_norm: int
    router: int
    gate_up: tuple[Linear, ...]
    down: Linear


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """Tensor addresses of a whole model; `rope_freqs` is 0 when the file has none."""

    token_embd: int
    output_norm: int
    output: Linear
    rope_freqs: int
    layers: tuple[LayerWeights, ...]


class MappedFile:
    """The shards of a GGUF file mapped read-only; their pages are shared and need no reading twice."""

    def __init__(self, gguf: GGUFFile) -> None:
        self._maps: list[mmap.mmap] = []
        self.bytes: list[NDArray[np.uint8]] = []
        self.buffers: list[int] = []
        for path in gguf.paths:
            try:
                with path.open("rb") as file:
                    self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except OSError as error:
                raise ModelFileError(path, f"the file cannot be mapped ({error.strerror}).") from None
            self.bytes.append(np.frombuffer(self._maps[-1], np.uint8))
            address = self.bytes[-1].ctypes.data
            buffer = ggml.ggml_backend_cpu_buffer_from_ptr(address, len(self.bytes[-1]))
            ggml.ggml_backend_buffer_set_usage(buffer, ggml.USAGE_WEIGHTS)
            self.buffers.append(buffer)

    def populate(self, source: WeightSource, progress: Progress) -> None:
        """Brings the pages of a weight into memory, in order, so that no computation waits for the disk."""
        for span in source.spans:
            for begin in range(span.offset, span.offset + span.n_bytes, _STRIDE):
                n_bytes = min(_STRIDE, span.offset + span.n_bytes - begin)
                self._touch(span.shard, begin, n_bytes)
                progress(n_bytes)

    def _touch(self, shard: int, begin: int, n_bytes: int) -> None:
        page = begin // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            self._maps[shard].madvise(_MADV_POPULATE_READ, page, begin + n_bytes - page)
        except (OSError, AttributeError):
            # Kernels before 5.14 and other systems: reading one byte a page does the same.
            self.bytes[shard][begin : begin + n_bytes : mmap.PAGESIZE].max()

    def close(self) -> None:
        """Unmaps the shards."""
        for buffer in self.buffers:
            ggml.ggml_backend_buffer_free(buffer)
        self.bytes.clear()
        for mapped in self._maps:
            mapped.close()
        self.buffers.clear()
        self._maps.clear()


class WeightStore:
    """Makes weights ready, each at most once per form, and owns their memory."""

    def __init__(self, gguf: GGUFFile, sources: ModelSources, progress: Progress) -> None:
        self.file = MappedFile(gguf)
        self._progress = progress
        capacity = 64 + 32 * len(sources.layers)
        self._ctx = ggml.ggml_init(ggml.InitParams(capacity * ggml.ggml_tensor_overhead(), None, True))
        self._buffers: list[int] = []
        self._ready: dict[tuple[str, bool], int] = {}
        self._staging = np.empty(0, np.uint8)

    def weight(self, source: WeightSource, repacked: bool) -> int:
        """The tensor of a weight, in this CPU's arrangement if `repacked`."""
        key = (source.name, repacked)
        if key not in self._ready:
            self._ready[key] = self._repacked(source) if repacked else self._plain(source)
        return self._ready[key]

    def release_staging(self) -> None:
        """Gives the memory used for joining weights back; call it after the last one."""
        self._staging = np.empty(0, np.uint8)

    def _tensor(self, source: WeightSource) -> int:
        ne = (*source.ne, 1, 1, 1)
        makers = {1: ggml.ggml_new_tensor_1d, 2: ggml.ggml_new_tensor_2d, 3: ggml.ggml_new_tensor_3d}
        n_dims = max(1, len(source.ne))
        tensor: int = makers[n_dims](self._ctx, source.type, *ne[:n_dims])
        ggml.ggml_set_name(tensor, source.name.encode()[:63])
        return tensor

    def _plain(self, source: WeightSource) -> int:
        tensor = self._tensor(source)
        if len(source.spans) == 1:
            span = source.spans[0]
            address = self.file.bytes[span.shard].ctypes.data + span.offset
            ggml.ggml_backend_tensor_alloc(self.file.buffers[span.shard], tensor, address)
            self.file.populate(source, self._progress)
            return tensor
        self._allocate(tensor, ggml.ggml_backend_cpu_buffer_type())
        self._fill(tensor, source)
        return tensor

    def _repacked(self, source: WeightSource) -> int:
        tensor = self._tensor(source)
        self._allocate(tensor, repack_buffer_type())
        self._fill(tensor, source)
        return tensor

    def _allocate(self, tensor: int, buft: int | None) -> None:
        n_bytes = ggml.ggml_backend_buft_get_alloc_size(buft, tensor)
        buffer = ggml.ggml_backend_buft_alloc_buffer(buft, n_bytes)
        assert buffer, "weight allocation"
        ggml.ggml_backend_buffer_set_usage(buffer, ggml.USAGE_WEIGHTS)
        self._buffers.append(buffer)
        ggml.ggml_backend_tensor_alloc(buffer, tensor, ggml.ggml_backend_buffer_get_base(buffer))

    def _fill(self, tensor: int, source: WeightSource) -> None:
        if len(source.spans) == 1:
            span = source.spans[0]
            address = self.file.bytes[span.shard].ctypes.data + span.offset
        else:
            address = self._join(source)
        # The repack buffer takes whole tensors only.
        ggml.ggml_backend_tensor_set(tensor, address, 0, source.n_bytes)
        self._progress(source.n_bytes)

    def _join(self, source: WeightSource) -> int:
        if self._staging.nbytes < source.n_bytes:
            self._staging = np.empty(source.n_bytes, np.uint8)
        at = 0
        for span in source.spans:
            self._staging[at : at + span.n_bytes] = self.file.bytes[span.shard][span.offset : span.offset + span.n_bytes]
            at += span.n_bytes
        return int(self._staging.ctypes.data)

    def close(self) -> None:
        """Frees all weights."""
        for buffer in self._buffers:
            ggml.ggml_backend_buffer_free(buffer)
        self._buffers.clear()
        self._ready.clear()
        self.file.close()
        if self._ctx:
            ggml.ggml_free(self._ctx)
            self._ctx = 0


RepackRule = Callable[[WeightSource], bool]
"""Says of a weight whether it is wanted repacked."""


def load_weights(store: WeightStore, sources: ModelSources, repack: RepackRule) -> ModelWeights:
    """Makes every weight of a model ready, in the form that `repack` asks for."""

    def linear(source: LinearSource) -> Linear:
        bias = store.weight(source.bias, False) if source.bias else 0
        return Linear(store.weight(source.weight, repack(source.weight)), bias)

    def layer(source: LayerSources) -> LayerWeights:
        return LayerWeights(
            attn_norm=store.weight(source.attn_norm, False),
            qkv=tuple(linear(part) for part in source.qkv),
            attn_output=linear(source.attn_output),
            ffn_norm=store.weight(source.ffn_norm, False),
            router=store.weight(source.router, False) if source.router else 0,
            gate_up=tuple(linear(part) for part in source.gate_up),
            down=linear(source.down),
        )

    return ModelWeights(
        token_embd=store.weight(sources.token_embd, False),
        output_norm=store.weight(sources.output_norm, False),
        output=linear(sources.output),
        rope_freqs=store.weight(sources.rope_freqs, False) if sources.rope_freqs else 0,
        layers=tuple(layer(source) for source in sources.layers),
    )
