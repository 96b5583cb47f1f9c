"""Matrices that bitsandbytes quantised, in Hugging Face checkpoints: what belongs together, and their values.

Source: bitsandbytes' QuantState.as_dict (a matrix X of 4 bits is saved as X, X.absmax, X.quant_map, perhaps
X.nested_absmax and X.nested_quant_map, and JSON in X.quant_state.bitsandbytes__nf4 or __fp4) and Linear8bitLt (X.weight
of signed bytes and X.SCB, the largest absolute value of each row). Values are bitsandbytes' own: its CPU functions
compute them, in the precision the checkpoint names, as transformers would when it runs the model.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.checkpoint import Checkpoint, CheckpointTensor
from converter.file_bytes import read_bytes
from converter.model_source import Blocks
from converter.quantize import to_f32
from converter.stored_rows import StoredMatrix, TensorRows
from offload.errors import LibraryError, ModelFileError, UnsupportedModelError

_STATE = ".quant_state.bitsandbytes__"
_FOUR_BIT = ("nf4", "fp4")
_PRECISIONS = ("float32", "float16", "bfloat16")
_STATE_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_BY_ROWS = 0
"""The only arrangement of 8-bit weights that does not depend on a GPU."""
_AGAIN = "Download the checkpoint again."


def stored_matrices(checkpoint: Checkpoint) -> dict[str, StoredMatrix]:
    """All matrices and vectors by their tensors' names, quantised ones with what belongs to them.

    Raises LibraryError without bitsandbytes where it is needed, ModelFileError for quantised weights whose parts are
    missing or contradict each other, and UnsupportedModelError for integers that are no such weights.
    """
    quantised: dict[str, StoredMatrix] = {}
    parts: set[str] = set()
    for name in checkpoint.tensors:
        stem = name.removesuffix(".weight")
        if _STATE in name:
            owner, _, _ = name.partition(_STATE)
            quantised[owner] = _four_bit(checkpoint, owner)
            parts |= {name, *(owner + part for part in _STATE_PARTS)}
        elif f"{stem}.SCB" in checkpoint.tensors and stem != name:
            quantised[name] = _eight_bit(checkpoint, name)
            parts |= {f"{stem}.SCB", f"{stem}.weight_format"}
    if quantised:
        _require_bitsandbytes()
    names = (name for name in checkpoint.tensors if name not in parts)
    return {name: quantised.get(name) or _plain(checkpoint.tensors[name]) for name in names}


def type_sizes(checkpoint: Checkpoint) -> Iterator[tuple[str, str, int, int]]:
    """(name, type, number of weights, bytes) of every matrix, the bytes of its quantisation's constants included."""
    for name, tensor in checkpoint.tensors.items():
        owner, _, four_bit = name.partition(_STATE)
        if four_bit:
            own = [checkpoint.tensors.get(owner + part) for part in ("", *_STATE_PARTS)]
            n_bytes = tensor.n_bytes + sum(part.n_bytes for part in own if part)
            yield owner, four_bit.upper(), math.prod(_State.of(checkpoint, owner).shape), n_bytes
        elif name.endswith(".SCB"):
            weight = checkpoint.tensors[name.removesuffix("SCB") + "weight"]
            yield weight.name, "INT8", weight.n_elements, weight.n_bytes + tensor.n_bytes
        elif not name.endswith((*_STATE_PARTS, ".weight_format")) and tensor.is_float:
            yield name, tensor.dtype, tensor.n_elements, tensor.n_bytes


def _plain(tensor: CheckpointTensor) -> StoredMatrix:
    if not tensor.is_float:
        problem = f"tensor {tensor.name} is stored as {tensor.dtype}, but nothing says how bitsandbytes quantised it."
        raise UnsupportedModelError(tensor.path, problem, _AGAIN)
    return StoredMatrix(tensor.shape or (1,), TensorRows(tensor))


def _require_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        problem = "The checkpoint is quantised by bitsandbytes, which is not installed."
        raise LibraryError(f'{problem} Install it: pip install "slimoe[convert]".') from None


def _data(tensor: CheckpointTensor) -> NDArray[np.uint8]:
    return read_bytes(tensor.path, tensor.offset, tensor.n_bytes)


def _part(checkpoint: Checkpoint, name: str) -> CheckpointTensor:
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        raise ModelFileError(checkpoint.path, f"tensor {name} is missing.", _AGAIN)
    return tensor


