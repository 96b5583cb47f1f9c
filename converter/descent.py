"""Which parts of a model come from which parts of the one that it was made of."""

from dataclasses import dataclass

from converter.model_source import ModelSource
from converter.slim_plan import SlimPlan


@dataclass(frozen=True, slots=True)
class Descent:
    """`blocks` are the ancestor's, ascending, one for each block of the model; `rows` [block] those of its router."""

    blocks: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        assert list(self.blocks) == sorted(set(self.blocks)), self.blocks
        assert len(self.rows) == len(self.blocks)


def planned_descent(plan: SlimPlan) -> Descent:
    """What a plan says."""
    return Descent(tuple(layer.block for layer in plan.layers), tuple(layer.rows for layer in plan.layers))


def likely_descent(model: ModelSource, ancestor: ModelSource) -> Descent | None:
    """Block by block and row by row where there are equally many of both; None for fewer blocks.

    Rows of a block that has other numbers of them are unknown, and empty.
    """
    if len(model.layers) != len(ancestor.layers):
        return None
    counts = [(len(one.target), len(other.target)) for one, other in zip(model.layers, ancestor.layers, strict=True)]
    rows = tuple(tuple(range(n_row)) if n_row == n_old else () for n_row, n_old in counts)
    return Descent(tuple(range(len(counts))), rows)
