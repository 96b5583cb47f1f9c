"""Which bytes of a file make up each weight the graph wants: decided here, loaded elsewhere.

A graph's weight is not always one tensor of the file: the legacy Mixtral layout keeps each expert by itself, and a
repacked copy joins matrices that read the same input (Q, K and V; gate and up), because one product over joined rows
needs one synchronisation of the threads instead of three.
"""

from dataclasses import dataclass, replace

from gguf import GGMLQuantizationType

from slimoe.offload.model.native_layout import NativeLayer


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of bytes in one shard."""

    shard: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class WeightSource:
    """One weight as the graph wants it: `ne` in ggml's order, and the spans that follow each other in memory."""

    name: str
    ne: tuple[int, ...]
    type: GGMLQuantizationType
    spans: tuple[Span, ...]
    is_batched: bool = False
    """Whether it is a stack whose matrices are each multiplied with rows of their own, one for each head."""

    @property
    def n_bytes(self) -> int:
        """Bytes in memory, in whatever buffer."""
        return sum(span.n_bytes for span in self.spans)

    @property
    def is_matrix(self) -> bool:
        """Whether it is multiplied with activations (and not a norm, a bias or a table of rows)."""
        return len(self.ne) > 1


@dataclass(frozen=True, slots=True)
class LinearSource:
    """A matrix, or a stack of experts' matrices, and its bias if the file has one."""

    weight: WeightSource
    bias: WeightSource | None = None

    @property
    def parts(self) -> tuple[WeightSource, ...]:
        """The matrix, and the bias if there is one."""
        return (self.weight, self.bias) if self.bias else (self.weight,)


@dataclass(frozen=True, slots=True)
class BucketSources:
    """A native layer's experts: per bucket the stacks of its matrices, and what of it is which expert."""

    layout: NativeLayer
    buckets: tuple[tuple[WeightSource, ...], ...]
    constants: WeightSource | None


@dataclass(frozen=True, slots=True)
class SharedSources:
    """A shared expert: its matrices, and the vector [n_embd] whose product gates its output, if it has one.

    One with norms of its own, `norm` of its input and `post_norm` of its output, [n_embd], does not read what the
    experts read.
    """

    gate_up: tuple[LinearSource, ...]
    down: LinearSource
    gate: WeightSource | None = None
    norm: WeightSource | None = None
    post_norm: WeightSource | None = None

    @property
    def vectors(self) -> tuple[WeightSource, ...]:
        """The gate and the norms that there are."""
        return tuple(one for one in (self.gate, self.norm, self.post_norm) if one)


@dataclass(frozen=True, slots=True)
class PostSources:
    """What a block's updates pass before they are added to the residual stream: norms [n_embd] of attention's output,
    of the experts' sum, and of the whole feed-forward part's output; `scale` [1] multiplies what leaves the block.
    """

    attention: WeightSource | None = None
    experts: WeightSource | None = None
    ffn: WeightSource | None = None
    scale: WeightSource | None = None

    @property
    def parts(self) -> tuple[WeightSource | None, ...]:
        """All of them, in this order."""
        return self.attention, self.experts, self.ffn, self.scale

    @property
    def vectors(self) -> tuple[WeightSource, ...]:
        """Those that there are."""
        return tuple(one for one in self.parts if one)


@dataclass(frozen=True, slots=True)
class LatentSources:
    """What latent attention (MLA) multiplies its low-rank rows with: `q` makes queries, where these have a rank.

    Absorbed, `k` [n_unrotated, n_lora_kv, n_head] takes queries to the row's space, and `v` [n_lora_kv, n_embd_head_v,
    n_head] takes what attention makes of rows to values; else `k` makes both keys and values.
    """

    q: LinearSource | None
    k: LinearSource
    v: LinearSource | None

    @property
    def matrices(self) -> tuple[LinearSource, ...]:
        """Those that there are."""
        return tuple(one for one in (self.q, self.k, self.v) if one)


@dataclass(frozen=True, slots=True)
class RecurrentSources:
    """What a recurrent layer has in place of attention.

    `inputs` are multiplied with its input: the one matrix of a short convolution, or of Mamba-2; a delta net's matrix
    of queries, keys and values, the output's gate, and beta and alpha, in two matrices or one. `conv`
    [n_conv, n_channels] are the convolution's taps, `output` makes the layer's output. A delta net and Mamba-2 have
    `decay` and `step_bias` [n_rank], and a `norm` of their output, [n_state] of each head or [n_inner / n_group,
    n_group]. Only Mamba-2 has a `conv_bias` [n_channels], and `skip` [1, n_rank], by which its values pass the state.
    """

    inputs: tuple[LinearSource, ...]
    conv: WeightSource
    output: LinearSource
    decay: WeightSource | None = None
    step_bias: WeightSource | None = None
    norm: WeightSource | None = None
    conv_bias: WeightSource | None = None
    skip: WeightSource | None = None

    @property
    def vectors(self) -> tuple[WeightSource, ...]:
        """The taps, and what a delta net or Mamba-2 adds and multiplies."""
        return tuple(one for one in (self.conv, *self.parts) if one)

    @property
    def parts(self) -> tuple[WeightSource | None, ...]:
        """What a short convolution does not have, in this order."""
        return self.decay, self.step_bias, self.norm, self.conv_bias, self.skip


