"""What a model is: its sizes and constants, and the GGUF keys and tensor names they are stored under.

The loader reads them here and the converter writes them from here. Meanings follow llama.cpp's `llama`
architecture (llama-model.cpp, llama-context.cpp, models/llama.cpp); the same keys under our own architecture's
prefix are the native format's (`native_format`), where sizes may differ between layers.
"""

import math
from dataclasses import dataclass

import numpy as np

from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf.foreign_file import foreign_model
from slimoe.offload.gguf.header import GGUFFile, Value
from slimoe.offload.gguf.metadata_keys import AGAIN, MetadataKeys
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.architectures import ARCHITECTURES, LLAMA
from slimoe.offload.model.rope import RopeSpec, read_rope

NATIVE = "slimoe"
"""Our own architecture, a name that stock loaders refuse."""
NATIVE_VERSION = 1
"""The newest native format that is read, and the one that is written."""
BASE_ARCHITECTURE = "base_architecture"
"""The native format's key for the architecture that a model was made from; without it that is `llama`."""
ROPE_FREQS = "rope_freqs.weight"  # divisors of the rotation frequencies, [n_rot / 2]: Llama 3.1's rope scaling


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention: `n_embd_head` values per head, keys and values shared by n_head / n_head_kv heads."""

    n_head: int
    n_head_kv: int
    n_embd_head: int


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer's router rows, and the width of its widest expert; both 0 in a layer without a feed-forward part.

    In a layer without attention the residual stream reaches the feed-forward part unchanged.
    """

    n_expert: int
    n_ff: int
    has_attention: bool = True


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """Routing: a token selects `n_expert_used` of `n_expert` experts, whose weights are multiplied by `weights_scale`.

    With 0 experts the model is dense.

    `layers` has every layer's shape in a native model, and is empty where all layers are alike.
    """

    n_expert: int = 0
    n_expert_used: int = 0
    weights_scale: float = 1.0
    layers: tuple[LayerShape, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model's sizes. `n_ff` is the width of one expert, or of the dense FFN when `n_expert` is 0.

    `n_window` are the tokens that the model's own attention looks back, 0 for all: here every token sees all before it.
    Where layers differ, `n_ff` and `n_expert` are those of the largest, and `layer_shape` has each layer's.
    """

    architecture: Architecture
    n_layer: int
    n_embd: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    rms_eps: float
    attention: AttentionSpec
    experts: ExpertSpec
    rope: RopeSpec
    n_window: int = 0
    is_native: bool = False

    @property
    def stored_architecture(self) -> str:
        """The value of `general.architecture`, and the prefix of the keys: in a native file the format's own name."""
        return NATIVE if self.is_native else self.architecture.name

    @property
    def n_ctx_scaled(self) -> int:
        """Tokens of context that the model can be expected to handle, with its rotation scaled as it is."""
        return self.rope.n_ctx_reached(self.n_ctx_train)

    @property
    def n_head(self) -> int:
        """The number of query heads."""
        return self.attention.n_head

    @property
    def n_head_kv(self) -> int:
        """The number of key and value heads."""
        return self.attention.n_head_kv

    @property
    def n_embd_head(self) -> int:
        """The number of values per head."""
        return self.attention.n_embd_head

    @property
    def attention_scale(self) -> float:
        """Factor on the products of queries and keys."""
        return 1.0 / math.sqrt(self.attention.n_embd_head)

    @property
    def n_expert(self) -> int:
        """Rows of the router, of the layer that has most of them; 0 for a dense model."""
        return self.experts.n_expert

    @property
    def n_expert_used(self) -> int:
        """The number of experts that a token selects."""
        return self.experts.n_expert_used

    @property
    def expert_weights_scale(self) -> float:
        """Factor on the expert weights."""
        return self.experts.weights_scale

    def layer_shape(self, layer: int) -> LayerShape:
        """Router rows and width of one layer, and whether it has attention."""
        return self.experts.layers[layer] if self.experts.layers else LayerShape(self.n_expert, self.n_ff)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers that have attention, and so keys and values."""
        return tuple(layer for layer in range(self.n_layer) if self.layer_shape(layer).has_attention)

    @classmethod
    def from_gguf(cls, gguf: GGUFFile) -> "ModelSpec":
        """Reads the metadata.

        Raises UnsupportedModelError for what this engine does not run, ModelFileError for missing or
        contradictory values. Tensors are `check_tensors`' business.
        """
        foreign = foreign_model(gguf.path, gguf.metadata, len(gguf.tensors))
        if foreign:
            raise foreign
        stored = gguf.metadata.get("general.architecture")
        keys = MetadataKeys(gguf, f"{stored}.")
        is_native = stored == NATIVE
        name = keys.value(BASE_ARCHITECTURE, LLAMA.name) if is_native else stored
        if not isinstance(name, str) or name not in ARCHITECTURES:
            known = ", ".join(f"{row.name} ({row.models})" for row in ARCHITECTURES.values())
            raise UnsupportedModelError(gguf.path, f"the architecture {name!r} is not supported, only {known}.")
        architecture = ARCHITECTURES[name]
        n_embd = keys.count("embedding_length")
        n_ctx_train = keys.count("context_length")
        attention = _attention(keys, n_embd)
        embeddings = gguf.tensors.get("token_embd.weight")
        n_layer = keys.count("block_count")
        layers = _layer_shapes(keys, n_layer) if is_native else ()
        experts, n_ff = _experts(keys, architecture, layers)
        return cls(
            architecture=architecture,
            n_layer=n_layer,
            n_embd=n_embd,
            n_ff=n_ff,
            n_vocab=embeddings.ne[-1] if embeddings else keys.count("vocab_size"),
            n_ctx_train=n_ctx_train,
            rms_eps=keys.number("attention.layer_norm_rms_epsilon"),
            attention=attention,
            experts=experts,
            rope=read_rope(keys, attention.n_embd_head, n_ctx_train),
            n_window=keys.count("attention.sliding_window", 0),
            is_native=is_native,
        )

    def metadata(self) -> dict[str, Value]:
        """The keys and values that `from_gguf` reads, and a stock llama.cpp too unless the model is native."""
        values: dict[str, Value] = {
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
        if self.n_window:
            values["attention.sliding_window"] = self.n_window
        if self.expert_weights_scale != 1.0:
            values["expert_weights_scale"] = self.expert_weights_scale
        if self.architecture.width_key != "feed_forward_length" and not self.is_native:
            values[self.architecture.width_key] = self.n_ff
        if self.is_native and self.architecture is not LLAMA:
            values[BASE_ARCHITECTURE] = self.architecture.name
        if self.is_native:
            shapes = [self.layer_shape(layer) for layer in range(self.n_layer)]
            values["format.version"] = NATIVE_VERSION
            values["expert_count"] = [shape.n_expert for shape in shapes]
            values["feed_forward_length"] = [shape.n_ff for shape in shapes]
            if not all(shape.has_attention for shape in shapes):
                values["attention.present"] = [int(shape.has_attention) for shape in shapes]
        if self.rope.scaling != "none":
            values |= {"rope.scaling.type": self.rope.scaling, "rope.scaling.factor": self.rope.factor}
            values["rope.scaling.original_context_length"] = self.rope.n_ctx_orig
        if self.rope.attn_multiplier != 1.0:
            values["rope.scaling.attn_factor"] = self.rope.attn_multiplier
        return {f"{self.stored_architecture}.{key}": value for key, value in values.items()}


def _attention(keys: MetadataKeys, n_embd: int) -> AttentionSpec:
    n_head = keys.count("attention.head_count")
    n_head_kv = keys.count("attention.head_count_kv", n_head)
    if n_head % n_head_kv:
        problem = f"{n_head} attention heads do not divide into groups for {n_head_kv} key heads."
        raise ModelFileError(keys.gguf.path, problem, AGAIN)
    n_embd_head = keys.count("attention.key_length", n_embd // n_head if n_embd % n_head == 0 else -1)
    if keys.count("attention.value_length", n_embd_head) != n_embd_head:
        raise UnsupportedModelError(keys.gguf.path, "keys and values of different length are not supported.")
    return AttentionSpec(n_head, n_head_kv, n_embd_head)


def _layer_shapes(keys: MetadataKeys, n_layer: int) -> tuple[LayerShape, ...]:
    """What a native file says of each layer; refuses a format that is newer than this program."""
    version = keys.count("format.version")
    if version > NATIVE_VERSION:
        problem = f"the file is of format version {version}, but this program reads versions up to {NATIVE_VERSION}."
        raise UnsupportedModelError(keys.gguf.path, problem, "Update slimoe, or convert the model again.")
    counts = keys.integers("expert_count", n_layer), keys.integers("feed_forward_length", n_layer)
    present = keys.integers("attention.present", n_layer) if keys.has("attention.present") else (1,) * n_layer
    if max(present) > 1:
        raise keys.bad_entry("attention.present", np.asarray(present), int(np.argmax(present)))
    if not any(present):
        raise ModelFileError(keys.gguf.path, "no layer has attention.", AGAIN)
    layers = tuple(LayerShape(*shape) for shape in zip(*counts, map(bool, present), strict=True))
    for layer, shape in enumerate(layers):
        if bool(shape.n_expert) != bool(shape.n_ff):
            problem = f"layer {layer} has {shape.n_expert} experts of width {shape.n_ff}."
            raise ModelFileError(keys.gguf.path, problem, AGAIN)
    if not any(shape.n_expert for shape in layers):
        raise ModelFileError(keys.gguf.path, "no layer has experts.", AGAIN)
    return layers


def _experts(keys: MetadataKeys, architecture: Architecture, layers: tuple[LayerShape, ...]) -> tuple[ExpertSpec, int]:
    """The experts, and the width of the widest one or of a dense feed-forward part."""
    least = 0 if architecture.may_be_dense else None
    counts = [shape.n_expert for shape in layers if shape.n_expert] or [keys.count("expert_count", least)]
    n_used = keys.count("expert_used_count", 0)
    if n_used > min(counts) or (min(counts) and not n_used):
        raise ModelFileError(keys.gguf.path, f"it uses {n_used} of {min(counts)} experts per token.", AGAIN)
    if layers:
        width = max(shape.n_ff for shape in layers)
    elif architecture.width_key == "feed_forward_length" or keys.has(architecture.width_key):
        width = keys.count(architecture.width_key)
    else:
        width = keys.count("feed_forward_length") // n_used
    return ExpertSpec(max(counts), n_used, keys.number("expert_weights_scale", 1.0), layers), width
