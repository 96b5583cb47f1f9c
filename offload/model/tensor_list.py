"""The tensors of a model, with their shapes: one list, from which files are checked, loaded, planned and written."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from slimoe.offload.errors import ModelFileError
from slimoe.offload.gguf.header import GGUFFile
from slimoe.offload.gguf.metadata_keys import AGAIN
from slimoe.offload.model.architecture import When
from slimoe.offload.model.attention_spec import AttentionSpec
from slimoe.offload.model.spec import ModelSpec

_Layout = dict[str, tuple[int, ...]]
_ATTENTION_INPUT = ("attn_q", "attn_k", "attn_v")
_DELTA_NET_INPUT = ("attn_qkv", "attn_gate")
_MERGED = ("ffn_gate_exps", "ffn_up_exps")
RECURRENT_FLOATS = ("ssm_conv1d", "shortconv.conv", "ssm_norm", "ssm_a", "ssm_d")
"""The roles of recurrent layers' taps, norms and factors, which have two axes and are F32 in every file."""
EXPERT_LATENT = ("ffn_latent_down", "ffn_latent_up")
"""The roles of what takes experts' inputs to fewer values, and their sum back."""
AUX_GAIN, AUX_SHIFT = "ffn_aux_gain", "ffn_aux_shift"
"""The roles of what stands for selected experts that are not computed: vectors for each row of the router."""


@dataclass(frozen=True, slots=True)
class ModelTensor:
    """One tensor by its name in the file and its shape in ggml's order; `layer` is -1 for one of the whole model."""

    role: str
    name: str
    ne: tuple[int, ...]
    layer: int = -1
    is_optional: bool = False


def model_tensors(spec: ModelSpec) -> Iterator[ModelTensor]:
    """Every tensor in the order of the computation. A native file's stacks of experts are `native_format`'s."""
    yield from _whole(spec, is_output=False)
    for layer in range(spec.n_layer):
        yield from layer_tensors(spec, layer)
    yield from _whole(spec, is_output=True)


def _whole(spec: ModelSpec, *, is_output: bool) -> Iterator[ModelTensor]:
    """The tensors of the model as a whole: those before its layers, or those behind them."""
    sizes = _sizes(spec)
    for role in spec.architecture.tensors:
        if role.when == "model" and role.role.startswith("output") is is_output:
            ne = tuple(sizes[n] for n in role.ne)
            yield ModelTensor(role.role, role.name(), ne, is_optional=role.is_optional)


def layer_tensors(spec: ModelSpec, layer: int) -> Iterator[ModelTensor]:
    """The tensors of one layer."""
    shape = spec.layer_shape(layer)
    sizes = _sizes(spec) | {"n_expert": shape.n_expert, "n_ff": shape.n_ff} | _head_sizes(spec.attention_of(layer))
    latent, is_recurrent = spec.attention.latent if shape.has_attention else None, spec.is_recurrent(layer)
    has_part: dict[When, bool] = {
        "layer": True,
        "attention": shape.has_attention and not is_recurrent,
        "recurrent": shape.has_attention and is_recurrent,
        "q": latent is not None and not latent.n_lora_q,
        "low_rank_q": latent is not None and latent.n_lora_q > 0,
        "absorbed": latent is not None and latent.is_absorbed,
        "unabsorbed": latent is not None and not latent.is_absorbed,
        "ffn": bool(shape.n_ff),
        "router": bool(shape.n_expert),
        "dense": bool(shape.n_ff) and not shape.n_expert,
        "experts": bool(shape.n_expert) and not spec.is_native,
        "latent_experts": bool(shape.n_expert and spec.experts.n_latent),
        "mtp": spec.has_mtp_layer and layer == spec.n_layer - 1,
        "shared": bool(shape.n_expert and spec.experts.n_ff_shared),
    }
    for role in spec.architecture.tensors:
        if has_part.get(role.when):
            ne = tuple(sizes[n] for n in role.ne)
            yield ModelTensor(role.role, role.name(f"blk.{layer}."), ne, layer, role.is_optional)
    if spec.n_expert_aux and shape.n_expert:
        for aux in (AUX_GAIN, AUX_SHIFT):
            yield ModelTensor(aux, f"blk.{layer}.{aux}.weight", (spec.n_embd_expert, shape.n_expert), layer)


