"""Reads a Hugging Face checkpoint directory: its configuration, and where each tensor's bytes lie.

Only headers are read here. safetensors' own reader needs torch for bfloat16 and trusts the header's sizes;
this one checks every offset against the file, so that a damaged file is named before anything is written.
Source: the safetensors format, https://github.com/huggingface/safetensors.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.file_bytes import all_bytes
from converter.source_digest import add_samples
from offload.errors import ModelFileError, UnsupportedModelError
from offload.regular_file import open_regular, reason

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""The dtypes of weights, and bytes per value."""
_PACKED_BYTES = {"U8": 1, "I8": 1}
"""Further ones that hold quantised weights."""
_BITSANDBYTES = "bitsandbytes"

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_MAX_HEADER = 100_000_000
_AGAIN = "Download the checkpoint again."


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """One stored tensor: `shape` in numpy's order, `offset` in bytes from the start of the file `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return self.n_elements * (DTYPE_BYTES | _PACKED_BYTES)[self.dtype]

    @property
    def is_float(self) -> bool:
        """Whether its values are the weights themselves."""
        return self.dtype in DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory's configuration and tensors; `source_hash` covers config.json, all headers and some weights."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, CheckpointTensor]
    source_hash: str

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Reads config.json and the safetensors headers.

        Raises ModelFileError for a directory that is no checkpoint, a missing shard or tensor, and a damaged file,
        UnsupportedModelError for weights in a form that is not read.
        """
        if not path.is_dir():
            problem = "this is a file, not a checkpoint directory." if path.exists() else "there is no such directory."
            raise ModelFileError(path, problem, "Name the directory with config.json and the safetensors files.")
        config_path = path / "config.json"
        if not config_path.is_file():
            raise ModelFileError(path, "this directory is no checkpoint: it has no config.json.")
        config = read_json(config_path)
        dtypes = _dtypes(config_path, config)
        digest = hashlib.sha256(all_bytes(config_path))
        tensors: dict[str, CheckpointTensor] = {}
        owners = _weight_map(path)
        for shard in sorted(set(owners.values())) if owners else [_SINGLE]:
            header, found = _read_shard(path / shard, dtypes)
            digest.update(header)
            tensors |= {tensor.name: tensor for tensor in found}
        for name, shard in owners.items():
            if name not in tensors:
                raise ModelFileError(path / shard, f"tensor {name} is missing, the index says it is here.", _AGAIN)
        add_samples(digest, ((tensor.path, tensor.offset, tensor.n_bytes) for tensor in tensors.values()))
        return cls(path, config, tensors, digest.hexdigest())


def _dtypes(path: Path, config: dict[str, Any]) -> dict[str, int]:
    """What tensors may be stored as, and bytes per value; refuses quantisation that is not read."""
    settings = config.get("quantization_config")
    if not settings:
        return DTYPE_BYTES
    if not isinstance(settings, dict):
        raise ModelFileError(path, "quantization_config is no object.", _AGAIN)
    is_old = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    method = settings.get("quant_method", _BITSANDBYTES if is_old else None)
    if method != _BITSANDBYTES:
        problem = f"the weights are quantised by {method or 'an unnamed method'}; only {_BITSANDBYTES} is read."
        raise UnsupportedModelError(path.parent, problem, "Use the checkpoint before it was quantised.")
    return DTYPE_BYTES | _PACKED_BYTES


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises ModelFileError when it is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(path, f"this is not readable as JSON ({error}).", _AGAIN) from None
    if not isinstance(value, dict):
        raise ModelFileError(path, "this is JSON, but no object.", _AGAIN)
    return value


def _weight_map(path: Path) -> dict[str, str]:
    """Which shard holds which tensor; empty when there is one file without an index."""
    if (path / _INDEX).is_file():
        owners = read_json(path / _INDEX).get("weight_map")
        if not isinstance(owners, dict) or not owners or not all(isinstance(v, str) for v in owners.values()):
            raise ModelFileError(path / _INDEX, "the index has no weight_map.", _AGAIN)
        for shard in sorted(set(owners.values())):
            if Path(shard).name != shard or not (path / shard).is_file():
                raise ModelFileError(path, f"shard {shard} is missing.", _AGAIN)
        return owners
    if (path / _SINGLE).is_file():
        return {}
    if any(path.glob("*.bin")) or any(path.glob("*.pt")):
        problem = "the weights are PyTorch pickles, which are not read because they can run code."
        raise UnsupportedModelError(path, problem, "Save the model as safetensors.")
    raise ModelFileError(path, f"this directory holds no weights ({_SINGLE} or {_INDEX}).")


def _read_shard(path: Path, dtypes: dict[str, int]) -> tuple[bytes, list[CheckpointTensor]]:
    try:
        with open_regular(path) as file:
            n_file = os.fstat(file.fileno()).st_size
            n_header = int.from_bytes(file.read(8), "little")
            if n_file < 8 or n_header > min(n_file - 8, _MAX_HEADER):
                raise ModelFileError(path, "this is not a whole safetensors file.", _AGAIN)
            raw = file.read(n_header)
        header = json.loads(raw)
    except OSError as error:
        raise ModelFileError(path, f"the file cannot be read ({reason(error)}).") from None
    except ValueError:
        raise ModelFileError(path, "the safetensors header is damaged.", _AGAIN) from None
    if not isinstance(header, dict):
        raise ModelFileError(path, "the safetensors header is damaged.", _AGAIN)
    header.pop("__metadata__", None)
    return raw, [_tensor(path, 8 + n_header, n_file, dtypes, name, entry) for name, entry in header.items()]


def _tensor(
    path: Path, data_begin: int, n_file: int, dtypes: dict[str, int], name: str, entry: Any
) -> CheckpointTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = isinstance(begin, int) and isinstance(end, int) and all(isinstance(n, int) and n > 0 for n in shape)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ModelFileError(path, f"the header's entry for tensor {name} is damaged.", _AGAIN)
    if dtype not in dtypes:
        problem = f"tensor {name} is stored as {dtype}; {', '.join(dtypes)} are read."
        raise UnsupportedModelError(path, problem, "Use the checkpoint before it was quantised.")
    if begin < 0 or end - begin != math.prod(shape) * dtypes[dtype]:
        raise ModelFileError(path, f"the header's entry for tensor {name} is damaged.", _AGAIN)
    if data_begin + end > n_file:
        problem = f"the file is truncated: tensor {name} ends at byte {data_begin + end}, the file at {n_file}."
        raise ModelFileError(path, problem, _AGAIN)
    return CheckpointTensor(name, dtype, shape, path, data_begin + begin)
