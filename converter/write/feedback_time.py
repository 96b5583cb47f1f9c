"""What error feedback takes, and which matrices are worth it where time is short.

Feedback takes off about the same share of what any type costs, so that the KL divergence to be saved is proportional to
what the statistics expect of a matrix's type. Matrices that read the same share the products of their inputs and the
factors of these, and are chosen together: those that save most in a second first, which are K types for the most part.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby

import numpy as np
from gguf import GGMLQuantizationType as Type

from slimoe.converter.layout.layer import ROUTER, Matrix
from slimoe.converter.layout.offsets import FileLayout
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.quant.block_layout import BITS
from slimoe.converter.quant.mixes import layer_and_role
from slimoe.converter.source.model_source import MatrixKey, ModelSource, expert_key
from slimoe.converter.stats.type_costs import TypeCosts
from slimoe.converter.write.estimate import seconds_per_weight
from slimoe.converter.write.matrix import stored_blocks
from slimoe.offload.errors import UsageError

N_TOKENS = 16384
"""Of the calibration's, at most, which run through the result as it grows."""
ATTENTION_INPUT = (
    *("attn_q", "attn_k", "attn_v", "attn_q_a", "attn_kv_a_mqa", "attn_qkv", "attn_gate"),
    *("ssm_alpha", "ssm_beta", "ssm_ba", "ssm_in", "shortconv.in_proj"),
)
"""The matrices that read attention's input, or that of a recurrence in its place."""
_LEFT = 0.35
"""What feedback leaves of a type's cost, on average: 0.31 to 0.36 from 2 to 6 bits on matrices of a trained model. In
single ones it is 0.13 to 0.5, by how far their inputs follow from each other."""
_SAMPLE = (2048, 256)
"""More rows take about as long for each weight, fewer longer."""
_PRODUCT = 768
_PASSES = 4
"""Times that tokens pass a matrix: for what the next one reads, and behind the layer, quantised and not."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """What this machine does, with all threads.

    `per_weight`: seconds that choosing a weight's code takes, beyond those of plain quantising, in a matrix of so many
    rows. `products`: of two numbers in a second.
    """

    per_weight: Callable[[Type, int], float]
    products: float


def measured_speeds(n_threads: int) -> Speeds:
    """Tries random weights and a product of matrices for a moment."""
    # torch is heavy, and plans without feedback do without.
    import torch

    from slimoe.converter.quant.feedback import Curvature, quantize_with_feedback

    rows = np.random.default_rng(0).standard_normal(_SAMPLE, np.float32)
    curvature, one = Curvature.of(np.eye(_SAMPLE[1], dtype=np.float32)), torch.ones(_PRODUCT, _PRODUCT)

    @cache
    def tried(kind: Type, n_rows: int) -> float:
        some = rows[:n_rows]
        quantize_with_feedback(some[:1], curvature, kind)
        begin = time.perf_counter()
        quantize_with_feedback(some, curvature, kind, n_threads)
        seconds = (time.perf_counter() - begin) / some.size
        return max(0.0, seconds - seconds_per_weight(kind) / n_threads)

    _ = one @ one
    begin = time.perf_counter()
    _ = one @ one
    return Speeds(
        lambda kind, n_rows: tried(kind, min(n_rows, _SAMPLE[0])), _PRODUCT**3 / (time.perf_counter() - begin)
    )


def input_of(matrix: Matrix) -> tuple[int, int, str]:
    """What a matrix reads: its layer, expert, and the role of the first matrix that reads the same."""
    layer, role = layer_and_role(matrix.key.name)
    role = ATTENTION_INPUT[0] if role in ATTENTION_INPUT else role.replace("ffn_up", "ffn_gate")
    return layer, matrix.key.expert, role


@dataclass(frozen=True, slots=True)
class FeedbackTime:
    """What feedback takes for a file: `following` its layers with the tokens, and `groups` of matrices."""

    following: float
    groups: tuple[tuple[tuple[Matrix, ...], float], ...]

    @classmethod
    def of(cls, source: ModelSource, plan: CompressPlan, layout: FileLayout, speeds: Speeds) -> "FeedbackTime":
        """The expected seconds of all matrices that the plan has feedback for."""
        matrices = [matrix for tensor in layout.tensors for matrix in tensor.matrices if not matrix.is_constant]
        passed = sum(
            _weights(one) * _tokens(source, plan, one) for one in matrices if layer_and_role(one.key.name)[0] >= 0
        )
        groups = []
        for _, some in groupby(
            sorted(filter(lambda one: _is_fitted(source, plan, one), matrices), key=input_of), input_of
        ):
            group = tuple(some)
            n_in, n_heads = group[0].shape[1], max(1, group[0].n_stack)
            products = n_heads * n_in**2 * (2 * _tokens(source, plan, group[0]) + n_in / 2)
            seconds = 0.0
            for matrix in group:
                seconds += _weights(matrix) * speeds.per_weight(matrix.type, matrix.shape[0] // n_heads)
                # What is owed to earlier columns, and what makes up for the inputs' drift.
                products += _weights(matrix) * n_in * 2.5
            groups.append((group, seconds + products / speeds.products))
        return cls(_PASSES * passed / speeds.products, tuple(groups))

    def chosen(self, plan: CompressPlan) -> "FeedbackTime":
        """What the plan's own choice of matrices takes."""
        return replace(self, groups=tuple(one for one in self.groups if is_chosen(plan, one[0][0])))

    @property
    def seconds(self) -> float:
        """In all, beyond what the same file takes without feedback."""
        return self.following + sum(seconds for _, seconds in self.groups)


