"""Recordings of the selected experts: one file for all steps that an engine runs, written by it and read offline.

Layout, little-endian: MAGIC, version u32, length u32 of a JSON header, the header. Then for each step: length u32 of
what follows, number of runs u16, the runs (kind u8, sequence, first position and number of tokens u32), and for each
layer in the order of computation: layer u16, experts per token u16, rows u32, then all selected experts (u8, u16 from
255 experts up, u32 from 65535 up; the largest value means none), all their weights (float16), the number u16 of experts
predicted, and of each its layer u16 and number u16, or u32 where selected experts are u32. A writer that was killed
leaves a partial last step, which a reader leaves out.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.files.regular_file import open_regular, read_regular, reason
from slimoe.offload.files.whole_file import real_path
from slimoe.offload.gguf.header import GGUFFile

MAGIC = b"moeroute"
VERSION = 1
PROMPT, ANSWER = 0, 1
"""Kinds of runs: tokens that were given, and tokens that the model continues with, one in each step."""

_START = struct.Struct("<8sII")
_LENGTH = struct.Struct("<I")
_COUNT = struct.Struct("<H")
_RUN = struct.Struct("<BIII")
_LAYER = struct.Struct("<HHI")
_PAIR, _WIDE_PAIR = struct.Struct("<HH"), struct.Struct("<HI")
_BUFFER_BYTES = 1 << 16
_MAX_TOKENS = 1 << 20  # no step is larger; a damaged count would otherwise be believed
_RECORDING = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
_ANOTHER = "Name another file for --trace."
_ROUTER_SUFFIX = ".ffn_gate_inp.weight"


class TraceFileError(SlimoeError):
    """A trace cannot be read or written, or belongs to another model; `path` and `problem` are fields."""

    exit_code = 3

    def __init__(self, path: str | Path, problem: str, hint: str) -> None:
        self.path = Path(path)
        self.problem = problem
        super().__init__(f"{path}: {problem} {hint}")


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """What was recorded: `model` is `routers_hash`, `expert_bytes` has each layer's stored experts, best copies."""

    model: str
    n_expert_used: int
    expert_bytes: tuple[tuple[int, ...], ...]

    @property
    def n_layer(self) -> int:
        """Layers of the model, those without experts included."""
        return len(self.expert_bytes)

    @property
    def n_expert(self) -> int:
        """Experts of the layer that has most."""
        return max((len(layer) for layer in self.expert_bytes), default=0)


@dataclass(frozen=True, slots=True)
class TraceRun:
    """Consecutive tokens of one sequence in a step, from `position` on; `kind` is PROMPT or ANSWER."""

    kind: int
    sequence: int
    position: int
    n_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class TraceLayer:
    """A layer's `selected` stored experts, int32 [n_rows, n_used] with -1 for none, and their `weights`, float16.

    The rows are the step's last tokens: all of them, unless the layer computed no others. `predicted` are (layer,
    expert) of later layers that were predicted there, in the order in which they were to be read.
    """

    layer: int
    selected: NDArray[np.int32]
    weights: NDArray[np.float16]
    predicted: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class TraceStep:
    """One batch; a step that was cancelled has fewer layers."""

    runs: tuple[TraceRun, ...]
    layers: tuple[TraceLayer, ...]

    def is_answer(self, n_rows: int) -> NDArray[np.bool_]:
        """Which of the step's last `n_rows` tokens belong to answers, bool [n_rows]."""
        kinds = np.repeat([run.kind for run in self.runs], [run.n_tokens for run in self.runs])
        return np.asarray(kinds[len(kinds) - n_rows :] == ANSWER)


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """A whole recording."""

    header: TraceHeader
    steps: tuple[TraceStep, ...]

    def rates(self) -> NDArray[np.float64]:
        """How often per token each expert was selected, prompts and answers alike, float64 [n_layer, n_expert]."""
        counts = np.zeros((self.header.n_layer, self.header.n_expert))
        n_rows = np.zeros(self.header.n_layer)
        for part in (part for step in self.steps for part in step.layers):
            n_rows[part.layer] += len(part.selected)
            selected = part.selected[part.selected >= 0]
            np.add.at(counts[part.layer], selected, 1)
        mean: NDArray[np.float64] = counts / np.maximum(n_rows, 1)[:, None]
        return mean


