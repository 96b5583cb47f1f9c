"""Reads a Hugging Face checkpoint directory: its configuration, and where each tensor's bytes lie.

Only headers are read here. safetensors' own reader needs torch for bfloat16 and trusts the header's sizes;
this one checks every offset against the file, so that a damaged file is named before anything is written.
Source: the safetensors format, https://github.com/huggingface/safetensors.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from slimoe.converter.document import BadDocumentError, decode_json
from slimoe.converter.gguf.bytes import add_samples
from slimoe.converter.source.checkpoint_files import check_directory, weight_files
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.files.regular_file import open_regular, reason
from slimoe.offload.gguf.foreign_file import is_lfs_pointer, lfs_pointer

T = TypeVar("T")

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
"""The dtypes of weights, and bytes per value."""
_PACKED_BYTES = {"U8": 1, "I8": 1}
"""Further ones that hold quantised weights."""
_BITSANDBYTES, _MXFP4 = "bitsandbytes", "mxfp4"
_UNREAD = {"I32": "packed integers, as GPTQ and AWQ have them", "F8_E4M3": "8-bit floats", "F8_E5M2": "8-bit floats"}
"""What some other dtypes mean."""

PROVENANCE_FIELD = "slimoe"
"""The field of config.json with the keys that a GGUF file's header has: transformers hands on fields that it does not
know, where it drops what safetensors files say of themselves.
"""
_MAX_CONFIG = 1 << 20
_MAX_HEADER = 16 << 20
_AGAIN = "Download the checkpoint again."
_BEFORE = "Use the checkpoint before it was quantised, or one that bitsandbytes quantised."


class _Quantisation(msgspec.Struct):
    quant_method: str | None = None
    load_in_4bit: bool | None = None
    load_in_8bit: bool | None = None


class _QuantisedConfig(msgspec.Struct):
    quantization_config: _Quantisation | None = None
    compression_config: _Quantisation | None = None


class _Provenance(msgspec.Struct):
    slimoe: Any = None


class _Entry(msgspec.Struct):
    """A tensor in a safetensors header."""

    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data_offsets: tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[int, msgspec.Meta(ge=0)]]


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
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """The tensor's bytes in the file."""
        return self.n_elements * (DTYPE_BYTES | _PACKED_BYTES)[self.dtype]

    @property
    def is_float(self) -> bool:
        """Whether the stored values are the weights themselves, and not quantised ones."""
        return self.dtype in DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory's configuration and tensors; `source_hash` covers config.json, all headers and some weights."""

    path: Path
    config_json: bytes
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
        check_directory(path)
        try:
            with open_regular(path / "config.json") as file:
                config = file.read(_MAX_CONFIG + 1)
        except OSError as error:
            raise ModelFileError(path / "config.json", f"the file cannot be read ({reason(error)}).") from None
        if is_lfs_pointer(config):
            raise lfs_pointer(path / "config.json")
        dtypes = _dtypes(path / "config.json", config)
        digest = hashlib.sha256(config)
        tensors: dict[str, CheckpointTensor] = {}
        shards, owners = weight_files(path)
        for shard in shards:
            header, found = _read_shard(path / shard, dtypes)
            digest.update(header)
            for tensor in found:
                if tensor.name in tensors:
                    problem = f"tensor {tensor.name} is in {tensors[tensor.name].path.name} too."
                    raise ModelFileError(path / shard, problem, _AGAIN)
                tensors[tensor.name] = tensor
        for name, shard in owners.items():
            if name not in tensors:
                raise ModelFileError(path / shard, f"tensor {name} is missing, the index says it is here.", _AGAIN)
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.n_elements}  # others have a width of 0
        add_samples(digest, ((tensor.path, tensor.offset, tensor.n_bytes) for tensor in tensors.values()))
        return cls(path, config, tensors, digest.hexdigest())

    @property
    def provenance(self) -> dict[str, str | int]:
        """What config.json says of where the checkpoint is from, by GGUF's keys; nothing of one that is not ours."""
        found = self.read_config(_Provenance).slimoe
        own = found.items() if isinstance(found, dict) else ()
        return {str(key): value for key, value in own if isinstance(value, str | int)}

    @property
    def config_path(self) -> Path:
        """The path of config.json."""
        return self.path / "config.json"

    def read_config(self, kind: type[T]) -> T:
        """Reads the fields of config.json that `kind` has; raises ModelFileError."""
        return _decode(self.config_path, self.config_json, kind)


