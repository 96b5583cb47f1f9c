"""Rotary position embedding in torch, as ggml computes it. Apart: `block` is long, and this needs none of it."""

import math

import torch
from torch import Tensor

from slimoe.offload.model.architecture import RopeType
from slimoe.offload.model.rope import RopeSpec


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, kind: RopeType = RopeType.NORM) -> Tensor:
    """Rotates the pairs of heads [n, n_head, n_embd_head]: (2i, 2i + 1), or (i, i + half) as NEOX has it.

    Values beyond the angles stay.
    """
    half = cos.shape[-1]
    n_rot = 2 * half
    is_split = kind is RopeType.NEOX
    first, second = (slice(0, half), slice(half, n_rot)) if is_split else (slice(0, n_rot, 2), slice(1, n_rot, 2))
    even, odd = heads[..., first], heads[..., second]
    cos, sin = cos[:, None], sin[:, None]
    turned = (even * cos - odd * sin, even * sin + odd * cos)
    rotated = torch.cat(turned, -1) if is_split else torch.stack(turned, -1).flatten(-2)
    return torch.cat((rotated, heads[..., n_rot:]), -1)


def angles_of(rope: RopeSpec, n: int, device: torch.device, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines [n, n_rot / 2], with YaRN's interpolation as `ggml_rope_ext` does it (ggml-cpu/ops.cpp)."""
    pairs = torch.arange(rope.n_rot // 2, dtype=torch.float64, device=device)
    frequencies = rope.freq_base ** (-2.0 * pairs / rope.n_rot)
    if factors is not None:
        frequencies = frequencies / factors
    scaled, size = rope.freq_scale * frequencies, rope.attn_factor
    if rope.ext_factor:
        low, high = rope.turning_pair(rope.beta_fast), rope.turning_pair(rope.beta_slow)
        low, high = max(0.0, math.floor(low)), min(rope.n_rot - 1.0, math.ceil(high))
        mix = (1.0 - ((pairs - low) / max(0.001, high - low)).clamp(0, 1)) * rope.ext_factor
        scaled = scaled * (1 - mix) + frequencies * mix
        size *= 1.0 + 0.1 * math.log(1.0 / rope.freq_scale)
    angles = torch.arange(n, dtype=torch.float64, device=device)[:, None] * scaled
    return (size * angles.cos()).float(), (size * angles.sin()).float()
