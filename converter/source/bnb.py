"""Matrices that bitsandbytes quantised, or that are MXFP4, in Hugging Face checkpoints: what belongs together.

Source: bitsandbytes' QuantState.as_dict (a matrix X of 4 bits is saved as X, X.absmax, X.quant_map, perhaps
X.nested_absmax and X.nested_quant_map, and JSON in X.quant_state.bitsandbytes__nf4 or __fp4) and Linear8bitLt (X.weight
of signed bytes and X.SCB, the largest absolute value of each row). Values are bitsandbytes' own: its CPU functions
compute them, in the precision the checkpoint names, as transformers would when it runs the model.
"""

import math
from collections.abc import Iterator

from slimoe.converter.gguf.bytes import read_bytes
from slimoe.converter.source.bnb_rows import FOUR_BIT, EightBitRows, FourBitRows, FourBitState
from slimoe.converter.source.checkpoint import Checkpoint, CheckpointTensor
from slimoe.converter.source.mxfp4 import Mxfp4Blocks
from slimoe.converter.source.stored_rows import BlockRows, StoredMatrix, TensorRows
from slimoe.offload.errors import LibraryError, ModelFileError, UnsupportedModelError

_STATE = ".quant_state.bitsandbytes__"
_STATE_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_MXFP4 = ("_blocks", "_scales")
"""The tensors of an MXFP4 matrix."""
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
        try:
            import bitsandbytes  # noqa: F401  # only whether it can be
        except ImportError:
            problem = "The checkpoint is quantised by bitsandbytes, which is not installed."
            raise LibraryError(
                f'{problem} Install it: scripts/install convert, or pip install "slimoe[convert]".'
            ) from None
    found: dict[str, StoredMatrix] = {}
    for name, tensor in checkpoint.tensors.items():
        if _is_mxfp4(tensor):
            quantised[name] = _mxfp4(checkpoint, tensor)
            parts.add(_scales_of(name))
    for name, tensor in checkpoint.tensors.items():
        if name in quantised:
            found[name] = quantised[name]
        elif name not in parts:
            if not tensor.is_float:
                problem = f"tensor {name} is stored as {tensor.dtype}, but nothing says how it was quantised."
                raise UnsupportedModelError(tensor.path, problem, _AGAIN)
            found[name] = StoredMatrix(tensor.shape or (1,), TensorRows(tensor))
    return found


def type_sizes(checkpoint: Checkpoint) -> Iterator[tuple[str, str, int, int]]:
    """(name, type, number of weights, bytes) of every matrix, the bytes of its quantisation's constants included."""
    tensors = checkpoint.tensors
    owners = {name.partition(_STATE)[0] for name in tensors if _STATE in name}
    for name, tensor in tensors.items():
        owner, _, four_bit = name.partition(_STATE)
        scales = tensors.get(f"{name.removesuffix('.weight')}.SCB")
        if four_bit:
            parts = [tensors.get(owner + part) for part in ("", *_STATE_PARTS)]
            n_bytes = tensor.n_bytes + sum(part.n_bytes for part in parts if part)
            yield owner, four_bit.upper(), math.prod(_state(checkpoint, owner).shape), n_bytes
        elif _is_mxfp4(tensor):
            yield name, "MXFP4", 2 * tensor.n_elements, tensor.n_bytes + _part(checkpoint, _scales_of(name)).n_bytes
        elif scales:
            yield name, "INT8", tensor.n_elements, tensor.n_bytes + scales.n_bytes
        elif name not in owners and not name.endswith((*_STATE_PARTS, ".SCB", ".weight_format", _MXFP4[1])):
            yield name, tensor.dtype, tensor.n_elements, tensor.n_bytes


def _is_mxfp4(tensor: CheckpointTensor) -> bool:
    return tensor.name.endswith(_MXFP4[0]) and not tensor.is_float


def _mxfp4(checkpoint: Checkpoint, codes: CheckpointTensor) -> StoredMatrix:
    blocks = Mxfp4Blocks.of(codes, _part(checkpoint, _scales_of(codes.name)))
    *shape, n_block, n_codes = codes.shape
    rows = BlockRows(codes.name, blocks, math.prod(shape), n_block * 2 * n_codes)
    return StoredMatrix((*shape, rows.n_per_row), rows)


def _scales_of(name: str) -> str:
    """The name of what an MXFP4 matrix's blocks are scaled by."""
    return name.removesuffix(_MXFP4[0]) + _MXFP4[1]


def _part(checkpoint: Checkpoint, name: str) -> CheckpointTensor:
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        raise ModelFileError(checkpoint.path, f"tensor {name} is missing.", _AGAIN)
    return tensor


def _state(checkpoint: Checkpoint, name: str) -> FourBitState:
    states = (checkpoint.tensors.get(name + _STATE + kind) for kind in FOUR_BIT)
    found = next((state for state in states if state), None)
    if found is None:
        problem = f"tensor {name} is quantised to 4 bits, but neither as nf4 nor as fp4."
        raise UnsupportedModelError(checkpoint.path, problem)
    return FourBitState.read(found)


def _four_bit(checkpoint: Checkpoint, name: str) -> StoredMatrix:
    state = _state(checkpoint, name)
    packed, scales = _part(checkpoint, name), _part(checkpoint, f"{name}.absmax")
    nested = [_part(checkpoint, f"{name}.nested_{part}") for part in ("absmax", "quant_map")] if state.n_nested else []
    code = _part(checkpoint, f"{name}.quant_map")
    n_weights = math.prod(state.shape)
    n_scale = -(-n_weights // state.n_block)
    wanted = [(code, 16, "F32"), (scales, n_scale, "U8" if nested else "F32")]
    if nested:
        wanted += [(nested[0], -(-n_scale // state.n_nested), "F32"), (nested[1], 256, "F32")]
    sizes_match = all((part.n_elements, part.dtype) == (n, dtype) for part, n, dtype in wanted)
    if not sizes_match or packed.n_bytes != -(-n_weights // 2):
        problem = f"the parts of the quantised tensor {name} do not belong to its shape {list(state.shape)}."
        raise ModelFileError(packed.path, problem, _AGAIN)
    return StoredMatrix(state.shape, FourBitRows(packed, code, scales, tuple(nested), state))


def _eight_bit(checkpoint: Checkpoint, name: str) -> StoredMatrix:
    stem = name.removesuffix(".weight")
    weight, scales = checkpoint.tensors[name], checkpoint.tensors[f"{stem}.SCB"]
    if weight.dtype != "I8" or len(weight.shape) != 2 or (scales.n_elements, scales.dtype) != (weight.shape[0], "F32"):
        raise ModelFileError(weight.path, f"tensors {name} and {scales.name} do not belong together.", _AGAIN)
    arrangement = checkpoint.tensors.get(f"{stem}.weight_format")
    is_by_rows = not arrangement or read_bytes(arrangement.path, arrangement.offset, 1)[0] == _BY_ROWS
    if not is_by_rows or (arrangement and arrangement.dtype != "U8"):
        problem = f"tensor {name} is in the arrangement of a GPU, which is not read."
        raise UnsupportedModelError(weight.path, problem, "Save the model again with a newer bitsandbytes.")
    return StoredMatrix(weight.shape, EightBitRows(weight, scales))
