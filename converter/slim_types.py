"""Types for every matrix of a structure: those that a recipe names, or the ones that cost least within a budget.

The allocator's parts are the experts of the native format, each of one type or of neighbouring ones for gate and up and
for down, so that slots stay interchangeable; and stacks of all experts of a layer for the stock one. What alignment
and the header take is found by asking for the size of the whole file, until the file is no larger than the budget.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from converter.allocation import Allocation, Group, Option, Part, allocate
from converter.methods.layer_drop import layer_removals
from converter.methods.layer_weight import layer_weight
from converter.methods.novices import novice_errors, variances
from converter.model_source import MatrixKey, ModelSource, block_key, expert_key
from converter.recipe import Recipe
from converter.slim_layer import matrix_width
from converter.slim_layout import PlanSize
from converter.slim_plan import ExpertPlan, LayerPlan, SlimPlan, Types
from converter.statistics import Statistics
from converter.structure import ROLES, Structure, with_novices, without_ffn
from converter.type_costs import TypeCosts
from offload.errors import DoesNotFitError

_TOKENS, _OUTPUT = MatrixKey("token_embd.weight"), MatrixKey("output.weight")
_ROUNDS = 8
_MISSING = 3.0
"""So many times what the statistics foretell is what leaving something out costs: they are good to second order, and do
not see that tokens pick other experts then. Measured on a trained model; types of weights cost about twice."""
_NEAR = 2000
"""A file within such a part of its budget is large enough."""
NOVICE = "novice"
"""The option that puts a constant in place of an expert."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What is stored how: types by (layer of the result, expert) or (layer, role), of the table and of the output."""

    experts: Mapping[tuple[int, int], Types | None]
    roles: Mapping[tuple[int, str], Type]
    token: Type
    output: Type | None
    without_ffn: frozenset[int] = frozenset()


def apply(plan: SlimPlan, choices: Choices, source: ModelSource, statistics: Statistics | None) -> SlimPlan:
    """The plan with these types; experts without types become novices."""
    layers = []
    for index, layer in enumerate(plan.layers):
        one = layer
        if index in choices.without_ffn:
            one = without_ffn(layer)
        elif layer.experts:
            types = [choices.experts[index, number] for number in range(len(layer.experts))]
            one = _with_types(layer, types, source, statistics)
        roles = {role: choices.roles[index, role] for role in one.types}
        layers.append(replace(one, types=roles))
    return replace(plan, layers=tuple(layers), token_type=choices.token, output_type=choices.output)


def _with_types(
    layer: LayerPlan, types: Sequence[Types | None], source: ModelSource, statistics: Statistics | None
) -> LayerPlan:
    kept = [(expert, kinds) for expert, kinds in zip(layer.experts, types, strict=True) if kinds is not None]
    base = layer
    if len(kept) < len(layer.experts):
        assert statistics is not None
        base = with_novices(source, statistics, layer.block, [expert.members[0] for expert, _ in kept])
        base = replace(base, types=layer.types, has_attention=layer.has_attention)
    return replace(base, experts=tuple(replace(expert, types=kinds) for expert, kinds in kept))


