"""The importance matrix that a person gives for a conversion, read from whichever file and held against the model."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.quant.mixes import layer_and_role
from slimoe.converter.source.model_source import MatrixKey, ModelSource
from slimoe.converter.stats.imatrix_file import Imatrix, imatrix_of, read_imatrix
from slimoe.offload.errors import LibraryError, UsageError
from slimoe.offload.files.regular_file import open_regular
from slimoe.offload.gguf import keys
from slimoe.offload.gguf.header import Value

Importance = NDArray[np.float32]
_OF_THIS_MODEL = "Give the imatrix of this model."
_OUTPUT, _TOKENS = "output.weight", "token_embd.weight"


@dataclass(frozen=True, slots=True)
class Fitted:
    """How far an importance matrix reaches: `n_fitted` of `n_matrices` that are quantised are fitted to it, and
    `n_unmet` of the model's `n_experts` were never met by the texts that it is from.
    """

    n_matrices: int
    n_fitted: int
    n_experts: int
    n_unmet: int


@dataclass(frozen=True, slots=True)
class GivenImportance:
    """An importance matrix that fits the model, its file, and the keys that tell of it in what is made.

    `n_matrices` counts the model's matrices by the name of their tensor in a stock GGUF file, which may have those of
    all experts or heads.
    """

    path: Path
    imatrix: Imatrix
    metadata: Mapping[str, Value]
    n_matrices: Mapping[str, int]

    def of(self, key: MatrixKey, n_per_row: int) -> Importance | None:
        """Mean squares [n_per_row] of a matrix's columns, or [n_head, n_per_row] where each head has a matrix.

        None where nothing is known of it.

        Without an output matrix the token table is it. Raises UsageError for an imatrix of another model.
        """
        name = key.name
        if name == _TOKENS and _OUTPUT not in self.n_matrices and name not in self.imatrix.entries:
            name = _OUTPUT
        entry = self.imatrix.entries.get(name)
        if entry is None:
            return None
        entry = entry.of_width(n_per_row)
        n_known, n_matrices = len(entry.counts), self.n_matrices[key.name]
        if n_known != n_matrices:
            problem = f"{self.path} knows {n_known} matrices of {name}, but the model has {n_matrices}."
            raise UsageError(f"{problem} {_OF_THIS_MODEL}")
        if key.expert < 0 and n_matrices > 1:
            return np.stack([entry.means(head) for head in range(n_matrices)])
        return self.imatrix.importance(MatrixKey(name, key.expert), n_per_row)

    def reach(self, n_matrices: int, n_fitted: int, n_experts: int) -> Fitted:
        """What to tell about it; raises UsageError if it is of no use."""
        if not n_fitted:
            problem = f"{self.path} knows none of the matrices that are quantised."
            raise UsageError(f"{problem} {_OF_THIS_MODEL[:-1]}, or leave it out.")
        unmet: dict[int, int] = {}
        for name, (n_seen, n_all) in self.imatrix.coverage.items():
            layer, _ = layer_and_role(name)
            unmet[layer] = max(unmet.get(layer, 0), n_all - n_seen)
        return Fitted(n_matrices, n_fitted, n_experts, sum(unmet.values()))


def read_importance(path: Path, model: ModelSource) -> GivenImportance:
    """Reads llama.cpp's imatrix in either form, or a file of `slimoe calibrate`, for a model.

    Raises UsageError for an imatrix of another model, OtherSourceError for such statistics, ModelFileError or
    StatisticsError for what is neither, and LibraryError where safetensors is needed and absent.
    """
    imatrix, metadata = _of_statistics(path, model) if _is_statistics(path) else _of_imatrix(path)
    n_matrices: Counter[str] = Counter()
    for key, shape in model.shapes.items():
        n_matrices[key.name] += math.prod(shape[:-2])
    given = GivenImportance(path, imatrix.apart(n_matrices.keys()), metadata, n_matrices)
    strange = sorted(given.imatrix.entries.keys() - given.n_matrices.keys() - {_OUTPUT})
    if strange:
        raise UsageError(f"{path} knows {strange[0]}, which the model does not have. {_OF_THIS_MODEL}")
    layers = {layer_and_role(name)[0] for name in given.imatrix.entries}
    missing = sorted(set(range(model.spec.n_layer)) - layers)
    if missing and layers:
        raise UsageError(f"{path} knows nothing of layer {missing[0]} of the model. {_OF_THIS_MODEL}")
    return given


def _is_statistics(path: Path) -> bool:
    """Whether the file is safetensors, whose JSON stands where the others have numbers or names."""
    try:
        with open_regular(path) as file:
            return file.read(9)[8:] == b"{"
    except OSError:
        return False


def _of_statistics(path: Path, model: ModelSource) -> tuple[Imatrix, dict[str, Value]]:
    try:
        from slimoe.converter.stats.statistics_file import load_statistics
    except ImportError:
        problem = f"{path} is a file of slimoe calibrate, which only safetensors can read."
        raise LibraryError(
            f'{problem} Install it: scripts/install convert, or pip install "slimoe[convert]".'
        ) from None
    statistics = load_statistics(path, model)
    about = {keys.CALIBRATION_HASH: statistics.text_hash, keys.CALIBRATION_TOKENS: statistics.n_tokens}
    return imatrix_of(statistics, model.spec.architecture.projections), about


def _of_imatrix(path: Path) -> tuple[Imatrix, dict[str, Value]]:
    imatrix = read_imatrix(path)
    about: dict[str, Value] = {
        keys.IMATRIX_FILE: path.name,
        keys.IMATRIX_DATASET: ", ".join(imatrix.datasets),
        keys.IMATRIX_ENTRIES: len(imatrix.entries),
        keys.IMATRIX_CHUNKS: imatrix.n_chunks,
    }
    return imatrix, {key: value for key, value in about.items() if value}
