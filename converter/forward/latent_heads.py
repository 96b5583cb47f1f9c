"""Heads of multi-head latent attention in torch, decompressed. Apart: `block` is long, and this is one form of many."""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimoe.offload.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LatentMatrices:
    """What makes heads of low-rank rows: `q` [n_head * n_embd_head_k, n_lora_q], None for queries of full rank, `k`
    [n_head, n_lora_kv, n_unrotated] and `v` [n_head, n_embd_head_v, n_lora_kv].
    """

    q: Tensor | None
    k: Tensor
    v: Tensor


def split_keys_and_values(both: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """The `k` and `v` of `LatentMatrices` from the matrix of both, [n_head * (n_unrotated + n_embd_head_v), n_lora_kv],
    which old files have.
    """
    latent = spec.attention.latent
    assert latent is not None
    by_head = both.view(spec.n_head, -1, latent.n_lora_kv)
    keys, values = by_head.split((by_head.shape[1] - latent.n_embd_head_v, latent.n_embd_head_v), 1)
    return keys.transpose(1, 2), values


def latent_queries(matrices: LatentMatrices, spec: ModelSpec, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of queries that stay [n, n_head, n_unrotated] and that rotate [n, n_head, n_rot], of their rows."""
    rows = rows if matrices.q is None else rows @ matrices.q.T
    heads = rows.view(len(rows), spec.n_head, -1)
    plain, turning = heads.split((heads.shape[-1] - spec.rope.n_rot, spec.rope.n_rot), -1)
    return plain, turning


def latent_keys_and_values(matrices: LatentMatrices, row: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [n, n_head, n_embd_head_k] and values [n, n_head, n_embd_head_v] of normalised low-rank rows [n, n_lora_kv]
    and of the rotated part [n, 1, n_rot] that all heads have.
    """
    plain = torch.einsum("nr,hru->nhu", row, matrices.k)
    keys = torch.cat((plain, rotated.expand(-1, plain.shape[1], -1)), -1)
    return keys, torch.einsum("nr,hvr->nhv", row, matrices.v)
