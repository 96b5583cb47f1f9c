"""What of a plan a format cannot hold, said before anything is made of it."""

from collections.abc import Iterator
from typing import NoReturn

from gguf import GGML_QUANT_SIZES

from slimoe.converter.layout.layer import matrix_width
from slimoe.converter.layout.plan import LayerPlan, SlimPlan, Types
from slimoe.converter.source.model_source import ModelSource
from slimoe.offload.errors import UnsupportedModelError

_NATIVE = "Write the native format, which can."


def check_plan(source: ModelSource, plan: SlimPlan) -> None:
    """Raises UnsupportedModelError, which names the source's layer, for what the plan's format cannot hold.

    Of the stock format this is what llama.cpp refuses or misreads; of the native one, what leaves too little.
    """
    if not source.spec.n_expert:
        raise UnsupportedModelError(source.path, "the model has no experts to slim.", "Convert it with --type.")
    if not any(layer.rows for layer in plan.layers):
        raise UnsupportedModelError(source.path, "no layer would keep an expert.", "Keep one layer's, at least.")
    if not any(layer.has_attention for layer in plan.layers):
        raise UnsupportedModelError(source.path, "no layer would keep its attention.", "Keep one layer's, at least.")
    check = _StockCheck(source, plan) if plan.format == "stock" else _Check(source, plan)
    for layer in plan.layers:
        assert all(-len(_novices(layer)) <= target < len(layer.experts) for target in layer.target)
        assert len(layer.target) == len(layer.rows)
        check.layer(layer)
        assert set(layer.target) >= set(range(len(layer.experts))), "an expert that no row means"


def _bits(types: Types) -> float:
    """Bits per weight, of the three matrices together, which are of one size."""
    sizes = (GGML_QUANT_SIZES[kind] for kind in types)
    return float(sum(8 * n_bytes / n for n, n_bytes in sizes))


def _novices(layer: LayerPlan) -> range:
    return range(0 if layer.novices is None else len(layer.novices))


class _Check:
    """What both formats ask of a layer."""

    def __init__(self, source: ModelSource, plan: SlimPlan) -> None:
        self.source, self.plan = source, plan

    def layer(self, layer: LayerPlan) -> None:
        n_used, n_kept = self.source.spec.n_expert_used, len(set(layer.target))
        if layer.rows and n_kept < n_used:
            self.refuse(layer, f"would keep {n_kept} experts, but {n_used} are used per token", "Keep as many.")
        for number, expert in enumerate(layer.experts):
            if expert.low_types and _bits(expert.low_types) >= _bits(expert.types):
                problem = f"would have a second copy of expert {number} that is not smaller than the first"
                self.refuse(layer, problem, "Choose a smaller type for it.")

    def refuse(self, layer: LayerPlan, problem: str, hint: str) -> NoReturn:
        raise UnsupportedModelError(self.source.path, f"layer {layer.block} {problem}.", hint)


class _StockCheck(_Check):
    """What llama.cpp's `llama` architecture asks besides: layers alike in everything but their types."""

    def layer(self, layer: LayerPlan) -> None:
        problem = next(self._problems(layer), None)
        if problem:
            self.refuse(layer, f"{problem}, which the stock format cannot hold", _NATIVE)
        super().layer(layer)

    def _problems(self, layer: LayerPlan) -> Iterator[str]:
        first = self.plan.layers[0]
        if not layer.has_attention:
            yield "would be without attention"
        if not layer.experts:
            yield "would be without experts"
        if _novices(layer):
            yield "would have constant vectors in place of experts"
        if any(expert.low_types for expert in layer.experts):
            yield "would have second copies of experts"
        if len({expert.types for expert in layer.experts}) > 1:
            yield "would have experts of different types"
        if layer.target != tuple(range(len(layer.experts))):
            yield "would have a router whose rows mean other experts than their own"
        if len(layer.experts) != len(first.experts):
            yield f"would have {len(layer.experts)} experts and layer {first.block} {len(first.experts)}"
        widths = {matrix_width(self.source, layer.block, expert) for expert in layer.experts}
        width = matrix_width(self.source, first.block, first.experts[0])
        if widths != {width}:
            yield f"would have experts of other widths than {width}, as layer {first.block} has"
