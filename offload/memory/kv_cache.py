"""What layers keep of the tokens read so far, keys and values or states, in buffers that are allocated once."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from slimoe.offload.errors import DoesNotFitError, UsageError
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import device as ggml_device
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import Backend
from slimoe.offload.model.attention_spec import AttentionSpec
from slimoe.offload.model.spec import ModelSpec

KV_TYPES = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_0": GGMLQuantizationType.Q4_0,
}
_ALIGNMENT = 256
_KEPT_STATES = 3
_VALUE_PIECE = 64
_MOST_HADAMARDS = 4
CELL_STEP = 256
"""The cache is read in steps of so many cells, so that one graph serves as many tokens."""


def kv_type(name: str) -> GGMLQuantizationType:
    """The ggml type of a `--kv-type`; raises UsageError for an unknown one."""
    if name not in KV_TYPES:
        raise UsageError(f"The KV cache type {name!r} is unknown. Use one of {', '.join(KV_TYPES)}.")
    return KV_TYPES[name]


@dataclass(frozen=True, slots=True)
class KVSize:
    """How much a KV cache holds: values of type `kind` of `n_cells` tokens, and `n_states` states of recurrent layers.

    Layers with a window have `n_window_cells` cells of their own, or with 0 as many as the others, and the same ones.
    """

    kind: GGMLQuantizationType
    n_cells: int
    n_states: int = 0
    n_window_cells: int = 0

    def cells_of(self, spec: ModelSpec, layer: int) -> int:
        """The tokens of which one layer keeps keys and values."""
        return self.n_window_cells if self.n_window_cells and spec.window(layer) else self.n_cells

    def n_masked(self, spec: ModelSpec) -> int:
        """The most cells that a token's row has in the masks of all layers, and in those of layers with a window."""
        return self.n_cells + ((self.n_window_cells or self.n_cells) if any(spec.windowed) else 0)

    def n_bytes(self, spec: ModelSpec, layers: Collection[int] | None = None) -> int:
        """Bytes of all that a cache of some `layers` or all holds; those without attention have no cells.

        Raises UsageError for a type that does not divide the heads.
        """
        n_cells = self.n_window_cells or self.n_cells
        every = [layer for layer in spec.attention_layers if layers is None or layer in layers]
        windowed = [layer for layer in every if spec.window(layer)]
        others = [layer for layer in every if not spec.window(layer)]
        n_kv = kv_bytes(spec, self.n_cells, self.kind, others) + kv_bytes(spec, n_cells, self.kind, windowed)
        return n_kv + _hadamard_bytes(spec, self.kind, layers) + self.n_states * state_bytes(spec, layers)