class TypeAllocator:
    """Spends a budget on one structure; holds what does not depend on the budget."""

    def __init__(
        self, source: ModelSource, statistics: Statistics, costs: TypeCosts, recipe: Recipe, structure: Structure
    ) -> None:
        self._source, self._statistics, self._costs, self._recipe = source, statistics, costs, recipe
        self._layers = structure.layers
        names = recipe.types.candidates or costs.types
        self._types = tuple(sorted((Type[name] for name in names), key=_bits))
        self.size = PlanSize(source, statistics)
        self.parts = list(self._outer_parts())
        self._groups: list[Group] = []
        for index, layer in enumerate(self._layers):
            self.parts += self._attention_parts(index, layer)
            if recipe.format == "stock":
                self.parts += self._stack_parts(index, layer)
            else:
                self.parts += self._expert_parts(index, layer)
        if recipe.free_layers:
            self._groups = self._layer_groups()

    def fit(self, plan: SlimPlan, budget: int) -> tuple[SlimPlan, Allocation]:
        """The plan with the types that cost least, its file of at most `budget` bytes, and what was allocated.

        Raises DoesNotFitError, which says the least that is possible.
        """
        goal = budget
        while (best := self._near(plan, goal, budget)) is None:
            # Alignment goes up and down with what is chosen: the goal falls until the file fits.
            goal -= max(1, budget // _NEAR)
        return best

    def _near(self, plan: SlimPlan, goal: int, budget: int) -> tuple[SlimPlan, Allocation] | None:
        """The best of some tries to come close to a file of `goal` bytes; None if all were larger."""
        room, best = goal, None
        for _ in range(_ROUNDS):
            try:
                found = allocate(self.parts, room, self._groups)
            except DoesNotFitError as error:
                return best or self._least(error, plan, goal, budget)
            typed = self.typed(plan, found)
            n_bytes = self.size.of(typed)
            if n_bytes <= goal and (best is None or found.cost <= best[1].cost):
                best = typed, found
            if best is not None and 0 <= goal - n_bytes < goal // _NEAR:
                break
            room += goal - n_bytes
        return best

    def _least(self, error: DoesNotFitError, plan: SlimPlan, goal: int, budget: int) -> tuple[SlimPlan, Allocation]:
        """The smallest of all, if it fits."""
        assert error.required_bytes is not None
        found = allocate(self.parts, error.required_bytes, self._groups)
        typed = self.typed(plan, found)
        least = self.size.of(typed)
        if least <= goal:
            return typed, found
        message = f"The smallest file that this can become has {least:,} bytes, but the target allows {budget:,}."
        hint = "Ask for more, or leave more out (slimoe convert --help says how)."
        raise DoesNotFitError(f"{message} {hint}", required_bytes=least, available_bytes=budget) from None

    def typed(self, plan: SlimPlan, found: Allocation) -> SlimPlan:
        """The plan with the types, novices and feed-forward parts of an allocation."""
        chosen = {name: option.choice for name, option in found.chosen.items()}
        experts: dict[tuple[int, int], Types | None] = {}
        for index, layer in enumerate(self._layers):
            if index in found.given_up:
                continue
            for number in range(len(layer.experts)):
                experts[index, number] = self._chosen_types(chosen, index, number)
        roles = {(index, role): chosen[index, role] for index, layer in enumerate(self._layers) for role in layer.types}
        dropped = frozenset(index for index in range(len(self._layers)) if index in found.given_up)
        token, output = chosen["token"], chosen.get("output")
        assert isinstance(token, Type)
        assert output is None or isinstance(output, Type)
        choices = Choices(experts, roles, token, output, dropped)
        typed = apply(plan, choices, self._source, self._statistics)
        return replace(typed, expected_kl=(plan.expected_kl or 0.0) + found.cost)

    def _chosen_types(self, chosen: Mapping[Hashable, object], index: int, number: int) -> Types | None:
        if self._recipe.format == "stock":
            gate, up, down = (chosen[index, name] for name in ("gate", "up", "down"))
            return gate, up, down
        types = chosen[index, number]
        return types if isinstance(types, tuple) else None

    # --- parts ----------------------------------------------------------------------------------------------

    def _outer_parts(self) -> Iterable[Part]:
        named = self._recipe.types
        yield Part("token", self._options([_TOKENS], named.token))
        if _OUTPUT in self._source.shapes:
            yield Part("output", self._options([_OUTPUT], named.output))

    def _attention_parts(self, index: int, layer: LayerPlan) -> Iterable[Part]:
        for role in ROLES if layer.has_attention else ():
            yield Part((index, role), self._options([block_key(layer.block, role)], self._recipe.types.attention))

    def _stack_parts(self, index: int, layer: LayerPlan) -> Iterable[Part]:
        for projection in ("gate", "up", "down") if layer.experts else ():
            options = [
                Option(
                    kind,
                    sum(self._bytes(layer, expert, projection, kind) for expert in layer.experts),
                    sum(self._cost(layer, expert, projection, kind) for expert in layer.experts),
                )
                for kind in self._fitting(layer, layer.experts[0])
            ]
            yield Part((index, projection), tuple(options), index)

    def _expert_parts(self, index: int, layer: LayerPlan) -> Iterable[Part]:
        free = self._replaceable(layer) if self._recipe.free_novices else {}
        for number, expert in enumerate(layer.experts):
            options = [self._expert_option(layer, expert, types) for types in self._neighbours(layer, expert)]
            if number in free:
                options.append(Option(NOVICE, 4 * self._source.spec.n_embd, free[number]))
            yield Part((index, number), tuple(options), index)

    def _neighbours(self, layer: LayerPlan, expert: ExpertPlan) -> list[Types]:
        """Triples of one type, and of types next to each other in size."""
        if self._recipe.types.expert is not None:
            kind = Type[self._recipe.types.expert]
            return [(kind, kind, kind)]
        fitting = self._fitting(layer, expert)
        pairs = product(enumerate(fitting), repeat=2)
        return [(one, one, other) for (i, one), (j, other) in pairs if abs(i - j) < 2]

    def _expert_option(self, layer: LayerPlan, expert: ExpertPlan, types: Types) -> Option:
        pairs = list(zip(("gate", "up", "down"), types, strict=True))
        n_bytes = sum(self._bytes(layer, expert, projection, kind) for projection, kind in pairs)
        if self._recipe.types.low is not None:
            low = Type[self._recipe.types.low]
            n_bytes += sum(self._bytes(layer, expert, projection, low) for projection, _ in pairs)
        return Option(types, n_bytes, sum(self._cost(layer, expert, projection, kind) for projection, kind in pairs))

    def _options(self, keys: Sequence[MatrixKey], named: str | None) -> tuple[Option, ...]:
        types = [Type[named]] if named else [kind for kind in self._types if self._is_priced(keys[0], kind)]
        shape = self._source.shapes[keys[0]]
        return tuple(
            Option(kind, len(keys) * _n_bytes(shape, kind), sum(self._price(key, kind) for key in keys))
            for kind in types or [Type.F16]
        )

    def _fitting(self, layer: LayerPlan, expert: ExpertPlan) -> list[Type]:
        """Types whose blocks divide the rows of all three matrices."""
        keys = [expert_key(layer.block, projection, expert.members[0]) for projection in ("gate", "down")]
        width = matrix_width(self._source, layer.block, expert)
        return [
            kind
            for kind in self._types
            if all(self._is_priced(key, kind) for key in keys) and width % GGML_QUANT_SIZES[kind][0] == 0
        ] or [Type.F16]

    def _bytes(self, layer: LayerPlan, expert: ExpertPlan, projection: str, kind: Type) -> int:
        n_rows, n_per_row = self._source.shapes[expert_key(layer.block, projection, expert.members[0])]
        width = matrix_width(self._source, layer.block, expert)
        return _n_bytes((n_rows, width) if projection == "down" else (width, n_per_row), kind)

    def _cost(self, layer: LayerPlan, expert: ExpertPlan, projection: str, kind: Type) -> float:
        """Of merged experts all that read the mean; of a trimmed one the part that is left."""
        keys = [expert_key(layer.block, projection, member) for member in expert.members]
        whole = self._source.shapes[expert_key(layer.block, "gate", expert.members[0])][0]
        part = matrix_width(self._source, layer.block, expert) / whole
        return part * sum(self._price(key, kind) for key in keys)

    def _is_priced(self, key: MatrixKey, kind: Type) -> bool:
        return kind.name in self._costs.types and self._costs.of(key, kind) < float("inf")

    def _price(self, key: MatrixKey, kind: Type) -> float:
        """Types that were not measured have more bits than all that were."""
        return self._costs.of(key, kind) if self._is_priced(key, kind) else 0.0

    def _replaceable(self, layer: LayerPlan) -> dict[int, float]:
        """Experts that may become constants, and what that costs: all but as many as a token picks."""
        one = self._statistics.layers[layer.block]
        if one.outputs is None or any(target < 0 for target in layer.target):
            return {}
        errors, profiles = novice_errors(one), variances(one.outputs)
        prices = {
            number: _MISSING * layer_weight(one, profiles[expert.members[0]]).cost(float(errors[expert.members[0]]))
            for number, expert in enumerate(layer.experts)
            if len(expert.members) == 1
        }
        n_free = max(0, len(layer.experts) - self._source.spec.n_expert_used)
        return dict(sorted(prices.items(), key=lambda item: item[1])[:n_free])

    def _layer_groups(self) -> list[Group]:
        removals = layer_removals(self._statistics, self._source.layers, self._source.spec.experts)
        nats = {one.layer: one.nats for one in removals}
        return [
            Group(index, _MISSING * price)
            for index, layer in enumerate(self._layers)
            if layer.experts and (price := nats.get(layer.block)) is not None
        ]


def _bits(kind: Type) -> float:
    n_weights, n_bytes = GGML_QUANT_SIZES[kind]
    return float(8 * n_bytes / n_weights)


def _n_bytes(shape: tuple[int, ...], kind: Type) -> int:
    n_weights, n_bytes = GGML_QUANT_SIZES[kind]
    result: int = shape[0] * (shape[1] // n_weights) * n_bytes
    return result
