"""llama.cpp's importance matrix file: mean squares of the inputs of each column of a matrix.

Reads and writes the GGUF form (`NAME.in_sum2` [n_matrices, n_per_row] sums of squares, `NAME.counts` [n_matrices, 1]
tokens), and reads the older one (.dat). Source: llama.cpp's tools/imatrix and tools/quantize.
"""

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from slimoe.converter.gguf.bytes import read_bytes
from slimoe.converter.gguf.header import HeaderTensor, pack_header, padded
from slimoe.converter.source.model_source import PROJECTIONS, MatrixKey
from slimoe.converter.stats.statistics import Single, Statistics
from slimoe.offload.errors import ModelFileError, UsageError
from slimoe.offload.files.regular_file import open_regular, read_regular, reason
from slimoe.offload.files.whole_file import write_whole
from slimoe.offload.gguf.header import GGUFFile, Value, read_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"
_ALIGNMENT = 32
_OLD_LIMIT = 1 << 20
_JOINED = ".attn_qkv."
_PARTS = {
    _JOINED: (".attn_q.", ".attn_k.", ".attn_v."),
    ".ssm_in.": (_JOINED, ".attn_gate."),
}
"""What one matrix of a file may be several of in another: of attention, and of a delta net in older files."""


@dataclass(frozen=True, slots=True)
class InputSquares:
    """The inputs of a matrix or a stack of matrices: sums of squares [n_matrices, n_per_row] over tokens.

    `counts` [n_matrices] are the numbers of tokens.
    """

    sums: Single
    counts: Single

    @property
    def n_seen(self) -> int:
        """The number of matrices that any token went through."""
        return int(np.count_nonzero(self.counts > 0))

    def means(self, matrix: int) -> Single:
        """Mean squares [n_per_row] of a matrix's inputs.

        For a matrix that no token went through they are those of all others, or ones if there are none.
        """
        seen = [matrix] if self.counts[matrix] > 0 else list(np.flatnonzero(self.counts > 0))
        total = self.counts[seen].sum(dtype=np.float32)
        means: Single = self.sums[seen].sum(0) / total if seen else np.ones_like(self.sums[0])
        return means

    def of_width(self, n_per_row: int) -> "InputSquares":
        """The same sums for matrices of rows of `n_per_row` weights.

        The older form of the file does not say how many matrices a stack has, nor does the newer one of stacks that
        read every token. Raises UsageError for an imatrix of rows of another width.
        """
        if self.sums.shape[1] == n_per_row:
            return self
        if len(self.sums) > 1 or self.sums.size % n_per_row:
            made_for = (
                f"The imatrix was made for rows of {self.sums.shape[1]} weights, but the model's have {n_per_row}."
            )
            raise UsageError(f"{made_for} Give the imatrix of this model.")
        sums = self.sums.reshape(-1, n_per_row)
        return InputSquares(sums, np.full(len(sums), self.counts[0]))


@dataclass(frozen=True, slots=True)
class Imatrix:
    """An importance matrix: `entries` by tensor names, and the texts that it was measured on.

    These are the names of the data sets, and the number of chunks and their size in tokens.
    """

    entries: Mapping[str, InputSquares]
    datasets: tuple[str, ...] = ()
    n_chunks: int = 0
    chunk_size: int = 0

    def importance(self, key: MatrixKey, n_per_row: int) -> Single | None:
        """Mean squares [n_per_row] of the inputs of a matrix, None if the file does not have them.

        Raises UsageError for an imatrix of another model.
        """
        if key.name not in self.entries:
            return None
        entry = self.entries[key.name].of_width(n_per_row)
        if key.expert >= len(entry.counts):
            raise UsageError(f"The imatrix knows {len(entry.counts)} of {key.name}. Give the imatrix of this model.")
        return entry.means(max(0, key.expert))

    def apart(self, known: Collection[str]) -> "Imatrix":
        """The same, with what a joint matrix reads named for those that it is made of, which read it all.

        What a model has a tensor of, by the names of `known`, keeps its name.
        """
        entries: dict[str, InputSquares] = {}
        for name, entry in self.entries.items():
            joint = next((joint for joint in _PARTS if joint in name and name not in known), None)
            parts = [name] if joint is None else [name.replace(joint, part) for part in _PARTS[joint]]
            entries |= dict.fromkeys(parts, entry)
        return replace(self, entries=entries)

    def joined(self) -> "Imatrix":
        """The same, for a model in whose files queries, keys and values are one matrix."""
        left = {n: entry for n, entry in self.entries.items() if ".attn_k." not in n and ".attn_v." not in n}
        return replace(self, entries={n.replace(".attn_q.", _JOINED): entry for n, entry in left.items()})

    @property
    def coverage(self) -> dict[str, tuple[int, int]]:
        """For each stack of which no token went through some matrices: how many were seen, and how many there are."""
        counts = {name: (entry.n_seen, len(entry.counts)) for name, entry in self.entries.items()}
        return {name: (seen, every) for name, (seen, every) in counts.items() if seen < every}