def kv_size(spec: ModelSpec, kind: GGMLQuantizationType, n_cells: int, n_batch: int, n_parallel: int) -> KVSize:
    """The size of a cache of `n_cells` tokens, for steps of at most `n_batch` tokens of `n_parallel` sequences.

    Layers with a window have cells for a window of each sequence and a step, and for one more window, from which a
    sequence can go on that left another one; but not more than the others.
    """
    n_window_cells = 0
    if any(spec.windowed):
        n_needed = (n_parallel + 1) * spec.n_window + n_batch
        n_window_cells = -(-n_needed // CELL_STEP) * CELL_STEP
    return KVSize(kind, n_cells, state_count(spec, n_parallel), n_window_cells if n_window_cells < n_cells else 0)


def kv_bytes(spec: ModelSpec, n_cells: int, kind: GGMLQuantizationType, layers: Collection[int] | None = None) -> int:
    """Bytes of the keys and values of `n_cells` tokens, for some `layers` or all; those without attention need none.

    Raises UsageError for a type that does not divide the heads.
    """
    block, block_bytes = GGML_QUANT_SIZES[kind]
    for length in (length for of in spec.attentions for length in (of.key_length, of.value_length)):
        if length % block:
            raise UsageError(f"Heads of {length} do not divide into {kind.name} blocks. Use --kv-type f16.")
    n_values = sum(spec.attention_of(layer).n_cached for layer in _with_attention(spec, layers))
    return int(n_cells * n_values // block * block_bytes)


def hadamard_lengths(of: AttentionSpec, kind: GGMLQuantizationType) -> tuple[int, int]:
    """The lengths of the pieces of keys, and of values, that are rotated before they are stored; 0 is for no rotation.

    A Hadamard matrix spreads a value that is much larger than the others of its block over all of a piece, so that a
    quantised cache rounds less. Queries are rotated as keys are, which changes no product, and what attention makes of
    values is rotated back. As in llama.cpp a head of keys is rotated by the largest power of two that divides it and
    values in pieces of 64, but heads that 64 does not divide in pieces of 32, where llama.cpp leaves them as they are.
    Nothing is rotated in caches of floats, nor where values are a view of keys (absorbed MLA).
    """
    if GGML_QUANT_SIZES[kind][0] == 1 or not of.has_values:
        return 0, 0
    keys, values = (length & -length for length in (of.key_length, of.value_length))
    return keys, min(values, _VALUE_PIECE)


def _hadamard_bytes(spec: ModelSpec, kind: GGMLQuantizationType, layers: Collection[int] | None) -> int:
    """Bytes of the matrices by which a cache rotates keys and values."""
    own = {spec.attention_of(layer) for layer in _with_attention(spec, layers)}
    return sum(4 * n * n for n in {n for of in own for n in hadamard_lengths(of, kind) if n})


def hadamard(n: int) -> NDArray[np.float32]:
    """The orthonormal Hadamard matrix in Sylvester's order, F32 [n, n], its own inverse; `n` is a power of two."""
    signs = np.array([[1]], np.float32)
    while len(signs) < n:
        signs = np.block([[signs, signs], [signs, -signs]])
    matrix: NDArray[np.float32] = signs / np.sqrt(np.float32(n))
    return matrix


def state_bytes(spec: ModelSpec, layers: Collection[int] | None = None) -> int:
    """Bytes of what recurrent layers, some `layers` or all, keep of one sequence; 0 where none is recurrent."""
    if spec.recurrent is None:
        return 0
    n_layer = sum(layers is None or layer in layers for layer in spec.recurrent_layers)
    return 4 * n_layer * (spec.recurrent.n_conv_kept + spec.recurrent.n_matrix_kept)


def state_count(spec: ModelSpec, n_parallel: int) -> int:
    """How many states of sequences a model with recurrent layers has room for; 0 where none is recurrent.

    The one of no tokens, two of each sequence in use, and some to go on from again.
    """
    return 0 if spec.recurrent is None else 1 + 3 * n_parallel + _KEPT_STATES


def _with_attention(spec: ModelSpec, layers: Collection[int] | None) -> list[int]:
    return [layer for layer in spec.attention_layers if layers is None or layer in layers]


class KVTensors(Protocol):
    """The tensors of what each layer keeps of tokens, such as those of a `KVCache`."""

    keys: dict[int, int]
    values: dict[int, int]
    convs: dict[int, int]
    matrices: dict[int, int]
    hadamards: dict[int, int]


class KVCache:
    """Keys and values [n_embd_head, n, n_head_kv] of each of the `layers`, by default all, that has attention.

    Heads lie outermost, so that attention reads each head's keys as one stretch of memory. Where values are a view of
    the keys, as with absorbed MLA, `values` is empty. Of recurrent layers there are the last inputs of convolutions,
    `convs`, and the `matrices` of delta nets, F32 [n, n_parts * n_states]: state 0 is that of no tokens. A quantised
    cache has the matrices by which keys and values are rotated, `hadamards` F32 [n, n] by their length.
    """

    def __init__(
        self,
        spec: ModelSpec,
        size: KVSize,
        backend: Backend,
        layers: Collection[int] | None = None,
    ) -> None:
        assert size.n_cells % CELL_STEP == size.n_window_cells % CELL_STEP == 0
        self.size, kind, n_states = size, size.kind, size.n_states
        self._ctx = ggml.ggml_init(
            ggml.InitParams((2 * spec.n_layer + _MOST_HADAMARDS) * ggml.ggml_tensor_overhead() + 1024, None, True)
        )
        own = {layer: spec.attention_of(layer) for layer in _with_attention(spec, layers)}
        n = {layer: size.cells_of(spec, layer) for layer in own}
        self.keys = {layer: self._tensor(kind, of.key_length, n[layer], of.n_head_kv) for layer, of in own.items()}
        self.values = {
            layer: self._tensor(kind, of.value_length, n[layer], of.n_head_kv)
            for layer, of in own.items()
            if of.has_values
        }
        self.convs, self.matrices = dict[int, int](), dict[int, int]()
        if recurrent := spec.recurrent:
            kept = [layer for layer in spec.recurrent_layers if layers is None or layer in layers]
            n_rows = n_states * recurrent.n_parts
            self.convs = {layer: self._rows(recurrent.n_conv_kept // recurrent.n_parts, n_rows) for layer in kept}
            if n_values := recurrent.n_matrix_kept // recurrent.n_parts:
                self.matrices = {layer: self._rows(n_values, n_rows) for layer in kept}
        lengths = {length for of in own.values() for length in hadamard_lengths(of, kind) if length}
        self.hadamards = {length: self._rows(length, length) for length in sorted(lengths)}
        tensors = [held for of in (*self.kinds, self.hadamards) for held in of.values()]
        sizes = [-(-ggml.ggml_nbytes(tensor) // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        self.n_bytes = sum(sizes)
        self._buffers = list[int]()
        try:
            for together in _pieces(sizes, ggml_device.ggml_backend_buft_get_max_size(backend.buft) - _ALIGNMENT):
                self._place(backend, [tensors[index] for index in together], [sizes[index] for index in together])
        except DoesNotFitError:
            self.close()
            raise
        for length, tensor in self.hadamards.items():
            matrix = np.ascontiguousarray(hadamard(length))
            ggml_backend.ggml_backend_tensor_set(tensor, matrix.ctypes.data, 0, matrix.nbytes)

    def _place(self, backend: Backend, tensors: Sequence[int], sizes: Sequence[int]) -> None:
        """Lays tensors one after the other in a buffer of their own."""
        self._buffers.append(backend.allocate(sum(sizes) + _ALIGNMENT))
        base = -(-ggml_backend.ggml_backend_buffer_get_base(self._buffers[-1]) // _ALIGNMENT) * _ALIGNMENT
        for tensor, size in zip(tensors, sizes, strict=True):
            ggml_backend.ggml_backend_tensor_alloc(self._buffers[-1], tensor, base)
            base += size
        # Cells that hold no token yet are masked, but 0 * NaN would still be NaN.
        ggml_backend.ggml_backend_buffer_clear(self._buffers[-1], 0)

    @property
    def kinds(self) -> tuple[dict[int, int], ...]:
        """Tensors of each kind by their layers."""
        return self.keys, self.values, self.convs, self.matrices

    def _rows(self, n_values: int, n_rows: int) -> int:
        return int(ggml.ggml_new_tensor_2d(self._ctx, GGMLQuantizationType.F32, n_values, n_rows))

    def _tensor(self, kind: GGMLQuantizationType, *ne: int) -> int:
        return int(ggml.ggml_new_tensor_3d(self._ctx, kind, *ne))

    def close(self) -> None:
        """Frees the memory."""
        while self._buffers:
            ggml_backend.ggml_backend_buffer_free(self._buffers.pop())
        if self._ctx:
            ggml.ggml_free(self._ctx)
            self._ctx = 0


def _pieces(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Indices of what lies in one buffer, in order: as much as `most` bytes, or one that is larger by itself."""
    pieces, held = list[list[int]](), most
    for index, size in enumerate(sizes):
        if held + size > most:
            pieces.append([])
            held = 0
        pieces[-1].append(index)
        held += size
    return pieces