@dataclass(frozen=True, slots=True)
class _State:
    """What bitsandbytes says about a matrix of 4 bits; `n_nested` is 0 where its scales are stored as they are."""

    shape: tuple[int, int]
    quant_type: str
    dtype: str
    n_block: int
    n_nested: int = 0
    nested_offset: float = 0.0

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str) -> "_State":
        """Reads the JSON that belongs to the matrix `name`; raises ModelFileError."""
        tensor = next(
            checkpoint.tensors[name + _STATE + kind] for kind in _FOUR_BIT if name + _STATE + kind in checkpoint.tensors
        )
        try:
            fields = json.loads(_data(tensor).tobytes())
            return cls._from_json(fields)
        except (KeyError, TypeError, ValueError):
            raise ModelFileError(tensor.path, f"tensor {tensor.name} is damaged.", _AGAIN) from None

    @classmethod
    def _from_json(cls, fields: Mapping[str, Any]) -> "_State":
        n_rows, n_per_row = fields["shape"]
        state = cls(
            (int(n_rows), int(n_per_row)),
            fields["quant_type"],
            fields["dtype"],
            int(fields["blocksize"]),
            int(fields.get("nested_blocksize", 0)),
            float(fields.get("nested_offset", 0.0)),
        )
        if min(*state.shape, state.n_block) < 1 or state.n_block % 2 or state.n_nested < 0:
            raise ValueError(state)
        if state.quant_type not in _FOUR_BIT or state.dtype not in _PRECISIONS:
            raise ValueError(state)
        return state


def _four_bit(checkpoint: Checkpoint, name: str) -> StoredMatrix:
    if not any(name + _STATE + kind in checkpoint.tensors for kind in _FOUR_BIT):
        problem = f"tensor {name} is quantised to 4 bits, but neither as nf4 nor as fp4."
        raise UnsupportedModelError(checkpoint.path, problem)
    state = _State.of(checkpoint, name)
    packed, scales = _part(checkpoint, name), _part(checkpoint, f"{name}.absmax")
    nested = [_part(checkpoint, f"{name}.nested_{part}") for part in ("absmax", "quant_map")] if state.n_nested else []
    code = _part(checkpoint, f"{name}.quant_map")
    if not _belong_together(state, packed, code, scales, nested):
        problem = f"the parts of the quantised tensor {name} do not belong to its shape {list(state.shape)}."
        raise ModelFileError(packed.path, problem, _AGAIN)
    return StoredMatrix(state.shape, FourBitRows(packed, code, scales, tuple(nested), state))


