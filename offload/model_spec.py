"""What a model is: its sizes and constants, and the GGUF keys and tensor names they are stored under.

The loader reads them here and the converter writes them from here. Meanings follow llama.cpp's `llama`
architecture (llama-model.cpp, llama-context.cpp, models/llama.cpp).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from offload.errors import ModelFileError, UnsupportedModelError
from offload.gguf_file import GGUFFile, Value

ARCHITECTURES = {"llama": "Llama, Mistral and Mixtral"}
"""`general.architecture` values that the engine runs, and the models that carry them."""
ROPE_SCALINGS = ("none", "linear", "yarn")
ROPE_FREQS = "rope_freqs.weight"  # divisors of the rotation frequencies, [n_rot / 2]: Llama 3.1's rope scaling

_AGAIN = "Download or convert it again."


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention: `n_embd_head` values per head, keys and values shared by n_head / n_head_kv heads."""

    n_head: int
    n_head_kv: int
    n_embd_head: int


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """Routing: softmax over `n_expert`, the best `n_expert_used` renormalised, times `weights_scale`; 0 is dense."""

    n_expert: int = 0
    n_expert_used: int = 0
    weights_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding. The first fields are the file's, the properties are `ggml_rope_ext`'s arguments."""

    n_rot: int
    n_ctx_orig: int
    freq_base: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    attn_multiplier: float = 1.0

    @property
    def freq_scale(self) -> float:
        """Factor on every rotation frequency."""
        return 1.0 if self.scaling == "none" else 1.0 / self.factor

    @property
    def ext_factor(self) -> float:
        """Share of YaRN's extrapolation: all or nothing."""
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


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model's sizes. `n_ff` is the width of one expert, or of the dense FFN when `n_expert` is 0."""

    architecture: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    rms_eps: float
    attention: AttentionSpec
    experts: ExpertSpec
    rope: RopeSpec

    @property
    def n_head(self) -> int:
        """Query heads."""
        return self.attention.n_head

    @property
    def n_head_kv(self) -> int:
        """Key and value heads."""
        return self.attention.n_head_kv

    @property
    def n_embd_head(self) -> int:
        """Values per head."""
        return self.attention.n_embd_head

    @property
    def attention_scale(self) -> float:
        """Factor on the products of queries and keys."""
        return 1.0 / math.sqrt(self.attention.n_embd_head)

    @property
    def n_expert(self) -> int:
        """Experts per layer; 0 for a dense model."""
        return self.experts.n_expert

    @property
    def n_expert_used(self) -> int:
        """Experts per token."""
        return self.experts.n_expert_used

    @property
    def expert_weights_scale(self) -> float:
        """Factor on the renormalised router weights."""
        return self.experts.weights_scale

    @classmethod
    def from_gguf(cls, gguf: GGUFFile) -> "ModelSpec":
        """Reads the metadata.

        Raises UnsupportedModelError for what this engine does not run, ModelFileError for missing or
        contradictory values. Tensors are `check_tensors`' business.
        """
        architecture = gguf.metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            known = ", ".join(f"{name} ({models})" for name, models in ARCHITECTURES.items())
            problem = f"the architecture {architecture!r} is not supported, only {known}."
            raise UnsupportedModelError(gguf.path, problem)
        keys = _Keys(gguf, f"{architecture}.")
        n_embd = keys.count("embedding_length")
        n_ctx_train = keys.count("context_length")
        attention = _attention(keys, n_embd)
        embeddings = gguf.tensors.get("token_embd.weight")
        return cls(
            architecture=architecture,
            n_layer=keys.count("block_count"),
            n_embd=n_embd,
            n_ff=keys.count("feed_forward_length"),
            n_vocab=embeddings.ne[-1] if embeddings else keys.count("vocab_size"),
            n_ctx_train=n_ctx_train,
            rms_eps=keys.number("attention.layer_norm_rms_epsilon"),
            attention=attention,
            experts=_experts(keys),
            rope=_rope(keys, attention.n_embd_head, n_ctx_train),
        )

    def metadata(self) -> dict[str, int | float | str]:
        """The keys and values that `from_gguf` reads, and a stock llama.cpp too."""
        values: dict[str, int | float | str] = {
            "block_count": self.n_layer,
            "context_length": self.n_ctx_train,
            "embedding_length": self.n_embd,
            "feed_forward_length": self.n_ff,
            "vocab_size": self.n_vocab,
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head_kv,
            "attention.key_length": self.n_embd_head,
            "attention.value_length": self.n_embd_head,
            "attention.layer_norm_rms_epsilon": self.rms_eps,
            "rope.dimension_count": self.rope.n_rot,
            "rope.freq_base": self.rope.freq_base,
        }
        if self.n_expert:
            values |= {"expert_count": self.n_expert, "expert_used_count": self.n_expert_used}
        if self.rope.scaling != "none":
            values |= {"rope.scaling.type": self.rope.scaling, "rope.scaling.factor": self.rope.factor}
            values["rope.scaling.original_context_length"] = self.rope.n_ctx_orig
            values["rope.scaling.attn_factor"] = self.rope.attn_multiplier
        return {f"{self.architecture}.{key}": value for key, value in values.items()}


