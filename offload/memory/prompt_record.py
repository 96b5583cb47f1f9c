"""What a prompt cache's files are called, and what is in them.

A text's tokens are cut into blocks of equal length. Each block's key is a hash of the key before it and of its tokens,
so that texts which begin alike have the same first blocks, and a block is stored once for all of them. A record has the
keys and values of a block, or of the tokens behind the last whole one; where layers are recurrent, further records have
parts of the state after its last token. Where layers with a window have cells of their own, theirs are in other
records, of those tokens only that the windows of places see from which texts go on.
"""

import hashlib
import re
import time
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
from gguf import GGMLQuantizationType

from slimoe.offload.errors import UsageError
from slimoe.offload.memory.cells import Tokens
from slimoe.offload.memory.contents import Bytes, row_shape, state_bytes_of
from slimoe.offload.memory.kv_cache import CELL_STEP, kv_bytes, state_bytes
from slimoe.offload.memory.kv_store import KVStore
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.resources.memory import human, human_up

MAGIC = b"SLIMOEPC1\n"
RECORD_BYTES = 8 << 20
"""About the most bytes of a record: few enough to be copied between two tokens, enough for a disk's full speed."""
LEAST_TOKENS = 128
"""Shorter texts are not kept. Reading them would be faster, with the demo model 60 times, but nobody would notice, and
greetings and questions without a system prompt would fill the disk with their files."""
_LEAST_BLOCK, LARGEST_BLOCK = 16, 32
"""Tokens behind the last whole block are computed again: half a block on average."""
_NAME = re.compile(r"slimoe-([0-9a-f]{16})-([0-9]{8})-([0-9a-f]{32})\.(kv|window|state[0-9]{1,4})")
_HASH_BYTES = 32


class RecordName(NamedTuple):
    """A record's file name in parts: of which `root`, the tokens that it ends with, their `key`, and `kind`.

    The kind is kv, window, or state and the number of the part.
    """

    root: str
    n_tokens: int
    key: str
    kind: str

    @classmethod
    def parse(cls, name: str) -> "RecordName | None":
        """The parts of a file name; None for one that no prompt cache has given."""
        found = _NAME.fullmatch(name)
        return None if found is None else cls(found[1], int(found[2]), found[3], found[4])

    @property
    def is_of_state(self) -> bool:
        """Whether it is of a part of a state, not of keys and values."""
        return self.kind.startswith("state")

    def __str__(self) -> str:
        return f"slimoe-{self.root}-{self.n_tokens:08}-{self.key}.{self.kind}"


@dataclass(frozen=True, slots=True)
class RecordForm:
    """Everything by which keys and values of the same tokens can differ, and how they are cut into records.

    `model` is the model's hash, `settings` what else they depend on; a block has `n_block` tokens. `rows`
    are heads and row bytes of each tensor of keys or values, `states` the bytes of one state in each of states, and
    `windows` what `rows` are, of layers with a window that have cells of their own.
    """

    model: str
    settings: str
    kind: str
    n_block: int
    rows: tuple[tuple[int, int], ...]
    states: tuple[int, ...]
    windows: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, model: str, settings: str, store: KVStore) -> "RecordForm":
        """The form of what a store holds."""
        rows = tuple(row_shape(tensor) for tensor in store.tensors())
        windows = tuple(row_shape(tensor) for tensor in store.window_tensors())
        states = tuple(state_bytes_of(store, tensor) for tensor in store.state_tensors())
        n_block = block_tokens(_token_bytes(rows + windows))
        return cls(model, settings, store.form, n_block, rows, states, windows)

    @property
    def root(self) -> bytes:
        """The hash of all this, which stands for a text of no tokens."""
        fields = msgspec.to_builtins(self)
        if not self.windows:
            # So it was before there were any: the files of other models stay what they are.
            del fields["windows"]
        return hashlib.sha256(MAGIC + msgspec.json.encode(fields)).digest()

    @property
    def n_parts(self) -> int:
        """Records that a state takes."""
        return len(self._part_bounds) - 1

    @property
    def _part_bounds(self) -> list[int]:
        bounds, n_bytes = [0], 0
        for index, size in enumerate(self.states):
            if n_bytes and n_bytes + size > RECORD_BYTES:
                bounds.append(index)
                n_bytes = 0
            n_bytes += size
        return [*bounds, len(self.states)] if self.states else bounds

    def part(self, name: RecordName) -> range:
        """The states' tensors that a record is of."""
        number = int(name.kind.removeprefix("state"))
        return range(*self._part_bounds[number : number + 2])

    def n_tokens(self, name: RecordName) -> int:
        """How many tokens a record is of: a block, or what is behind the last whole one."""
        return (name.n_tokens - 1) % self.n_block + 1

    def rows_of(self, name: RecordName) -> tuple[tuple[int, int], ...]:
        """Heads and row bytes of each tensor of which a record of keys and values has rows."""
        return self.windows if name.kind == "window" else self.rows

    def n_bytes(self, name: RecordName) -> int:
        """Bytes of a record's content."""
        if name.kind in ("kv", "window"):
            return self.n_tokens(name) * _token_bytes(self.rows_of(name))
        return sum(self.states[index] for index in self.part(name))


