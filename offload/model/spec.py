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
from slimoe.offload.model.architecture import Architecture, Score
from slimoe.offload.model.architectures import ARCHITECTURES, LLAMA, variant_of
from slimoe.offload.model.attention_spec import (
    AttentionSpec,
    attention_metadata,
    read_attention,
    read_window_attention,
    window_metadata,
)
from slimoe.offload.model.expert_spec import ExpertSpec, LayerShape, expert_metadata, read_experts
from slimoe.offload.model.recurrent_spec import RecurrentSpec, read_recurrent, recurrent_metadata
from slimoe.offload.model.rope import RopeSpec, read_rope

NATIVE = "slimoe"
"""Our own architecture, a name that stock loaders refuse."""
BASE_ARCHITECTURE = "base_architecture"
"""The native format's key for the architecture that a model was made from; without it that is `llama`."""
_MOST_BLOCKS = 1 << 16
"""Far more than any model has, and few enough to list."""
_PER_BLOCK = (
    "feed_forward_length",
    "expert_count",
    "expert_used_count",
    "attention.head_count",
    "attention.head_count_kv",
)
"""Keys that may have a value for each block, whether this architecture reads them or not."""
_SOFTCAP = 30.0
"""What bounds logits in files without the key, as llama.cpp has it."""
ROPE_FREQS = "rope_freqs.weight"  # divisors of the rotation frequencies, [n_rot / 2]: Llama 3.1's rope scaling


@dataclass(frozen=True, slots=True)
class Multipliers:
    """Constant factors on the token embeddings, on what each branch of a block adds to the residual stream, on the
    products of queries and keys (0: one over the root of the head size), and on the logits.

    Logits are bounded by `softcap`, x becomes softcap * tanh(x / softcap); 0 is for no bound.
    """

    embedding: float = 1.0
    residual: float = 1.0
    attention: float = 0.0
    logits: float = 1.0
    softcap: float = 0.0


