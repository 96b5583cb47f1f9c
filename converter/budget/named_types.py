"""Types that a recipe names itself: for every matrix, with what they cost, and which of them cannot be had."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from gguf import GGMLQuantizationType as Type

from slimoe.converter.layout.layer import ROUTER, Matrix, fitted_types, matrix_width, row_lengths, type_bits
from slimoe.converter.layout.offsets import FileLayout
from slimoe.converter.layout.plan import CompressPlan, ExpertPlan
from slimoe.converter.quant.mixes import find_recipe, fits, fitting_type, layer_and_role
from slimoe.converter.quant.quantize import needs_importance
from slimoe.converter.quant.unfit_types import TypedMatrix, check_fits, copies_advice, typed
from slimoe.converter.recipe.recipe import DEFAULT_EXPERT, Recipe
from slimoe.converter.source.model_source import MatrixKey, ModelSource, block_key, expert_key
from slimoe.converter.stats.type_costs import LOSSLESS, TypeCosts
from slimoe.offload.errors import UsageError

_TOKENS, _OUTPUT = "token_embd.weight", "output.weight"
_SMALL_BLOCK = 32
"""Weights in a block of the quantised types that divide most rows."""


Wanted = Callable[[str, int], Type | None]
"""The type that is asked for, by a matrix's name in a stock file and the number of its copy; None if a size decides."""


def with_named_types(
    source: ModelSource, plan: CompressPlan, wanted: Wanted, asked: str, base: Type, *, has_copies: bool = False
) -> CompressPlan:
    """The plan whose matrices have the types that are `wanted` by name, or others where these do not fit the rows.

    Raises UnsupportedModelError if nothing fits `base`, the type that `asked` is mostly made of; `has_copies` says
    whether `asked` is of experts with second copies.
    """
    matrices: list[TypedMatrix] = []

    def kind(name: str, n_per_row: int) -> Type:
        named = wanted(name, 0)
        assert named is not None, "no size chooses types"
        matrices.append(typed(name, n_per_row, named))
        return matrices[-1].type

    n_embd, projections = source.spec.n_embd, source.spec.architecture.projections
    token, output = kind(_TOKENS, n_embd), kind(_OUTPUT, n_embd) if MatrixKey(_OUTPUT) in source.shapes else None
    layers = []
    for index, layer in enumerate(plan.layers):
        types = {
            role: kind(block_key(index, role).name, source.shapes[block_key(layer.block, role)][-1])
            for role in layer.types
        }
        experts = []
        for number, expert in enumerate(layer.experts):
            named = zip(projections, row_lengths(source, layer.block, expert), strict=True)
            kinds = tuple(kind(expert_key(index, name, number).name, n_per_row) for name, n_per_row in named)
            experts.append(replace(expert, types=kinds))
        layers.append(replace(layer, types=types, experts=tuple(experts)))
    check_fits(source.path, source.spec, asked, base, matrices, has_copies=has_copies)
    return replace(plan, layers=tuple(layers), token_type=token, output_type=output)


def with_low_copies(source: ModelSource, plan: CompressPlan, wanted: Wanted) -> CompressPlan:
    """The plan with second copies of all experts whose first ones are larger."""

    def with_copy(index: int, block: int, expert: ExpertPlan) -> ExpertPlan:
        names = (expert_key(index, name, 0).name for name in source.spec.architecture.projections)
        types = fitted_types(source, block, expert, tuple(wanted(name, 1) or Type.F32 for name in names))
        return replace(expert, low_types=types if type_bits(types) < type_bits(expert.types) else None)

    layers = (
        replace(layer, experts=tuple(with_copy(index, layer.block, expert) for expert in layer.experts))
        for index, layer in enumerate(plan.layers)
    )
    return replace(plan, layers=tuple(layers))


def smaller_copies_advice(source: ModelSource, plan: CompressPlan, low: Type) -> str:
    """What to do where second copies in `low` are no smaller than the first ones of the plan."""
    widths = {matrix_width(source, layer.block, expert) for layer in plan.layers for expert in layer.experts}
    rows = widths | {source.spec.n_embd_expert}
    if all(fits(low, n_per_row) for n_per_row in rows):
        return "Name the better type first, and a smaller one second."
    return f"{low.name} does not fit all rows of the experts. {copies_advice(rows)}"


def typed_matrices(layout: FileLayout, wanted: Callable[[Matrix], Type | None]) -> tuple[TypedMatrix, ...]:
    """The matrices of a file, or stacks of them, that have a type, with what stands in for one that is `wanted`."""
    found = []
    for tensor in layout.tensors:
        first = tensor.matrices[0]
        if not first.is_constant and layer_and_role(first.key.name)[1] != ROUTER:
            # What is joined has the type of one of its parts.
            is_wanted = any(wanted(one) is tensor.type for one in tensor.matrices)
            found.append(TypedMatrix(tensor.name, tensor.ne[0], tensor.type, None if is_wanted else wanted(first)))
    return tuple(found)


