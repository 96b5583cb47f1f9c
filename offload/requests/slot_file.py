"""Files of the keys and values of a sequence of tokens, so that its prompt need not be read again after a restart.

A file has a head (of which model, in which form, how many tokens), the tokens, the keys and values of each layer, head
by head, and a sha256 of all that. It is read to its end before anything of it is used.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec
import numpy as np

from slimoe.offload.errors import UsageError
from slimoe.offload.files.regular_file import open_regular, reason
from slimoe.offload.files.whole_file import whole_file
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.memory.cells import Indices, Tokens
from slimoe.offload.memory.contents import (
    read_rows,
    read_state,
    row_shape,
    state_bytes_of,
    write_rows,
    write_state,
)
from slimoe.offload.memory.kv_store import KVStore

MAGIC = b"SLIMOEKV1\n"
_LENGTH_BYTES, _HASH_BYTES, _MAX_HEAD_BYTES = 4, 32, 1 << 16
_PIECE_BYTES = 1 << 20


class SlotFileError(UsageError):
    """A file that is not the keys and values of this model, whole."""


class SlotHead(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a file is of: `model` is the model's hash, `kv_type` the cache's, `row_bytes` are of a token in one head.

    Where every second tensor has values whose rows are not like keys', `value_bytes` are of these. `state_bytes` are of
    what recurrent layers keep of all its tokens. Where heads differ between layers, the first layer's are named, and
    `cell_bytes` are a token's of all layers. Layers with a window that have cells of their own are counted apart: they
    have the last `n_windowed` tokens, in `window_bytes` each.
    """

    model: str
    kv_type: str
    n_tokens: int
    n_tensors: int
    n_heads: int
    row_bytes: int
    value_bytes: int = 0
    state_bytes: int = 0
    cell_bytes: int = 0
    n_windowed: int = 0
    window_bytes: int = 0

    @property
    def n_bytes(self) -> int:
        """Bytes of tokens, keys and values, and states."""
        n_bytes = self.n_tokens * (4 + (self.cell_bytes or self.even_bytes)) + self.state_bytes
        return n_bytes + self.n_windowed * self.window_bytes

    @property
    def even_bytes(self) -> int:
        """Bytes of a token in all layers, were they all as the first."""
        two_rows = self.row_bytes + (self.value_bytes or self.row_bytes)
        return self.n_tensors * self.n_heads * two_rows // 2


class SlotPlace(NamedTuple):
    """Where a sequence lies in memory: the cells of its tokens, the state of recurrent layers after them, and the cells
    of the last ones in layers with a window, if these have cells of their own.
    """

    cells: Indices
    state: int = 0
    window: Indices | None = None


def slot_head(model: str, store: KVStore, n_tokens: int) -> SlotHead:
    """The head of a file of so many tokens in this model's cache."""
    tensors = store.tensors()
    shapes = [ggml.tensor_at(tensor) for tensor in tensors]
    n_heads = int(shapes[0].ne[2]) if shapes else 0
    row_bytes, value_bytes = (int(shapes[:2][place].nb[1]) if shapes else 0 for place in (0, -1))
    if value_bytes == row_bytes:
        value_bytes = 0
    state_bytes = sum(state_bytes_of(store, tensor) for tensor in store.state_tensors())
    head = SlotHead(model, store.form, n_tokens, len(tensors), n_heads, row_bytes, value_bytes, state_bytes)
    cell_bytes = _token_bytes(tensors)
    if cell_bytes != head.even_bytes:
        head = msgspec.structs.replace(head, cell_bytes=cell_bytes)
    window_bytes = _token_bytes(store.window_tensors())
    if not window_bytes:
        return head
    n_windowed = min(n_tokens, store.spec.n_window - 1)
    return msgspec.structs.replace(head, n_windowed=n_windowed, window_bytes=window_bytes)


def _token_bytes(tensors: Sequence[int]) -> int:
    """Bytes of a token in tensors of keys or values."""
    return sum(n_heads * row_bytes for n_heads, row_bytes in map(row_shape, tensors))


def write_slot(path: Path, model: str, store: KVStore, tokens: Tokens, place: SlotPlace) -> int:
    """Writes tokens with their keys and values, and their state; the file's bytes.

    It appears under its name when it is whole. Raises UsageError where it cannot be written.
    """
    head = msgspec.json.encode(slot_head(model, store, len(tokens)))
    n_bytes, digest = 0, hashlib.sha256()
    with whole_file(path) as part, part.open("wb") as file:
        pieces = (MAGIC, len(head).to_bytes(_LENGTH_BYTES, "big"), head, tokens.astype("<i4").tobytes())
        for piece in itertools.chain(pieces, _content(store, place)):
            digest.update(piece)
            n_bytes += file.write(piece)
        n_bytes += file.write(digest.digest())
    return n_bytes


