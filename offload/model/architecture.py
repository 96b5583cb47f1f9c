"""What can differ between the architectures that the engine runs: each axis is a field, in llama.cpp's own key names.

`graph.attention`, `graph.router` and `graph.expert_ffn` read them, and ask for no name. A new axis is a field with the
value that the architectures before it have as its default.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal


class RopeType(IntEnum):
    """Which values of a head rotate together, as ggml numbers it: neighbours, or a value and the one half a head on."""

    NORM = 0
    NEOX = 2


Score = Literal["softmax", "sigmoid", "softmax_of_selected"]
"""What a router's logits become: probabilities over all experts, each by itself, or over the selected ones only."""
SCORES: dict[int, Score] = {1: "softmax", 2: "sigmoid", 3: "softmax_of_selected"}
"""The scores by the value of the key `expert_gating_func`."""


@dataclass(frozen=True, slots=True)
class Router:
    """How a router's logits become expert weights.

    `score` is the architecture's own, which the key `expert_gating_func` may replace where `reads_score`; files without
    the key and of these `sigmoid_sizes`, layers and tokens of the vocabulary, have the sigmoid. With
    `renormalise` the weights of the selected experts are scaled to a sum of 1; None leaves it to the key
    `expert_weights_norm`. Where it `reads_residual`, its input is not the experts' but the residual stream, normalised,
    divided by the root of its length, and multiplied with a vector of its own.
    """

    score: Score = "softmax"
    reads_score: bool = False
    renormalise: bool | None = True
    sigmoid_sizes: tuple[tuple[int, int], ...] = ()
    reads_residual: bool = False


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """A feed-forward part that every token passes beside its selected experts.

    `width` says where its width stands: in the key `expert_shared_feed_forward_length`, without which there is no such
    part ("key") or it is the dense one ("key_or_dense"); or it is an expert's times `expert_shared_count` ("counted"),
    where the key may replace the expert's ("key_counted"). With a `gate` its output is multiplied with the sigmoid of a
    vector's product with the input, computed as such or as llama.cpp once did, SiLU over its argument. One that is the
    model's dense part ("dense") has the dense width and names, and norms of its own, before it and behind it.
    """

    width: Literal["key", "key_or_dense", "counted", "key_counted", "dense"]
    gate: Literal["sigmoid", "silu_quotient"] | None = None

    @property
    def suffix(self) -> str:
        """What its matrices' roles end with behind ffn_gate, ffn_up and ffn_down."""
        return "" if self.width == "dense" else "_shexp"


Activation = Literal["swiglu", "swiglu_oai", "geglu", "relu2"]
"""What joins an expert's gate and up: SwiGLU, OpenAI's, whose inputs are clamped and whose up is raised by one, or
GeGLU by GELU's approximation with tanh; or of experts without a gate ReLU's square of up.
"""
PROJECTIONS = ("gate", "up", "down")
"""An expert's matrices, in the order of use."""
Rotation = Literal["always", "by_key", "never"]
"""Whether heads rotate by their positions; by the key `rope.scaling.finetuned`, they do not where it is false."""

Recurrence = Literal["delta_net", "short_conv", "mamba2"]
"""What layers without attention keep a state by: a gated delta net, a short convolution alone, or Mamba-2."""

When = Literal[
    "model",
    "layer",
    "attention",
    "recurrent",
    "q",
    "low_rank_q",
    "absorbed",
    "unabsorbed",
    "ffn",
    "router",
    "dense",
    "experts",
    "latent_experts",
    "shared",
    "mtp",
]
"""Where a tensor belongs: to the model as a whole, to each layer, or to each that has such a part or form of attention,
or to the block behind the layers that predicts a further token, which has all the rest that a layer has.
"""


@dataclass(frozen=True, slots=True)
class TensorRole:
    """One kind of weight: its `role`, which is llama.cpp's name of the tensor, its shape in ggml's order, where it is.

    The shape is given in sizes that have names: see `tensor_list.sizes`. A bias has the `suffix` "bias"; those of
    attention's and dense matrices may always be there, and need no role. A factor on a matrix's product, or on its
    input, has the suffix "scale". Some files have another name, `stored_as`.
    """

    role: str
    ne: tuple[str, ...]
    when: When
    is_optional: bool = False
    suffix: Literal["weight", "bias", "scale", ""] = "weight"
    stored_as: str = ""

    def name(self, block: str = "") -> str:
        """The tensor's name in files, where `block` stands before it."""
        stem = f"{block}{self.stored_as or self.role}"
        return f"{stem}.{self.suffix}" if self.suffix else stem