class TextKeys:
    """The keys of all beginnings of a text that is used now."""

    def __init__(self, form: RecordForm, tokens: Tokens) -> None:
        self.tokens, self._form, self._used_ns = np.array(tokens, "<i4"), form, time.time_ns()
        root = form.root
        self._root, self._blocks = root.hex()[:16], [root]
        for begin in range(0, len(tokens) - form.n_block + 1, form.n_block):
            block = self.tokens[begin : begin + form.n_block]
            self._blocks.append(hashlib.sha256(self._blocks[-1] + block.tobytes()).digest())

    def name(self, n_tokens: int, kind: str = "kv") -> RecordName:
        """The name of the record that ends with the first `n_tokens` tokens."""
        n_blocks, n_behind = divmod(n_tokens, self._form.n_block)
        key = self._blocks[n_blocks]
        if n_behind:
            key = hashlib.sha256(key + self.tokens[n_tokens - n_behind : n_tokens].tobytes()).digest()
        return RecordName(self._root, n_tokens, key.hex()[:32], kind)

    def used_ns(self, name: RecordName) -> int:
        """When a record of it counts as used: the beginning last, for without it the rest is of no use."""
        return self._used_ns - 1000 * name.n_tokens

    def is_of(self, name: RecordName) -> bool:
        """Whether a record is of a beginning of this text."""
        return name.n_tokens <= len(self.tokens) and self.name(name.n_tokens, name.kind) == name

    def head(self, name: RecordName) -> bytes:
        """What stands in a record's file before its content: the same for the same tokens of the same model."""
        tokens = self.tokens[name.n_tokens - self._form.n_tokens(name) : name.n_tokens].tobytes()
        return MAGIC + self._form.root + f"{name}\n".encode() + tokens


def held_bytes(spec: ModelSpec, kind: GGMLQuantizationType) -> int:
    """About the most bytes of the records that are in memory at once, of a model with a KV cache of this type."""
    token_bytes = kv_bytes(spec, CELL_STEP, kind) // CELL_STEP
    n_records = 3  # one is being written, one waits for that, and one is read
    return n_records * max(block_tokens(token_bytes) * token_bytes, min(state_bytes(spec), RECORD_BYTES))


def check_bound(most_bytes: int, spec: ModelSpec, kind: GGMLQuantizationType) -> None:
    """Raises UsageError for a bound of all records below what the shortest text takes that is kept."""
    least = LEAST_TOKENS * (kv_bytes(spec, CELL_STEP, kind) // CELL_STEP) + state_bytes(spec)
    if most_bytes < 2 * least:  # with room for what is written before older records go
        raise UsageError(
            f"--prompt-cache-size is {human(most_bytes)}, but of this model prompts of {LEAST_TOKENS} tokens and more "
            f"are kept, which take {human(least)} and more. Make it {human_up(2 * least)} or more."
        )


def block_tokens(token_bytes: int) -> int:
    """How many tokens a block has, a power of two, if a token has so many bytes."""
    n_most = max(1, RECORD_BYTES // max(1, token_bytes))
    return min(LARGEST_BLOCK, max(_LEAST_BLOCK, 1 << (n_most.bit_length() - 1)))


def digest(head: bytes, content: Bytes) -> bytes:
    """The checksum that ends a record's file."""
    whole = hashlib.sha256(head)
    whole.update(content.data)
    return whole.digest()


def file_bytes(head: bytes, n_bytes: int) -> int:
    """Bytes of the file of a record whose content has `n_bytes`."""
    return len(head) + n_bytes + _HASH_BYTES


def content_of(data: bytes | bytearray, head: bytes, n_bytes: int) -> Bytes | None:
    """The content of a record's file, `n_bytes` behind its `head`; None for a file that is not just that, whole."""
    if len(data) != file_bytes(head, n_bytes) or not data.startswith(head):
        return None
    content = np.frombuffer(data, np.uint8, n_bytes, len(head))
    return content if digest(head, content) == data[-_HASH_BYTES:] else None


def _token_bytes(rows: tuple[tuple[int, int], ...]) -> int:
    return sum(n_heads * row_bytes for n_heads, row_bytes in rows)
