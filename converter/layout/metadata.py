"""The keys of a file: sizes, the layout of its experts, what it was made of and how."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version

import numpy as np
from gguf.utility import size_label

from slimoe.converter.gguf.header import ALIGNMENT_KEY
from slimoe.converter.gguf.late_keys import room_for_late_keys
from slimoe.converter.layout.layer import Matrix, layer_shape, native_layer
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.stored_model import LATER_BLOCKS, StoredModel
from slimoe.converter.stats.statistics import Statistics
from slimoe.offload.gguf import keys
from slimoe.offload.gguf.header import DEFAULT_ALIGNMENT, Value
from slimoe.offload.model.architectures import DOTS1, GRANITEHYBRID, LFM2MOE, OLMOE
from slimoe.offload.model.native_format import ALIGNMENT, layout_metadata
from slimoe.offload.model.native_layout import NativeLayout
from slimoe.offload.model.spec import ModelSpec

_QUANTIZATION_VERSION = 2
_SMALL_EXPERT = 1 << 22
"""Weights of an expert below which padding to pages costs percents of a file, and reading around the cache saves
nothing."""
_OF_ITS_OWN = (
    "general.architecture",
    "general.file_type",
    "general.size_label",
    ALIGNMENT_KEY,
    *keys.PROVENANCE,
    keys.RESERVED,
)


def llamacpp_problem(spec: ModelSpec) -> str | None:
    """Why llama.cpp does not run a file of these sizes, though it is a stock one; None where it does."""
    name, shared = spec.architecture.models, spec.architecture.shared
    if spec.architecture in (OLMOE, DOTS1) and spec.n_head_kv != spec.n_head:
        heads = f"this one has {spec.n_head_kv} heads of keys for {spec.n_head} of queries"
        return f"llama.cpp loads no {name} model with fewer heads of keys than of queries, and {heads}."
    if spec.architecture is GRANITEHYBRID and spec.recurrent and spec.recurrent.n_inner != 2 * spec.n_embd:
        n_values = spec.recurrent.n_inner
        return f"llama.cpp loads no {name} model whose Mamba-2 layers have {n_values} values, not {2 * spec.n_embd}."
    if spec.architecture is LFM2MOE and spec.n_head * spec.n_embd_head != spec.n_embd:
        n_values = spec.n_head * spec.n_embd_head
        return (
            f"llama.cpp loads no {name} model whose heads have other than {spec.n_embd} values, and these {n_values}."
        )
    if shared and "counted" in shared.width and spec.n_expert and not spec.experts.n_ff_shared:
        return f"llama.cpp runs no {name} model without shared experts."
    if spec.windowed and not any(spec.windowed):
        return f"llama.cpp runs no {name} model without layers with a sliding window."
    return None


def left_out(source: ModelSource) -> tuple[str, ...]:
    """Notes about what files made of a model lack, or compute otherwise; none where that is nothing."""
    n_nextn, difference = source.spec.n_layer_nextn, source.spec.architecture.difference
    advice = ": --mtp keeps it" if source.spec.architecture.has_mtp else ": nothing runs it"
    blocks = f"What predicts further tokens (MTP, {n_nextn} of the blocks) is left out{advice}."
    if source.spec.has_mtp_layer:
        blocks = LATER_BLOCKS
    own = source.notes if isinstance(source, StoredModel) else ()
    return (*([blocks] if n_nextn else ()), *own, *([difference] if difference else ()))


def carried_metadata(source: ModelSource) -> dict[str, Value]:
    """What the result takes over from the source unchanged, arrays as lists."""
    kept = {key: value for key, value in source.metadata.items() if key not in _OF_ITS_OWN}
    lists = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in kept.items()}
    return {key: value for key, value in lists.items() if value != []}


def result_spec(source: ModelSource, plan: CompressPlan) -> ModelSpec:
    """Sizes of the result: of the stock format's layers, those with experts are alike, and the dense ones."""
    shapes = tuple(layer_shape(source, layer) for layer in plan.layers)
    is_native = plan.format == "native"
    n_expert = max(shape.n_expert for shape in shapes)
    are_alike = not is_native and len(set(shapes)) == 1
    experts = replace(source.spec.experts, n_expert=n_expert, layers=() if are_alike else shapes)
    if plan.n_main:
        experts = replace(experts, n_expert_used=plan.n_main, n_selected=experts.n_expert_used)
    recurrent, blocks = source.spec.recurrent, [layer.block for layer in plan.layers]
    return replace(
        source.spec,
        is_native=is_native,
        n_layer=len(shapes),
        n_ff=max(shape.n_ff for shape in shapes if shape.n_expert or not n_expert),
        experts=experts,
        windowed=tuple(source.spec.windowed[block] for block in blocks) if source.spec.windowed else (),
        recurrent=replace(recurrent, layers=tuple(recurrent.layers[n] for n in blocks)) if recurrent else None,
    )


