"""The config.json of a compressed checkpoint: its source's, with the sizes that have changed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from slimoe.converter.document import decode_json
from slimoe.converter.source.checkpoint import PROVENANCE_FIELD, Checkpoint
from slimoe.converter.source.families.config import ModelConfig
from slimoe.offload.errors import UnsupportedModelError

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_WIDTHS = ("moe_intermediate_size", "intermediate_size")  # a class that has both means dense layers by the second
_SHARED_COUNTS = ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts")
_DENSE_COUNTS = ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers")
"""The names that classes have for the number of experts, an expert's width, the number of shared experts, which are as
wide, and that of the dense layers before those with experts."""
_BY_LAYER = ("layer_types", "mlp_layer_types", "num_experts", "moe_topk", "moe_intermediate_size", "num_shared_expert")
"""Fields that may be lists with an entry for each layer."""
_QUANTISED = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True)
class ClassSizes:
    """The sizes of the result: experts of a layer, their width, the source's `blocks` that are left, and how many of
    these are dense.
    """

    n_expert: int
    n_ff: int
    blocks: tuple[int, ...]
    n_dense: int


def class_config(
    checkpoint: Checkpoint,
    old: ModelConfig,
    sizes: ClassSizes,
    dtype: str,
    quantisation: Mapping[str, Any] | None,
    provenance: Mapping[str, str | int],
) -> bytes:
    """The bytes of a config.json with the new sizes, weights of `dtype`, what is said of quantised ones, if any, and
    where the checkpoint is from.

    Raises UnsupportedModelError where shared experts, which stay as they are, would have to be narrower too.
    """
    raw: dict[str, Any] = checkpoint.read_config(dict[str, Any])
    known = {field.encode_name for field in msgspec.structs.fields(old)}
    fields = {name: value for name, value in raw.items() if name not in _QUANTISED}

    def put(names: Sequence[str], value: int) -> None:
        """Sets all fields of these names that are there, or if none is, the first that the class has."""
        absent = [name for name in names if name in known][:1]
        for name in [name for name in names if name in fields] or absent:
            is_list = isinstance(fields.get(name), list)
            fields[name] = [value] * len(fields[name]) if is_list else value

    put(_COUNTS, sizes.n_expert)
    if sizes.n_ff != old.n_ff:
        put(_WIDTHS[:1] if _WIDTHS[0] in known else _WIDTHS, sizes.n_ff)
        put(_SHARED_COUNTS, old.experts.n_ff_shared // sizes.n_ff)
    if old.experts.layers:
        put(_DENSE_COUNTS, sizes.n_dense)
    if old.kinds:
        fields["layer_types"] = list(old.kinds)
        fields.pop("layers_block_type", None)  # another name of the same
    _put_layers(fields, old, sizes.blocks)
    if old.n_layer_nextn:
        put(("num_nextn_predict_layers",), 0)
    if old.experts.n_group == 1 and fields.get("n_group") not in (None, 1):
        # All groups are selected from, and the experts that are left need not divide into them.
        fields |= {"n_group": 1, "topk_group": 1}
    fields |= {name: dtype for name in ("dtype", "torch_dtype") if name in fields} or {"torch_dtype": dtype}
    if quantisation is not None:
        fields["quantization_config"] = dict(quantisation)
    fields[PROVENANCE_FIELD] = dict(provenance)
    data = json.dumps(fields, indent=2, ensure_ascii=False).encode() + b"\n"
    _check(checkpoint, old, decode_json(data, type(old)), sizes)
    return data


def _put_layers(fields: dict[str, Any], old: ModelConfig, blocks: Sequence[int]) -> None:
    """Sets the number of layers, and what is said of each of them."""
    n_before = old.num_hidden_layers
    fields["num_hidden_layers"] = len(blocks)
    for name in _BY_LAYER:
        values = fields.get(name)
        if isinstance(values, list) and len(values) == n_before:
            fields[name] = [values[block] for block in blocks]
    if fields.get("moe_layer_end_index", -1) >= 0:
        fields["moe_layer_end_index"] = len(blocks) - 1
    first_windowed = fields.get("max_window_layers")
    if isinstance(first_windowed, int) and 0 < first_windowed < n_before:
        fields["max_window_layers"] = sum(block < first_windowed for block in blocks)


def _check(checkpoint: Checkpoint, old: ModelConfig, new: ModelConfig, sizes: ClassSizes) -> None:
    """Compares what the new file says, read as any other, with what it shall say."""
    if new.experts.n_ff_shared != old.experts.n_ff_shared:
        shared = f"a shared expert of {old.experts.n_ff_shared} neurons, which config.json counts in experts' widths"
        problem = f"the model has {shared}: with experts of {sizes.n_ff} it cannot say that."
        hint = f"Choose a --width that divides {old.experts.n_ff_shared}, or write a GGUF file, without --hf."
        raise UnsupportedModelError(checkpoint.path, problem, hint)
    assert (new.n_expert, new.n_ff, new.num_hidden_layers) == (sizes.n_expert, sizes.n_ff, len(sizes.blocks))
    assert sum(not shape.n_expert for shape in new.experts.layers) == sizes.n_dense