def with_chosen(plan: CompressPlan, needed: FeedbackTime, costs: TypeCosts) -> CompressPlan:
    """The plan with feedback for those matrices for which its time is best spent, by what their types cost.

    Raises UsageError for a time in which not even one can be reached.
    """
    left = float(plan.feedback) - needed.following
    worth = [(_cost(group, costs) / seconds, group, seconds) for group, seconds in needed.groups]
    chosen = set[tuple[str, int]]()
    for _, group, seconds in sorted(worth, key=lambda one: -one[0]):
        if seconds <= left:
            left -= seconds
            chosen |= {(matrix.tensor, matrix.slot) for matrix in group}
    if not chosen and needed.groups:
        least = math.ceil(needed.following + min(seconds for _, seconds in needed.groups))
        raise UsageError(
            f"--feedback is {float(plan.feedback):g} s, but following the layers with the calibration's tokens takes "
            f"{needed.following:.1f} s before anything is gained. Give {least} s or more, or --no-feedback."
        )
    return replace(plan, fitted=frozenset(chosen))


def saved_share(plan: CompressPlan, needed: FeedbackTime, costs: TypeCosts) -> float:
    """The share of the expected loss of all matrices' types that those have which the plan has feedback for."""
    whole, part = (sum(_cost(group, costs) for group, _ in one.groups) for one in (needed, needed.chosen(plan)))
    return part / whole if whole else 1.0


def costs_with_feedback(costs: TypeCosts) -> TypeCosts:
    """An estimate of what types cost where all matrices have feedback: those that are multiplied with their inputs."""
    left = np.array([_LEFT if Type[name] in BITS else 1.0 for name in costs.types])
    return replace(costs, costs={key: nats * left if _multiplies(key) else nats for key, nats in costs.costs.items()})


def is_chosen(plan: CompressPlan, matrix: Matrix) -> bool:
    """Whether the plan has feedback for the matrix, if its type can have any."""
    return plan.fitted is None or (matrix.tensor, matrix.slot) in plan.fitted


def _is_fitted(source: ModelSource, plan: CompressPlan, matrix: Matrix) -> bool:
    is_quantised = matrix.type in BITS and not stored_blocks(source, matrix)
    return bool(plan.feedback) and _multiplies(matrix.key) and is_quantised


def _multiplies(key: MatrixKey) -> bool:
    """Whether feedback knows what a matrix reads: it is no table, and no router."""
    layer, role = layer_and_role(key.name)
    return role == "output" or (layer >= 0 and role != ROUTER)


def _weights(matrix: Matrix) -> int:
    return matrix.shape[0] * matrix.shape[1]


def _tokens(source: ModelSource, plan: CompressPlan, matrix: Matrix) -> float:
    """How many tokens pass a matrix, on average."""
    layer, _ = layer_and_role(matrix.key.name)
    if matrix.key.expert < 0:
        return N_TOKENS
    return N_TOKENS * min(1.0, source.spec.n_expert_used / max(1, len(plan.layers[layer].rows)))


def _cost(group: tuple[Matrix, ...], costs: TypeCosts) -> float:
    return sum(_matrix_cost(matrix, costs) for matrix in group)


def _matrix_cost(matrix: Matrix, costs: TypeCosts) -> float:
    """The KL divergence that the matrix's type costs; 0 of second copies, and where it is not known."""
    if matrix.copy:
        return 0.0
    if matrix.expert is None:
        keys = [matrix.key if matrix.origin is None else matrix.origin]
    else:
        keys = [expert_key(matrix.block, matrix.projection, member) for member in matrix.expert.members]
    known: Mapping[MatrixKey, object] = costs.costs
    return sum(costs.of(key, matrix.type) for key in keys if key in known)
