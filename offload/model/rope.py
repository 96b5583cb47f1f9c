"""Rotary position embedding: its constants, as a GGUF file has them and as ggml takes them."""

import math
from dataclasses import dataclass

import numpy as np

from slimoe.offload.errors import UnsupportedModelError
from slimoe.offload.gguf.metadata_keys import MetadataKeys
from slimoe.offload.model.architecture import Architecture

_F32 = np.float32
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding. The fields are those of the file, the properties the arguments of `ggml_rope_ext`.

    With an `n_rot` of 0 nothing rotates. In MLA `yarn_log_multiplier` is a tenth of YaRN's mscale_all_dim, which is its
    mscale too if `is_mscale_shared`. `window_freq_base` takes the place of `freq_base` in layers with a sliding window,
    and `window_n_rot` that of `n_rot`; 0 is the same one.
    """

    n_rot: int
    n_ctx_orig: int
    freq_base: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    attn_multiplier: float = 1.0
    yarn_log_multiplier: float = 0.0
    is_mscale_shared: bool = False
    window_freq_base: float = 0.0
    window_n_rot: int = 0
    sections: tuple[int, ...] = ()
    """How many pairs turn by a token's place in time, by its row and by its column, which are the same in text."""

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
        return float(self._magnitude * _F32(self.attn_multiplier))

    @property
    def _magnitude(self) -> np.float32:
        """YaRN's part of `attn_factor`, in llama.cpp's arithmetic."""
        if self.scaling != "yarn":
            return _F32(1.0)
        factor = self._stored_factor
        all_dim = self._mscale_all_dim
        mscale = all_dim if self.is_mscale_shared and all_dim not in (0.0, 1.0) else _F32(1.0)
        # An mscale_all_dim of 0 leaves YaRN's magnitude as it is.
        magnitude = _mscale(factor, mscale) / _mscale(factor, all_dim)
        return magnitude * (_F32(1.0) / (_F32(1.0) + _F32(0.1) * _ln(factor)))

    @property
    def _mscale_all_dim(self) -> np.float32:
        return _F32(self.yarn_log_multiplier) / _F32(0.1)

    @property
    def _stored_factor(self) -> np.float32:
        """The factor of the context, by the way of `freq_scale`."""
        return _F32(1.0) / (_F32(1.0) if self.scaling == "none" else _F32(1.0) / _F32(self.factor))

    def latent_scale(self, n_embd_head: int) -> float:
        """Factor on the products of queries and keys of MLA, in llama.cpp's arithmetic.

        `n_embd_head` are the values per head of queries and keys. It has the square of YaRN's magnitude, which is not
        in the rotation.
        """
        growth = _ln(self._stored_factor)
        magnitude = self._magnitude * _F32(self.attn_multiplier) * (_F32(1.0) + _F32(0.1) * growth)
        mscale = magnitude * (_F32(1.0) + _F32(0.1) * self._mscale_all_dim * growth)
        return float(mscale * mscale / np.sqrt(_F32(n_embd_head)))

    @property
    def beta_fast(self) -> float:
        """Rotations over the context above which YaRN leaves a dimension as it is."""
        return 32.0

    @property
    def beta_slow(self) -> float:
        """Rotations over the context below which YaRN interpolates a dimension."""
        return 1.0


def _ln(factor: np.float32) -> np.float32:
    """The natural logarithm, rounded correctly, which numpy's own of F32 is not."""
    return _F32(math.log(factor))


def _mscale(factor: np.float32, mscale: np.float32) -> np.float32:
    return _F32(1.0) if factor <= 1.0 else _F32(0.1) * mscale * _ln(factor) + _F32(1.0)


def read_rope(
    keys: MetadataKeys, architecture: Architecture, n_embd_head: int, n_ctx_train: int, n_window_head: int = 0
) -> RopeSpec:
    """Reads the `rope.` keys; fewer values than a head has may rotate where the architecture rotates partly.

    Heads of layers with a window have `n_window_head` values, or with 0 as many as the others. Raises
    UnsupportedModelError for what is not implemented, ModelFileError for nonsense.
    """
    n_rot = keys.count("rope.dimension_count", n_embd_head)
    rotates = architecture.rotation != "by_key" or keys.flag("rope.scaling.finetuned", default=True)
    if architecture.rotation == "never" or not rotates:
        return RopeSpec(0, n_ctx_train)
    is_partial = architecture.rotates_partly or architecture.has_latent_attention
    if n_rot > n_embd_head or (n_rot != n_embd_head and not is_partial) or n_rot % 2:
        raise UnsupportedModelError(keys.gguf.path, f"it rotates {n_rot} of {n_embd_head} values per head, not pairs.")
    factor = keys.value("rope.scaling.factor", keys.value("rope.scale_linear", 0.0))
    scaling = keys.value("rope.scaling.type", "linear")
    if scaling not in ROPE_SCALINGS:
        raise UnsupportedModelError(keys.gguf.path, f"rope scaling of type {scaling!r} is not supported.")
    n_window_rot = keys.count("rope.dimension_count_swa", n_rot) if n_window_head else 0
    if n_window_rot > n_window_head or n_window_rot % 2:
        problem = f"layers with a window rotate {n_window_rot} of {n_window_head} values per head, not pairs."
        raise UnsupportedModelError(keys.gguf.path, problem)
    if n_window_head and (factor or scaling in ("yarn", "longrope")):
        problem = "rope scaling is not supported where layers with a window have heads of their own."
        raise UnsupportedModelError(keys.gguf.path, problem)
    return RopeSpec(
        n_rot=n_rot,
        n_ctx_orig=keys.count("rope.scaling.original_context_length", n_ctx_train),
        freq_base=keys.number("rope.freq_base", 10000.0),
        scaling=scaling if scaling in ("yarn", "longrope") or factor else "none",
        factor=keys.number("rope.scaling.factor", factor) if factor else 1.0,
        attn_multiplier=keys.number("rope.scaling.attn_factor", 1.0),
        yarn_log_multiplier=_log_multiplier(keys) if architecture.has_latent_attention else 0.0,
        is_mscale_shared=architecture.is_mscale_shared,
        window_freq_base=_window_base(keys, has_own=n_window_head > 0),
        window_n_rot=n_window_rot,
        sections=keys.integers("rope.dimension_sections", 4) if keys.has("rope.dimension_sections") else (),
    )


def _window_base(keys: MetadataKeys, *, has_own: bool) -> float:
    """The base in layers with a window; without its key the model's, or llama.cpp's default where these layers have
    heads of their own.
    """
    if not keys.has("rope.freq_base_swa"):
        return 10000.0 if has_own else 0.0
    return keys.number("rope.freq_base_swa")


def _log_multiplier(keys: MetadataKeys) -> float:
    has_any = keys.value("rope.scaling.yarn_log_multiplier", 0.0)
    return keys.number("rope.scaling.yarn_log_multiplier") if has_any else 0.0