def _decode(path: Path, data: bytes, kind: type[T]) -> T:
    try:
        return decode_json(data, kind, _MAX_CONFIG)
    except BadDocumentError as error:
        raise ModelFileError(path, f"{error}.", _AGAIN) from None


def _dtypes(path: Path, config: bytes) -> dict[str, int]:
    """What tensors may be stored as, and bytes per value; refuses quantisation that is not read."""
    settings = _decode(path, config, _QuantisedConfig)
    quantised = settings.quantization_config or settings.compression_config
    if quantised is None or quantised == _Quantisation():
        return DTYPE_BYTES
    is_old = quantised.load_in_4bit or quantised.load_in_8bit
    method = quantised.quant_method or (_BITSANDBYTES if is_old else None)
    if method not in (_BITSANDBYTES, _MXFP4):
        problem = f"the weights are quantised by {method or 'an unnamed method'}; only {_BITSANDBYTES} and {_MXFP4}"
        problem += " are read."
        raise UnsupportedModelError(path.parent, problem, _BEFORE)
    return DTYPE_BYTES | _PACKED_BYTES


def _read_shard(path: Path, dtypes: dict[str, int]) -> tuple[bytes, list[CheckpointTensor]]:
    try:
        with open_regular(path) as file:
            n_file = os.fstat(file.fileno()).st_size
            start = file.read(32)
            if is_lfs_pointer(start):
                raise lfs_pointer(path)
            n_header = int.from_bytes(start[:8], "little")
            if n_file < 8 or n_header > min(n_file - 8, _MAX_HEADER):
                raise ModelFileError(path, "this is not a whole safetensors file.", _AGAIN)
            file.seek(8)
            raw = file.read(n_header)
        header = decode_json(raw, dict[str, msgspec.Raw], _MAX_HEADER)
    except OSError as error:
        raise ModelFileError(path, f"the file cannot be read ({reason(error)}).") from None
    except BadDocumentError as error:
        raise ModelFileError(path, f"the safetensors header is damaged ({error}).", _AGAIN) from None
    header.pop("__metadata__", None)
    entries: dict[str, _Entry] = {}
    for name, value in header.items():
        try:
            entries[name] = decode_json(bytes(value), _Entry)
        except BadDocumentError as error:
            problem = f"the header's entry for tensor {name} is damaged ({error})."
            raise ModelFileError(path, problem, _AGAIN) from None
    _check_offsets(path, entries, n_file - 8 - n_header)
    tensors: list[CheckpointTensor] = []
    for name, entry in entries.items():
        begin, end = entry.data_offsets
        if entry.dtype not in dtypes:
            meaning = f" ({_UNREAD[entry.dtype]})" if entry.dtype in _UNREAD else ""
            problem = f"tensor {name} is stored as {entry.dtype}{meaning}; {', '.join(dtypes)} are read."
            raise UnsupportedModelError(path, problem, _BEFORE)
        if end - begin != math.prod(entry.shape) * dtypes[entry.dtype]:
            problem = f"the header's entry for tensor {name} is damaged: {list(entry.shape)} of {entry.dtype}"
            raise ModelFileError(path, f"{problem} do not take {end - begin} bytes.", _AGAIN)
        if entry.shape == (0,):
            problem = f"tensor {name} is empty, as what stands for weights that lie elsewhere."
            raise ModelFileError(path, problem, "Save the model again with all of its weights gathered.")
        tensors.append(CheckpointTensor(name, entry.dtype, entry.shape, path, 8 + n_header + begin))
    return raw, tensors


def _check_offsets(path: Path, entries: Mapping[str, _Entry], n_data: int) -> None:
    """Tensors fill the file's data without gaps or overlaps, as the format demands."""
    expected = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if begin != expected or end < begin:
            problem = f"tensor {name} lies at {begin} to {end} of the data, but belongs at {expected}."
            raise ModelFileError(path, problem, _AGAIN)
        if end > n_data:
            problem = f"the file is truncated: tensor {name} ends at byte {end} of the data, which has {n_data}."
            raise ModelFileError(path, problem, _AGAIN)
        expected = end
    if expected != n_data:
        raise ModelFileError(path, f"{n_data - expected} bytes at the file's end belong to no tensor.", _AGAIN)