class _Keys:
    """Reads an architecture's keys, each with one error message for whatever is wrong with it."""

    def __init__(self, gguf: GGUFFile, prefix: str) -> None:
        self.gguf = gguf
        self.prefix = prefix

    def value(self, name: str, default: Value = None) -> Value:
        """A scalar; an array with a value per layer counts as one if the layers agree."""
        value = self.gguf.metadata.get(self.prefix + name, default)
        if isinstance(value, np.ndarray):
            if len(set(value.tolist())) != 1:
                problem = f"{self.prefix}{name} differs between layers, which is not supported."
                raise UnsupportedModelError(self.gguf.path, problem)
            value = value[0].item()
        if value is None:
            raise ModelFileError(self.gguf.path, f"the key {self.prefix}{name} is missing.", _AGAIN)
        return value

    def count(self, name: str, default: int | None = None) -> int:
        value = self.value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < (1 if default != 0 else 0):
            raise ModelFileError(self.gguf.path, f"{self.prefix}{name} is {value!r}, which is no count.", _AGAIN)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.value(name, default)
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            problem = f"{self.prefix}{name} is {value!r}, which is no positive number."
            raise ModelFileError(self.gguf.path, problem, _AGAIN)
        return float(value)


def _attention(keys: _Keys, n_embd: int) -> AttentionSpec:
    n_head = keys.count("attention.head_count")
    n_head_kv = keys.count("attention.head_count_kv", n_head)
    if n_head % n_head_kv:
        problem = f"{n_head} attention heads do not divide into groups for {n_head_kv} key heads."
        raise ModelFileError(keys.gguf.path, problem, _AGAIN)
    n_embd_head = keys.count("attention.key_length", n_embd // n_head if n_embd % n_head == 0 else -1)
    if keys.count("attention.value_length", n_embd_head) != n_embd_head:
        raise UnsupportedModelError(keys.gguf.path, "keys and values of different length are not supported.")
    return AttentionSpec(n_head, n_head_kv, n_embd_head)


def _experts(keys: _Keys) -> ExpertSpec:
    n_expert, n_used = keys.count("expert_count", 0), keys.count("expert_used_count", 0)
    if n_used > n_expert or (n_expert and not n_used):
        raise ModelFileError(keys.gguf.path, f"it uses {n_used} of {n_expert} experts per token.", _AGAIN)
    return ExpertSpec(n_expert, n_used, keys.number("expert_weights_scale", 1.0))


def _rope(keys: _Keys, n_embd_head: int, n_ctx_train: int) -> RopeSpec:
    n_rot = keys.count("rope.dimension_count", n_embd_head)
    if n_rot != n_embd_head or n_rot % 2:
        raise UnsupportedModelError(keys.gguf.path, f"it rotates {n_rot} of {n_embd_head} values per head, not pairs.")
    factor = keys.value("rope.scaling.factor", keys.value("rope.scale_linear", 0.0))
    scaling = keys.value("rope.scaling.type", "linear")
    if scaling not in ROPE_SCALINGS:
        raise UnsupportedModelError(keys.gguf.path, f"rope scaling of type {scaling!r} is not supported.")
    return RopeSpec(
        n_rot=n_rot,
        n_ctx_orig=keys.count("rope.scaling.original_context_length", n_ctx_train),
        freq_base=keys.number("rope.freq_base", 10000.0),
        scaling=scaling if scaling == "yarn" or factor else "none",
        factor=keys.number("rope.scaling.factor", factor) if factor else 1.0,
        attn_multiplier=keys.number("rope.scaling.attn_factor", 1.0),
    )


def check_tensors(gguf: GGUFFile, spec: ModelSpec) -> None:
    """Raises ModelFileError that names the first tensor that is missing or has another shape than `spec` says."""
    for alternatives in _expected_tensors(spec):
        found = next((choice for choice in alternatives if gguf.tensors.keys() & choice.keys()), alternatives[0])
        for name, ne in found.items():
            tensor = gguf.tensors.get(name)
            if tensor is None:
                raise ModelFileError(gguf.path, f"tensor {name} is missing.", _AGAIN)
            if tensor.ne != ne:
                problem = f"tensor {name} has the shape {tensor.ne}, but {ne} belongs to this model."
                raise ModelFileError(gguf.path, problem, _AGAIN)


_Layout = dict[str, tuple[int, ...]]


def _expected_tensors(spec: ModelSpec) -> Iterator[list[_Layout]]:
    """Groups of tensors, each in one or several layouts, as names and shapes in ggml's order; {} is no tensor."""
    yield [{"token_embd.weight": (spec.n_embd, spec.n_vocab)}]
    yield [{"output_norm.weight": (spec.n_embd,)}]
    yield [{}, {"output.weight": (spec.n_embd, spec.n_vocab)}]
    yield [{}, {ROPE_FREQS: (spec.rope.n_rot // 2,)}]
    n_q, n_kv = spec.n_head * spec.n_embd_head, spec.n_head_kv * spec.n_embd_head
    for layer in range(spec.n_layer):
        block = f"blk.{layer}."
        yield [{block + "attn_norm.weight": (spec.n_embd,)}]
        separate = {"attn_q.weight": n_q, "attn_k.weight": n_kv, "attn_v.weight": n_kv}
        fused: _Layout = {block + "attn_qkv.weight": (spec.n_embd, n_q + 2 * n_kv)}
        yield [{block + name: (spec.n_embd, n_out) for name, n_out in separate.items()}, fused]
        yield [{block + "attn_output.weight": (n_q, spec.n_embd)}]
        yield [{block + "ffn_norm.weight": (spec.n_embd,)}]
        yield from _expected_ffn(spec, block)


def _expected_ffn(spec: ModelSpec, block: str) -> Iterator[list[_Layout]]:
    if spec.n_expert:
        yield [{block + "ffn_gate_inp.weight": (spec.n_embd, spec.n_expert)}]
    for name in ("ffn_gate", "ffn_up", "ffn_down"):
        ne = (spec.n_ff, spec.n_embd) if name == "ffn_down" else (spec.n_embd, spec.n_ff)
        if spec.n_expert:
            each: _Layout = {f"{block}{name}.{expert}.weight": ne for expert in range(spec.n_expert)}
            yield [{f"{block}{name}_exps.weight": (*ne, spec.n_expert)}, each]
        else:
            yield [{f"{block}{name}.weight": ne}]