def imatrix_of(statistics: Statistics, projections: Sequence[str] = PROJECTIONS) -> Imatrix:
    """The importance matrix that llama.cpp would measure of the same model, whose experts have these `projections`, on
    the same texts.
    """
    absent = {f"ffn_gate{suffix}" for suffix in ("", "_shexp", "_exps")} if "gate" not in projections else set[str]()
    n_tokens = np.array([statistics.n_tokens], np.float32)
    entries: dict[str, InputSquares] = {}
    for layer, one in enumerate(statistics.layers):
        inputs = one.inputs
        # Stacks with a matrix for each head, all of which read every token, have one row and one count in llama.cpp's.
        found = {role: InputSquares(sums.reshape(1, -1), n_tokens) for role, sums in inputs.by_role().items()}
        if one.outputs is not None and inputs.expert.size:
            counts = one.outputs.n_pick.astype(np.float32)
            sums = (inputs.expert, inputs.expert, inputs.hidden)
            found |= {
                f"ffn_{name}_exps": InputSquares(one, counts) for name, one in zip(PROJECTIONS, sums, strict=True)
            }
        entries |= {f"blk.{layer}.{role}.weight": entry for role, entry in found.items() if role not in absent}
    entries["output.weight"] = InputSquares(statistics.output_input[None], n_tokens)
    datasets = tuple(dict.fromkeys(statistics.domains))
    longest = max(map(len, statistics.tokens), default=0)
    return Imatrix(entries, datasets, len(statistics.tokens), longest)


def write_imatrix(imatrix: Imatrix, path: Path) -> None:
    """Writes llama.cpp's GGUF form, whole or not at all; raises as `write_whole` does."""
    metadata: dict[str, Value] = {
        "general.type": "imatrix",
        "imatrix.datasets": list(imatrix.datasets) or ["unknown"],
        "imatrix.chunk_count": imatrix.n_chunks,
        "imatrix.chunk_size": imatrix.chunk_size,
    }
    headers, payload = [], bytearray()
    for name, entry in sorted(imatrix.entries.items()):
        for suffix, values in ((_SUMS, entry.sums), (_COUNTS, entry.counts[:, None])):
            ne = tuple(reversed(values.shape))
            headers.append(HeaderTensor(name + suffix, ne, GGMLQuantizationType.F32, len(payload)))
            payload += np.ascontiguousarray(values, "<f4").tobytes()
            payload += bytes(padded(len(payload), _ALIGNMENT) - len(payload))
    write_whole(path, pack_header(metadata, headers) + payload)


def read_imatrix(path: Path) -> Imatrix:
    """Reads a file of either form; raises ModelFileError for one that cannot be read or is no imatrix."""
    try:
        with open_regular(path) as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelFileError(path, f"the file cannot be read ({reason(error)}).") from None
    imatrix = _from_gguf(read_gguf(path)) if magic == b"GGUF" else _from_old(path)
    for name, entry in imatrix.entries.items():
        with np.errstate(over="ignore", invalid="ignore"):
            numbers = np.isfinite(entry.sums.sum(0)).all() and np.isfinite(entry.counts.sum())
        counts = entry.counts[entry.counts != 0]
        if not numbers or entry.sums.min(initial=0) < 0 or counts.min(initial=1) < 1:
            problem = f"{name} has values that cannot be sums of squares: negative ones, NaN or infinity."
            raise ModelFileError(path, problem, "Make the imatrix again.")
    return imatrix


def _from_gguf(file: GGUFFile) -> Imatrix:
    if file.metadata.get("general.type") != "imatrix":
        raise ModelFileError(file.path, "this is a GGUF file, but no imatrix.", "Give what llama-imatrix wrote.")
    entries = {}
    for name in file.tensors:
        if name.endswith(_SUMS):
            base = name.removesuffix(_SUMS)
            if base + _COUNTS not in file.tensors:
                raise ModelFileError(file.path, f"{base}{_COUNTS} is missing.", "Make the imatrix again.")
            sums, counts = _values(file, name), _values(file, base + _COUNTS).reshape(-1)
            if len(sums) != len(counts):
                raise ModelFileError(file.path, f"{base} has sums of {len(sums)} matrices, counts of {len(counts)}.")
            entries[base] = InputSquares(sums, counts)
    datasets, chunks = file.metadata.get("imatrix.datasets"), file.metadata.get("imatrix.chunk_count")
    size = file.metadata.get("imatrix.chunk_size")
    names = tuple(map(str, datasets)) if isinstance(datasets, list | tuple) else ()
    return Imatrix(entries, names, chunks if isinstance(chunks, int) else 0, size if isinstance(size, int) else 0)


def _values(file: GGUFFile, name: str) -> Single:
    info = file.tensors[name]
    if info.type != GGMLQuantizationType.F32:
        raise ModelFileError(file.path, f"{name} is not F32.", "Make the imatrix again.")
    values: Single = read_bytes(file.path, info.offset, info.n_bytes).view("<f4").reshape(-1, info.ne[0])
    return values


def _from_old(path: Path) -> Imatrix:
    """Reads the form of before 2025: whole tensors, whose sums are divided by counts and multiplied by all calls."""
    at, entries = 4, {}
    try:
        data = read_regular(path)
        (n_entries,) = struct.unpack_from("<i", data, 0)
        if not 0 < n_entries < _OLD_LIMIT:
            raise ValueError
        for _ in range(n_entries):
            (length,) = struct.unpack_from("<i", data, at)
            name = data[at + 4 : at + 4 + length].decode()
            n_calls, n_values = struct.unpack_from("<ii", data, at + 4 + length)
            at += 12 + length
            if length < 1 or n_values < 1:
                raise ValueError
            sums = np.frombuffer(data, "<f4", n_values, at).reshape(1, -1)
            at += 4 * n_values
            entries[name] = InputSquares(sums, np.array([max(n_calls, 1)], np.float32))
    except OSError as error:
        raise ModelFileError(path, f"the file cannot be read ({reason(error)}).") from None
    except (struct.error, ValueError):
        raise ModelFileError(path, "this is no imatrix file.", "Give what llama-imatrix wrote.") from None
    return Imatrix(entries)
