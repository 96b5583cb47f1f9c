"""Which bytes of a file make up each expert: the unit of caching, whatever layout the file has.

An expert has one or several *copies*, encodings of the same matrices, the best one first. What the router's rows
point at is a table, so that an engine never needs to know how a file came to have fewer experts than rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from slimoe.offload.model.native_layout import NO_HINTS, LayerHints
from slimoe.offload.model.regrouped import expert_matrices, stacked_matrix
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import ModelSources, WeightSource

MatrixClass = tuple[GGMLQuantizationType, tuple[int, ...]]
"""Type and shape of one matrix."""


class SlotClass:
    """Type and shape of an expert's matrices: copies of one class can take each other's place in memory.

    There is one object for each class, so that looking one up, as happens for every selected expert, hashes no types.
    """

    __slots__ = ("matrices",)
    _known: ClassVar[dict[tuple[MatrixClass, ...], "SlotClass"]] = {}

    matrices: tuple[MatrixClass, ...]

    @classmethod
    def of(cls, *matrices: MatrixClass) -> "SlotClass":
        """The one object for these types and shapes."""
        known = cls._known.get(matrices)
        if known is None:
            known = cls._known[matrices] = cls()
            known.matrices = matrices
        return known

    def __iter__(self) -> Iterator[MatrixClass]:
        return iter(self.matrices)

    def __repr__(self) -> str:
        return f"SlotClass{self.matrices}"


@dataclass(frozen=True, slots=True)
class ExpertCopy:
    """One encoding of an expert, whose matrices are moved and replaced together: gate, where it has one, and up
    [n_embd, n_ff], down [n_ff, n_embd].

    Copies of one `slot_class` can use the same slot.
    """

    matrices: tuple[WeightSource, ...]
    slot_class: SlotClass = field(init=False, compare=False)

    @property
    def n_ff(self) -> int:
        """The number of its neurons."""
        return self.matrices[0].ne[1]

    @property
    def n_bytes(self) -> int:
        """Bytes of all its matrices."""
        return sum(matrix.n_bytes for matrix in self.matrices)

    def __post_init__(self) -> None:
        object.__setattr__(self, "slot_class", SlotClass.of(*((part.type, part.ne) for part in self.matrices)))


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts of one layer.

    `router` F32 [n_embd, n_row]; `experts` the stored ones, each with its copies, best first. `target` says for each
    row of the router which stored expert it means, or -1 - n for column n of `constants`, F32 [n_embd, n]:
    constant experts. Several rows may mean the same expert. A token's expert weights sum up to
    `weights_scale` if `is_renormalised`.
    """

    router: WeightSource
    experts: tuple[tuple[ExpertCopy, ...], ...]
    target: tuple[int, ...]
    constants: WeightSource | None
    n_expert_used: int
    hints: LayerHints = NO_HINTS
    weights_scale: float = 1.0
    is_renormalised: bool = True

    @property
    def low_error(self) -> tuple[float, ...] | None:
        """Per stored expert, the rise in KL when its low-bit copy replaces its best one; None if not measured."""
        return self.hints.low_error


def expert_layers(sources: ModelSources, spec: ModelSpec) -> tuple[ExpertLayer | None, ...]:
    """The experts of every layer, None where a layer has none. `sources` are a file's own, not joined."""
    routing = spec.expert_weights_scale, spec.renormalises
    found: list[ExpertLayer | None] = []
    for layer in sources.layers:
        constants, hints = None, NO_HINTS
        if not layer.router:
            found.append(None)
            continue
        if layer.buckets:
            layout, constants = layer.buckets.layout, layer.buckets.constants
            copies: list[list[ExpertCopy]] = [[] for _ in layout.buckets]
            for expert, _, bucket, slot in layout.slots():
                copies[expert].append(_copy(layer.buckets.buckets[bucket], slot))
            experts, target, hints = tuple(map(tuple, copies)), layout.target, layout.hints
        else:
            assert layer.down
            target = tuple(range(layer.router.weight.ne[1]))
            n_projections = len(spec.architecture.projections)
            experts = tuple(
                (ExpertCopy(expert_matrices(layer.gate_up, layer.down, expert, n_projections)),) for expert in target
            )
        found.append(ExpertLayer(layer.router.weight, experts, target, constants, spec.n_expert_used, hints, *routing))
    return tuple(found)


def cache_priors(layers: Sequence[ExpertLayer | None]) -> NDArray[np.float64] | None:
    """How often a token selects each expert, as the file says, [n_layer, most router rows]; None if a layer has none.

    Columns are stored experts; those that a layer does not have are 0, as are layers without experts.
    """
    present = [layer for layer in layers if layer is not None and layer.experts]
    if not present or any(layer.hints.use is None for layer in present):
        return None
    priors = np.zeros((len(layers), max(len(layer.target) for layer in layers if layer is not None)))
    for row, layer in zip(priors, layers, strict=True):
        if layer is not None and layer.hints.use is not None:
            row[: len(layer.experts)] = layer.hints.use
    return priors


def _copy(stacks: Sequence[WeightSource], slot: int) -> ExpertCopy:
    return ExpertCopy(tuple(stacked_matrix(stack, slot) for stack in stacks))
