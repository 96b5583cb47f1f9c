"""The KL divergence in nats per token that each ggml type costs for each matrix of a model, as statistics predict it.

To second order, a matrix W whose output's gradients have mean squares r and whose inputs have mean squares c costs half
the sum of r_i c_j (error_ij)^2: the diagonal of Fisher's information, taken as a product of rows and columns (GEMQ,
arXiv 2605.23078, has it by expert). Errors are measured by quantising; of large matrices only evenly spaced rows.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.converter.quant.gain import type_error
from slimoe.converter.quant.mixes import fits, layer_and_role
from slimoe.converter.quant.quantize import BadWeightsError
from slimoe.converter.source.model_source import MatrixKey, ModelSource, parse_key
from slimoe.converter.stats.statistics import LayerStatistics, MatrixCosts, Sensitivity, Statistics
from slimoe.offload.errors import UsageError
from slimoe.offload.model.tensor_list import RECURRENT_FLOATS

CANDIDATES = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K"),
    *("Q5_K", "Q6_K", "Q8_0", "F16", "IQ4_NL", "Q4_0", "Q5_0"),
)
"""Types from which a budget chooses. The last three are for rows that are no multiple of 256."""
LOSSLESS = (Type.F16, Type.BF16, Type.F32)
"""Types whose cost is negligible."""
PRICING = "measuring what types cost"
_SMALL_BLOCKS = ("IQ4_NL", "Q4_0", "Q5_0")
_KEPT = ("MXFP4",)
_SAMPLED_WEIGHTS = 1 << 18
_SEEN_TOKENS = 0.5
"""The count of a token that does not occur in the texts."""


@dataclass(frozen=True, slots=True)
class MatrixWeights:
    """Weights of a matrix's errors: half the sum of rows_i columns_j (error_ij)^2 is the KL divergence per token.

    `rows` [n_rows] and `columns` [n_per_row]; of a stack with a matrix for each head [n_head, n_rows] and [n_head,
    n_per_row]. Of a matrix that is used twice `other` are the weights of its second use, whose divergence is added.
    """

    rows: NDArray[np.float32]
    columns: NDArray[np.float32]
    other: "MatrixWeights | None" = None


@dataclass(frozen=True, slots=True)
class TypeCosts:
    """The KL divergence in nats per token [len(types)] that the types cost for each matrix.

    It is infinite if a type does not divide the matrix's rows.
    """

    types: tuple[str, ...]
    costs: Mapping[MatrixKey, NDArray[np.float64]]

    def of(self, key: MatrixKey, kind: Type) -> float:
        """The cost of storing one matrix in one type."""
        return float(self.costs[key][self.types.index(kind.name)])


def candidates(source: ModelSource) -> tuple[str, ...]:
    """Types from which a budget chooses for a model: MXFP4 too where matrices have it already, and so for nothing."""
    return CANDIDATES + (_KEPT if any(_is_kept(source, key) for key in source.shapes) else ())


def _is_kept(source: ModelSource, key: MatrixKey) -> bool:
    blocks = source.blocks(key)
    return blocks is not None and blocks.type.name in _KEPT


Progress = Callable[[int, int], None]
"""Called with the number of matrices that are done, and of all matrices."""


def packed_costs(costs: TypeCosts) -> MatrixCosts:
    """The costs in the form that statistics have."""
    nats = np.stack(list(costs.costs.values())) if costs.costs else np.empty((0, len(costs.types)))
    return MatrixCosts(costs.types, tuple(map(str, costs.costs)), nats)


def known_types(source: ModelSource, statistics: Statistics) -> frozenset[str]:
    """Types whose cost the statistics have for every matrix whose rows they divide."""
    known = statistics.matrix_costs
    if known is None:
        return frozenset()
    widths = [source.shapes[parse_key(name)][-1] for name in known.matrices]
    return frozenset(
        name
        for name, nats in zip(known.types, known.nats.T, strict=True)
        if np.isfinite(nats[[fits(Type[name], width) for width in widths]]).all()
    )


def stored_costs(statistics: Statistics, types: Sequence[str]) -> TypeCosts | None:
    """The costs of these types in the statistics; None if the statistics lack one of them."""
    known = statistics.matrix_costs
    if known is None or not types or not set(types) <= set(known.types):
        return None
    columns = [known.types.index(name) for name in types]
    keys = map(parse_key, known.matrices)
    return TypeCosts(tuple(types), {key: row[columns] for key, row in zip(keys, known.nats, strict=True)})


def joined_costs(one: TypeCosts, other: TypeCosts) -> TypeCosts:
    """The costs of the types of both, which must be of the same matrices."""
    costs = {key: np.concatenate((nats, other.costs[key])) for key, nats in one.costs.items()}
    return TypeCosts(one.types + other.types, costs)


def priced_matrices(source: ModelSource) -> list[MatrixKey]:
    """The matrices whose types have a price: all except routers, constant experts, and a recurrence's own values."""
    kept = ("ffn_gate_inp.", "ffn_novice.", *(f"{role}." for role in RECURRENT_FLOATS))
    return [
        key
        for key, shape in source.shapes.items()
        if len(shape) > 1 and key.name.endswith(".weight") and not any(name in key.name for name in kept)
    ]


