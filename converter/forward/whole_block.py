"""A block as one function of its input through which gradients flow, for training what it holds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimoe.converter.forward.block import (
    attend,
    read_attention,
    read_aux_vectors,
    read_dense,
    read_end,
    read_expert,
    read_latent_space,
    read_router,
    read_shared,
    read_tensor,
)
from slimoe.converter.forward.routing import Router, route
from slimoe.converter.forward.stream import rows_by_expert
from slimoe.converter.forward.tensor_source import TensorSource
from slimoe.converter.source.model_source import constant_key


def pass_block(source: TensorSource, layer: int, h: Tensor, lengths: Sequence[int]) -> Tensor:
    """The hidden states [n, n_embd] behind a layer, from those before it, of sequences with `lengths` that sum to n.

    It computes what `Stream.pass_layer` does, and keeps what a backward pass needs. Raises ModelFileError.
    """
    attention = read_attention(source, layer, source.device)
    if attention is not None:
        parts = h.split(list(lengths))
        h = torch.cat([part + attend(attention, source.spec, part).update for part in parts])
    router, end = read_router(source, layer, source.device), read_end(source, layer, source.device)
    if router is not None:
        total, always = _mixture(source, layer, router, h)
        if end is not None:
            return end.after(h, total, always)
        return h + source.spec.multipliers.residual * (total if always is None else total + always)
    if source.layers[layer].has_ffn:
        norm, ffn = read_dense(source, layer, source.device)
        return h + source.spec.multipliers.residual * ffn(norm(h))
    return h if end is None else end.scaled(h)


def _mixture(source: TensorSource, layer: int, router: Router, h: Tensor) -> tuple[Tensor, Tensor | None]:
    """What experts say to the hidden states `h` [n, n_embd], and what the shared one does, None without.

    No gradient flows through which ones are selected.
    """
    x, space = router.norm(h), read_latent_space(source, layer, source.device)
    read = x if space is None else space.down(x)
    routing, n_main = route(router, source.spec, x), source.spec.n_expert_used
    total = torch.zeros_like(read)
    for number, rows, weights in rows_by_expert(source.layers[layer].target, routing, n_main):
        if number < 0:
            output = read_tensor(source, constant_key(layer, -1 - number), source.device)[None]
        else:
            output = read_expert(source, layer, number, source.device)(read[rows])
        total = total.index_add(0, rows, weights[:, None] * output)
    aux = read_aux_vectors(source, layer, source.device)
    if aux is not None:
        others = routing.selected[:, n_main:], routing.weights[:, n_main:]
        total = total * aux.gains(*others) + aux.shifts(*others)
    shared = read_shared(source, layer, source.device)
    total = total if space is None else space.up(total)
    return total, None if shared is None else shared(x)
