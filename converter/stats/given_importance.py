"""The importance matrix that a person gives for a conversion, read from whichever file and held against the model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.quant.mixes import layer_and_role
from slimoe.converter.source.model_source import MatrixKey
from slimoe.converter.source.stored_model import StockTensor, StoredModel
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
    """An importance matrix that fits the model, its file, and the keys that tell of it in what is made."""

    path: Path
    imatrix: Imatrix
    metadata: Mapping[str, Value]

    def of(self, target: StockTensor, *, tied: bool) -> tuple[Importance, ...]:
        """Mean squares [n_per_row] for each matrix of a tensor; none where nothing is known of it.

        `tied` says that the token table is also the output matrix. Raises UsageError for an imatrix of another model.
        """
        name = target.stock_name
        if tied and name == _TOKENS and name not in self.imatrix.entries:
            name = _OUTPUT
        entry = self.imatrix.entries.get(name)
        if entry is None:
            return ()
        n_known, n_matrices = len(entry.of_width(target.ne[0]).counts), len(target.sources)
        if n_known != n_matrices:
            problem = f"{self.path} knows {n_known} matrices of {name}, but the model has {n_matrices}."
            raise UsageError(f"{problem} {_OF_THIS_MODEL}")
        numbers = range(n_matrices) if n_matrices > 1 else (-1,)
        means = (self.imatrix.importance(MatrixKey(name, number), target.ne[0]) for number in numbers)
        return tuple(one for one in means if one is not None)

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


def read_importance(path: Path, model: StoredModel, targets: Iterable[StockTensor]) -> GivenImportance:
    """Reads llama.cpp's imatrix in either form, or a file of `slimoe calibrate`, for a model of such tensors.

    Raises UsageError for an imatrix of another model, OtherSourceError for such statistics, ModelFileError or
    StatisticsError for what is neither, and LibraryError where safetensors is needed and absent.
    """
    given = _of_statistics(path, model) if _is_statistics(path) else _of_imatrix(path)
    known = {target.stock_name for target in targets} | {_OUTPUT}
    strange = sorted(given.imatrix.entries.keys() - known)
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


def _of_statistics(path: Path, model: StoredModel) -> GivenImportance:
    try:
        from slimoe.converter.stats.statistics_file import load_statistics
    except ImportError:
        problem = f"{path} is a file of slimoe calibrate, which only safetensors can read."
        raise LibraryError(f'{problem} Install it: pip install "slimoe[convert]".') from None
    statistics = load_statistics(path, model)
    about = {keys.CALIBRATION_HASH: statistics.text_hash, keys.CALIBRATION_TOKENS: statistics.n_tokens}
    return GivenImportance(path, imatrix_of(statistics), about)


def _of_imatrix(path: Path) -> GivenImportance:
    imatrix = read_imatrix(path)
    about: dict[str, Value] = {
        keys.IMATRIX_FILE: path.name,
        keys.IMATRIX_DATASET: ", ".join(imatrix.datasets),
        keys.IMATRIX_ENTRIES: len(imatrix.entries),
        keys.IMATRIX_CHUNKS: imatrix.n_chunks,
    }
    return GivenImportance(path, imatrix, {key: value for key, value in about.items() if value})