class NamedTypes:
    """The types that a recipe names for the tensors of a result of `n_layer` layers."""

    def __init__(self, source: ModelSource, recipe: Recipe, n_layer: int) -> None:
        self._recipe, self._n_layer = recipe, n_layer
        self.is_tied = MatrixKey(_OUTPUT) not in source.shapes

    def of(self, name: str, copy: int = 0) -> Type | None:
        """The type of the matrix of that stock name, or of its second copy; None where a size chooses it."""
        named, role = self._recipe.types, layer_and_role(name)[1]
        is_expert = "_exps." in name
        if is_expert:
            own = named.low if copy else None
        else:
            own = {"token_embd": named.token, "output": named.output}.get(role, named.attention)
        if own is not None:
            return Type[own]
        if self._recipe.target_size is None and self._recipe.target_bpw is None:
            default = find_recipe(named.expert or DEFAULT_EXPERT)
            return default.type_of(name, self._n_layer, moe=True, tied=self.is_tied)
        return Type[named.expert] if named.expert is not None and is_expert else None

    def typed(self, layout: FileLayout) -> tuple[TypedMatrix, ...]:
        """The matrices of a file that the recipe makes, with what stands in for a type that was asked for."""
        candidates = [Type[name] for name in self._recipe.types.candidates]

        def wanted(one: Matrix) -> Type | None:
            """A size chose among the candidates: the one that the matrix has, or in whose place it has its type."""
            named = self.of(one.key.name, one.copy)
            if named is not None or one.type in candidates:
                return named or one.type
            return next((kind for kind in candidates if fitting_type(kind, one.shape[1]) is one.type), None)

        return typed_matrices(layout, wanted)


def check_width(source: ModelSource, recipe: Recipe, width: int) -> None:
    """Raises UsageError, before neurons are chosen, for a width that some experts do not have, and for one that the
    blocks of no quantised type divide.
    """
    for block, layer in enumerate(source.layers):
        for expert in range(layer.n_stored):
            n_ff, _ = source.shapes.get(expert_key(block, "up", expert), (width, 0))
            if n_ff < width:
                problem = f"--width is {width}, but experts of layer {block} have {n_ff} neurons"
                raise UsageError(f"{problem}. Choose 1 to {n_ff}, or a size, which narrows each expert by itself.")
    named = recipe.types
    kinds = [find_recipe(named.expert or DEFAULT_EXPERT).base]
    if named.expert is None and named.candidates:
        kinds = [Type[name] for name in named.candidates]
    kinds += [Type[named.low]] if named.low is not None else []
    if width % _SMALL_BLOCK == 0 or source.spec.n_ff % _SMALL_BLOCK or all(kind in LOSSLESS for kind in kinds):
        return
    below, above = width // _SMALL_BLOCK * _SMALL_BLOCK, -(-width // _SMALL_BLOCK) * _SMALL_BLOCK
    near = " or ".join(str(one) for one in dict.fromkeys((below, above)) if 0 < one <= source.spec.n_ff)
    raise UsageError(
        f"Experts of {width} neurons do not divide into blocks of {_SMALL_BLOCK}, the smallest there are. Keep {near}."
    )


def check_importance(plan: CompressPlan) -> None:
    """Raises UsageError for types that cannot be made without knowing which weights matter."""
    kinds = sorted(kind.name for kind in plan_kinds(plan) if needs_importance(kind))
    if kinds and not plan.importance:
        problem = f"{', '.join(kinds)} cannot be made: it is not known which weights matter."
        raise UsageError(f"{problem} Give --stats, or use IQ3_S or larger.")


def priced(plan: CompressPlan, costs: TypeCosts | None) -> CompressPlan:
    """The plan with what its types cost, if that is known."""
    outer = {MatrixKey(_TOKENS): plan.token_type, MatrixKey(_OUTPUT): plan.output_type}
    if not plan_kinds(plan) - set(LOSSLESS):
        return plan
    if costs is None:
        return replace(plan, uncounted=("types",))
    pairs = ((key, kind) for key, kind in _plan_types(plan, outer) if key in costs.costs and kind not in LOSSLESS)
    return replace(plan, expected_kl=(plan.expected_kl or 0.0) + sum(costs.of(key, kind) for key, kind in pairs))


def are_priced(plan: CompressPlan, costs: TypeCosts) -> bool:
    """Whether it is known what each type of a plan costs the matrix that has it, second copies among them."""
    outer = {MatrixKey(_TOKENS): plan.token_type, MatrixKey(_OUTPUT): plan.output_type}
    seconds = [
        (expert_key(layer.block, name, member), kind)
        for layer in plan.layers
        for expert in layer.experts
        for name, kind in zip(expert.projections, expert.low_types or (), strict=False)
        for member in expert.members
    ]
    pairs = (pair for pair in (*_plan_types(plan, outer), *seconds) if pair[0] in costs.costs)
    return all(kind in LOSSLESS or math.isfinite(costs.of(key, kind)) for key, kind in pairs)


def _plan_types(plan: CompressPlan, outer: Mapping[MatrixKey, Type | None]) -> Iterator[tuple[MatrixKey, Type]]:
    """The source's matrices that are kept, and their types; of merged experts all that read the mean."""
    yield from ((key, kind) for key, kind in outer.items() if kind is not None)
    for layer in plan.layers:
        yield from ((block_key(layer.block, role), kind) for role, kind in layer.types.items())
        for expert in layer.experts:
            for name, kind in zip(expert.projections, expert.types, strict=True):
                yield from ((expert_key(layer.block, name, member), kind) for member in expert.members)


def plan_kinds(plan: CompressPlan) -> set[Type]:
    """All types of a plan."""
    experts = [expert for layer in plan.layers for expert in layer.experts]
    kinds = {kind for expert in experts for kind in (*expert.types, *(expert.low_types or ()))}
    kinds |= {kind for layer in plan.layers for kind in layer.types.values()}
    return kinds | ({plan.token_type, plan.output_type} - {None})