def whole_metadata(
    source: ModelSource, plan: CompressPlan, spec: ModelSpec, matrices: Iterable[Matrix]
) -> dict[str, Value]:
    """All keys of a file from whose model nothing is removed: it has the number of a mix of types, and no late keys."""
    assert plan.file_type is not None
    values: dict[str, Value] = {
        "general.architecture": spec.stored_architecture,
        "general.size_label": _size_label(spec, matrices),
        "general.file_type": int(plan.file_type),
        "general.quantization_version": _QUANTIZATION_VERSION,
        keys.SLIMOE_VERSION: version("slimoe"),
        keys.SOURCE_HASH: source.source_hash,
    }
    values |= spec.metadata() | dict(source.metadata) | dict(plan.provenance) | {keys.RECIPE: plan.recipe}
    return values | (_layout_keys(source, plan, ALIGNMENT) if plan.format == "native" else {})


def own_metadata(
    source: ModelSource, plan: CompressPlan, spec: ModelSpec, matrices: Iterable[Matrix], statistics: Statistics | None
) -> dict[str, Value]:
    """The keys that a compressed file does not share with its source; `statistics`, if any, made the plan."""
    values: dict[str, Value] = room_for_late_keys(spec.stored_architecture) | {
        "general.size_label": _size_label(spec, matrices),
        "general.quantization_version": _QUANTIZATION_VERSION,
        keys.SLIMOE_VERSION: version("slimoe"),
        keys.RECIPE: plan.recipe,
        keys.SOURCE_HASH: source.source_hash,
    }
    blocks = [layer.block for layer in plan.layers]
    if blocks != list(range(source.spec.n_layer)):
        values[keys.SOURCE_BLOCKS] = blocks
    if statistics is not None:
        values |= {keys.CALIBRATION_HASH: statistics.text_hash, keys.CALIBRATION_TOKENS: statistics.n_tokens}
    values |= spec.metadata() | dict(plan.provenance)
    if plan.format == "native":
        alignment = ALIGNMENT if 3 * spec.n_ff * spec.n_embd >= _SMALL_EXPERT else DEFAULT_ALIGNMENT
        values |= _layout_keys(source, plan, alignment)
    return values


def _layout_keys(source: ModelSource, plan: CompressPlan, alignment: int) -> dict[str, Value]:
    """The native format's keys about experts."""
    layout = NativeLayout(tuple(native_layer(source, layer) for layer in plan.layers))
    return {ALIGNMENT_KEY: alignment} | layout_metadata(layout)


def merged_metadata(carried: Mapping[str, Value], own: Mapping[str, Value]) -> dict[str, Value]:
    """All keys, the architecture first."""
    return {**own, **{key: value for key, value in carried.items() if key not in own}}


def _size_label(spec: ModelSpec, matrices: Iterable[Matrix]) -> str:
    """Parameters as people say them, second copies not counted."""
    counts = [(math.prod(m.shape), m.key.expert >= 0) for m in matrices if not m.copy]
    n_all, n_experts = sum(n for n, _ in counts), sum(n for n, is_expert in counts if is_expert)
    label: str = size_label(n_all, n_all - n_experts, n_experts // max(1, spec.n_expert), spec.n_expert)
    return label
