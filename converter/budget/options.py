"""What the allocator may choose: for every part of a structure the types it can have, with exact bytes and costs.

Parts are the experts of the native format, each with types of neighbouring sizes for its matrices, so that slots stay
interchangeable, with all or some of its neurons, or a constant in its place; the stacks of all experts of a layer in
the stock one; and matrices of attention, shared experts and dense layers, the table and the output. Feed-forward parts
and attentions can be given up as a whole.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import product

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from slimoe.converter.budget.knapsack import Group, Option, Part
from slimoe.converter.budget.widths import Narrower, may_narrow, narrowed, type_share, width_costs
from slimoe.converter.layout.layer import fitted_types, is_attention, matrix_width, row_lengths
from slimoe.converter.layout.plan import ExpertPlan, LayerPlan, Types
from slimoe.converter.methods.constant_experts import constant_costs
from slimoe.converter.methods.removal import TOGETHER, attention_removals, layer_removals
from slimoe.converter.quant.mixes import fitting_type
from slimoe.converter.recipe.recipe import Recipe
from slimoe.converter.source.model_source import MatrixKey, ModelSource, block_key, expert_key, expert_width
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.type_costs import TypeCosts

CONSTANT = "constant"
"""The option that puts a constant in place of an expert."""
ATTENTION = "attention"
"""Of the layer's number, the name of the group that is its attention; that of the feed-forward part is the number."""
_TOKENS, _OUTPUT = MatrixKey("token_embd.weight"), MatrixKey("output.weight")


