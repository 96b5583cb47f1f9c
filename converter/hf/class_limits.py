"""What no class of Hugging Face models can hold. Apart: it looks at layers, and `class_config` at fields.

config.json has one number of experts, and one width, for all layers.
"""

from collections.abc import Iterator

from slimoe.converter.layout.layer import layer_shape
from slimoe.converter.layout.plan import CompressPlan, LayerPlan
from slimoe.converter.source.model_source import ModelSource
from slimoe.offload.errors import UnsupportedModelError


def check_class(source: ModelSource, name: str, plan: CompressPlan) -> None:
    """Raises UnsupportedModelError for the first layer that no model of the class `name` can have, and says what fits.

    Beyond that it can hold what a stock GGUF file can, whatever its types: see `check_plan`.
    """
    if not source.spec.n_expert:
        problem = "the model has no experts, and a checkpoint is written to leave some of them out."
        raise UnsupportedModelError(source.path, problem, "Convert it to a GGUF file, without --hf.")
    first = next((layer for layer in plan.layers if layer.experts), None)
    for layer in plan.layers:
        for problem, hint in _problems(source, first, layer):
            problem = f"layer {layer.block} would {problem}, which no {name} has."
            raise UnsupportedModelError(source.path, problem, hint)


def _problems(source: ModelSource, first: LayerPlan | None, layer: LayerPlan) -> Iterator[tuple[str, str]]:
    """What is wrong with a layer, and what would fit; `first` is the first layer with experts."""
    if not layer.has_attention:
        yield "be without attention", "Leave whole layers out, with --drop-blocks."
    if source.layers[layer.block].target and not layer.experts:
        yield "be without experts", "Leave whole layers out, with --drop-blocks, or write a GGUF file, without --hf."
    if not layer.has_ffn:
        yield "be without a feed-forward part", "Leave whole layers out, with --drop-blocks."
    if layer.constants is not None or any(target < 0 for target in layer.target):
        yield "have constants in place of experts", "Leave --constants out, or write a GGUF file, without --hf."
    if layer.aux is not None:
        yield "have vectors that stand for experts", "Leave --main-experts out, or write a GGUF file, without --hf."
    if first is None or not layer.experts:
        return
    if len(layer.experts) != len(first.experts):
        fitting = min(len(layer.experts), len(first.experts))
        counts = f"have {len(layer.experts)} experts and layer {first.block} {len(first.experts)}"
        yield counts, f"Keep as many in each layer: --keep-experts {fitting}, without --overall."
    widths = [layer_shape(source, one).n_ff for one in (layer, first)]
    if widths[0] != widths[1]:
        yield (
            f"have experts of {widths[0]} neurons and layer {first.block} of {widths[1]}",
            f"Make all as narrow: --width {min(widths)}.",
        )