def routers_hash(gguf: GGUFFile) -> str:
    """sha256 of a model's routers: the same for every quantisation of its experts, another for any other model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(gguf.tensors.items()):
        if name.endswith(_ROUTER_SUFFIX):
            digest.update(f"{name} {tensor.ne}".encode())
            with open_regular(gguf.paths[tensor.shard]) as file:
                file.seek(tensor.offset)
                digest.update(file.read(tensor.n_bytes))
    return digest.hexdigest()


def _expert_type(header: TraceHeader) -> Any:
    return next(kind for kind in map(np.dtype, ("<u1", "<u2", "<u4")) if header.n_expert < np.iinfo(kind).max)


def _pair(kind: Any) -> struct.Struct:
    return _WIDE_PAIR if kind.itemsize > 2 else _PAIR


class TraceWriter:
    """Records steps. A disk that refuses to take more ends the recording, not the engine: see `failure`."""

    def __init__(self, path: Path, header: TraceHeader) -> None:
        """Begins a file. An older recording is replaced, unless it is still being made; any other file is not.

        Raises TraceFileError.
        """
        self.path = path
        self.failure: str | None = None
        self._type = _expert_type(header)
        self._parts: list[bytes] = []
        try:
            real = real_path(path)
            self._file = open(os.open(real, _RECORDING, 0o666), "r+b", buffering=_BUFFER_BYTES)  # noqa: SIM115 (close)
            with contextlib.ExitStack() as opened:
                opened.callback(self._file.close)
                self._begin(header, real)
                opened.pop_all()
        except UsageError as error:
            raise TraceFileError(path, f"routing cannot be recorded here: {error}", _ANOTHER) from None
        except OSError as error:
            problem = f"routing cannot be recorded here: {reason(error)}."
            raise TraceFileError(path, problem, _ANOTHER) from None

    def _begin(self, header: TraceHeader, real: Path) -> None:
        """Takes the file for this process, for as long as it is open, and writes the header unless it is no trace."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TraceFileError(self.path, "is being recorded by another run.", _ANOTHER) from None
        except OSError:
            pass  # a file system without locks
        start = self._file.read(len(MAGIC))
        if start and start != MAGIC:
            raise TraceFileError(self.path, "is not a trace.", f"It was left alone. {_ANOTHER}")
        text = json.dumps(asdict(header)).encode()
        self._file.seek(0)
        self._file.truncate()
        try:
            self._file.write(_START.pack(MAGIC, VERSION, len(text)) + text)
            self._file.flush()
        except OSError:
            real.unlink(missing_ok=True)
            raise

    def step(self, runs: Sequence[TraceRun]) -> None:
        """Begins a step and ends the one before."""
        self._end_step()
        packed = b"".join(_RUN.pack(run.kind, run.sequence, run.position, run.n_tokens) for run in runs)
        self._parts = [_COUNT.pack(len(runs)) + packed]

    def layer(self, layer: int, selected: NDArray[Any], weights: NDArray[Any]) -> None:
        """Records a layer of the step: selected stored experts or -1, and their weights, both [n_rows, n_used]."""
        assert self._parts, "a layer needs a step"
        assert selected.shape == weights.shape
        n_rows, n_used = selected.shape
        self._parts.append(_LAYER.pack(layer, n_used, n_rows))
        self._parts.append(selected.astype(self._type).tobytes())
        self._parts.append(weights.astype("<f2").tobytes())
        self._parts.append(_COUNT.pack(0))

    def predicted(self, keys: Sequence[tuple[int, int]]) -> None:
        """Records what was predicted at the layer just recorded: (layer, expert), the first to be read first."""
        pair = _pair(self._type)
        self._parts[-1] = _COUNT.pack(len(keys)) + b"".join(pair.pack(*key) for key in keys)

    def _end_step(self) -> None:
        parts, self._parts = self._parts, []
        if not parts or self.failure:
            return
        try:
            self._file.write(_LENGTH.pack(sum(map(len, parts))) + b"".join(parts))
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.failure = f"{self.path}: routing is no longer recorded: {reason(error)}."

    def close(self) -> None:
        """Ends the last step and the file."""
        self._end_step()
        try:
            self._file.close()
        except OSError as error:
            self._fail(error)


