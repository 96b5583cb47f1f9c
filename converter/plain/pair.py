"""Two copies of every expert in one native file: what the tensors of a stock conversion become."""

from collections.abc import Iterable
from dataclasses import replace

from slimoe.converter.quant.mixes import TypeRecipe, find_recipe
from slimoe.converter.source.stored_model import StockTensor
from slimoe.offload.errors import UsageError
from slimoe.offload.model.native_format import stack_name
from slimoe.offload.model.native_layout import NativeLayer, NativeLayout
from slimoe.offload.model.spec import ModelSpec

Pair = tuple[TypeRecipe, TypeRecipe]
"""The recipes of the better and of the smaller copy."""


def find_pair(names: str) -> Pair:
    """The recipes of "HIGH,LOW"; raises UsageError for anything but two known types."""
    parts = [name.strip() for name in names.split(",")]
    if len(parts) != 2:
        raise UsageError(f"--two-copies is {names!r}, but takes two types: the better one first, such as Q4_K,Q2_K.")
    high, low = (find_recipe(name) for name in parts)
    return high, low


def pair_spec(spec: ModelSpec) -> ModelSpec:
    """The same sizes in the native format."""
    layers = tuple(spec.layer_shape(layer) for layer in range(spec.n_layer))
    return replace(spec, is_native=True, experts=replace(spec.experts, layers=layers))


def pair_layout(spec: ModelSpec) -> NativeLayout:
    """All experts in the router's order, the better copies in bucket 0, the others in bucket 1."""
    layer = NativeLayer(tuple(range(spec.n_expert)), ((0, 1),) * spec.n_expert)
    return NativeLayout((layer,) * spec.n_layer)


def pair_targets(targets: Iterable[StockTensor], pair: Pair) -> list[tuple[StockTensor, TypeRecipe]]:
    """Every tensor of the native file and the recipe that decides its type; a layer's low copies come last."""
    high, low = pair
    result: list[tuple[StockTensor, TypeRecipe]] = []
    lows: list[tuple[StockTensor, TypeRecipe]] = []
    for target in targets:
        if "_exps." not in target.name:
            result += [*lows, (target, high)]
            lows.clear()
            continue
        _, layer, role, _ = target.name.split(".")
        projection = role.removeprefix("ffn_").removesuffix("_exps")
        result.append((replace(target, name=stack_name(int(layer), projection, 0)), high))
        lows.append((replace(target, name=stack_name(int(layer), projection, 1)), low))
    return result + lows
