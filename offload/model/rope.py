"""Rotary position embedding: its constants, as a GGUF file has them and as ggml takes them."""

import math
from dataclasses import dataclass

from slimoe.offload.errors import UnsupportedModelError
from slimoe.offload.gguf.metadata_keys import MetadataKeys

ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding. The fields are those of the file, the properties the arguments of `ggml_rope_ext`."""

    n_rot: int
    n_ctx_orig: int
    freq_base: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    attn_multiplier: float = 1.0

    def n_ctx_reached(self, n_ctx_train: int) -> int:
        """Tokens that the scaled rotation was made for, in a file whose context length is `n_ctx_train`.

        The context length is the scaled one already if it is longer than the original one. With linear scaling, where
        files name no original length, it always is.
        """
        is_scaled = self.scaling == "yarn" or self.n_ctx_orig < n_ctx_train
        return max(n_ctx_train, int(self.n_ctx_orig * self.factor) if is_scaled else 0)

    def turning_pair(self, n_turns: float) -> float:
        """The pair, a number that need not be whole, that turns `n_turns` times within the original context."""
        return self.n_rot * math.log(self.n_ctx_orig / (n_turns * 2 * math.pi)) / (2 * math.log(self.freq_base))

    @property
    def freq_scale(self) -> float:
        """Factor on every rotation frequency."""
        return 1.0 if self.scaling == "none" else 1.0 / self.factor

    @property
    def ext_factor(self) -> float:
        """The part of YaRN's extrapolation: all of it, or none."""
        return 1.0 if self.scaling == "yarn" else 0.0

    @property
    def attn_factor(self) -> float:
        """Magnitude of the rotated values; ggml itself multiplies YaRN's 1 + 0.1 ln(factor) to it."""
        if self.scaling != "yarn":
            return self.attn_multiplier
        growth = 0.1 * math.log(self.factor)
        return self.attn_multiplier * (max(growth, 0.0) + 1.0) / (1.0 + growth)

    @property
    def beta_fast(self) -> float:
        """Rotations over the context above which YaRN leaves a dimension as it is."""
        return 32.0

    @property
    def beta_slow(self) -> float:
        """Rotations over the context below which YaRN interpolates a dimension."""
        return 1.0


def read_rope(keys: MetadataKeys, n_embd_head: int, n_ctx_train: int, *, is_partial: bool = False) -> RopeSpec:
    """Reads the `rope.` keys; fewer values than a head has may rotate if `is_partial`.

    Raises UnsupportedModelError for what is not implemented, ModelFileError for nonsense.
    """
    n_rot = keys.count("rope.dimension_count", n_embd_head)
    if n_rot > n_embd_head or (n_rot != n_embd_head and not is_partial) or n_rot % 2:
        raise UnsupportedModelError(keys.gguf.path, f"it rotates {n_rot} of {n_embd_head} values per head, not pairs.")
    factor = keys.value("rope.scaling.factor", keys.value("rope.scale_linear", 0.0))
    scaling = keys.value("rope.scaling.type", "linear")
    if scaling not in ROPE_SCALINGS:
        raise UnsupportedModelError(keys.gguf.path, f"rope scaling of type {scaling!r} is not supported.")
    return RopeSpec(
        n_rot=n_rot,
        n_ctx_orig=keys.count("rope.scaling.original_context_length", n_ctx_train),
        freq_base=keys.number("rope.freq_base", 10000.0),
        scaling=scaling if scaling in ("yarn", "longrope") or factor else "none",
        factor=keys.number("rope.scaling.factor", factor) if factor else 1.0,
        attn_multiplier=keys.number("rope.scaling.attn_factor", 1.0),
    )
