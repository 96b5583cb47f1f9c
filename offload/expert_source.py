"""Which bytes of a file make up each expert: the unit of caching, whatever layout the file has.

An expert has one or several *copies*, encodings of the same three matrices, the best one first. What the router's rows
point at is a table, so that an engine never needs to know how a file came to have fewer experts than rows.
"""

from dataclasses import dataclass

from gguf import GGMLQuantizationType

from offload.model_spec import ModelSpec
from offload.weight_source import LayerSources, ModelSources, WeightSource, stacked_matrix

MatrixClass = tuple[GGMLQuantizationType, tuple[int, ...]]
"""Type and shape of one matrix."""
SlotClass = tuple[MatrixClass, MatrixClass, MatrixClass]
"""Type and shape of gate, up and down: copies of one class can take each other's place in memory."""


@dataclass(frozen=True, slots=True)
class ExpertCopy:
    """One encoding of an expert: gate and up [n_embd, n_ff], down [n_ff, n_embd], moved and replaced together."""

    gate: WeightSource
    up: WeightSource
    down: WeightSource

    @property
    def n_bytes(self) -> int:
        """Bytes of all three matrices."""
        return self.gate.n_bytes + self.up.n_bytes + self.down.n_bytes

    @property
    def slot_class(self) -> SlotClass:
        """What must agree for two copies to share a slot."""
        gate, up, down = ((part.type, part.ne) for part in (self.gate, self.up, self.down))
        return gate, up, down


@dataclass(frozen=True, slots=True)
class LayerHints:
    """What a converter measured, None where it did not; one value per stored expert unless it says otherwise.

    `use`: expected picks per token. Errors are expected rises in KL divergence (nats per token) when for every pick of
    the expert the action is taken: `low_error` its last copy in place of its best one, `fallback_error` its fallback,
    `skip_error` nothing at all. `fallback`: the novice that can stand in for a stored expert, -1 for none.
    For the whole layer: `sensitivity`, KL per unit of squared error of the layer's output; `skip_ratio`, the share of a
    pick relative to the token's largest one below which it may be skipped; `low_share`, the share below which a pick
    may use the low copy.
    """

    use: tuple[float, ...] | None = None
    low_error: tuple[float, ...] | None = None
    fallback: tuple[int, ...] | None = None
    fallback_error: tuple[float, ...] | None = None
    skip_error: tuple[float, ...] | None = None
    sensitivity: float | None = None
    skip_ratio: float | None = None
    low_share: float | None = None


NO_HINTS = LayerHints()


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts of one layer.

    `router` F32 [n_embd, n_row]; `experts` the stored ones, each with its copies, best first. `target` says for each
    row of the router which stored expert it means, or -1 - n for column n of `novices`, F32 [n_embd, n_novice]:
    constant vectors in place of experts. Several rows may mean the same expert.
    """

    router: WeightSource
    experts: tuple[tuple[ExpertCopy, ...], ...]
    target: tuple[int, ...]
    novices: WeightSource | None
    n_expert_used: int
    hints: LayerHints = NO_HINTS

    @property
    def low_error(self) -> tuple[float, ...] | None:
        """Per stored expert, the rise in KL when its low copy always replaces its best one; None if not measured."""
        return self.hints.low_error


def expert_layers(sources: ModelSources, spec: ModelSpec) -> tuple[ExpertLayer | None, ...]:
    """The experts of every layer, None where a layer has none."""
    return tuple(_stacked_layer(layer, spec) if layer.router else None for layer in sources.layers)


def _stacked_layer(layer: LayerSources, spec: ModelSpec) -> ExpertLayer:
    """A layer whose experts are all alike, in stacks."""
    assert layer.router
    assert len(layer.gate_up) == 2, "experts are found before matrices are joined"
    stacks = (*(part.weight for part in layer.gate_up), layer.down.weight)
    n_expert = layer.router.ne[1]
    experts = tuple((ExpertCopy(*(stacked_matrix(stack, e) for stack in stacks)),) for e in range(n_expert))
    return ExpertLayer(layer.router, experts, tuple(range(n_expert)), None, spec.n_expert_used)
