"""Which GGUF tensors a Hugging Face model's tensors make, by its family's table of names, and the sizes it has."""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.source.bnb import stored_matrices
from slimoe.converter.source.checkpoint import Checkpoint
from slimoe.converter.source.families.config import ModelConfig
from slimoe.converter.source.families.family import Family
from slimoe.converter.source.model_source import MatrixKey
from slimoe.converter.source.stored_rows import (
    EveryNthColumn,
    GivenRows,
    HeadRows,
    PartRows,
    RotatedRows,
    StoredMatrix,
    StoredRows,
    TransposedRows,
)
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.model.architecture import RopeType
from slimoe.offload.model.rope import RopeSpec
from slimoe.offload.model.spec import ModelSpec

_EMBEDDINGS = MatrixKey("token_embd.weight")
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.word_embeddings.weight": "token_embd.weight",
    "model.embeddings.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.norm.bias": "output_norm.bias",
    "lm_head.bias": "output.bias",
    "model.embedding_norm.weight": "token_embd_norm.weight",
}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_IGNORED = ("rotary_emb.inv_freq",)
_AGAIN = "Download the checkpoint again."
_MTP = "mtp."
_MTP_OWN = {
    "fc": "eh_proj",
    "pre_fc_norm_embedding": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "norm": "shared_head.norm",
}
"""What the block that predicts further tokens has that no layer has, by Qwen's names, which are GLM's in a layer."""


def model_spec(family: Family, config: ModelConfig, rope: RopeSpec) -> ModelSpec:
    """The model's sizes and constants, as config.json gives them."""
    n_ctx_train, window = config.max_position_embeddings, config.window or 0
    if window >= n_ctx_train and not config.windowed:
        window = 0  # never left
    if window and not config.n_expert:
        # Up to the window's length, sliding attention is full attention; beyond it GGUF's llama has no word for it.
        n_ctx_train = window
    own = config.window_attention
    rope = replace(rope, window_freq_base=config.window_base, window_n_rot=own.n_embd_head if own else 0)
    return ModelSpec(
        architecture=family.architecture,
        n_layer=config.num_hidden_layers,
        n_embd=config.hidden_size,
        n_ff=config.n_ff,
        n_vocab=config.vocab_size,
        n_ctx_train=n_ctx_train,
        rms_eps=config.rms_norm_eps,
        attention=config.attention,
        experts=config.experts,
        rope=replace(rope, sections=config.rope_sections),
        n_window=window,
        multipliers=config.multipliers,
        windowed=config.windowed,
        recurrent=config.recurrent,
        window_attention=own,
    )


def checkpoint_matrices(
    checkpoint: Checkpoint,
    family: Family,
    config: ModelConfig,
    spec: ModelSpec,
    divisors: Mapping[str, NDArray[np.float32]],
) -> dict[MatrixKey, StoredMatrix]:
    """Every matrix and vector of the GGUF model, experts one by one. `divisors` are the rotation's.

    Shapes are the stored ones: whether they are right is for `check_tensors` to say. Raises UnsupportedModelError for a
    stored tensor that has no place, ModelFileError for a missing expert, and as `stored_matrices` does.
    """
    found: dict[MatrixKey, StoredMatrix] = {}
    own_block = f"blk.{spec.n_layer - 1}." if spec.has_mtp_layer else " "
    for name, stored in kept_tensors(checkpoint, family, config, keeps_mtp=spec.has_mtp_layer).items():
        made = matrices_of(name, stored, family, config)
        if any(".nextn." in key.name and not key.name.startswith(own_block) for key in made):
            raise _without_place(name, stored)
        found |= made
    if spec.rope.n_rot and spec.architecture.rope is RopeType.NORM and not family.rotates_neighbours:
        for key, matrix in found.items():
            if key.name.split(".")[-2] in ("attn_q", "attn_k"):
                found[key] = replace(matrix, rows=RotatedRows(matrix.rows, spec.n_embd_head))
    if latent := spec.attention.latent:
        n_unrotated = latent.n_embd_head_k - spec.rope.n_rot
        for key in [key for key in found if key.name.endswith(".attn_kv_b.weight")]:
            found |= _absorbed(key.name, found.pop(key), spec.n_head, n_unrotated, latent.n_embd_head_v)
    roles = {tensor.role: tensor for tensor in spec.architecture.tensors}
    if config.tie_word_embeddings and not roles["output"].is_optional and _EMBEDDINGS in found:
        found[MatrixKey("output.weight")] = found[_EMBEDDINGS]
    for role, values in divisors.items():
        if role not in roles:
            problem = f"the rotation is scaled in a way that a GGUF file of {spec.architecture.name} cannot express."
            raise UnsupportedModelError(
                checkpoint.config_path, problem, "Supported are default, linear and plain yarn."
            )
        name = f"{role}.weight"
        found[MatrixKey(name)] = StoredMatrix(values.shape, GivenRows(name, checkpoint.config_path, values))
    _check_values(found, config.without_values)
    for name in dict.fromkeys(key.name for key in found if key.expert >= 0):
        for expert in range(spec.n_expert):
            one = found.get(MatrixKey(name, expert))
            if one is None:
                raise ModelFileError(checkpoint.path, f"expert {expert} of {name} is missing.", _AGAIN)
            if one.shape != found[MatrixKey(name, 0)].shape:
                problem = f"tensor {one.rows.name} differs in shape from the same matrix of other experts."
                raise ModelFileError(one.rows.path, problem, _AGAIN)
    return found


