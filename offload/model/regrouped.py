"""The weights of a model in other groups than its file has: joined, taken from their stacks, or without the experts."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

from slimoe.offload.model.recurrent_spec import RecurrentSpec
from slimoe.offload.model.tensors import LayerSources, LinearSource, ModelSources, Span, WeightSource, rows_of


def join_layers(sources: ModelSources) -> ModelSources:
    """The same model with gate and up joined in every layer, and Q, K and V, where their types allow it.

    The last layer's Q stays alone: of a prompt only the end needs it. So do the matrices of latent attention.
    """
    *inner, last = (_join_gate_up(layer) for layer in sources.layers)
    layers = (*(layer if layer.latent else replace(layer, qkv=join_rows(layer.qkv)) for layer in inner), last)
    return replace(sources, layers=layers)


def _join_gate_up(layer: LayerSources) -> LayerSources:
    shared = layer.shared and replace(layer.shared, gate_up=join_rows(layer.shared.gate_up))
    # Between the product of experts and their activation stand what only gate or only up has.
    has_extras = bool(layer.expert_biases or layer.expert_scales)
    return replace(layer, gate_up=layer.gate_up if has_extras else join_rows(layer.gate_up), shared=shared)


def join_rows(parts: Sequence[LinearSource]) -> tuple[LinearSource, ...]:
    """Joins matrices of one input, type and expert count below each other, or returns them as they are."""
    weights = [part.weight for part in parts]
    alike = len({(w.type, w.ne[0], *w.ne[2:]) for w in weights}) == 1
    if len(parts) < 2 or not alike or any(part.bias for part in parts):
        return tuple(parts)
    first = weights[0]
    n_stack = first.ne[2] if len(first.ne) > 2 else 1
    spans = tuple(span for index in range(n_stack) for w in weights for span in stacked_matrix(w, index).spans)
    ne = (first.ne[0], sum(w.ne[1] for w in weights), *first.ne[2:])
    return (LinearSource(WeightSource("+".join(w.name for w in weights), ne, first.type, spans)),)


def gathered_rows(source: WeightSource, name: str, ranges: Iterable[tuple[int, int]]) -> WeightSource:
    """The rows of a matrix in these ranges, (first, behind the last), one range behind the other."""
    parts = [rows_of(source, name, *one) for one in ranges]
    spans = tuple(span for part in parts for span in part.spans)
    return WeightSource(name, (source.ne[0], sum(part.ne[1] for part in parts)), source.type, spans)


def delta_net_inputs(joint: WeightSource, block: str, of: RecurrentSpec) -> tuple[WeightSource, WeightSource]:
    """The matrices `attn_qkv` and `attn_gate` of a delta net whose file has both as one, by key heads.

    Of each key head the `joint` matrix has a query, a key, its value heads and their gates, one behind the other.
    Source: llama.cpp's models/qwen3next.cpp, `ssm_in`.
    """
    n_values = of.n_inner // of.n_group
    widths = (of.n_state, of.n_state, n_values, n_values)
    ends = (*accumulate(widths),)

    def ranges(*parts: int) -> list[tuple[int, int]]:
        begins = [(ends[part] - widths[part] + head * ends[-1], part) for part in parts for head in range(of.n_group)]
        return [(begin, begin + widths[part]) for begin, part in begins]

    qkv = gathered_rows(joint, f"{block}attn_qkv.weight", ranges(0, 1, 2))
    return qkv, gathered_rows(joint, f"{block}attn_gate.weight", ranges(3))


def stacked_matrix(stack: WeightSource, index: int) -> WeightSource:
    """Matrix `index` of a stack, as a weight of its own; a single matrix is a stack of one."""
    n_stack = stack.ne[2] if len(stack.ne) > 2 else 1
    if len(stack.spans) == n_stack:
        span = stack.spans[index]
    else:
        assert len(stack.spans) == 1, stack.name
        n_bytes = stack.n_bytes // n_stack
        span = Span(stack.spans[0].shard, stack.spans[0].offset + index * n_bytes, n_bytes)
    return WeightSource(f"{stack.name}[{index}]", stack.ne[:2], stack.type, (span,))


def as_matrix(stack: WeightSource) -> WeightSource:
    """The same weight, a matrix if it is a stack of one."""
    return replace(stack, ne=stack.ne[:2]) if stack.ne[2:] == (1,) else stack


def expert_matrices(
    gate_up: Sequence[LinearSource], down: LinearSource, index: int, n: int
) -> tuple[WeightSource, ...]:
    """The `n` matrices of expert `index` of these stacks, of which one can be gate's and up's."""
    *inner, last = (stacked_matrix(stack.weight, index) for stack in (*gate_up, down))
    if len(inner) < n - 1:
        (both,), n_rows = inner, inner[0].ne[1]
        inner = [
            rows_of(both, both.name.replace("gate_up", projection), begin, begin + n_rows // 2)
            for projection, begin in (("gate", 0), ("up", n_rows // 2))
        ]
    return (*inner, last)


def without_experts(sources: ModelSources) -> ModelSources:
    """The same model without the experts of its layers, whose routers stay."""
    layers = tuple(
        replace(layer, gate_up=(), down=None) if layer.router is not None else layer for layer in sources.layers
    )
    return replace(sources, layers=layers)
