"""Which GGUF tensors a Hugging Face model's tensors make: a table of names, and the sizes from config.json."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.bnb import stored_matrices
from converter.checkpoint import Checkpoint
from converter.model_source import MatrixKey
from converter.stored_rows import GivenRows, PartRows, RotatedRows, StoredMatrix, StoredRows
from offload.errors import ModelFileError, UnsupportedModelError
from offload.model_spec import ROPE_FREQS, AttentionSpec, ExpertSpec, ModelSpec
from offload.rope_spec import RopeSpec

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "MixtralForCausalLM": "llama"}
"""Hugging Face class names, and the GGUF architecture that holds such a model."""

_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
_EXPERT = {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT_NAME = re.compile(r"mlp\.experts\.(\d+)\.(w[123])\.weight")
_IGNORED = ("rotary_emb.inv_freq",)
_AGAIN = "Download the checkpoint again."


def model_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The sizes that config.json gives; raises UnsupportedModelError for what the target cannot express."""
    config = checkpoint.config
    name = (config.get("architectures") or [None])[0]
    if name not in ARCHITECTURES:
        problem = f"the architecture {name!r} is not supported, only {', '.join(ARCHITECTURES)}."
        raise UnsupportedModelError(checkpoint.path, problem)
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(checkpoint.path, f"the activation {config['hidden_act']!r} is not supported.")
    sizes = _Sizes(checkpoint)
    n_head = sizes.count("num_attention_heads")
    n_embd = sizes.count("hidden_size")
    n_embd_head = sizes.count("head_dim", n_embd // n_head)
    n_ctx_train = sizes.count("max_position_embeddings")
    if name == "MistralForCausalLM" and config.get("sliding_window"):
        # Up to the window's length, sliding attention is full attention; beyond it GGUF's llama has no word for it.
        n_ctx_train = min(n_ctx_train, sizes.count("sliding_window"))
    n_expert = sizes.count("num_local_experts") if name == "MixtralForCausalLM" else 0
    return ModelSpec(
        architecture=ARCHITECTURES[name],
        n_layer=sizes.count("num_hidden_layers"),
        n_embd=n_embd,
        n_ff=sizes.count("intermediate_size"),
        n_vocab=sizes.count("vocab_size"),
        n_ctx_train=n_ctx_train,
        rms_eps=float(config.get("rms_norm_eps", 1e-6)),
        attention=AttentionSpec(n_head, sizes.count("num_key_value_heads", n_head), n_embd_head),
        experts=ExpertSpec(n_expert, sizes.count("num_experts_per_tok") if n_expert else 0),
        rope=_rope(checkpoint, n_embd_head, n_ctx_train),
    )


class _Sizes:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def count(self, name: str, default: int | None = None) -> int:
        value = self.checkpoint.config.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or value < 1:
            path = self.checkpoint.path / "config.json"
            raise ModelFileError(path, f"{name} is {value!r}, which is no count.", _AGAIN)
        return value


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The rotation's settings, which transformers keeps under `rope_parameters` since version 5."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {"rope_theta": config.get("rope_theta", 10000.0)} | parameters


def _rope(checkpoint: Checkpoint, n_rot: int, n_ctx_train: int) -> RopeSpec:
    parameters = rope_parameters(checkpoint.config)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    known = {"default": "none", "llama3": "none", "linear": "linear", "yarn": "yarn"}
    if kind not in known:
        raise UnsupportedModelError(checkpoint.path, f"rope scaling of type {kind!r} is not supported.")
    if kind == "yarn" and (parameters.get("beta_fast") or 32, parameters.get("beta_slow") or 1) != (32, 1):
        raise UnsupportedModelError(checkpoint.path, "YaRN with a beta_fast or beta_slow of its own is not supported.")
    factor = float(parameters.get("factor") or 1.0) if kind in ("linear", "yarn") else 1.0
    attention = parameters.get("attention_factor") if kind == "yarn" else None
    return RopeSpec(
        n_rot=n_rot,
        n_ctx_orig=int(parameters.get("original_max_position_embeddings") or n_ctx_train),
        freq_base=float(parameters["rope_theta"]),
        scaling=known[kind],
        factor=factor,
        attn_multiplier=float(attention) / (1.0 + 0.1 * math.log(factor)) if attention else 1.0,
    )


def rope_factors(config: dict[str, Any], n_rot: int) -> NDArray[np.float32] | None:
    """Llama 3.1's divisors of the rotation frequencies, [n_rot / 2], or None for other models.

    Long wavelengths are divided by `factor`, short ones kept, those between interpolated (transformers'
    modeling_rope_utils.py).
    """
    parameters = rope_parameters(config)
    if parameters.get("rope_type", parameters.get("type")) != "llama3":
        return None
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    n_ctx = parameters["original_max_position_embeddings"]
    frequencies = parameters["rope_theta"] ** -(np.arange(0, n_rot, 2, dtype=np.float64) / n_rot)
    turns = n_ctx * frequencies / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / (kept + (1.0 - kept) / parameters["factor"]), np.float32)


