"""An expert's matrices as arrays: reordered, aligned with another's, and merged as a plan says.

Alignment finds the order of an expert's neurons in which its weights are nearest to another expert's. It maximises the
inner products of matched neurons over gate, up and down (arXiv 2310.01334, with a term for SwiGLU's gate), which
minimises the squared distance of the weights. Up to `N_EXACT` neurons the assignment is optimal. Beyond, the greatest
products are matched first and the remaining neurons exactly, since an exact assignment takes time with the cube of the
width. Copies are found either way: the greatest product of all is that of a neuron and its copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slimoe.converter.layout.plan import ExpertPlan
from slimoe.converter.source.model_source import MatrixKey, ModelSource, expert_key, vectors_key
from slimoe.converter.stats.statistics import Int, Single


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """`gate` and `up` [n_ff, n_embd], `down` [n_embd, n_ff]. A neuron is a row of gate and up and a column of down.

    Experts without a gate have rows of no elements, [n_ff, 0].
    """

    gate: Single
    up: Single
    down: Single

    @property
    def n_ff(self) -> int:
        """The number of neurons."""
        return len(self.gate)

    def distance(self, other: "ExpertMatrices") -> float:
        """The squared distance of all weights over the squared norms of both: 0 if equal, 1 if orthogonal."""
        pairs = ((self.gate, other.gate), (self.up, other.up), (self.down, other.down))
        apart = sum(_square(a - b) for a, b in pairs)
        return apart / max(sum(_square(a) + _square(b) for a, b in pairs), np.finfo(np.float64).tiny)


def _square(values: Single) -> float:
    return float(np.einsum("ij,ij->", values, values, dtype=np.float64))


def read_matrices(source: ModelSource, layer: int, expert: int) -> ExpertMatrices:
    """Reads a stored expert of a model, its matrices multiplied by their scales, if any; raises ModelFileError."""
    matrices = []
    for projection in source.spec.architecture.projections:
        values, key = source.read(expert_key(layer, projection, expert)), vectors_key(layer, projection, "scale")
        matrices.append(values * source.read(key)[expert] if key in source.shapes else values)
    *gate, up, down = matrices
    return ExpertMatrices(gate[0] if gate else up[:, :0], up, down)


N_EXACT = 2048
"""Neurons up to which the assignment is exact; the products then take 4 * N_EXACT^2 bytes, and twice that in scipy."""
_N_CANDIDATES = 32
_ROWS_AT_ONCE = 512


def align(reference: ExpertMatrices, other: ExpertMatrices, n_exact: int = N_EXACT) -> Int:
    """The order [n_ff] of `other`'s neurons in which they match `reference`'s, for `ExpertMatrices.reordered`.

    Beside the experts it holds the products of `n_exact` by `n_exact` neurons at most, or of 512 neurons by all.
    """
    # It takes a second to load, and most plans align nothing.
    from scipy.optimize import linear_sum_assignment

    assert reference.gate.shape == other.gate.shape
    order = np.full(reference.n_ff, -1, np.int64)
    free = np.arange(reference.n_ff)
    unmatched = free.copy()
    while len(unmatched) > max(n_exact, 1):
        rows, columns = _likeliest(reference, other, unmatched, free)
        order[rows] = columns
        unmatched, free = np.setdiff1d(unmatched, rows), np.setdiff1d(free, columns)
    if len(unmatched):
        rows, columns = linear_sum_assignment(_products(reference, other, unmatched, free), maximize=True)
        order[unmatched[rows]] = free[columns]
    return order


def _products(reference: ExpertMatrices, other: ExpertMatrices, rows: Int, columns: Int) -> Single:
    """Inner products [rows, columns] of neurons."""
    products: Single = reference.gate[rows] @ other.gate[columns].T
    products += reference.up[rows] @ other.up[columns].T
    products += reference.down[:, rows].T @ other.down[:, columns]
    return products


def _likeliest(reference: ExpertMatrices, other: ExpertMatrices, rows: Int, columns: Int) -> tuple[Int, Int]:
    """Pairs of these neurons, the greatest products first, each neuron once: at least one pair, and mostly many.

    The candidates are the columns of the greatest products of every row.
    """
    n_best = min(_N_CANDIDATES, len(columns))
    best_columns, best_products = [], []
    for begin in range(0, len(rows), _ROWS_AT_ONCE):
        products = _products(reference, other, rows[begin : begin + _ROWS_AT_ONCE], columns)
        best = np.argpartition(-products, n_best - 1, axis=1)[:, :n_best]
        best_columns.append(columns[best].ravel())
        best_products.append(np.take_along_axis(products, best, axis=1).ravel())
    candidate_rows, candidate_columns = np.repeat(rows, n_best), np.concatenate(best_columns)
    matched: dict[int, int] = {}
    taken: set[int] = set()
    for pair in np.argsort(-np.concatenate(best_products), kind="stable"):
        row, column = int(candidate_rows[pair]), int(candidate_columns[pair])
        if row not in matched and column not in taken:
            matched[row] = column
            taken.add(column)
    return np.array(list(matched), np.int64), np.array(list(matched.values()), np.int64)


def merged_matrix(source: ModelSource, layer: int, plan: ExpertPlan, projection: str) -> Single:
    """One matrix of the expert that `plan` describes: gate, up or down, as `projection` names it.

    An expert of one member that keeps all neurons is the source's, bit for bit. Holds three matrices of the source's
    size, whatever the number of members. Raises ModelFileError.
    """
    is_down = projection == "down"
    if is_down and plan.down is not None:
        return plan.down
    if plan.is_joined:
        return _joined_matrix(source, layer, plan, projection)
    axis = 1 if is_down else 0
    merged = source.read(expert_key(layer, projection, plan.members[0]))
    if len(plan.members) > 1:
        key = vectors_key(layer, projection, "scale")
        first, *others = _factors(plan, source.read(key))[0] if key in source.shapes else plan.weights
        merged = merged * np.float32(first)
        for member, weight, order in zip(plan.members[1:], others, plan.neurons, strict=True):
            part = source.read(expert_key(layer, projection, member)).take(order, axis)
            part *= np.float32(weight)
            merged += part
    return merged if plan.kept is None else merged.take(plan.kept, axis)


def _joined_matrix(source: ModelSource, layer: int, plan: ExpertPlan, projection: str) -> Single:
    """Gate or up of members that lie side by side, whose scales are multiplied in."""
    assert projection != "down", "the matrix behind neurons of several experts is fitted"
    key, rows = vectors_key(layer, projection, "scale"), []
    scales = source.read(key) if key in source.shapes else None
    for member, own in plan.picked(source.shapes[expert_key(layer, projection, plan.members[0])][0]):
        values = source.read(expert_key(layer, projection, member))[own]
        rows.append(values if scales is None else values * scales[member])
    return np.concatenate(rows)


def _factors(plan: ExpertPlan, scales: Single) -> tuple[tuple[float, ...], float]:
    """The factors of the members' matrices in their mean, and the mean's scale: `scales` [n_stored] are the source's.

    What is averaged are products, matrices times scales. The mean's scale is that of the members' magnitudes, so that
    the magnitudes of the factors add up to 1 and no weight leaves the range of the members'.
    """
    own = scales[list(plan.members)].astype(np.float64)
    if plan.is_joined:
        return plan.weights, 1.0
    if len(own) == 1:
        return plan.weights, float(own[0])
    scale = float(np.abs(own) @ plan.weights)
    return tuple((own * plan.weights / scale).tolist()) if scale else plan.weights, scale


def merged_vectors(source: ModelSource, key: MatrixKey, plans: Sequence[ExpertPlan], n: int) -> Single:
    """The biases [n_plan, n] that experts of plans have of all stored ones' under `key`, or their scales [n_plan].

    Biases of narrower experts end in zeros. Raises ModelFileError.
    """
    stored = source.read(key)
    if stored.ndim == 1:
        return np.array([_factors(plan, stored)[1] for plan in plans], np.float32)
    found, is_down = np.zeros((len(plans), n), np.float32), "_down_" in key.name
    for row, plan in zip(found, plans, strict=True):
        own = _merged_bias(stored, plan, is_down)
        row[: len(own)] = own[:n]
    return found


def _merged_bias(stored: Single, plan: ExpertPlan, is_down: bool) -> Single:
    """The bias of one expert, of the neurons that it keeps or of its output."""
    if plan.is_joined and not is_down:
        return np.concatenate([stored[member][own] for member, own in plan.picked(stored.shape[1])])
    merged = np.float32(plan.weights[0]) * stored[plan.members[0]]
    orders = plan.neurons or (np.arange(0),) * (len(plan.members) - 1)
    for member, weight, order in zip(plan.members[1:], plan.weights[1:], orders, strict=True):
        merged = merged + np.float32(weight) * (stored[member] if is_down else stored[member][order])
    own: Single = merged if is_down or plan.kept is None else merged[plan.kept]
    return own