def measure_type_costs(
    source: ModelSource,
    statistics: Statistics,
    *,
    types: Sequence[str] | None = None,
    n_threads: int = 1,
    on_progress: Progress = lambda _done, _total: None,
) -> TypeCosts:
    """Measures what types cost by quantising every matrix to each of `types` that divides its rows.

    Without `types` these are the `candidates`, small blocks only where large ones do not fit. Raises UsageError for
    statistics without sensitivities, and ModelFileError.
    """
    keys, tried = priced_matrices(source), candidates(source) if types is None else tuple(types)
    done = 0

    def price(key: MatrixKey) -> NDArray[np.float64]:
        nonlocal done
        values, weights = source.read(key), matrix_weights(source, statistics, key)
        left_out = () if types is not None else _left_out(values.shape[-1], is_kept=_is_kept(source, key))
        costs = _matrix_costs(values, weights, tried, left_out)
        done += 1
        on_progress(done, len(keys))
        return costs

    with ThreadPoolExecutor(n_threads) as pool:
        return TypeCosts(tried, dict(zip(keys, pool.map(price, keys), strict=True)))


def tried_types(source: ModelSource, n_per_row: int) -> tuple[str, ...]:
    """The types that are measured for a matrix of such rows where none are named."""
    left_out = _left_out(n_per_row, is_kept=False)
    return tuple(name for name in candidates(source) if fits(Type[name], n_per_row) and name not in left_out)


def _left_out(n_per_row: int, *, is_kept: bool) -> tuple[str, ...]:
    """Types that are measured only if they are asked for: those of small blocks where types of 256 weights fit, too."""
    return (_SMALL_BLOCKS if fits(Type.Q4_K, n_per_row) else ()) + (() if is_kept else _KEPT)


def _matrix_costs(
    values: NDArray[np.float32], weights: MatrixWeights, types: Sequence[str], left_out: Collection[str]
) -> NDArray[np.float64]:
    """What each type costs a matrix, or all matrices of a stack together."""
    sampled = _sampled_rows(values.shape)
    if values.ndim > 2:
        parts = zip(values, weights.rows, weights.columns, strict=True)
        costs = [_part_costs(one, MatrixWeights(r, c), sampled, types, left_out) for one, r, c in parts]
        return np.asarray(np.sum(costs, 0))
    return _part_costs(values, weights, sampled, types, left_out)


def _part_costs(
    values: NDArray[np.float32],
    weights: MatrixWeights,
    sampled: slice,
    types: Sequence[str],
    left_out: Collection[str],
) -> NDArray[np.float64]:
    some, uses = np.ascontiguousarray(values[sampled]), [weights, *([weights.other] if weights.other else [])]
    costs = np.full(len(types), np.inf)
    for index, name in enumerate(types):
        if fits(Type[name], values.shape[1]) and name not in left_out:
            with suppress(BadWeightsError):  # beyond F16's range
                costs[index] = sum(
                    _grown(use.rows, sampled)
                    * type_error(some, Type[name], use.rows[sampled], use.columns, fitted=weights.columns)
                    for use in uses
                )
    return costs


def _grown(rows: NDArray[np.float32], sampled: slice) -> float:
    """Half of what the sensitivities of all rows are over those of the sampled ones."""
    whole, part = (float(some.sum(dtype=np.float64)) for some in (rows, rows[sampled]))
    return 0.5 * (whole / part if part else float(sampled.step))