def skipped_prefixes(family: Family, config: ModelConfig, *, keeps_mtp: bool = False) -> tuple[str, ...]:
    """How the names of tensors begin that are not read: of what predicts further tokens, or has to do with images.

    If it `keeps_mtp`, the first block of what predicts tokens is read, as the last layer.
    """
    numbers = range(int(keeps_mtp), config.n_layer_nextn)
    nextn = (f"model.layers.{config.num_hidden_layers + index}." for index in numbers)
    return (*(prefix for prefix in family.skipped if prefix != _MTP or not keeps_mtp), *nextn)


def _check_values(found: Mapping[MatrixKey, StoredMatrix], without: Collection[int]) -> None:
    """Raises UnsupportedModelError where values have a matrix, but are the keys by config.json."""
    for layer in without:
        if (stored := found.get(MatrixKey(f"blk.{layer}.attn_v.weight"))) is not None:
            raise _without_place(stored.rows.name, stored)


def kept_tensors(
    checkpoint: Checkpoint, family: Family, config: ModelConfig, *, keeps_mtp: bool = False
) -> dict[str, StoredMatrix]:
    """The stored tensors that count, by the names that they have in a language model that is the whole: without what
    predicts further tokens, or with that as its last layer, and without an output matrix where the token table is it.
    Raises as `stored_matrices` does.
    """
    skipped = skipped_prefixes(family, config, keeps_mtp=keeps_mtp)
    if config.tie_word_embeddings:
        skipped += ("lm_head.weight",)
    found = {name.replace(family.prefix, "model.", 1): one for name, one in stored_matrices(checkpoint).items()}
    kept = {name: one for name, one in found.items() if not name.endswith(_IGNORED) and not name.startswith(skipped)}
    return {_of_last_layer(name, config.num_hidden_layers): one for name, one in kept.items()} if keeps_mtp else kept


def _of_last_layer(name: str, layer: int) -> str:
    """The name of a tensor of Qwen's block that predicts further tokens as it is for one that is layer `layer`."""
    if not name.startswith(_MTP):
        return name
    inner = name.removeprefix(_MTP)
    stem, _, kind = inner.rpartition(".")
    inner = f"{_MTP_OWN[stem]}.{kind}" if stem in _MTP_OWN else inner.removeprefix("layers.0.")
    return f"model.layers.{layer}.{inner}"


def matrices_of(name: str, stored: StoredMatrix, family: Family, config: ModelConfig) -> dict[MatrixKey, StoredMatrix]:
    """The GGUF matrices that a stored tensor holds: one, or those of all experts.

    Raises UnsupportedModelError for a tensor that has no place in the architecture.
    """
    if _WHOLE.get(name) in {tensor.name() for tensor in family.architecture.tensors}:
        return {MatrixKey(_WHOLE[name]): _changed(_WHOLE[name], stored, family, config)}
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        raise _without_place(name, stored)
    layer, inner = match.groups()
    if config.recurrent and inner in family.split:
        parts = family.split[inner].items()
        return {MatrixKey(f"blk.{layer}.{role}"): change(stored, config.recurrent) for role, change in parts}
    if inner in family.joined:
        if family.alternates:
            return _alternating(f"blk.{layer}", stored, family.joined[inner])
        return _parts(f"blk.{layer}", stored, family.joined[inner], config)
    general = _EXPERT.sub("*", inner)
    role = family.names.get(general)
    stem, _, kind = general.rpartition(".")
    if role is None and stem in family.names and kind in ("weight", "bias"):
        role = f"{family.names[stem]}.{kind}"
        if kind == "bias" and not inner.startswith(tuple(f"{module}." for module in config.biased)):
            # transformers would not add it, and whatever reads the file would.
            problem = f"tensor {name} is a bias, but config.json has no biases for {inner.split('.')[0]}."
            raise UnsupportedModelError(stored.rows.path, problem, "Correct config.json, or leave the tensor out.")
    if role is None:
        raise _without_place(name, stored)
    number = _EXPERT.search(inner)
    if len(stored.shape) == 2 and stored.shape[0] == 1 and role.split(".")[0] in _vectors(family):
        stored = replace(stored, shape=stored.shape[1:])
    changed = _changed(role, stored, family, config)
    return {MatrixKey(f"blk.{layer}.{role}", int(number[0]) if number else -1): changed}


