"""Types that stand in for those whose blocks do not divide a matrix's rows: which these are, and what is told of it."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from slimoe.converter.quant.mixes import fitting_type, fitting_types
from slimoe.offload.errors import UnsupportedModelError
from slimoe.offload.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class TypedMatrix:
    """A matrix of a file, or a stack of them, with its type. `unfit` is the type in whose place it has that one."""

    name: str
    n_per_row: int
    type: GGMLQuantizationType
    unfit: GGMLQuantizationType | None = None

    @property
    def change(self) -> str:
        """Both types, such as "Q4_K to Q5_0"; empty if it has the one that was asked for."""
        return f"{self.unfit.name} to {self.type.name}" if self.unfit else ""


def typed(name: str, n_per_row: int, wanted: GGMLQuantizationType) -> TypedMatrix:
    """A matrix with the type `wanted`, or with one that its rows fit."""
    kind = fitting_type(wanted, n_per_row)
    return TypedMatrix(name, n_per_row, kind, None if kind is wanted else wanted)


def unfit_counts(matrices: Sequence[TypedMatrix]) -> dict[str, int]:
    """How many have another type than was asked for, such as {"Q4_K to Q5_0": 3}."""
    return dict(Counter(matrix.change for matrix in matrices if matrix.unfit))


def unfit_notes(matrices: Sequence[TypedMatrix], n_tensors: int) -> list[str]:
    """What a person is told of them, in a file of `n_tensors`."""
    notes = []
    for change, n in unfit_counts(matrices).items():
        example = next(matrix for matrix in matrices if matrix.change == change)
        assert example.unfit is not None
        which = f"{n} of {n_tensors} tensors, such as {example.name},"
        rows = f"rows of {example.n_per_row}, which {example.unfit.name} does not divide"
        notes.append(f"{which} have {rows}: {example.type.name} in its place")
    return notes


def check_fits(
    path: Path,
    spec: ModelSpec,
    recipe: str,
    base: GGMLQuantizationType,
    matrices: Sequence[TypedMatrix],
    *,
    has_copies: bool = False,
) -> None:
    """Refuses a type, or a mix of types, that no matrix can have: nothing in the file would be what was asked for.

    Raises UnsupportedModelError with the three smallest types that fit all matrices of the model at `path`, or with two
    types if experts have second copies.
    """
    unfit = [matrix for matrix in matrices if matrix.unfit is not None]
    blocks = {matrix.type: GGML_QUANT_SIZES[matrix.type][0] for matrix in matrices}
    # Mixes have other types of the same blocks in some places.
    if not unfit or any(
        matrix.unfit is None and blocks[matrix.type] == GGML_QUANT_SIZES[base][0] for matrix in matrices
    ):
        return
    first = unfit[0]
    assert first.unfit is not None
    what = {spec.n_ff: "n_ff", spec.n_embd: "n_embd"}.get(first.n_per_row, "the row length")
    block = GGML_QUANT_SIZES[first.unfit][0]
    needs = f"is no multiple of {block}, as {first.unfit.name} in {recipe} needs"
    rows = [matrix.n_per_row for matrix in matrices]
    suggested = fitting_types(math.gcd(*rows))[-3:]
    advice = copies_advice(rows) if has_copies else f"Use --type {' or '.join(suggested)}."
    raise UnsupportedModelError(path, f"{first.name}: {what} of {first.n_per_row} {needs}.", advice)


def copies_advice(rows: Iterable[int]) -> str:
    """A sentence with two types for copies of experts that fit rows of these lengths, the second one smaller."""
    suggested = fitting_types(math.gcd(*rows))
    best = "Q8_0" if "Q8_0" in suggested else suggested[0]
    return f"Use --two-copies {best},{suggested[-1]}, or a recipe with such types."
