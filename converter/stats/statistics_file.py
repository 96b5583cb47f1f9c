"""The statistics file: safetensors with JSON metadata, read and written without torch.

Every array has the name of its field, such as `layers.3.router.share`; lists of names are JSON in bytes.
"""

import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from slimoe.converter.document import BadDocumentError, decode_json
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.statistics import LayerStatistics, MatrixCosts, Statistics
from slimoe.converter.stats.statistics_shapes import misfit
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.files.regular_file import open_regular, reason
from slimoe.offload.files.whole_file import whole_file

T = TypeVar("T")
Arrays = dict[str, NDArray[Any]]

VERSION = 3
_COSTS = "matrix_costs."
_FORMAT = "slimoe statistics"
_MAY_BE_INFINITE = ("nats", "error", "received")
"""Names of arrays that may hold infinity: costs of types that do not divide the rows, and float16 sums of attention."""
_AGAIN = "Make it again with `slimoe calibrate`."


class StatisticsError(SlimoeError):
    """A statistics file is missing or damaged, or is none; `path` is the file, `problem` the reason."""

    exit_code = 3

    def __init__(self, path: Path, problem: str, hint: str = _AGAIN) -> None:
        self.path, self.problem = path, problem
        super().__init__(f"{path}: {problem} {hint}")


class OtherSourceError(StatisticsError):
    """The statistics are those of another checkpoint than the one that they are given for."""


def save_statistics(statistics: Statistics, path: Path, folder: Path | None = None) -> None:
    """Writes `statistics` to the file `path`, whole or not at all; raises as `write_arrays` does."""
    tokens = [np.asarray(one, np.int32) for one in statistics.tokens]
    arrays: Arrays = {
        "tokens": np.concatenate(tokens) if tokens else np.empty(0, np.int32),
        "lengths": np.array([len(one) for one in tokens], np.int64),
    }
    for name in ("output_input", "token_count", "output_gradient", "token_gradient"):
        value = getattr(statistics, name)
        if value is not None:
            arrays[name] = value
    for n, layer in enumerate(statistics.layers):
        arrays |= to_arrays(layer, f"layers.{n}.")
    if statistics.matrix_costs is not None:
        arrays |= to_arrays(statistics.matrix_costs, _COSTS)
    about = json.dumps(
        {
            "version": VERSION,
            "source_hash": statistics.source_hash,
            "text_hash": statistics.text_hash,
            "domains": statistics.domains,
            "n_layer": len(statistics.layers),
            "notes": None if statistics.notes is None else dict(statistics.notes),
        }
    )
    checksum = content_checksum(arrays, about)
    write_arrays(arrays, path, {"format": _FORMAT, "statistics": about, "checksum": checksum}, folder)


def load_statistics(path: Path, source: ModelSource | None = None) -> Statistics:
    """Reads a file that `save_statistics` wrote.

    Raises StatisticsError if it is no such file, damaged, of another version or of other sizes than `source`, and
    OtherSourceError if `source` is given and is not the checkpoint that was calibrated.
    """
    arrays, metadata = read_arrays(path)
    about = _about(path, arrays, metadata)
    if source is not None and about.source_hash != source.source_hash:
        problem = f"these are statistics of another checkpoint than {source.path}."
        raise OtherSourceError(path, problem, "Run `slimoe calibrate` on this one.")
    try:
        statistics = Statistics(
            source_hash=about.source_hash,
            text_hash=about.text_hash,
            tokens=_sequences(arrays, len(about.domains)),
            domains=about.domains,
            layers=tuple(from_arrays(LayerStatistics, arrays, f"layers.{n}.") for n in range(about.n_layer)),
            output_input=finite(arrays, "output_input"),
            token_count=arrays["token_count"],
            output_gradient=finite(arrays, "output_gradient") if "output_gradient" in arrays else None,
            token_gradient=finite(arrays, "token_gradient") if "token_gradient" in arrays else None,
            matrix_costs=from_arrays(MatrixCosts, arrays, _COSTS) if _COSTS + "nats" in arrays else None,
            notes=about.notes,
        )
    except KeyError as error:
        raise StatisticsError(path, f"the file is damaged: {error.args[0]} is missing.") from None
    except (TypeError, ValueError) as error:
        raise StatisticsError(path, f"the file is damaged: {error}.") from None
    unfit = None if source is None else misfit(statistics, source)
    if unfit is not None:
        raise StatisticsError(path, unfit)
    return statistics


def content_checksum(arrays: Arrays, about: str) -> str:
    """A digest of every array's name, type, shape and values, and of the JSON metadata `about`."""
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for name, values in sorted(arrays.items()):
        digest.update(f"{name} {values.dtype} {values.shape} ".encode())
        digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class _Version(msgspec.Struct):
    """The part of a file's metadata that every version has."""

    version: int


class _About(msgspec.Struct):
    """The rest of a file's metadata."""

    source_hash: str
    text_hash: str
    domains: tuple[str, ...]
    n_layer: int
    notes: dict[str, str] | None = None


