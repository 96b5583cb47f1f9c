"""Heads of attention in torch, and those of multi-head latent attention (MLA), absorbed or not as in the engine.

In both forms every matrix reads and makes what it does in llama.cpp, so that calibration can observe it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slimoe.converter.forward.norms import rms_norm
from slimoe.converter.forward.rotation import rotate
from slimoe.offload.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Heads:
    """Queries [n, n_head, n_key], and the keys [n, n_key] and values [n, n_value] of each group of heads, in order.

    `reads` has what the matrices read that made them, and `products` what these made of it, by role. Outputs are
    multiplied with the sigmoid of `gates` [n, n_head, n_value], if there are any.
    """

    queries: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    reads: Mapping[str, Tensor]
    products: Mapping[str, Tensor]
    gates: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LatentMatrices:
    """What makes heads of low-rank rows: `q` [n_head * n_embd_head_k, n_lora_q], None for queries of full rank.

    Absorbed, `k` [n_head, n_lora_kv, n_unrotated] takes queries to the rows' space and `v` [n_head, n_embd_head_v,
    n_lora_kv] what attention makes of rows to values. In old files `k` [n_head * (n_unrotated + n_embd_head_v),
    n_lora_kv] makes keys and values of rows, and `v` is None.
    """

    q: Tensor | None
    k: Tensor
    v: Tensor | None
    q_norm: Tensor | None
    kv_norm: Tensor

    def heads(self, spec: ModelSpec, q: Tensor, both: Tensor, angles: tuple[Tensor, Tensor]) -> Heads:
        """Heads from the products of the first two matrices: queries, or their low-rank rows [n, n_lora_q], and the
        low-rank rows of keys and values with what rotates of all heads' keys [n, n_lora_kv + n_rot].
        """
        n, n_rot, kind = len(q), spec.rope.n_rot, spec.architecture.rope
        reads, products = {}, {}
        if self.q is not None:
            assert self.q_norm is not None
            reads["attn_q_b"] = rms_norm(q, self.q_norm, spec.rms_eps)
            q = products["attn_q_b"] = reads["attn_q_b"] @ self.q.T
        queries = q.view(n, spec.n_head, -1)
        plain, turning = queries.split((queries.shape[-1] - n_rot, n_rot), -1)
        row, rotated = both.split((both.shape[1] - n_rot, n_rot), -1)
        row = rms_norm(row, self.kv_norm, spec.rms_eps)
        turning, rotated = (rotate(part, *angles, kind) for part in (turning, rotated[:, None]))
        if self.v is not None:
            reads["attn_k_b"] = plain
            plain = products["attn_k_b"] = torch.einsum("nhu,hru->nhr", plain, self.k)
            keys, values = (torch.cat((row, rotated[:, 0]), -1),) * spec.n_head, (row,) * spec.n_head
        else:
            reads["attn_kv_b"] = row
            made = products["attn_kv_b"] = row @ self.k.T
            by_head = made.view(n, spec.n_head, -1)
            unrotated, last = by_head.split((plain.shape[-1], by_head.shape[-1] - plain.shape[-1]), -1)
            keys = torch.cat((unrotated, rotated.expand(-1, spec.n_head, -1)), -1).unbind(1)
            values = last.unbind(1)
        queries = torch.cat((plain, turning), -1)
        if temperature := spec.attention.temperature:
            factors = temperature.factors(np.arange(n, dtype=np.int32))
            queries = queries * torch.from_numpy(factors).to(q.device)[:, None, None]
        return Heads(queries, keys, values, reads, products)
