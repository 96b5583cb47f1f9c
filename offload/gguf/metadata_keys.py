"""Reads a GGUF file's metadata under one prefix, with one error message for whatever is wrong with a value."""

import math
from dataclasses import dataclass

import numpy as np

from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf.header import GGUFFile, Value, number_array

AGAIN = "Download or convert it again."
"""What to do about a damaged file."""


@dataclass(frozen=True, slots=True)
class MetadataKeys:
    """The keys of `gguf` that begin with `prefix`; names below are without it."""

    gguf: GGUFFile
    prefix: str

    def value(self, name: str, default: Value = None) -> Value:
        """The scalar at a key; an array with a value per block counts as a scalar if all blocks agree."""
        value = self.gguf.metadata.get(self.prefix + name, default)
        if isinstance(value, np.ndarray):
            n_block = self.gguf.metadata.get(f"{self.prefix}block_count", value.size)
            if not isinstance(n_block, int):
                # The number of blocks itself, or what depends on it.
                problem = f"{self.prefix}block_count is no number of blocks."
                raise ModelFileError(self.gguf.path, problem, AGAIN)
            if not value.size or value.size != n_block:
                problem = f"{self.prefix}{name} has {value.size} entries, but the model {n_block} blocks."
                raise ModelFileError(self.gguf.path, problem, AGAIN)
            if len(set(value.tolist())) != 1:
                problem = f"{self.prefix}{name} differs between layers, which is not supported."
                raise UnsupportedModelError(self.gguf.path, problem)
            value = value[0].item()
        if value is None:
            raise self.missing(name)
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """The integer at a key, above 0, or from 0 on if the default is 0."""
        value = self.value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < (1 if default != 0 else 0):
            raise ModelFileError(self.gguf.path, f"{self.prefix}{name} is {value!r}, which is no count.", AGAIN)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """The finite number above 0 at a key."""
        value = self.value(name, default)
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            problem = f"{self.prefix}{name} is {value!r}, which is no positive number."
            raise ModelFileError(self.gguf.path, problem, AGAIN)
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """The truth value at a key."""
        value = self.value(name, default)
        if not isinstance(value, bool):
            raise ModelFileError(self.gguf.path, f"{self.prefix}{name} is {value!r}, which is no truth value.", AGAIN)
        return value

    def has(self, name: str) -> bool:
        """Whether the file has the key."""
        return self.prefix + name in self.gguf.metadata

    def is_array(self, name: str) -> bool:
        """Whether the value at a key is an array."""
        return isinstance(self.gguf.metadata.get(self.prefix + name), np.ndarray | list)

    def integers(self, name: str, n: int, least: int = 0, most: int | None = None) -> tuple[int, ...]:
        """An array of `n` integers or truth values, each at least `least` and, if that is given, at most `most`."""
        values = self._array(name, n, "iub", "integers")
        if n and values.min() < least:
            raise self.bad_entry(name, values, int(np.argmin(values)))
        if n and most is not None and values.max() > most:
            raise self.bad_entry(name, values, int(np.argmax(values)))
        return tuple(values.tolist())

    def numbers(self, name: str, n: int) -> tuple[float, ...] | None:
        """An array of `n` finite numbers from 0 on; None when the key is absent."""
        if not self.has(name):
            return None
        values = self._array(name, n, "fiu", "numbers")
        bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if bad.size:
            raise self.bad_entry(name, values, int(bad[0]))
        return tuple(float(value) for value in values)

    def missing(self, name: str) -> ModelFileError:
        """The error for an absent key."""
        return ModelFileError(self.gguf.path, f"the key {self.prefix}{name} is missing.", AGAIN)

    def bad_entry(self, name: str, values: np.ndarray, index: int) -> ModelFileError:
        """The error for an impossible entry of an array."""
        problem = f"entry {index} of {self.prefix}{name} is {values[index].item()!r}, which cannot be."
        return ModelFileError(self.gguf.path, problem, AGAIN)

    def _array(self, name: str, n: int, kinds: str, what: str) -> np.ndarray:
        stored = self.gguf.metadata.get(self.prefix + name)
        if stored is None:
            raise self.missing(name)
        values = number_array(stored)
        if values is None or values.dtype.kind not in kinds:
            raise ModelFileError(self.gguf.path, f"{self.prefix}{name} is no array of {what}.", AGAIN)
        if values.size != n:
            problem = f"{self.prefix}{name} has {values.size} entries, but {n} belong to this model."
            raise ModelFileError(self.gguf.path, problem, AGAIN)
        return values
