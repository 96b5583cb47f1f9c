"""Writes random native files, for speed alone: experts of several types, in two copies, or compressed ones.

The copies are random each for itself, so that a low one approximates nothing. `bench.offload --copies TYPES` makes real
copies, out of a random checkpoint, which takes many minutes at true shape; this takes seconds. Compressed experts have
random vectors.

    python -m bench.models.random_copies design8 /tmp/copies.gguf --types Q4_K,Q2_K
    python -m bench.models.random_copies qwen3moe /tmp/main.gguf --types Q4_K --main 4
    python -m bench.models.random_copies qwen3moe /tmp/buckets.gguf --types Q4_K --buckets Q3_K,Q4_K/Q5_K,Q5_K
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click
from gguf import GGMLQuantizationType, GGUFWriter

from bench.models.random_blocks import RandomTensor
from bench.models.random_model import WeightTypes, describe, random_tensors, weight_type, write_file
from bench.models.shapes import MODELS, model_named
from bench.models.topics import STYLES
from slimoe.converter.quant.mixes import fitting_type
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.model.architecture import PROJECTIONS
from slimoe.offload.model.native_format import ALIGNMENT, layout_metadata, stack_name
from slimoe.offload.model.native_layout import NativeLayer, NativeLayout
from slimoe.offload.model.spec import NATIVE, ModelSpec
from slimoe.offload.model.tensor_list import AUX_GAIN, AUX_SHIFT, model_tensors

_EXPERTS = "_exps.weight"
_AUX_STD = 0.02


def native_tensors(spec: ModelSpec, types: Sequence[str], routing: str) -> Iterator[RandomTensor]:
    """Yields all tensors of a stock model, its stacks of experts once in each type, rounded up to fit their rows."""
    for tensor in random_tensors(spec, WeightTypes.parse(types[0]), STYLES[routing]):
        if not tensor.name.endswith(_EXPERTS):
            yield tensor
            continue
        _, layer, matrix, _ = tensor.name.split(".")
        projection = next(name for name in PROJECTIONS if name in matrix)
        for bucket, kind in enumerate(types):
            own = fitting_type(weight_type(kind), tensor.ne[0])
            yield replace(tensor, name=stack_name(int(layer), projection, bucket), type=own)


def bucketed_tensors(spec: ModelSpec, types: str, buckets: Sequence[str], routing: str) -> Iterator[RandomTensor]:
    """Yields all tensors of a stock model of one type, but each layer's experts are dealt out to buckets.

    A bucket is TYPE, or TYPE/TYPE where `down` has one of its own, and may end in :WIDTH. Raises UsageError for types
    that random weights cannot have and for widths that are none.
    """
    parsed = [_bucket(bucket, spec.n_ff) for bucket in buckets]
    for tensor in random_tensors(spec, WeightTypes.parse(types), STYLES[routing]):
        if not tensor.name.endswith(_EXPERTS):
            yield tensor
            continue
        _, layer, matrix, _ = tensor.name.split(".")
        projection = next(name for name in PROJECTIONS if name in matrix)
        for number, (wide, down, width) in enumerate(parsed):
            n_slot = len(range(number, tensor.ne[2], len(parsed)))
            is_down = projection == "down"
            ne = (width, tensor.ne[1], n_slot) if is_down else (tensor.ne[0], width, n_slot)
            kind = fitting_type(down if is_down else wide, ne[0])
            yield replace(tensor, name=stack_name(int(layer), projection, number), ne=ne, type=kind)


def _bucket(text: str, n_ff: int) -> tuple[GGMLQuantizationType, GGMLQuantizationType, int]:
    """The types of gate and up and of down, and the width."""
    types, _, width = text.partition(":")
    wide, _, down = types.partition("/")
    if width and not (width.isdecimal() and 0 < int(width) <= n_ff):
        raise UsageError(f"{width} is no width of experts in {text}. Give a number from 1 to {n_ff}.")
    return weight_type(wide), weight_type(down or wide), int(width or n_ff)


def aux_tensors(spec: ModelSpec) -> Iterator[RandomTensor]:
    """Yields the vectors of experts that are selected but not computed, which change the hidden states little."""
    for tensor in model_tensors(spec):
        if tensor.role in (AUX_GAIN, AUX_SHIFT):
            yield RandomTensor(tensor.name, tensor.ne, GGMLQuantizationType.F32, _AUX_STD)


def write_random_native(
    path: Path,
    stock: ModelSpec,
    types: Sequence[str],
    *,
    n_main: int | None = None,
    buckets: Sequence[str] = (),
    routing: str = "uniform",
    seed: int = 1,
) -> int:
    """Writes a native file with a copy of each expert in each of one or two `types`; returns its bytes.

    With `buckets`, experts have one copy, in turn of each of these, as in `bucketed_tensors`. With `n_main`, so many of
    a token's experts are computed, and vectors stand for the others that it selects. Raises UsageError for unknown
    types, for an `n_main` that leaves none of these, and for more buckets than experts.
    """
    if len(buckets) > stock.n_expert:
        raise UsageError(f"{len(buckets)} buckets are more than the {stock.n_expert} experts of a layer. Give fewer.")
    if n_main is not None and n_main >= stock.n_expert_used:
        raise UsageError(f"--main is {n_main}, but a token selects {stock.n_expert_used} experts. Give less.")
    layers = tuple(map(stock.layer_shape, range(stock.n_layer)))
    spec = replace(stock, experts=replace(stock.experts, layers=layers), is_native=True)
    if n_main is not None:
        selected = replace(spec.experts, n_expert_used=n_main, n_selected=stock.n_expert_used)
        spec = replace(spec, experts=selected)
    experts = tuple(range(stock.n_expert))
    if buckets:
        tensors = [*bucketed_tensors(stock, types[0], buckets, routing), *aux_tensors(spec)]
        layer = NativeLayer(experts, tuple((expert % len(buckets),) for expert in experts))
    else:
        tensors = [*native_tensors(stock, types, routing), *aux_tensors(spec)]
        layer = NativeLayer(experts, tuple(tuple(range(len(types))) for _ in experts))
    writer = GGUFWriter(path, NATIVE)
    layout = NativeLayout(tuple(layer if shape.n_expert else NativeLayer() for shape in layers))
    describe(writer, spec.metadata() | layout_metadata(layout))
    writer.data_alignment = ALIGNMENT
    writer.add_custom_alignment(ALIGNMENT)
    writer.add_tokenizer_model("none")
    write_file(writer, tensors, seed)
    return path.stat().st_size


@click.command()
@click.argument("shape", type=click.Choice(MODELS))
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--types", default="Q4_K,Q2_K", show_default=True, help="Of one copy or two, the better first.")
@click.option("--main", "n_main", type=click.IntRange(1), help="Selected experts to compute; vectors stand for others.")
@click.option("--buckets", default="", help="TYPE[/TYPE of down][:WIDTH],..., dealt out to the experts in turn.")
@click.option("--layers", type=click.IntRange(1), help="Number of layers.  [default: the shape's]")
@click.option("--routing", type=click.Choice(list(STYLES)), default="uniform", show_default=True)
def main(
    shape: str, path: Path, types: str, n_main: int | None, buckets: str, layers: int | None, routing: str
) -> None:
    """Write a random native model of SHAPE to PATH."""
    try:
        n_bytes = write_random_native(
            path,
            model_named(shape, layers),
            types.split(","),
            n_main=n_main,
            buckets=[one for one in buckets.split(",") if one],
            routing=routing,
        )
    except (SlimoeError, OSError) as error:
        sys.exit(f"{error}")
    print(f"{path}: {n_bytes / 1e9:.2f} GB", file=sys.stderr)


if __name__ == "__main__":
    main()
