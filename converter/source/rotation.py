"""The rotary position embedding that config.json describes, in the terms of a GGUF file.

A file has YaRN's settings where ggml computes from them what transformers does (modeling_rope_utils.py). It has
divisors of the frequencies, one for each pair, where ggml has no word for a setting: Llama 3.1's scaling, or YaRN with
bounds of its own. The magnitude of the rotated values is a key of its own in either case.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from msgspec import UnsetType
from numpy.typing import NDArray

from slimoe.converter.source.families.config import ModelConfig
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.rope import RopeSpec

_BETAS = (32.0, 1.0)
"""The bounds, in turns within the original context, that ggml's YaRN is run with."""
_STILL = 1e30
"""What a pair's frequency is divided by that does not turn, as llama.cpp's converter has it."""
_ROUNDING = 1e-3
"""ggml rounds the bounds' pairs in float32: nearer than this to an integer, it may round to the other one."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """The file's constants, and the divisors of the frequencies [n_rot / 2] if it needs any, by their tensor's role."""

    spec: RopeSpec
    divisors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


def read_rotation(path: Path, config: ModelConfig, architecture: Architecture) -> Rotation:
    """Raises UnsupportedModelError for what a GGUF file of this architecture cannot hold, ModelFileError for nonsense.

    `path` is that of config.json.
    """
    if config.n_rot == 0:
        return Rotation(RopeSpec(0, config.max_position_embeddings))
    return _Reader(path, config, architecture).read()


class _Reader:
    def __init__(self, path: Path, config: ModelConfig, architecture: Architecture) -> None:
        self.is_mscale_shared = architecture.is_mscale_shared
        self.path, self.config, self.fields = path, config, config.rope
        theta = config.rope_theta if isinstance(self.fields.rope_theta, UnsetType) else self.fields.rope_theta
        self.plain = RopeSpec(self._n_rot(architecture.rotates_partly), config.max_position_embeddings, theta)

    def _n_rot(self, is_partial: bool) -> int:
        """Values of a head that are rotated."""
        if self.config.n_rot is not None:
            return self.config.n_rot
        own = self.fields.partial_rotary_factor
        partial = self.config.partial_rotary_factor if isinstance(own, UnsetType) else own
        if partial in (None, 1.0):
            return self.config.n_embd_head
        n_rot = int(self.config.n_embd_head * partial)
        if not is_partial or not 0 < n_rot <= self.config.n_embd_head or n_rot % 2:
            why = "heads that are rotated in part are not supported"
            why = f"of {self.config.n_embd_head} values this is no number of pairs" if is_partial else why
            problem = f"partial_rotary_factor is {partial:g}; {why}."
            raise UnsupportedModelError(self.path, problem)
        return n_rot

    def read(self) -> Rotation:
        fields = self.fields
        kind = fields.type if isinstance(fields.rope_type, UnsetType) else fields.rope_type
        if isinstance(kind, UnsetType) or kind == "default":
            return Rotation(self.plain)
        if kind == "linear":
            return Rotation(replace(self.plain, scaling="linear", factor=self._needed("linear", "factor")))
        if kind == "llama3":
            return Rotation(self.plain, {"rope_freqs": self._llama3()})
        if kind == "yarn":
            return self._yarn()
        if kind == "proportional":
            return Rotation(self.plain, {"rope_freqs": self._proportional()})
        if kind in ("longrope", "su"):
            return self._longrope()
        problem = f"rope scaling of type {kind!r} is not supported."
        if kind == "dynamic":
            problem = "rope scaling of type 'dynamic' depends on a text's length, which a GGUF cannot express."
        raise UnsupportedModelError(self.path, problem, "Supported are default, linear, llama3, longrope and yarn.")

    def _needed(self, kind: str, name: str) -> float:
        value = getattr(self.fields, name)
        if value is None or isinstance(value, UnsetType):
            problem = f"rope scaling of type {kind!r} needs {name}, which is missing."
            raise ModelFileError(self.path, problem, "Download the checkpoint again.")
        return float(value)

    def _original_context(self) -> int:
        """Where the length stands beside the rotation's fields it counts, as transformers has it."""
        for value in (self.config.original_max_position_embeddings, self.fields.original_max_position_embeddings):
            if not isinstance(value, UnsetType):
                return value
        return self.config.max_position_embeddings

    def _llama3(self) -> NDArray[np.float32]:
        """Long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
        names = ("factor", "low_freq_factor", "high_freq_factor")
        factor, low, high = (self._needed("llama3", name) for name in names)
        if low >= high:
            problem = f"low_freq_factor is {low:g}, which is not below high_freq_factor, {high:g}."
            raise ModelFileError(self.path, problem, "Download the checkpoint again.")
        n_rot = self.plain.n_rot
        frequencies = self.plain.freq_base ** -(np.arange(0, n_rot, 2, dtype=np.float64) / n_rot)
        turns = self._original_context() * frequencies / (2 * np.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return np.asarray(1.0 / (kept + (1.0 - kept) / factor), np.float32)

    def _proportional(self) -> NDArray[np.float32]:
        """The first pairs of a head turn at the speeds that they would have if all did; the others hardly turn."""
        partial, factor = self.fields.partial_rotary_factor, self.fields.factor
        partial = 1.0 if partial is None or isinstance(partial, UnsetType) else partial
        if not 0 <= partial <= 1:
            problem = f"partial_rotary_factor is {partial:g}, which is no part of a head."
            raise ModelFileError(self.path, problem, "Download the checkpoint again.")
        n_turned = int(partial * self.plain.n_rot // 2)
        slower = 1.0 if factor is None or isinstance(factor, UnsetType) else factor
        return np.where(np.arange(self.plain.n_rot // 2) < n_turned, slower, _STILL).astype(np.float32)

    def _longrope(self) -> Rotation:
        """Divisors of their own for contexts up to the original length and for longer ones."""
        fields, n_ctx, n_pairs = self.fields, self._original_context(), self.plain.n_rot // 2
        factors = {"rope_factors_short": fields.short_factor or [], "rope_factors_long": fields.long_factor or []}
        for name, values in factors.items():
            if len(values) != n_pairs:
                problem = f"{name.removeprefix('rope_factors_')}_factor has {len(values)} entries, not {n_pairs}."
                raise ModelFileError(self.path, problem, "Download the checkpoint again.")
        if fields.short_mscale != fields.long_mscale:
            problem = f"short_mscale and long_mscale are {fields.short_mscale} and {fields.long_mscale}, not the same."
            raise UnsupportedModelError(self.path, problem)
        growth = max(0.0, math.log(self.config.max_position_embeddings / n_ctx))
        size = fields.short_mscale or fields.attention_factor or math.sqrt(1 + growth / math.log(max(2, n_ctx)))
        spec = replace(self.plain, n_ctx_orig=n_ctx, scaling="longrope", attn_multiplier=size)
        return Rotation(spec, {name: np.asarray(values, np.float32) for name, values in factors.items()})

    def _yarn(self) -> Rotation:
        fields, n_ctx = self.fields, self._original_context()
        whole = self.config.max_position_embeddings / n_ctx
        factor = whole if fields.factor is None else self._needed("yarn", "factor")
        betas = (fields.beta_fast or _BETAS[0], fields.beta_slow or _BETAS[1])
        if min(betas) <= 0 or self.plain.freq_base <= 1:
            problem = f"YaRN with beta_fast {betas[0]:g}, beta_slow {betas[1]:g} and rope_theta"
            raise ModelFileError(self.path, f"{problem} {self.plain.freq_base:g} means nothing.")
        all_dim = fields.mscale_all_dim or 0.0
        if self.config.attention.latent and (fields.mscale != all_dim or not all_dim or fields.attention_factor):
            problem = "YaRN with latent attention is supported only where mscale and mscale_all_dim are the same"
            raise UnsupportedModelError(self.path, f"{problem}, not {fields.mscale} and {fields.mscale_all_dim}.")
        size = self._yarn_magnitude(factor)
        bounds = [replace(self.plain, n_ctx_orig=n_ctx).turning_pair(beta) for beta in betas]
        low, high = (math.floor(bounds[0]), math.ceil(bounds[1])) if fields.truncate else bounds
        low, high = max(low, 0), min(high, self.plain.n_rot - 1)
        is_clear = all(abs(bound - round(bound)) > _ROUNDING for bound in bounds)
        if fields.truncate and betas == _BETAS and low <= high and is_clear:
            if self.config.attention.latent:
                log_multiplier = 0.1 * all_dim
                plain = replace(self.plain, yarn_log_multiplier=log_multiplier, is_mscale_shared=self.is_mscale_shared)
                return Rotation(replace(plain, n_ctx_orig=n_ctx, scaling="yarn", factor=factor))
            own = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
            spec = replace(self.plain, n_ctx_orig=n_ctx, scaling="yarn", factor=factor, attn_multiplier=size / own)
            return Rotation(spec)
        pairs = np.arange(self.plain.n_rot // 2, dtype=np.float64)
        interpolated = np.clip((pairs - low) / (high - low if high != low else 0.001), 0, 1)
        divisors = 1.0 / (interpolated / factor + 1.0 - interpolated)
        return Rotation(replace(self.plain, attn_multiplier=size), {"rope_freqs": divisors.astype(np.float32)})

    def _yarn_magnitude(self, factor: float) -> float:
        fields = self.fields
        if fields.attention_factor is not None:
            return fields.attention_factor
        growth = math.log(factor) if factor > 1 else 0.0
        size = 0.1 * growth + 1.0
        if fields.mscale and fields.mscale_all_dim:
            size = (0.1 * fields.mscale * growth + 1.0) / (0.1 * fields.mscale_all_dim * growth + 1.0 or math.inf)
        if not 0 < size < math.inf:
            problem = f"mscale {fields.mscale} and mscale_all_dim {fields.mscale_all_dim} make a magnitude of {size:g}."
            raise ModelFileError(self.path, problem)
        return size
