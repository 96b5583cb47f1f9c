"""Checks that statistics have the sizes of the model that they are used for, which no checksum can."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.converter.source.model_source import PROJECTIONS, ModelSource, block_key, expert_key, shared_suffix
from slimoe.converter.stats.statistics import N_AHEAD, N_BINS, LayerStatistics, Statistics, has_plain_attention
from slimoe.converter.stats.type_costs import priced_matrices
from slimoe.offload.model.tensor_list import EXPERT_LATENT

_Group = tuple[str, object, Mapping[str, str], Mapping[str, int]]
"""How the names of arrays begin, what has the arrays, their shapes, and the sizes that words in shapes stand for."""
_ROUTED = ("router", "outputs", "trace")
"""The groups of statistics that every layer with experts has."""
_MIXING = (
    *(f"attn_{role}" for role in ("q", "q_a", "q_b", "kv_a_mqa", "k_b", "v_b", "kv_b", "qkv", "gate")),
    *(f"ssm_{role}" for role in ("alpha", "beta", "ba", "in", "out")),
    *(f"shortconv.{role}" for role in ("in_proj", "out_proj")),
)
"""The roles of what latent attention has in place of queries, keys and values, or a recurrence, as far as files have
them."""
_WHOLE: Mapping[str, str] = {
    "output_input": "d",
    "token_count": "vocabulary",
    "output_gradient": "vocabulary",
    "token_gradient": "d",
}
_LAYER: Mapping[str, Mapping[str, str]] = {
    "inputs": {
        "expert": "E e",
        "hidden": "E f",
        "attention": "read",
        "mixed": "mixed",
        "router": "routed",
    },
    "router": {
        "rank_count": "R k",
        **dict.fromkeys(("probability", "share", "share_square", "picked_probability", "logit"), "R"),
        **dict.fromkeys(("ratio_bins", "top_bins"), "bins"),
        **dict.fromkeys(("together", "logit_product", "to_next_token"), "R R"),
        "ahead_hits": "ahead k k",
        "to_next": "R next",
    },
    "outputs": {
        **dict.fromkeys(("n_pick", "norm", "norm_square", "share_norm"), "E"),
        **dict.fromkeys(("share_square_norm_square", "largest", "share_square"), "E"),
        **dict.fromkeys(("output", "output_square", "share_output", "share_square_output"), "E e"),
    },
    "trace": {"picks": "T k", "shares": "T k", "received": "T", "norm": "T"},
    "type_errors": {"error": "types E 4"},
    "sketch": {"gram": "S n n", "logits": "S R", "rows": "S"},
    "sensitivity": {
        "update": "made",
        "gate": "parts f",
        "up": "parts f",
        "down": "parts made",
        **{role: f"attn_{role}" for role in ("q", "k", "v")},
        "attention": "attention",
    },
    "removals": {"skipped": "E", "novice": "E"},
    "widths": {"widths": "W", "error": "W E", "type_share": "W E"},
}
"""The shape of every array, in the letters of the module `statistics`, and in words for all other sizes."""


def misfit(statistics: Statistics, source: ModelSource) -> str | None:
    """A sentence on the first part of the statistics that cannot be of the model; None if all of them can be."""
    if len(statistics.layers) != source.spec.n_layer:
        return f"it is of {len(statistics.layers)} layers, but {source.path} has {source.spec.n_layer}."
    whole = {"d": source.spec.n_embd, "vocabulary": source.spec.n_vocab}
    groups: list[_Group] = [("", statistics, _WHOLE, whole)]
    if (costs := statistics.matrix_costs) is not None:
        sizes = {"matrices": len(costs.matrices), "types": len(costs.types)}
        groups.append(("matrix_costs.", costs, {"nats": "matrices types"}, sizes))
    for number, layer in enumerate(statistics.layers):
        sizes = _sizes(source, number, layer) | {"T": statistics.n_tokens}
        for name, shapes in _LAYER.items():
            if (group := getattr(layer, name)) is not None:
                groups.append((f"layers.{number}.{name}.", group, shapes, sizes))
        groups += _others(source, number, layer)
    for prefix, group, shapes, sizes_by_name in groups:
        for name, shape in shapes.items():
            values: NDArray[Any] | None = group.get(name) if isinstance(group, Mapping) else getattr(group, name)
            if values is None and isinstance(group, Mapping):
                return f"{prefix}{name} is missing."
            wanted = tuple(int(size) if size.isdigit() else sizes_by_name[size] for size in shape.split())
            # Arrays of parts that a layer does not have may be empty in any shape.
            if values is not None and values.shape != wanted and not values.size == 0 == np.prod(wanted):
                return f"{prefix}{name} is of shape {values.shape}, but for {source.path} it would be {wanted}."
    return next(_unknown_names(statistics, source), None)


def _sizes(source: ModelSource, number: int, layer: LayerStatistics) -> dict[str, int]:
    """The sizes in one layer that the letters and words of `_LAYER` stand for."""
    spec, of = source.spec, source.layers[number]
    later = source.layers[number + 1] if number + 1 < len(source.layers) else None
    # A dense feed-forward part is measured like one expert.
    n_parts = of.n_stored or int(of.has_ffn)
    ups = [expert_key(number, "up", expert) for expert in range(of.n_stored)] or [block_key(number, "ffn_up")]
    is_plain = of.has_attention and has_plain_attention(spec, number)
    heads = {
        role: source.shapes.get(block_key(number, role), (0,))[0] if is_plain else 0
        for role in ("attn_q", "attn_k", "attn_v")
    }
    n_mixed = spec.attention_of(number).n_output if of.has_attention and not spec.is_recurrent(number) else 0
    return heads | {
        "E": of.n_stored,
        "R": len(of.target),
        "k": spec.n_expert_used,
        "d": spec.n_embd,
        "e": spec.n_embd_expert,
        "made": spec.n_embd_expert if of.n_stored else spec.n_embd,
        "f": max(source.shapes[key][0] for key in ups) if n_parts else 0,
        "parts": n_parts,
        "attention": spec.n_embd if n_mixed else 0,
        "read": spec.n_embd if is_plain else 0,
        "mixed": n_mixed,
        "routed": spec.n_embd if of.target else 0,
        "next": len(later.target) if later is not None else 0,
        "bins": N_BINS,
        "ahead": N_AHEAD,
        "n": 2 * of.n_stored + 1,
        "S": 0 if layer.sketch is None else len(layer.sketch.rows),
        "types": 0 if layer.type_errors is None else len(layer.type_errors.types),
        "W": 0 if layer.widths is None else len(layer.widths.widths),
    }


def _others(source: ModelSource, number: int, layer: LayerStatistics) -> Iterator[_Group]:
    """The sums by role of what every token passes: a dense feed-forward part, a shared expert, and what mixes tokens
    otherwise than plain attention.
    """
    routed = bool(source.layers[number].target)
    suffix = shared_suffix(source, number)
    roles = [f"ffn_{name}{suffix}" for name in PROJECTIONS]
    shapes = {role: source.shapes.get(block_key(number, role)) for role in roles}
    known = {role: shape for role, shape in shapes.items() if shape is not None}
    read = {role: str(shape[1]) for role, shape in known.items() if not suffix or role == roles[-1]}
    made = {role: str(shape[0]) for role, shape in known.items() if routed}
    for role, sizes in ((role, source.shapes.get(block_key(number, role))) for role in EXPERT_LATENT):
        if sizes is not None:
            made[role] = str(sizes[0])
            read |= {role: str(sizes[1])} if role == EXPERT_LATENT[1] else {}
    if source.layers[number].has_attention and not has_plain_attention(source.spec, number):
        for role in _MIXING:
            *stack, n_out, n_in = map(str, source.shapes.get(block_key(number, role), ("", "")))
            if n_out:
                made[role], read[role] = " ".join((*stack, n_out)), " ".join((*stack, n_in))
    yield f"layers.{number}.inputs.others.", layer.inputs.others, read, {}
    if layer.sensitivity is not None:
        yield f"layers.{number}.sensitivity.others.", layer.sensitivity.others, made, {}


def _unknown_names(statistics: Statistics, source: ModelSource) -> Iterator[str]:
    """Sentences on values that name tokens, experts, types or matrices which the model does not have."""
    of_model = f"that {source.path} does not have."
    if not all(0 <= token < source.spec.n_vocab for one in statistics.tokens for token in one):
        yield f"tokens has some {of_model}"
    for number, layer in enumerate(statistics.layers):
        of = source.layers[number]
        absent = [name for name in _ROUTED if (getattr(layer, name) is None) is bool(of.n_stored)]
        if absent:
            what = "is missing" if of.n_stored else f"is of experts {of_model[:-1]}"
            yield f"layers.{number}.{absent[0]} {what}."
        if layer.trace is not None and layer.trace.picks.max(initial=0) >= max(1, len(of.target)):
            yield f"layers.{number}.trace.picks has experts {of_model}"
        rows = np.zeros(0, np.int64) if layer.sketch is None else layer.sketch.rows
        if not ((rows >= 0) & (rows < statistics.n_tokens)).all():
            yield f"layers.{number}.sketch.rows has tokens that were not read."
        narrower, n_ff = layer.widths, source.spec.layer_shape(number).n_ff
        if narrower is not None and not (np.diff(narrower.widths, prepend=0, append=n_ff) > 0).all():
            yield f"layers.{number}.widths.widths are not widths of narrower experts."
        if layer.type_errors is not None and not set(layer.type_errors.types) <= set(Type.__members__):
            yield f"layers.{number}.type_errors.types has what is no type."
    if (costs := statistics.matrix_costs) is not None:
        if set(costs.matrices) != set(map(str, priced_matrices(source))):
            yield f"matrix_costs.matrices are not those of {source.path}."
        if not set(costs.types) <= set(Type.__members__):
            yield "matrix_costs.types has what is no type."


assert {field.name for field in fields(LayerStatistics)} == {"similarity", *_LAYER}
