"""Which GGUF tensors a Hugging Face model's tensors make, by its family's table of names, and the sizes it has."""

import re
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.source.bnb import stored_matrices
from slimoe.converter.source.checkpoint import Checkpoint
from slimoe.converter.source.families.config import ModelConfig
from slimoe.converter.source.families.family import Family
from slimoe.converter.source.model_source import MatrixKey
from slimoe.converter.source.stored_rows import GivenRows, PartRows, RotatedRows, StoredMatrix
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.model.architecture import RopeType
from slimoe.offload.model.expert_spec import ExpertSpec
from slimoe.offload.model.rope import RopeSpec
from slimoe.offload.model.spec import ROPE_FREQS, AttentionSpec, ModelSpec

_EMBEDDINGS = MatrixKey("token_embd.weight")
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_STACKED = {
    "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.experts.down_proj": ("ffn_down_exps",),
}
"""All experts of a layer in one tensor [n_expert, n_rows, n_per_row], as transformers 5 has them in memory, gate above
up. What it saves, and what older versions saved, are tensors of single experts."""
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_STACK_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_IGNORED = ("rotary_emb.inv_freq",)
_AGAIN = "Download the checkpoint again."


def model_spec(family: Family, config: ModelConfig, rope: RopeSpec) -> ModelSpec:
    """The model's sizes and constants, as config.json gives them."""
    n_ctx_train, window = config.max_position_embeddings, config.window or 0
    if window >= n_ctx_train:
        window = 0  # never left
    if window and not config.n_expert:
        # Up to the window's length, sliding attention is full attention; beyond it GGUF's llama has no word for it.
        n_ctx_train = window
    return ModelSpec(
        architecture=family.architecture,
        n_layer=config.num_hidden_layers,
        n_embd=config.hidden_size,
        n_ff=config.n_ff,
        n_vocab=config.vocab_size,
        n_ctx_train=n_ctx_train,
        rms_eps=config.rms_norm_eps,
        attention=AttentionSpec(config.num_attention_heads, config.n_head_kv, config.n_embd_head),
        experts=ExpertSpec(config.n_expert, config.n_expert_used),
        rope=rope,
        n_window=window,
    )


def checkpoint_matrices(
    checkpoint: Checkpoint, family: Family, config: ModelConfig, spec: ModelSpec, divisors: NDArray[np.float32] | None
) -> dict[MatrixKey, StoredMatrix]:
    """Every matrix and vector of the GGUF model, experts one by one. `divisors` are the rotation's.

    Shapes are the stored ones: whether they are right is for `check_tensors` to say. Raises UnsupportedModelError for a
    stored tensor that has no place, ModelFileError for a missing expert, and as `stored_matrices` does.
    """
    found: dict[MatrixKey, StoredMatrix] = {}
    for name, stored in stored_matrices(checkpoint).items():
        if name.endswith(_IGNORED) or (config.tie_word_embeddings and name == "lm_head.weight"):
            continue
        found |= _places(name, stored, family, config)
    if spec.architecture.rope is RopeType.NORM:
        for key, matrix in found.items():
            if key.name.split(".")[-2] in ("attn_q", "attn_k"):
                found[key] = replace(matrix, rows=RotatedRows(matrix.rows, spec.n_embd_head))
    roles = {tensor.role: tensor for tensor in spec.architecture.tensors}
    if config.tie_word_embeddings and not roles["output"].is_optional and _EMBEDDINGS in found:
        found[MatrixKey("output.weight")] = found[_EMBEDDINGS]
    if divisors is not None:
        if "rope_freqs" not in roles:
            problem = f"the rotation is scaled in a way that a GGUF file of {spec.architecture.name} cannot express."
            raise UnsupportedModelError(
                checkpoint.config_path, problem, "Supported are default, linear and plain yarn."
            )
        rows = GivenRows(ROPE_FREQS, checkpoint.config_path, divisors)
        found[MatrixKey(ROPE_FREQS)] = StoredMatrix(divisors.shape, rows)
    for name in dict.fromkeys(key.name for key in found if key.expert >= 0):
        for expert in range(spec.n_expert):
            one = found.get(MatrixKey(name, expert))
            if one is None:
                raise ModelFileError(checkpoint.path, f"expert {expert} of {name} is missing.", _AGAIN)
            if one.shape != found[MatrixKey(name, 0)].shape:
                problem = f"tensor {one.rows.name} differs in shape from the same matrix of other experts."
                raise ModelFileError(one.rows.path, problem, _AGAIN)
    return found


def _places(name: str, stored: StoredMatrix, family: Family, config: ModelConfig) -> dict[MatrixKey, StoredMatrix]:
    """The GGUF matrices that a stored tensor holds: one, or those of all experts."""
    if name in _WHOLE:
        return {MatrixKey(_WHOLE[name]): stored}
    if match := _LAYER_NAME.fullmatch(name):
        layer, inner, kind = match.groups()
        number = _EXPERT.search(inner)
        role = family.names.get(_EXPERT.sub("*", inner))
        if kind == "bias" and role and (module := inner.split(".")[0]) not in config.biased:
            # transformers would not add it, and whatever reads the file would.
            problem = f"tensor {name} is a bias, but config.json has no biases for {module}."
            raise UnsupportedModelError(stored.rows.path, problem, "Correct config.json, or leave the tensor out.")
        if role:
            return {MatrixKey(f"blk.{layer}.{role}.{kind}", int(number[0]) if number else -1): stored}
    match = _STACK_NAME.fullmatch(name)
    roles = _STACKED.get(match[2], ()) if match else ()
    if match and len(stored.shape) == 3 and set(roles) & set(family.names.values()):
        n_expert, n_rows, n_per_row = stored.shape
        n_each = n_rows // len(roles)
        return {
            MatrixKey(f"blk.{match[1]}.{role}.weight", expert): StoredMatrix(
                (n_each, n_per_row), PartRows(stored.rows, expert * n_rows + index * n_each, n_each)
            )
            for expert in range(n_expert)
            for index, role in enumerate(roles)
        }
    raise UnsupportedModelError(stored.rows.path, f"tensor {name} has no place in this architecture.")