@dataclass(frozen=True, slots=True)
class LayerSources:
    """One block. `qkv` is three matrices, two where values are keys, or one of all; `gate_up` two, one of both, or up
    alone; `router` None in a dense block.

    A block without attention has no `attn_norm`, one without a feed-forward part no `ffn_norm`; norms are vectors with
    or without a bias. With `latent` attention `qkv` are the matrices of queries, or of their low rank, and of the low
    rank of keys and values, and `q_norm` and `k_norm` are those of the low ranks. `sinks` [n_head] take part in the
    softmax of attention. `choice_bias` [n_expert] is added to the router's scores to select experts, but not to their
    weights. `aux` are the gains and shifts [n_embd, n_expert] of selected experts that are not computed, or none.
    `expert_biases` are those of each of an expert's matrices [n, n_expert], or none, `expert_scales` factors [n_expert]
    on their products, each of which may be missing, or none. `expert_latent` are the matrices that take what experts
    read to fewer values, and their sum back, or none. A `recurrent` layer has no `qkv`. `router_scale` [n_embd]
    multiplies the input of a router that reads the residual stream. In a native file `buckets` has all experts;
    `gate_up` and `down` are the best copies if these are one stack in the router's order, and otherwise absent.
    """

    attn_norm: LinearSource | None
    qkv: tuple[LinearSource, ...]
    attn_output: LinearSource | None
    ffn_norm: LinearSource | None
    router: LinearSource | None
    gate_up: tuple[LinearSource, ...]
    down: LinearSource | None
    buckets: BucketSources | None = None
    q_norm: WeightSource | None = None
    k_norm: WeightSource | None = None
    choice_bias: WeightSource | None = None
    shared: SharedSources | None = None
    sinks: WeightSource | None = None
    expert_biases: tuple[WeightSource, ...] = ()
    expert_scales: tuple[WeightSource | None, ...] = ()
    latent: LatentSources | None = None
    aux: tuple[WeightSource, ...] = ()
    recurrent: RecurrentSources | None = None
    router_scale: WeightSource | None = None
    post: PostSources = PostSources()
    expert_latent: tuple[LinearSource, ...] = ()

    @property
    def vectors(self) -> tuple[WeightSource, ...]:
        """The norms, the router, and the biases of the experts, in the order of the computation."""
        every = (
            *(self.attn_norm.parts if self.attn_norm else ()),
            self.q_norm,
            self.k_norm,
            *(self.ffn_norm.parts if self.ffn_norm else ()),
            *(self.router.parts if self.router else ()),
            self.router_scale,
            self.choice_bias,
            *(self.shared.vectors if self.shared else ()),
            *self.post.vectors,
            self.sinks,
            *(self.recurrent.vectors if self.recurrent else ()),
            *self.expert_biases,
            *self.expert_scales,
            *self.aux,
        )
        return tuple(one for one in every if one is not None)

    @property
    def matrices(self) -> tuple[LinearSource, ...]:
        """Those that every token is multiplied with: of attention or its place, around experts, of the shared one."""
        shared = (*self.shared.gate_up, self.shared.down) if self.shared else ()
        latent = self.latent.matrices if self.latent else ()
        recurrent = (*self.recurrent.inputs, self.recurrent.output) if self.recurrent else ()
        return (
            *self.qkv,
            *latent,
            *((self.attn_output,) if self.attn_output else ()),
            *recurrent,
            *self.expert_latent,
            *shared,
        )

    @property
    def is_stacked(self) -> bool:
        """Whether a graph of the whole model can compute it: its experts, if any, are one stack per projection."""
        return self.router is None or self.down is not None


@dataclass(frozen=True, slots=True)
class ModelSources:
    """A whole model. `output` is the token table itself when the file ties them.

    `rope_freqs` divide the rotation's frequencies; where a file has divisors for short contexts and others for long
    ones, they are those of the context that the model is opened with: see `in_context`.
    """

    token_embd: WeightSource
    output_norm: LinearSource
    output: LinearSource
    rope_freqs: WeightSource | None
    layers: tuple[LayerSources, ...]
    rope_factors_short: WeightSource | None = None
    rope_factors_long: WeightSource | None = None

    @property
    def whole(self) -> tuple[WeightSource, ...]:
        """Those of the model as a whole: the token table, what divides frequencies, the output's norm and matrix."""
        rope = (self.rope_freqs, self.rope_factors_short, self.rope_factors_long)
        output = () if self.output.weight is self.token_embd else self.output.parts
        return (self.token_embd, *(one for one in rope if one), *self.output_norm.parts, *output)

    def in_context(self, n_ctx: int, n_ctx_orig: int) -> "ModelSources":
        """The same model in a context of `n_ctx` tokens, where longer ones than `n_ctx_orig` are long."""
        factors = self.rope_factors_long if n_ctx > n_ctx_orig else self.rope_factors_short
        return replace(self, rope_freqs=self.rope_freqs or factors)


def rows_of(source: WeightSource, name: str, begin: int, end: int) -> WeightSource:
    """Rows `begin` to `end` of a matrix, or such elements of a vector."""
    span, row_bytes = source.spans[0], source.n_bytes // source.ne[-1]
    part = Span(span.shard, span.offset + begin * row_bytes, (end - begin) * row_bytes)
    return WeightSource(name, (*source.ne[:-1], end - begin), source.type, (part,))