NO_MULTIPLIERS = Multipliers()


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model's sizes. `n_ff` is the width of one expert, or of the dense FFN when `n_expert` is 0.

    `n_window` are the tokens that the model's own attention looks back, its own one included, 0 for all. So it does
    here in the layers that are `windowed`, one entry per layer; where that is empty, every token sees all before it.
    Where layers differ, `n_ff` and `n_expert` are those of the layer that has most, and `layer_shape` has each layer's.
    `attention` is that of all layers, but for those with a window where there is a `window_attention`.
    `n_layer_nextn` blocks behind the layers, which predict further tokens, are in a stock file, and are none of them.
    If it `has_mtp_layer`, the last layer is such a block: so it is for who runs or converts the block.
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
    multipliers: Multipliers = NO_MULTIPLIERS
    n_layer_nextn: int = 0
    has_mtp_layer: bool = False
    windowed: tuple[bool, ...] = ()
    recurrent: RecurrentSpec | None = None
    window_attention: AttentionSpec | None = None

    @property
    def stored_architecture(self) -> str:
        """The value of `general.architecture`, and the prefix of the keys: in a native file the format's own name."""
        return NATIVE if self.is_native else self.architecture.name

    @property
    def n_ctx_scaled(self) -> int:
        """Tokens of context that the model can be expected to handle, with its rotation scaled as it is."""
        return self.rope.n_ctx_reached(self.n_ctx_train)

    @property
    def n_ctx_exact(self) -> int:
        """Tokens of context that the model was trained for and that are computed as it was trained."""
        return min(self.n_ctx_train, self.attention.n_indexed or self.n_ctx_train)

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
        """The number of values in a head's row of cached keys."""
        return self.attention.n_embd_head

    @property
    def attention_scale(self) -> float:
        """Factor on the products of queries and keys."""
        latent = self.attention.latent
        if latent is not None:
            return self.rope.latent_scale(latent.n_embd_head_k)
        return self.multipliers.attention or 1.0 / math.sqrt(self.attention.n_embd_head)

    def attention_of(self, layer: int) -> AttentionSpec:
        """The attention of one layer."""
        return self.window_attention if self.window_attention and self.windowed[layer] else self.attention

    @property
    def attentions(self) -> tuple[AttentionSpec, ...]:
        """The different attentions that layers have."""
        return (self.attention, self.window_attention) if self.window_attention else (self.attention,)

    def n_rot(self, layer: int) -> int:
        """How many values of a head of one layer rotate."""
        return self.rope.window_n_rot if self.rope.window_n_rot and self.windowed[layer] else self.rope.n_rot

    def window(self, layer: int) -> int:
        """How many tokens the attention of a layer looks back, its own one included; 0 is all."""
        return self.n_window if self.windowed and self.windowed[layer] else 0

    @property
    def n_expert(self) -> int:
        """Rows of the router, of the layer that has most of them; 0 for a dense model."""
        return self.experts.n_expert

    @property
    def n_expert_used(self) -> int:
        """The number of experts that are computed for a token: all that it selects, but with compressed experts."""
        return self.experts.n_expert_used

    @property
    def n_expert_selected(self) -> int:
        """The number of experts that a token selects; with compressed experts more than those that are computed."""
        return self.experts.n_selected or self.experts.n_expert_used

    @property
    def n_embd_expert(self) -> int:
        """The number of values that experts read and write."""
        return self.experts.n_latent or self.n_embd

    @property
    def n_expert_aux(self) -> int:
        """The number of experts that a token selects for which vectors stand, 0 but with compressed experts."""
        return self.n_expert_selected - self.n_expert_used

    @property
    def router_score(self) -> Score:
        """What a router's logits become."""
        return self.experts.score or self.architecture.router.score

    @property
    def renormalises(self) -> bool:
        """Whether the weights of a token's selected experts are scaled to a sum of 1."""
        stored = self.experts.renormalise
        return bool(self.architecture.router.renormalise) if stored is None else stored

    @property
    def expert_weights_scale(self) -> float:
        """Factor on the expert weights."""
        return self.experts.weights_scale or 1.0

    @property
    def n_ff_dense(self) -> int:
        """The width of the dense layers among those with experts, 0 without any."""
        return max((shape.n_ff for shape in self.experts.layers if not shape.n_expert), default=0)

    def layer_shape(self, layer: int) -> LayerShape:
        """Router rows and width of one layer, and whether it has attention."""
        return self.experts.layers[layer] if self.experts.layers else LayerShape(self.n_expert, self.n_ff)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers that have attention, and so keys and values."""
        return tuple(layer for layer in self._mixing_layers if not self.is_recurrent(layer))

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """The layers that keep a state in place of keys and values."""
        return tuple(layer for layer in self._mixing_layers if self.is_recurrent(layer))

    @property
    def _mixing_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.n_layer) if self.layer_shape(layer).has_attention)

    def is_recurrent(self, layer: int) -> bool:
        """Whether a layer has a recurrence in place of attention."""
        return self.recurrent is not None and self.recurrent.layers[layer]

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
        if not isinstance(stored, str):
            raise UnsupportedModelError(gguf.path, _unknown(stored))
        keys = MetadataKeys(gguf, f"{stored}.")
        is_native = stored == NATIVE
        name = keys.value(BASE_ARCHITECTURE, LLAMA.name) if is_native else stored
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise UnsupportedModelError(gguf.path, _unknown(name))
        architecture = ARCHITECTURES[name]
        n_embd = keys.count("embedding_length")
        n_ctx_train = keys.count("context_length")
        embeddings = gguf.tensors.get("token_embd.weight")
        n_nextn = keys.count("nextn_predict_layers", 0)
        n_block = keys.count("block_count")
        if n_block > _MOST_BLOCKS:
            raise ModelFileError(gguf.path, f"{stored}.block_count is {n_block}, which cannot be.", AGAIN)
        n_layer = n_block - n_nextn
        if n_layer < 1:
            problem = f"{n_nextn} of {n_block} blocks predict further tokens, which leaves no layer."
            raise ModelFileError(gguf.path, problem, AGAIN)
        _refuse_present(keys, architecture)
        windowed = _windowed(keys, architecture, n_layer)
        attention = read_attention(keys, architecture, n_embd, windowed)
        window_attention = read_window_attention(keys, architecture, windowed, attention)
        for each in filter(keys.is_array, _PER_BLOCK):
            keys.integers(each, n_block)
        n_window_head = window_attention.n_embd_head if window_attention else 0
        n_vocab = embeddings.ne[-1] if embeddings else keys.count("vocab_size")
        experts, n_ff = read_experts(keys, architecture, n_layer, n_vocab, is_native=is_native)
        attending = tuple(shape.has_attention for shape in experts.layers) or (True,) * n_layer
        return cls(
            architecture=architecture,
            n_layer=n_layer,
            n_embd=n_embd,
            n_ff=n_ff,
            n_vocab=n_vocab,
            n_ctx_train=n_ctx_train,
            rms_eps=keys.number(next(filter(keys.has, architecture.eps_keys), architecture.eps_keys[0])),
            attention=attention,
            experts=experts,
            rope=read_rope(keys, architecture, attention.n_embd_head, n_ctx_train, n_window_head),
            n_window=keys.count("attention.sliding_window", 0),
            is_native=is_native,
            multipliers=_multipliers(keys, architecture, n_embd),
            n_layer_nextn=n_nextn,
            windowed=windowed,
            recurrent=read_recurrent(keys, architecture, n_embd, attending),
            window_attention=window_attention,
        )

    def metadata(self) -> dict[str, Value]:
        """The keys and values that `from_gguf` reads, and a stock llama.cpp too unless the model is native."""
        values: dict[str, Value] = {
            "block_count": self.n_layer,
            "context_length": self.n_ctx_train,
            "embedding_length": self.n_embd,
            "feed_forward_length": self.n_ff,
            "vocab_size": self.n_vocab,
            **dict.fromkeys(self.architecture.eps_keys, self.rms_eps),
            "rope.dimension_count": self.rope.n_rot or self.n_embd_head,
            "rope.freq_base": self.rope.freq_base,
        }
        values |= attention_metadata(self.attention)
        if self.window_attention:
            values |= window_metadata(self.attention, self.window_attention, self.windowed)
            values["rope.dimension_count_swa"] = self.rope.window_n_rot
        if self.recurrent:
            values |= recurrent_metadata(self.recurrent, self.n_head_kv, self.attention_layers)
        if self.has_mtp_layer:
            values["nextn_predict_layers"] = 1
        if self.n_window:
            values["attention.sliding_window"] = self.n_window
        if self.windowed:
            values["attention.sliding_window_pattern"] = [int(windowed) for windowed in self.windowed]
        if self.rope.window_freq_base:
            values["rope.freq_base_swa"] = self.rope.window_freq_base
        if self.n_expert:
            shapes = [self.layer_shape(layer) for layer in range(self.n_layer)]
            values |= expert_metadata(self.experts, self.n_ff, self.architecture, shapes, is_native=self.is_native)
        if self.is_native and self.architecture is not LLAMA:
            values[BASE_ARCHITECTURE] = self.architecture.name
        if self.architecture.has_multipliers:
            scales = self.multipliers
            values |= {"embedding_scale": scales.embedding, "residual_scale": scales.residual}
            values |= {"logit_scale": 1.0 / scales.logits, "attention.scale": self.attention_scale}
        if self.architecture.scales_embeddings:
            values["final_logit_softcapping"] = self.multipliers.softcap
        values |= {key: 0 for key, _ in self.architecture.absent}
        if self.architecture.rotation != "always":
            values["rope.scaling.finetuned"] = self.rope.n_rot > 0
        if self.rope.sections:
            values["rope.dimension_sections"] = list(self.rope.sections)
        if self.rope.scaling != "none":
            values |= {"rope.scaling.type": self.rope.scaling, "rope.scaling.factor": self.rope.factor}
        if self.rope.scaling != "none" or self.rope.n_ctx_orig != self.n_ctx_train:
            values["rope.scaling.original_context_length"] = self.rope.n_ctx_orig
        if self.rope.attn_multiplier != 1.0:
            values["rope.scaling.attn_factor"] = self.rope.attn_multiplier
        if self.rope.yarn_log_multiplier:
            values["rope.scaling.yarn_log_multiplier"] = self.rope.yarn_log_multiplier
        return {f"{self.stored_architecture}.{key}": value for key, value in values.items()}


def _unknown(name: Value) -> str:
    """Says of an architecture that it is not supported, of which one it is a variant, and which ones are."""
    variant = variant_of(name) if isinstance(name, str) else ""
    return f"the architecture {name!r:.100} is not supported{variant}. Those that are: {', '.join(ARCHITECTURES)}."


def _windowed(keys: MetadataKeys, architecture: Architecture, n_layer: int) -> tuple[bool, ...]:
    """Which layers have a sliding window: an entry each, or all but each n-th, and where n is 0 all."""
    if not architecture.window_period:
        return ()
    keys.count("attention.sliding_window")
    name = "attention.sliding_window_pattern"
    if keys.is_array(name):
        return tuple(entry > 0 for entry in keys.integers(name, n_layer, most=1))
    period = keys.count(name, 0) if keys.has(name) else architecture.window_period
    return tuple(not period or layer % period < period - 1 for layer in range(n_layer))


def _refuse_present(keys: MetadataKeys, architecture: Architecture) -> None:
    """Raises UnsupportedModelError for a key above 0 that the models of an architecture that are run do not have."""
    for name, meaning in architecture.absent:
        if keys.count(name, 0):
            problem = f"{keys.prefix}{name} is {keys.count(name)}: {meaning}, are not supported."
            raise UnsupportedModelError(keys.gguf.path, problem)


def _multipliers(keys: MetadataKeys, architecture: Architecture, n_embd: int) -> Multipliers:
    """What Granite's keys say, whose logits are divided by theirs, or Gemma's way, in llama.cpp's arithmetic."""
    if architecture.scales_embeddings:
        name = "final_logit_softcapping"
        softcap = keys.number(name, _SOFTCAP) if keys.value(name, _SOFTCAP) else 0.0
        return Multipliers(embedding=float(np.sqrt(np.float32(n_embd))), attention=1.0, softcap=softcap)
    if not architecture.has_multipliers:
        return NO_MULTIPLIERS
    return Multipliers(
        embedding=keys.number("embedding_scale", 1.0),
        residual=keys.number("residual_scale", 1.0),
        attention=keys.number("attention.scale") if keys.has("attention.scale") else 0.0,
        logits=1.0 / keys.number("logit_scale"),
    )
