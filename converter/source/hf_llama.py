"""Which GGUF tensors a Hugging Face model's tensors make: a table of names, and the sizes from config.json."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.source.bnb import stored_matrices
from slimoe.converter.source.checkpoint import Checkpoint
from slimoe.converter.source.model_config import ModelConfig
from slimoe.converter.source.model_source import MatrixKey
from slimoe.converter.source.stored_rows import GivenRows, PartRows, RotatedRows, StoredMatrix, StoredRows
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.model.architectures import LLAMA
from slimoe.offload.model.rope import RopeSpec
from slimoe.offload.model.spec import ROPE_FREQS, AttentionSpec, ExpertSpec, ModelSpec

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


def model_spec(config: ModelConfig, rope: RopeSpec) -> ModelSpec:
    """The sizes that config.json gives."""
    n_ctx_train, window = config.max_position_embeddings, config.window or 0
    if window >= n_ctx_train:
        window = 0  # never left
    if window and not config.n_expert:
        # Up to the window's length, sliding attention is full attention; beyond it GGUF's llama has no word for it.
        n_ctx_train = window
    return ModelSpec(
        architecture=LLAMA,
        n_layer=config.num_hidden_layers,
        n_embd=config.hidden_size,
        n_ff=config.intermediate_size,
        n_vocab=config.vocab_size,
        n_ctx_train=n_ctx_train,
        rms_eps=config.rms_norm_eps,
        attention=AttentionSpec(config.num_attention_heads, config.n_head_kv, config.n_embd_head),
        experts=ExpertSpec(config.n_expert, config.n_expert_used),
        rope=rope,
        n_window=window,
    )


def checkpoint_matrices(
    checkpoint: Checkpoint, config: ModelConfig, spec: ModelSpec, divisors: NDArray[np.float32] | None
) -> dict[MatrixKey, StoredMatrix]:
    """Every matrix and vector of the GGUF model in file order; experts one by one. `divisors` are the rotation's.

    Shapes are the stored ones: whether they are right is for `check_tensors` to say. Raises UnsupportedModelError for a
    stored tensor that has no place, ModelFileError for a missing expert, and as `stored_matrices` does.
    """
    found: dict[MatrixKey, StoredMatrix] = {}
    for name, stored in stored_matrices(checkpoint).items():
        if name.endswith(_IGNORED) or (config.tie_word_embeddings and name == "lm_head.weight"):
            continue
        _check_bias(name, stored, config)
        for key, matrix in _places(name, stored):
            rotated = key.name.split(".")[-2] in ("attn_q", "attn_k")
            found[key] = replace(matrix, rows=RotatedRows(matrix.rows, spec.n_embd_head)) if rotated else matrix
    if divisors is not None:
        rows = GivenRows(ROPE_FREQS, checkpoint.config_path, divisors)
        found[MatrixKey(ROPE_FREQS)] = StoredMatrix(divisors.shape, rows)
    _check_experts(checkpoint, spec, found)
    return {key: found[key] for key in sorted(found, key=file_order)}


def _check_bias(name: str, stored: StoredMatrix, config: ModelConfig) -> None:
    """Biases that the class does not have are not added by transformers, and would be by whatever reads the file."""
    module = next((part for part in ("self_attn", "mlp") if f".{part}." in name), None)
    if name.endswith(".bias") and module and module not in config.biased:
        problem = f"tensor {name} is a bias, but config.json has no biases for {module}."
        raise UnsupportedModelError(stored.rows.path, problem, "Correct config.json, or leave the tensor out.")


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
