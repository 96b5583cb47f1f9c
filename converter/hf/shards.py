"""The safetensors files of a checkpoint: which tensors lie in which, their headers, and the index.

Source: the safetensors format, https://github.com/huggingface/safetensors.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from slimoe.converter.gguf.writer import Piece
from slimoe.converter.hf.result_tensors import Stretch

SHARD_BYTES = 5_000_000_000
"""Most bytes of tensors in a file, as transformers had it for long; one tensor may be larger."""
INDEX = "model.safetensors.index.json"
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of a checkpoint: its name, its header, and the stretches of tensors behind it."""

    name: str
    header: bytes
    stretches: tuple[Stretch, ...]

    @property
    def n_bytes(self) -> int:
        """The file's bytes."""
        return len(self.header) + sum(stretch.n_bytes for stretch in self.stretches)

    def pieces(self) -> Iterator[Piece]:
        """What makes everything behind the header."""
        offset = len(self.header)
        for stretch in self.stretches:
            for n_bytes, make in stretch.parts:
                yield Piece(offset, n_bytes, make)
                offset += n_bytes


def shards_of(
    stretches: Iterable[Stretch], notes: Mapping[str, str], shard_bytes: int = SHARD_BYTES
) -> tuple[Shard, ...]:
    """Divides tensors, in their order, among as few files as hold them; `notes` are further metadata of each."""
    groups: list[list[Stretch]] = []
    room = 0
    for stretch in stretches:
        if not groups or stretch.n_bytes > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(stretch)
        room -= stretch.n_bytes
    n, shards = len(groups), []
    for number, group in enumerate(groups, 1):
        # The widest values first, so that all lie at multiples of their width, which readers may ask for.
        ordered = sorted(group, key=lambda stretch: -stretch.tensors[0].item_bytes)
        name = "model.safetensors" if n == 1 else f"model-{number:05d}-of-{n:05d}.safetensors"
        shards.append(Shard(name, _header(ordered, notes), tuple(ordered)))
    return tuple(shards)


def index_json(shards: Iterable[Shard]) -> bytes:
    """The index of several files, which says where each tensor is."""
    places = [(tensor, shard.name) for shard in shards for one in shard.stretches for tensor in one.tensors]
    total = sum(tensor.n_bytes for tensor, _ in places)
    weight_map = {tensor.name: name for tensor, name in sorted(places, key=lambda place: place[0].name)}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode() + b"\n"


def _header(stretches: Iterable[Stretch], notes: Mapping[str, str]) -> bytes:
    """The header's length and the header, padded with spaces."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **notes}}
    offset = 0
    for tensor in (tensor for stretch in stretches for tensor in stretch.tensors):
        end = offset + tensor.n_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