def _about(path: Path, arrays: Arrays, metadata: Mapping[str, str]) -> _About:
    if metadata.get("format") != _FORMAT:
        raise StatisticsError(path, "this is not a statistics file.", "Name a file that `slimoe calibrate` wrote.")
    text = metadata.get("statistics", "")
    try:
        version = decode_json(text.encode(), _Version).version
        if version != VERSION:
            raise StatisticsError(path, f"the file is of version {version}; this program reads {VERSION}.")
        if metadata.get("checksum") != content_checksum(arrays, text):
            raise StatisticsError(path, "the file is damaged: its checksum is not that of its contents.")
        return decode_json(text.encode(), _About)
    except BadDocumentError as error:
        raise StatisticsError(path, f"the file is damaged ({error}).") from None


def _sequences(arrays: Arrays, n_sequences: int) -> tuple[tuple[int, ...], ...]:
    tokens, lengths = arrays["tokens"], arrays["lengths"]
    kinds = {values.dtype.kind for values in (tokens, lengths)}
    if kinds != {"i"} or len(lengths) != n_sequences or lengths.min(initial=0) < 0 or lengths.sum() != tokens.size:
        raise ValueError("tokens and lengths do not belong together")
    ends = np.cumsum(lengths)
    return tuple(tuple(piece.tolist()) for piece in np.split(tokens, ends)[: len(ends)])


def finite(arrays: Mapping[str, NDArray[Any]], name: str) -> NDArray[Any]:
    """The array of a name; raises KeyError if it is missing, and ValueError if it has NaN, or infinity where none may
    be.
    """
    values = arrays[name]
    may_be_infinite = name.rpartition(".")[2] in _MAY_BE_INFINITE
    if values.dtype.kind == "f" and not (~np.isnan(values) if may_be_infinite else np.isfinite(values)).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return values


def to_arrays(value: object, prefix: str = "") -> Arrays:
    """The arrays of a dataclass of arrays, some by name, numbers, tuples of names and dataclasses; None is left out."""
    arrays: Arrays = {}
    for field in fields(value):  # type: ignore[arg-type]  # any dataclass
        item = getattr(value, field.name)
        name = prefix + field.name
        if isinstance(item, np.ndarray):
            arrays[name] = np.ascontiguousarray(item)
        elif isinstance(item, float):
            arrays[name] = np.array([item], np.float64)
        elif isinstance(item, tuple):
            arrays[name] = np.frombuffer(json.dumps(item).encode(), np.uint8)
        elif isinstance(item, Mapping):
            arrays |= {f"{name}.{key}": np.ascontiguousarray(one) for key, one in item.items()}
        elif item is not None:
            arrays |= to_arrays(item, name + ".")
    return arrays


def from_arrays(kind: type[T], arrays: Mapping[str, NDArray[Any]], prefix: str = "") -> T:
    """Makes the dataclass `kind` of the arrays that `to_arrays` returned for it.

    Raises KeyError with the name of an array that is missing, and ValueError for one of another type or shape.
    """
    values: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        full = prefix + name
        if isinstance(hint, UnionType):
            inner = next(part for part in typing.get_args(hint) if part is not type(None))
            is_there = any(key.startswith(full + ".") for key in arrays)
            values[name] = from_arrays(inner, arrays, full + ".") if is_there else None
        elif hint is float:
            if arrays[full].shape != (1,):
                raise ValueError(f"{full} is of shape {arrays[full].shape}, not one number")
            values[name] = float(finite(arrays, full)[0])
        elif typing.get_origin(hint) is tuple:
            values[name] = decode_json(arrays[full].tobytes(), tuple[str, ...])
        elif typing.get_origin(hint) is np.ndarray:
            values[name] = _of_type(arrays, full, hint)
        elif typing.get_origin(hint) is Mapping:
            every = [key for key in arrays if key.startswith(full + ".")]
            inner = typing.get_args(hint)[1]
            values[name] = {key.removeprefix(full + "."): _of_type(arrays, key, inner) for key in every}
        else:
            values[name] = from_arrays(hint, arrays, full + ".")
    return kind(**values)


def _of_type(arrays: Mapping[str, NDArray[Any]], name: str, hint: Any) -> NDArray[Any]:
    wanted = typing.get_args(typing.get_args(hint)[1])[0]
    if arrays[name].dtype != wanted:
        raise ValueError(f"{name} has numbers of type {arrays[name].dtype}, not {wanted.__name__}")
    return finite(arrays, name)


def write_arrays(arrays: Arrays, path: Path, metadata: Mapping[str, str], folder: Path | None = None) -> None:
    """Writes a safetensors file, whole or not at all, in `folder` until it is whole; raises as `whole_file` does."""
    with whole_file(path, folder) as part:
        try:
            save_file(arrays, part, dict(metadata))
        except SafetensorError as error:
            raise UsageError(f"{path} cannot be written ({error}). Choose another place.") from None


def read_arrays(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Reads all arrays of a safetensors file and its metadata; raises StatisticsError if it cannot be read."""
    try:
        open_regular(path).close()
        with safe_open(path, "numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no mapping)
    except FileNotFoundError:
        raise StatisticsError(path, "there is no such file.") from None
    except IsADirectoryError:
        raise StatisticsError(path, "this is a directory.", "Name a file that `slimoe calibrate` wrote.") from None
    except OSError as error:
        raise StatisticsError(path, f"the file cannot be read ({reason(error)}).") from None
    except (SafetensorError, ValueError) as error:
        problem = f"this is not a whole statistics file ({error})."
        raise StatisticsError(path, problem, _AGAIN) from None
