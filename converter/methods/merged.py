"""What a plan's expert is: members averaged in matching order, then trimmed. Carries plans out, decides nothing."""

import numpy as np

from slimoe.converter.layout.plan import ExpertPlan
from slimoe.converter.methods.expert_matrices import ExpertMatrices, Single
from slimoe.converter.source.model_source import PROJECTIONS, ModelSource, expert_key


def merged_matrix(source: ModelSource, layer: int, plan: ExpertPlan, projection: str) -> Single:
    """One of the result's matrices; an expert of one member that keeps all neurons is the source's, bit for bit.

    Holds three matrices of the source's size, whatever the number of members. Raises ModelFileError.
    """
    is_down = projection == "down"
    if is_down and plan.down is not None:
        return plan.down
    axis = 1 if is_down else 0
    merged = source.read(expert_key(layer, projection, plan.members[0]))
    if len(plan.members) > 1:
        merged = merged * np.float32(plan.weights[0])
        for member, weight, order in zip(plan.members[1:], plan.weights[1:], plan.neurons, strict=True):
            part = source.read(expert_key(layer, projection, member)).take(order, axis)
            part *= np.float32(weight)
            merged += part
    return merged if plan.kept is None else merged.take(plan.kept, axis)


def merged_expert(source: ModelSource, layer: int, plan: ExpertPlan) -> ExpertMatrices:
    """All of the result's matrices; raises ModelFileError."""
    return ExpertMatrices(*(merged_matrix(source, layer, plan, projection) for projection in PROJECTIONS))