def _sizes(spec: ModelSpec) -> dict[str, int]:
    """The sizes that shapes are made of, by the names that rows of architectures use."""
    sizes = {
        "n_embd": spec.n_embd,
        "n_embd_twice": 2 * spec.n_embd,
        "n_embd_expert": spec.n_embd_expert,
        "n_vocab": spec.n_vocab,
        "n_ff": spec.n_ff,
        "n_ff_shared": spec.experts.n_ff_shared,
        "n_expert": spec.n_expert,
        "n_head": spec.n_head,
        "n_rot_pairs": spec.rope.n_rot // 2,
        "one": 1,
    }
    if recurrent := spec.recurrent:
        sizes |= {
            "n_conv": recurrent.n_conv,
            "n_conv_channels": recurrent.n_channels,
            "n_conv_inputs": 3 * spec.n_embd,
            "n_state": recurrent.n_state,
            "n_rank": recurrent.n_rank,
            "n_rank_pairs": 2 * recurrent.n_rank,
            "n_inner": recurrent.n_inner,
            "n_ssm_in": recurrent.n_inner + recurrent.n_channels + recurrent.n_rank,
            "n_group": recurrent.n_group,
            "n_group_inner": recurrent.n_inner // recurrent.n_group if recurrent.n_group else 0,
        }
    if latent := spec.attention.latent:
        n_unrotated = latent.n_embd_head_k - spec.rope.n_rot
        sizes |= {
            "n_lora_q": latent.n_lora_q,
            "n_lora_kv": latent.n_lora_kv,
            "n_lora_kv_rot": latent.n_lora_kv + spec.rope.n_rot,
            "n_unrotated": n_unrotated,
            "n_embd_head_v": latent.n_embd_head_v,
            "n_kv_b": spec.n_head * (n_unrotated + latent.n_embd_head_v),
            "n_attn_output": spec.attention.n_output,
        }
    return sizes


def _head_sizes(attention: AttentionSpec) -> dict[str, int]:
    """The sizes of one layer's heads."""
    latent = attention.latent
    return {
        "n_embd_head": attention.n_embd_head,
        "n_q": attention.n_head * (latent.n_embd_head_k if latent else attention.n_embd_head),
        "n_q_rows": attention.n_query_rows,
        "n_kv": attention.n_head_kv * attention.n_embd_head,
    }


def with_listed_shapes(gguf: GGUFFile, spec: ModelSpec) -> GGUFFile:
    """The file with vectors where it has matrices of one row in their place, which is the same to llama.cpp.

    Its converter writes the gates of shared experts so.
    """
    rows = {name: tensor for name, tensor in gguf.tensors.items() if len(tensor.ne) == 2 and tensor.ne[1] == 1}
    if not rows:
        return gguf
    vectors = {tensor.name for tensor in model_tensors(spec) if len(tensor.ne) == 1}
    changed = {name: replace(tensor, ne=tensor.ne[:1]) for name, tensor in rows.items() if name in vectors}
    return replace(gguf, tensors=gguf.tensors | changed)


def check_tensors(gguf: GGUFFile, spec: ModelSpec) -> None:
    """Raises ModelFileError that names the first tensor that is missing or has another shape than `spec` says."""
    check_shapes(gguf, spec, model_tensors(spec))


def check_shapes(gguf: GGUFFile, spec: ModelSpec, tensors: Iterable[ModelTensor]) -> None:
    """The same for some tensors of a model."""
    for alternatives in _layouts(spec, tensors):
        found = next((choice for choice in alternatives if gguf.tensors.keys() & choice.keys()), alternatives[0])
        for name, ne in found.items():
            tensor = gguf.tensors.get(name)
            if tensor is None:
                raise ModelFileError(gguf.path, f"tensor {name} is missing.", AGAIN)
            if tensor.ne != ne:
                problem = f"tensor {name} has the shape {tensor.ne}, but {ne} belongs to this model."
                raise ModelFileError(gguf.path, problem, AGAIN)


def _layouts(spec: ModelSpec, tensors: Iterable[ModelTensor]) -> Iterator[list[_Layout]]:
    """Groups of tensors, each in the layouts that files have of it, the usual one first; {} is no tensor."""
    joined: _Layout = {}
    joint = {} if spec.attention.latent else dict.fromkeys(_ATTENTION_INPUT, "attn_qkv")
    joint |= dict.fromkeys(_DELTA_NET_INPUT, "ssm_in") if spec.architecture.groups_heads else {}
    for tensor in tensors:
        if tensor.role in joint:
            joined[tensor.name] = tensor.ne
            if tensor.role in (_ATTENTION_INPUT[-1], _DELTA_NET_INPUT[-1]):
                n_rows = sum(n for _, n in joined.values())
                if tensor.is_optional:  # Without a matrix of their own, values are the keys.
                    yield [{}, {tensor.name: joined.pop(tensor.name)}]
                yield [joined, {f"blk.{tensor.layer}.{joint[tensor.role]}.weight": (spec.n_embd, n_rows)}]
                joined = {}
        elif tensor.name.endswith("_exps.weight"):
            stem = tensor.name.removesuffix("_exps.weight")
            each: _Layout = {f"{stem}.{expert}.weight": tensor.ne[:2] for expert in range(tensor.ne[2])}
            merged: _Layout = {}
            if tensor.role in _MERGED and len(spec.architecture.projections) > 2:
                ne = (tensor.ne[0], 2 * tensor.ne[1], tensor.ne[2])
                merged = {f"blk.{tensor.layer}.ffn_gate_up_exps.weight": ne}
            yield [{tensor.name: tensor.ne}, each, merged]
        else:
            yield [*([{}] if tensor.is_optional else []), {tensor.name: tensor.ne}]