def _belong_together(
    state: _State,
    packed: CheckpointTensor,
    code: CheckpointTensor,
    scales: CheckpointTensor,
    nested: Sequence[CheckpointTensor],
) -> bool:
    n_weights = math.prod(state.shape)
    n_scale = -(-n_weights // state.n_block)
    wanted = [(code, 16, "F32"), (scales, n_scale, "U8" if nested else "F32")]
    if nested:
        wanted += [(nested[0], -(-n_scale // state.n_nested), "F32"), (nested[1], 256, "F32")]
    sizes_match = all((part.n_elements, part.dtype) == (n, dtype) for part, n, dtype in wanted)
    return sizes_match and packed.n_bytes == -(-n_weights // 2)


def _eight_bit(checkpoint: Checkpoint, name: str) -> StoredMatrix:
    stem = name.removesuffix(".weight")
    weight, scales = checkpoint.tensors[name], checkpoint.tensors[f"{stem}.SCB"]
    if weight.dtype != "I8" or len(weight.shape) != 2 or (scales.n_elements, scales.dtype) != (weight.shape[0], "F32"):
        raise ModelFileError(weight.path, f"tensors {name} and {scales.name} do not belong together.", _AGAIN)
    arrangement = checkpoint.tensors.get(f"{stem}.weight_format")
    if arrangement and (arrangement.dtype != "U8" or _data(arrangement).tolist() != [_BY_ROWS]):
        problem = f"tensor {name} is in the arrangement of a GPU, which is not read."
        raise UnsupportedModelError(weight.path, problem, "Save the model again with a newer bitsandbytes.")
    return StoredMatrix(weight.shape, EightBitRows(weight, scales))


@dataclass(frozen=True, slots=True)
class FourBitRows:
    """Rows of a matrix of nf4 or fp4; a block's scale may itself be one of 256 values times a scale (`nested`)."""

    packed: CheckpointTensor
    code: CheckpointTensor
    scales: CheckpointTensor
    nested: tuple[CheckpointTensor, ...]
    state: _State
    step: int = 1
    blocks: Blocks | None = None

    @property
    def name(self) -> str:
        """The tensor's."""
        return self.packed.name

    @property
    def path(self) -> Path:
        """The tensor's."""
        return self.packed.path

    @property
    def n_rows(self) -> int:
        """Rows of the matrix that was quantised."""
        return self.state.shape[0]

    @property
    def n_per_row(self) -> int:
        """Its columns."""
        return self.state.shape[1]

    def read(self, first: int, n_rows: int) -> NDArray[np.float32]:
        """Rows as bitsandbytes decodes them; whole blocks are decoded, then cut. Raises ModelFileError."""
        import torch
        from bitsandbytes import functional

        begin, end = first * self.n_per_row, (first + n_rows) * self.n_per_row
        first_block, end_block = begin // self.state.n_block, -(-end // self.state.n_block)
        first_weight = first_block * self.state.n_block
        n_weights = min(end_block * self.state.n_block, math.prod(self.state.shape)) - first_weight
        state = functional.QuantState(
            absmax=torch.from_numpy(self._scales(first_block, end_block)),
            shape=torch.Size((1, n_weights)),
            code=torch.from_numpy(_floats(self.code)),
            blocksize=self.state.n_block,
            quant_type=self.state.quant_type,
            dtype=getattr(torch, self.state.dtype),
        )
        packed = read_bytes(self.path, self.packed.offset + first_weight // 2, -(-n_weights // 2))
        values = functional.dequantize_4bit(torch.from_numpy(packed).view(-1, 1), state).float().flatten().numpy()
        rows: NDArray[np.float32] = values[begin - first_weight : end - first_weight]
        return rows.reshape(n_rows, self.n_per_row)

    def _scales(self, first: int, end: int) -> NDArray[np.float32]:
        """The scales of some blocks."""
        import torch
        from bitsandbytes import functional

        if not self.nested:
            return _floats(self.scales, first, end)
        n_nested = self.state.n_nested
        outer = first // n_nested
        absmax = _floats(self.nested[0], outer, -(-end // n_nested))
        begin = outer * n_nested
        packed = read_bytes(self.scales.path, self.scales.offset + begin, end - begin)
        state = functional.QuantState(
            absmax=torch.from_numpy(absmax),
            code=torch.from_numpy(_floats(self.nested[1])),
            blocksize=n_nested,
            dtype=torch.float32,
        )
        scales: NDArray[np.float32] = functional.dequantize_blockwise(torch.from_numpy(packed), state).numpy()
        return scales[first - begin :] + np.float32(self.state.nested_offset)


@dataclass(frozen=True, slots=True)
class EightBitRows:
    """Rows of signed bytes, each row with a scale."""

    weight: CheckpointTensor
    scales: CheckpointTensor
    step: int = 1
    blocks: Blocks | None = None

    @property
    def name(self) -> str:
        """The tensor's."""
        return self.weight.name

    @property
    def path(self) -> Path:
        """The tensor's."""
        return self.weight.path

    @property
    def n_rows(self) -> int:
        """The tensor's."""
        return self.weight.shape[0]

    @property
    def n_per_row(self) -> int:
        """The tensor's."""
        return self.weight.shape[1]

    def read(self, first: int, n_rows: int) -> NDArray[np.float32]:
        """Rows as bitsandbytes decodes them; raises ModelFileError."""
        import torch
        from bitsandbytes import functional

        packed = read_bytes(self.path, self.weight.offset + first * self.n_per_row, n_rows * self.n_per_row)
        rows = torch.from_numpy(packed.view(np.int8).reshape(n_rows, self.n_per_row))
        scales = torch.from_numpy(_floats(self.scales, first, first + n_rows))
        values: NDArray[np.float32] = functional.int8_vectorwise_dequant(rows, scales).numpy()
        return values


def _floats(tensor: CheckpointTensor, begin: int = 0, end: int | None = None) -> NDArray[np.float32]:
    """Elements of an F32 tensor."""
    n = (tensor.n_elements if end is None else end) - begin
    return to_f32(read_bytes(tensor.path, tensor.offset + 4 * begin, 4 * n), "F32")