def _sampled_rows(shape: tuple[int, ...]) -> slice:
    """Evenly spaced rows of a matrix, or of each matrix of a stack."""
    n_rows = shape[-2]
    step = min(max(1, math.prod(shape) // _SAMPLED_WEIGHTS), n_rows)
    return slice(step // 2, n_rows, step)


def sampled_weights(shape: tuple[int, ...]) -> int:
    """The number of weights of a matrix, or of a stack, that are quantised to every type."""
    rows = _sampled_rows(shape)
    return math.prod(shape[:-2]) * len(range(rows.start, rows.stop, rows.step)) * shape[-1]


def matrix_weights(source: ModelSource, statistics: Statistics, key: MatrixKey) -> MatrixWeights:
    """The weights of one matrix's errors; raises UsageError for statistics without sensitivities."""
    layer, role = layer_and_role(key.name)
    n_tokens = max(1, statistics.n_tokens)
    if layer < 0:
        return _outer_weights(source, statistics, role, n_tokens)
    one = statistics.layers[layer]
    if one.sensitivity is None:
        raise _unmeasured()
    if key.expert >= 0:
        weights = _expert_weights(one, one.sensitivity, key, source.shapes[key])
        scales = MatrixKey(f"{key.name.removesuffix('weight')}scale")
        if scales not in source.shapes:
            return weights
        # Gradients are by the product after its scale.
        return replace(weights, rows=weights.rows * np.square(source.read(scales)[key.expert]))
    return MatrixWeights(one.sensitivity.of_role(role), one.inputs.by_role()[role] / np.float32(n_tokens))


def _expert_weights(
    layer: LayerStatistics, sensitivity: Sensitivity, key: MatrixKey, shape: tuple[int, ...]
) -> MatrixWeights:
    projection = key.name.split(".")[2].removeprefix("ffn_").removesuffix("_exps")
    gradients: NDArray[np.float32] = getattr(sensitivity, projection)[key.expert][: shape[0]]
    sums = layer.inputs.hidden if projection == "down" else layer.inputs.expert
    own = sums[key.expert][: shape[1]]
    if not own.any():
        # Nothing is known of an expert that no token selected: it must neither look free nor cost more than others.
        own = sums.sum(0)[: shape[1]]
        gradients = getattr(sensitivity, projection).mean(0)[: shape[0]]
    # The gradients' means run over all tokens, so that the inputs' must run over those that selected the expert.
    n_pick = layer.outputs.n_pick if layer.outputs is not None else None
    n_own = 0 if n_pick is None else int(n_pick[key.expert]) or int(n_pick.sum())
    return MatrixWeights(gradients, own / np.float32(max(1, n_own)))


def _outer_weights(source: ModelSource, statistics: Statistics, role: str, n_tokens: int) -> MatrixWeights:
    if statistics.token_gradient is None or statistics.output_gradient is None:
        raise _unmeasured()
    columns = statistics.output_input / np.float32(n_tokens)
    if role == "output":
        return MatrixWeights(statistics.output_gradient, columns)
    counts = np.maximum(statistics.token_count, _SEEN_TOKENS).astype(np.float32)
    as_embeddings = MatrixWeights(counts / counts.sum(), statistics.token_gradient)
    if MatrixKey("output.weight") in source.shapes:
        return as_embeddings
    # A tied table is the output as well, to which blocks are fitted.
    return MatrixWeights(statistics.output_gradient, columns, as_embeddings)


def _unmeasured() -> UsageError:
    return UsageError(
        "The statistics have no sensitivities, which say what each type costs. Run slimoe calibrate again without "
        "--no-sensitivity."
    )


def statistics_costs(
    source: ModelSource,
    statistics: Statistics,
    types: Sequence[str] | None,
    n_threads: int,
    on_progress: Callable[[str, int, int], None],
) -> TypeCosts:
    """What these types cost, those worth choosing from if they are not given, measured where the statistics have no
    answer; `on_progress` gets the name of the step. Raises as `measure_type_costs` does.
    """
    known, missing = priced_types(source, statistics, types)
    stored = stored_costs(statistics, known)
    if not missing and stored is not None:
        return stored
    measured = measure_type_costs(
        source,
        statistics,
        types=missing,
        n_threads=n_threads,
        on_progress=lambda done, total: on_progress(PRICING, done, total),
    )
    return measured if stored is None else joined_costs(stored, measured)


def priced_types(
    source: ModelSource, statistics: Statistics, types: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of these types, or those worth choosing from, the ones that the statistics have a price of, and the others."""
    # What calibration left without a price is not worth choosing among all, but a type that was named is wanted.
    tried = () if statistics.matrix_costs is None else statistics.matrix_costs.types
    known = set(tried) if types is None else known_types(source, statistics)
    may_be = tuple(name for name in candidates(source) if name in (*CANDIDATES, *tried))
    wanted = may_be if types is None else tuple(types)
    missing = tuple(name for name in wanted if name not in known)
    return tuple(name for name in wanted if name not in missing), missing
