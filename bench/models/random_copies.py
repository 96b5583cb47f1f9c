"""Writes random models with two copies of every expert: native files, for speed alone.

The copies are random each for itself, so that a low one approximates nothing. `bench.offload --copies TYPES` makes real
copies, out of a random checkpoint, which takes many minutes at true shape; this takes seconds.

    python -m bench.models.random_copies design8 /tmp/copies.gguf --types Q4_K,Q2_K
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
from gguf import GGUFWriter

from bench.models.random_blocks import RandomTensor
from bench.models.random_model import WeightTypes, describe, random_tensors, weight_type, write_file
from bench.models.shapes import SHAPES, model_named
from bench.models.topics import STYLES
from slimoe.offload.errors import SlimoeError
from slimoe.offload.model.native_format import ALIGNMENT, PROJECTIONS, layout_metadata, stack_name
from slimoe.offload.model.native_layout import NativeLayer, NativeLayout
from slimoe.offload.model.spec import NATIVE, ModelSpec

_EXPERTS = "_exps.weight"


def copies_tensors(spec: ModelSpec, high: str, low: str, routing: str) -> Iterator[RandomTensor]:
    """Yields all tensors of a model, its stacks of experts once in each of both types."""
    kinds = weight_type(high), weight_type(low)
    for tensor in random_tensors(spec, WeightTypes.parse(high), STYLES[routing]):
        if not tensor.name.endswith(_EXPERTS):
            yield tensor
            continue
        _, layer, matrix, _ = tensor.name.split(".")
        projection = next(name for name in PROJECTIONS if name in matrix)
        for bucket, kind in enumerate(kinds):
            yield replace(tensor, name=stack_name(int(layer), projection, bucket), type=kind)


def write_random_copies(
    path: Path, stock: ModelSpec, high: str, low: str, routing: str = "uniform", seed: int = 1
) -> int:
    """Writes a native file to `path`; returns its bytes. Raises UsageError for unknown types."""
    tensors = list(copies_tensors(stock, high, low, routing))
    experts = tuple(range(stock.n_expert))
    layer = NativeLayer(experts, tuple((0, 1) for _ in experts))
    writer = GGUFWriter(path, NATIVE)
    layers = tuple(map(stock.layer_shape, range(stock.n_layer)))
    spec = replace(stock, experts=replace(stock.experts, layers=layers), is_native=True)
    describe(writer, spec.metadata() | layout_metadata(NativeLayout((layer,) * spec.n_layer)))
    writer.data_alignment = ALIGNMENT
    writer.add_custom_alignment(ALIGNMENT)
    writer.add_tokenizer_model("none")
    write_file(writer, tensors, seed)
    return path.stat().st_size


@click.command()
@click.argument("shape", type=click.Choice(list(SHAPES)))
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--types", default="Q4_K,Q2_K", show_default=True, help="Of the two copies, the better first.")
@click.option("--layers", type=click.IntRange(1), help="Number of layers.  [default: the shape's]")
@click.option("--routing", type=click.Choice(list(STYLES)), default="uniform", show_default=True)
def main(shape: str, path: Path, types: str, layers: int | None, routing: str) -> None:
    """Write a random native model of SHAPE to PATH."""
    high, _, low = types.partition(",")
    try:
        n_bytes = write_random_copies(path, model_named(shape, layers), high, low, routing)
    except (SlimoeError, OSError) as error:
        sys.exit(f"{error}")
    print(f"{path}: {n_bytes / 1e9:.2f} GB", file=sys.stderr)


if __name__ == "__main__":
    main()