def _changed(role: str, stored: StoredMatrix, family: Family, config: ModelConfig) -> StoredMatrix:
    """The GGUF tensor that a stored one makes alone."""
    change = family.changes.get(role)
    return stored if change is None or config.recurrent is None else change(stored, config.recurrent)


def _absorbed(name: str, stored: StoredMatrix, n_head: int, n_key: int, n_value: int) -> dict[MatrixKey, StoredMatrix]:
    """MLA's matrix of keys above values, head by head, as the two stacks that are multiplied into queries and outputs.

    That of keys is transposed: [n_head, rank, n_key] and [n_head, n_value, rank].
    """
    n_rows, rank = stored.shape
    if n_rows != n_head * (n_key + n_value):
        problem = f"tensor {stored.rows.name} has {n_rows} rows, not {n_head} heads of {n_key} and {n_value}."
        raise ModelFileError(stored.rows.path, problem, _AGAIN)
    values = HeadRows(stored.rows, n_head, n_key + n_value, n_key, n_value)
    keys = TransposedRows(HeadRows(stored.rows, n_head, n_key + n_value, 0, n_key), n_head)
    return {
        MatrixKey(name.replace("attn_kv_b", "attn_k_b")): StoredMatrix((n_head, rank, n_key), keys),
        MatrixKey(name.replace("attn_kv_b", "attn_v_b")): StoredMatrix((n_head, n_value, rank), values),
    }


def _without_place(name: str, stored: StoredMatrix) -> UnsupportedModelError:
    return UnsupportedModelError(stored.rows.path, f"tensor {name} has no place in this architecture.")


def _vectors(family: Family) -> set[str]:
    """The roles of vectors, which some families store as matrices of one row."""
    return {tensor.role for tensor in family.architecture.tensors if len(tensor.ne) == 1}


def _parts(
    block: str, stored: StoredMatrix, roles: tuple[str, ...], config: ModelConfig
) -> dict[MatrixKey, StoredMatrix]:
    """The matrices that lie below each other in a stored one, or in each matrix of a stack of all experts."""
    *stack, n_rows, n_per_row = stored.shape
    n_each = {"attn_q": config.num_attention_heads, "attn_k": config.n_head_kv, "attn_v": config.n_head_kv}
    shares = [n_each.get(role, 1) for role in roles]
    if len(stack) > 1 or n_rows % sum(shares):
        raise _without_place(stored.rows.name, stored)
    ends = list(accumulate(share * n_rows // sum(shares) for share in shares))
    return {
        MatrixKey(f"{block}.{role}.weight", expert if stack else -1): StoredMatrix(
            (end - begin, n_per_row), PartRows(stored.rows, expert * n_rows + begin, end - begin)
        )
        for expert in range(stack[0] if stack else 1)
        for role, begin, end in zip(roles, [0, *ends], ends, strict=False)
    }


def _alternating(block: str, stored: StoredMatrix, roles: tuple[str, ...]) -> dict[MatrixKey, StoredMatrix]:
    """The matrices of all experts whose rows take turns in a stack of MXFP4, or columns in one of numbers [n_expert,
    n_per_row, n_rows], which is transposed; or biases [n_expert, n_rows], whose elements take turns.
    """
    n, n_last = len(roles), stored.shape[-1] if stored.rows.blocks is None else stored.shape[-2]
    if len(stored.shape) not in (2, 3) or n_last % n:
        raise _without_place(stored.rows.name, stored)
    found: dict[MatrixKey, StoredMatrix] = {}
    for place, role in enumerate(roles):
        columns = EveryNthColumn(stored.rows, place, n)
        if len(stored.shape) == 2:
            found[MatrixKey(f"{block}.{role}.bias")] = StoredMatrix((stored.shape[0], n_last // n), columns)
            continue
        n_expert, n_each, _ = stored.shape
        for expert in range(n_expert):
            rows: StoredRows
            if stored.rows.blocks is None:
                rows = TransposedRows(HeadRows(PartRows(columns, expert * n_each, n_each), 1, n_each, 0, n_each), 1)
            else:
                rows = PartRows(stored.rows, expert * n_each + place, n_each // n, n)
            found[MatrixKey(f"{block}.{role}.weight", expert)] = StoredMatrix((rows.n_rows, rows.n_per_row), rows)
    return found