def read_trace(path: str | Path, model: str | None = None) -> Trace:
    """Reads all whole steps. Raises TraceFileError, also when the file belongs to another model than `model`."""
    path = Path(path)
    try:
        data = read_regular(path)
    except OSError as error:
        raise TraceFileError(path, f"cannot be read: {reason(error)}.", "Check the path.") from None
    header, begin = _read_header(path, data)
    kind, steps = _expert_type(header), []
    if model is not None and model != header.model:
        raise TraceFileError(path, "was recorded from another model.", "Record this model with --trace.")
    try:
        while begin + _LENGTH.size <= len(data):
            (n_bytes,) = _LENGTH.unpack_from(data, begin)
            begin += _LENGTH.size
            if begin + n_bytes > len(data):
                break
            steps.append(_read_step(data[begin : begin + n_bytes], kind, header))
            begin += n_bytes
    except (ValueError, struct.error):
        raise TraceFileError(path, "is damaged.", "Record it again with --trace.") from None
    return Trace(header, tuple(steps))


def _read_header(path: Path, data: bytes) -> tuple[TraceHeader, int]:
    if data[: len(MAGIC)] != MAGIC:
        raise TraceFileError(path, "is not a trace.", "Record one with --trace.")
    if len(data) < _START.size:
        raise TraceFileError(path, "ends within its header.", "Record it again with --trace.")
    _, version, n_bytes = _START.unpack_from(data)
    if version != VERSION:
        problem = f"is a trace of version {version}, but this program reads version {VERSION}."
        raise TraceFileError(path, problem, "Record it again with --trace.")
    end = _START.size + n_bytes
    try:
        fields = json.loads(data[_START.size : end])
        sizes = tuple(tuple(int(size) for size in layer) for layer in fields["expert_bytes"])
        return TraceHeader(str(fields["model"]), int(fields["n_expert_used"]), sizes), end
    except (ValueError, TypeError, KeyError):
        raise TraceFileError(path, "has a damaged header.", "Record it again with --trace.") from None


def _read_step(data: bytes, kind: Any, header: TraceHeader) -> TraceStep:
    """Raises ValueError or struct.error for what no writer of ours has written."""
    pair = _pair(kind)
    (n_runs,) = _COUNT.unpack_from(data)
    at = _COUNT.size + n_runs * _RUN.size
    runs = tuple(TraceRun(*fields) for fields in _RUN.iter_unpack(data[_COUNT.size : at]))
    n_tokens = sum(run.n_tokens for run in runs)
    if at > len(data) or n_tokens > _MAX_TOKENS:
        raise ValueError(n_runs)
    layers = []
    while at < len(data):
        layer, n_used, n_rows = _LAYER.unpack_from(data, at)
        if layer >= header.n_layer or not 0 < n_rows <= n_tokens:
            raise ValueError(layer)
        at += _LAYER.size
        stored = np.frombuffer(data, kind, n_rows * n_used, at).reshape(n_rows, n_used)
        at += stored.nbytes
        weights = np.frombuffer(data, "<f2", n_rows * n_used, at).reshape(n_rows, n_used)
        at += weights.nbytes
        selected = np.where(stored == np.iinfo(kind).max, -1, stored.astype(np.int64)).astype(np.int32)
        if (selected >= len(header.expert_bytes[layer])).any():
            raise ValueError(layer)
        (n_predicted,) = _COUNT.unpack_from(data, at)
        at += _COUNT.size + n_predicted * pair.size
        predicted = tuple(pair.iter_unpack(data[at - n_predicted * pair.size : at]))
        if len(predicted) != n_predicted:
            raise ValueError(layer)
        if any(later >= header.n_layer or expert >= len(header.expert_bytes[later]) for later, expert in predicted):
            raise ValueError(layer)
        layers.append(TraceLayer(layer, selected, weights, predicted))
    return TraceStep(runs, tuple(layers))