def read_slot(
    path: Path, model: str, store: KVStore, n_most: int, find_place: Callable[[Tokens], SlotPlace]
) -> tuple[Tokens, int]:
    """Reads a file back: asks for a place for its tokens, and fills it. The tokens, and the file's bytes.

    Raises SlotFileError, before `find_place` is asked, for a file that is damaged, of another model or cache, or of
    more than `n_most` tokens.
    """
    try:
        with open_regular(path) as file:
            tokens, n_bytes = _checked(path, file, model, store, n_most)
            place = find_place(tokens)
            file.seek(n_bytes - _HASH_BYTES - slot_head(model, store, len(tokens)).n_bytes + 4 * len(tokens))
            for tensor, cells in _rows(store, place):
                n_heads, row_bytes = row_shape(tensor)
                for head in range(n_heads):
                    rows = np.frombuffer(file.read(len(cells) * row_bytes), np.uint8)
                    write_rows(tensor, cells, range(head, head + 1), rows.reshape(1, -1, row_bytes))
            for tensor in store.state_tensors():
                state = np.frombuffer(file.read(state_bytes_of(store, tensor)), np.uint8)
                write_state(store, tensor, place.state, state)
    except OSError as error:
        raise SlotFileError(f"{path.name} cannot be read: {reason(error)}.") from None
    return tokens, n_bytes


def _checked(path: Path, file: BinaryIO, model: str, store: KVStore, n_most: int) -> tuple[Tokens, int]:
    begin = file.read(len(MAGIC) + _LENGTH_BYTES)
    n_head = int.from_bytes(begin[len(MAGIC) :], "big")
    if not begin.startswith(MAGIC) or len(begin) < len(MAGIC) + _LENGTH_BYTES or n_head > _MAX_HEAD_BYTES:
        raise SlotFileError(f"{path.name} is no saved slot of this program.")
    text = file.read(n_head)
    try:
        head = msgspec.json.decode(text, type=SlotHead)
    except msgspec.MsgspecError:
        raise SlotFileError(f"{path.name} is damaged: its head cannot be read.") from None
    expected = slot_head(model, store, head.n_tokens)
    if head.model != model:
        raise SlotFileError(f"{path.name} was saved from another model. Restore it with that one, or save it anew.")
    if head != expected:
        raise SlotFileError(
            f"{path.name} was saved from a KV cache of another form ({head.kv_type}, {head.n_tensors} tensors), but "
            f"this one is {expected.kv_type} of {expected.n_tensors}. Start the server with the same --kv-type and "
            "--ctx, or save it anew."
        )
    if not 0 < head.n_tokens <= n_most:
        raise SlotFileError(f"{path.name} has {head.n_tokens} tokens, but the context window has {n_most}.")
    digest, n_left = hashlib.sha256(begin + text), head.n_bytes
    raw = file.read(4 * head.n_tokens)
    digest.update(raw)
    n_left -= len(raw)
    while n_left and (piece := file.read(min(_PIECE_BYTES, n_left))):
        digest.update(piece)
        n_left -= len(piece)
    if file.read(_HASH_BYTES + 1) != digest.digest():
        raise SlotFileError(f"{path.name} is damaged or cut off: its checksum is not that of its content.")
    return np.frombuffer(raw, "<i4").astype(np.int32), file.tell()


def _rows(store: KVStore, place: SlotPlace) -> Iterator[tuple[int, Indices]]:
    """Each tensor of keys or values, and the cells of the tokens that are in the file."""
    for tensor in store.tensors():
        yield tensor, place.cells
    for tensor in store.window_tensors():
        assert place.window is not None
        yield tensor, place.window


def _content(store: KVStore, place: SlotPlace) -> Iterator[bytes]:
    """The keys and values of the tokens, and what recurrent layers keep of them."""
    for tensor, cells in _rows(store, place):
        for head in range(row_shape(tensor)[0]):
            yield read_rows(tensor, cells, range(head, head + 1)).tobytes()
    for tensor in store.state_tensors():
        yield read_state(store, tensor, place.state).tobytes()