@dataclass(frozen=True, slots=True)
class Architecture:
    """One value of `general.architecture`, and the models that carry it.

    `qk_norm`: queries and keys are normalised, each head by itself or all heads as one row, before the rotation or
    after it; where the norms' tensors are optional, a file without them has none. `rotates_partly`: a file may rotate
    fewer values than a head has. `scales_queries`: the queries are scaled, and not their products with the keys.
    `joins_qkv`: llama.cpp reads the matrices of queries, keys and values only as one, attn_qkv. `ffn_norm` is the role
    of the feed-forward part's norm. `width_key` names the key of an expert's width; without the key it is the dense
    width over the experts used. `has_dense_layers`: the keys `leading_dense_block_count` and
    `interleave_moe_layer_step` say which layers are dense. With `has_single_parts` each layer is one part, behind one
    norm: of experts where the array `feed_forward_length` is above 0, else attention or, without key heads, a
    recurrence. `has_multipliers`: keys scale embeddings, both branches of a
    block, attention and logits. `has_latent_attention`: attention is MLA. With `is_mscale_shared` YaRN's mscale is the
    model's mscale_all_dim, and not 1. `window_period`: of so many consecutive layers all but the last look back no
    further than the model's window, where the key `sliding_window_pattern` does not say otherwise; 0 is for
    architectures without windows. `activation` is that of the experts. `is_down_wide`: what an expert's down is
    multiplied with may be larger than F16 can say, which kernels must not make of it. With `has_indexer` attention sees
    of a longer context only what an indexer selects, which is not run: contexts end where it would begin to select.
    Of architectures with a `recurrence` some layers have it in place of attention. With `groups_heads` the value heads
    of one key head of a delta net are neighbours, and their beta and alpha are one matrix. If it `gates_attention`, the
    matrix of queries makes for each head a row more, whose sigmoid the head's output is multiplied with.
    If it `norms_values`, each head's values are normalised, without a weight. With `has_window_heads` layers with a
    window have sizes of heads, and a rotation, of their own, and what divides frequencies does so in the others. With
    `has_post_norms` what attention and the feed-forward part add to the residual stream is normalised before. If it
    `scales_embeddings`, these are multiplied with the root of their length, and products of queries and keys with 1;
    logits are bounded as the key `final_logit_softcapping` says. `absent` are keys that are not above 0 in the models
    that are run, with what they would mean. The first of `eps_keys` that a file has is what norms add to a mean square.
    `difference` is a sentence on what files of this architecture compute otherwise than transformers' class does.
    """

    name: str
    models: str
    tensors: tuple[TensorRole, ...]
    rope: RopeType = RopeType.NORM
    qk_norm: Literal["none", "head", "row", "head_after_rope"] = "none"
    rotates_partly: bool = False
    rotation: Rotation = "always"
    scales_queries: bool = False
    joins_qkv: bool = False
    ffn_norm: str = "ffn_norm"
    router: Router = Router()
    shared: SharedExpert | None = None
    width_key: Literal["feed_forward_length", "expert_feed_forward_length"] = "feed_forward_length"
    has_dense_layers: bool = False
    has_single_parts: bool = False
    has_multipliers: bool = False
    may_be_dense: bool = False
    has_latent_attention: bool = False
    is_mscale_shared: bool = False
    window_period: int = 0
    activation: Activation = "swiglu"
    is_down_wide: bool = False
    has_indexer: bool = False
    recurrence: Recurrence | None = None
    groups_heads: bool = False
    gates_attention: bool = False
    norms_values: bool = False
    has_window_heads: bool = False
    has_post_norms: bool = False
    scales_embeddings: bool = False
    absent: tuple[tuple[str, str], ...] = ()
    eps_keys: tuple[str, ...] = ("attention.layer_norm_rms_epsilon",)
    difference: str = ""

    @property
    def has_mtp(self) -> bool:
        """Whether a block behind the layers, with attention and experts as they have, may predict a further token."""
        return any(role.when == "mtp" for role in self.tensors)

    @property
    def has_latent_experts(self) -> bool:
        """Whether experts may stand between projections to fewer values and back, as the key `moe_latent_size` says."""
        return any(role.when == "latent_experts" for role in self.tensors)

    @property
    def projections(self) -> tuple[str, ...]:
        """The matrices of an expert, and of every other feed-forward part, in the order of use."""
        return PROJECTIONS[1:] if self.activation == "relu2" else PROJECTIONS

    @property
    def has_expert_biases(self) -> bool:
        """Whether the products of its experts' matrices have biases, [n, n_expert] each."""
        return self._has_down("bias")

    @property
    def has_down_scales(self) -> bool:
        """Whether each expert's output has a factor, in a vector [n_expert]."""
        return self._has_down("scale")

    def _has_down(self, suffix: str) -> bool:
        return any(role.role == "ffn_down_exps" and role.suffix == suffix for role in self.tensors)