def checkpoint_matrices(checkpoint: Checkpoint, spec: ModelSpec) -> dict[MatrixKey, StoredMatrix]:
    """Every matrix and vector of the GGUF model in file order; experts one by one.

    Shapes are the stored ones: whether they are right is for `check_tensors` to say. Raises UnsupportedModelError for a
    stored tensor that has no place, ModelFileError for a missing expert, and as `stored_matrices` does.
    """
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    found: dict[MatrixKey, StoredMatrix] = {}
    for name, stored in stored_matrices(checkpoint).items():
        if name.endswith(_IGNORED) or (tied and name == "lm_head.weight"):
            continue
        for key, matrix in _places(name, stored):
            rotated = key.name.split(".")[-2] in ("attn_q", "attn_k")
            found[key] = replace(matrix, rows=RotatedRows(matrix.rows, spec.n_embd_head)) if rotated else matrix
    factors = rope_factors(checkpoint.config, spec.rope.n_rot)
    if factors is not None:
        rows = GivenRows(ROPE_FREQS, checkpoint.path / "config.json", factors)
        found[MatrixKey(ROPE_FREQS)] = StoredMatrix(factors.shape, rows)
    _check_experts(checkpoint, spec, found)
    return {key: found[key] for key in sorted(found, key=file_order)}


def _places(name: str, stored: StoredMatrix) -> Iterator[tuple[MatrixKey, StoredMatrix]]:
    """Each GGUF matrix that a stored tensor holds."""
    if name in _WHOLE:
        yield MatrixKey(_WHOLE[name]), stored
        return
    match = _LAYER_NAME.fullmatch(name)
    inner = match[2].replace("block_sparse_moe.", "mlp.") if match else ""
    block = f"blk.{match[1]}." if match else ""
    stem, _, suffix = inner.rpartition(".")
    if stem in _IN_LAYER and suffix in ("weight", "bias"):
        yield MatrixKey(f"{block}{_IN_LAYER[stem]}.{suffix}"), stored
    elif expert := _EXPERT_NAME.fullmatch(inner):
        yield MatrixKey(f"{block}{_EXPERT[expert[2]]}_exps.weight", int(expert[1])), stored
    elif inner in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj") and len(stored.shape) == 3:
        yield from _stacked_places(block, inner, stored)
    else:
        raise UnsupportedModelError(stored.rows.path, f"tensor {name} has no place in this architecture.")


def _stacked_places(block: str, inner: str, stored: StoredMatrix) -> Iterator[tuple[MatrixKey, StoredMatrix]]:
    """The layout of newer transformers: all experts in one tensor, gate above up."""
    n_expert, n_rows, n_per_row = stored.shape
    names = ("ffn_gate", "ffn_up") if inner.endswith("gate_up_proj") else ("ffn_down",)
    n_each = n_rows // len(names)
    for expert in range(n_expert):
        for index, name in enumerate(names):
            rows = PartRows(stored.rows, expert * n_rows + index * n_each, n_each)
            yield MatrixKey(f"{block}{name}_exps.weight", expert), StoredMatrix((n_each, n_per_row), rows)


def _check_experts(checkpoint: Checkpoint, spec: ModelSpec, found: Mapping[MatrixKey, StoredMatrix]) -> None:
    """Stacks have all experts, of one shape; how many there may be at most is for `check_tensors`."""
    for key, matrix in found.items():
        if key.expert < 0:
            continue
        for expert in range(spec.n_expert):
            if MatrixKey(key.name, expert) not in found:
                raise ModelFileError(checkpoint.path, f"expert {expert} of {key.name} is missing.", _AGAIN)
        if matrix.shape != found[MatrixKey(key.name, 0)].shape:
            rows: StoredRows = matrix.rows
            raise ModelFileError(rows.path, f"tensor {rows.name} differs in shape from its like.", _AGAIN)


_ROLE_ORDER = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate_inp")


def file_order(key: MatrixKey) -> tuple[int, int, str, int]:
    """Blocks in order, and in a block the order of use, so that reading follows the computation."""
    parts = key.name.split(".")
    if parts[0] != "blk":
        return (-1 if parts[0] in ("token_embd", "rope_freqs") else 1 << 30), 0, key.name, key.expert
    rank = _ROLE_ORDER.index(parts[2]) if parts[2] in _ROLE_ORDER else len(_ROLE_ORDER)
    return int(parts[1]), rank, key.name, key.expert