class OptionParts:
    """Parts and groups of the layers of one structure."""

    def __init__(
        self,
        source: ModelSource,
        statistics: Statistics,
        costs: TypeCosts,
        recipe: Recipe,
        layers: Sequence[LayerPlan],
    ) -> None:
        self._source, self._statistics, self._costs, self._recipe = source, statistics, costs, recipe
        self._layers, self._may_narrow = layers, may_narrow(recipe)
        names = recipe.types.candidates or costs.types
        self._types = tuple(sorted((Type[name] for name in names), key=_bits))

    def parts(self) -> list[Part]:
        """Everything that has a type, in the file's order."""
        named = self._recipe.types
        parts = [Part("token", self._options(_TOKENS, named.token))]
        if _OUTPUT in self._source.shapes:
            parts.append(Part("output", self._options(_OUTPUT, named.output)))
        for index, layer in enumerate(self._layers):
            for role in layer.types:
                options = self._options(block_key(layer.block, role), named.attention)
                parts.append(Part((index, role), options, (ATTENTION, index) if is_attention(role) else index))
            if self._recipe.format == "stock":
                parts += self._stack_parts(index, layer)
            else:
                parts += self._expert_parts(index, layer)
        return [Part(part.name, _worthwhile(part.options), part.group) for part in parts]

    def groups(self) -> list[Group]:
        """What can be given up as a whole, if the recipe lets it; one attention and one layer's experts always stay."""
        if not self._recipe.free_layers:
            return []
        ffn = {one.layer: one.nats for one in layer_removals(self._statistics, self._source.layers)}
        attention = {one.layer: one.nats for one in attention_removals(self._statistics, self._source.layers)}
        of_attention = [
            Group((ATTENTION, index), TOGETHER * price)
            for index, layer in enumerate(self._layers)
            if layer.has_attention and (price := attention[layer.block]) is not None
        ]
        of_ffn = [
            Group(index, TOGETHER * price)
            for index, layer in enumerate(self._layers)
            if layer.has_ffn and (price := ffn.get(layer.block)) is not None
        ]
        has_experts = {index for index, layer in enumerate(self._layers) if layer.experts}
        of_experts = [group for group in of_ffn if group.name in has_experts]
        if of_experts and len(of_experts) == len(has_experts):
            of_ffn.remove(max(of_experts, key=lambda group: group.cost))
        recurrent = {
            (ATTENTION, index) for index, one in enumerate(self._layers) if self._source.spec.is_recurrent(one.block)
        }
        attending = [group for group in of_attention if group.name not in recurrent]
        if attending:
            of_attention.remove(sorted(attending, key=lambda group: group.cost)[-1])
        return of_ffn + sorted(of_attention, key=lambda group: group.cost)

    def _stack_parts(self, index: int, layer: LayerPlan) -> Iterable[Part]:
        for number, projection in enumerate(layer.experts[0].projections if layer.experts else ()):
            options = [
                Option(
                    kind,
                    sum(self._bytes(layer, expert, projection, kind) for expert in layer.experts),
                    sum(self._cost(layer, expert, projection, kind) for expert in layer.experts),
                )
                for kind in self._expert_types(layer, layer.experts[0])[number]
            ]
            yield Part((index, projection), tuple(options), index)

    def _expert_parts(self, index: int, layer: LayerPlan) -> Iterable[Part]:
        free = self._replaceable(layer) if self._recipe.free_constants else {}
        narrower = width_costs(self._statistics.layers[layer.block]) if self._may_narrow else {}
        for number, expert in enumerate(layer.experts):
            options = [Option(types, n_bytes, cost) for types, n_bytes, cost in self._typed(layer, expert)]
            for width, costs in narrower.items() if expert.kept is None else ():
                own = float(costs[expert.members[0]])
                for types, n_bytes, cost in self._typed(layer, narrowed(expert, width)):
                    options.append(Option(Narrower(types, width), n_bytes, cost + own))
            if number in free:
                options.append(Option(CONSTANT, 4 * self._source.spec.n_embd_expert, free[number]))
            yield Part((index, number), tuple(options), index)

    def _typed(self, layer: LayerPlan, expert: ExpertPlan) -> Iterable[tuple[Types, int, float]]:
        """The types that an expert can have, with its bytes and what they cost."""
        low_bytes, names = 0, expert.projections
        if self._recipe.types.low is not None:
            low = (Type[self._recipe.types.low],) * len(names)
            lows = zip(names, fitted_types(self._source, layer.block, expert, low), strict=True)
            low_bytes = sum(self._bytes(layer, expert, projection, kind) for projection, kind in lows)
        choices = self._neighbours(layer, expert)
        single = {
            pair: (self._bytes(layer, expert, *pair), self._cost(layer, expert, *pair))
            for pair in {pair for types in choices for pair in zip(names, types, strict=True)}
        }
        for types in choices:
            pairs = [single[pair] for pair in zip(names, types, strict=True)]
            yield types, low_bytes + sum(n_bytes for n_bytes, _ in pairs), sum(cost for _, cost in pairs)

    def _neighbours(self, layer: LayerPlan, expert: ExpertPlan) -> list[Types]:
        """The types of an expert's matrices of which none is more than a step larger than another.

        A matrix that cannot have the type of a step has the next larger one.
        """
        if self._recipe.types.expert is not None:
            kind = Type[self._recipe.types.expert]
            return [fitted_types(self._source, layer.block, expert, (kind,) * len(expert.projections))]
        fitting = self._expert_types(layer, expert)
        steps = sorted(dict.fromkeys(kind for kinds in fitting for kind in kinds), key=_bits)
        by_matrix = [
            # The type of the step, or the first one, the smallest first, with as many bits.
            [
                step if step in kinds else next((one for one in kinds if _bits(one) >= _bits(step)), kinds[-1])
                for step in steps
            ]
            for kinds in fitting
        ]
        numbers = product(range(len(steps)), repeat=len(by_matrix))
        near = (some for some in numbers if max(some) - min(some) < 2)
        found = (tuple(kinds[n] for kinds, n in zip(by_matrix, some, strict=True)) for some in near)
        return list(dict.fromkeys(found))

    def _options(self, key: MatrixKey, named: str | None) -> tuple[Option, ...]:
        shape = self._source.shapes[key]
        types = [fitting_type(Type[named], shape[-1])] if named else self._fitting(key, shape[-1])
        return tuple(Option(kind, _n_bytes(shape, kind), self._price(key, kind)) for kind in types)

    def _expert_types(self, layer: LayerPlan, expert: ExpertPlan) -> list[list[Type]]:
        """What each of an expert's matrices can have."""
        lengths = row_lengths(self._source, layer.block, expert)
        return [
            self._fitting(expert_key(layer.block, projection, expert.members[0]), n_per_row)
            for projection, n_per_row in zip(expert.projections, lengths, strict=True)
        ]

    def _fitting(self, key: MatrixKey, n_per_row: int) -> list[Type]:
        """The candidates, others in place of those that do not divide the rows, the smallest first."""
        kinds = dict.fromkeys(fitting_type(kind, n_per_row) for kind in self._types)
        return sorted((kind for kind in kinds if self._is_priced(key, kind)), key=_bits) or [Type.F16]

    def _bytes(self, layer: LayerPlan, expert: ExpertPlan, projection: str, kind: Type) -> int:
        n_rows, n_per_row = self._source.shapes[expert_key(layer.block, projection, expert.members[0])]
        width = matrix_width(self._source, layer.block, expert)
        return _n_bytes((n_rows, width) if projection == "down" else (width, n_per_row), kind)

    def _cost(self, layer: LayerPlan, expert: ExpertPlan, projection: str, kind: Type) -> float:
        """Of merged experts all that read the mean; of narrower ones the part that is left."""
        keys = [expert_key(layer.block, projection, member) for member in expert.members]
        whole = expert_width(self._source, layer.block, expert.members[0])
        width = matrix_width(self._source, layer.block, expert)
        part = width / whole
        if width < whole and len(keys) == 1:
            part = type_share(self._statistics.layers[layer.block], expert.members[0], width, whole)
        return part * sum(self._price(key, kind) for key in keys)

    def _is_priced(self, key: MatrixKey, kind: Type) -> bool:
        return kind.name in self._costs.types and self._costs.of(key, kind) < float("inf")

    def _price(self, key: MatrixKey, kind: Type) -> float:
        """Types that were not measured have more bits than all that were."""
        return self._costs.of(key, kind) if self._is_priced(key, kind) else 0.0

    def _replaceable(self, layer: LayerPlan) -> dict[int, float]:
        """Experts that may become constants, and what that costs: all but as many as a token selects."""
        one = self._statistics.layers[layer.block]
        if one.removals is None or one.outputs is None or any(target < 0 for target in layer.target):
            return {}
        costs = TOGETHER * constant_costs(one)
        prices = {
            number: float(costs[expert.members[0]])
            for number, expert in enumerate(layer.experts)
            if len(expert.members) == 1
        }
        n_free = max(0, len(layer.experts) - self._source.spec.n_expert_used)
        return dict(sorted(prices.items(), key=lambda item: item[1])[:n_free])


def _worthwhile(options: Sequence[Option]) -> tuple[Option, ...]:
    """Those that no smaller one costs less than, the smallest first; not all of a knapsack's others can be chosen."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda one: (one.n_bytes, one.cost)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return tuple(kept)


def _bits(kind: Type) -> float:
    n_weights, n_bytes = GGML_QUANT_SIZES[kind]
    return float(8 * n_bytes / n_weights)


def _n_bytes(shape: tuple[int, ...], kind: Type) -> int:
    n_weights, n_bytes = GGML_QUANT_SIZES[kind]
    result: int = math.prod(shape[:-1]) * (shape[-1] // n_weights) * n_bytes
    return result
