"""The statistics of a model that a calibration gathers: sums over tokens, from which methods compute their measures.

Everything is a sum, so that parts of a pass add up. In shapes, E are stored experts of the layer, R rows of its router,
k experts that a token selects, d is n_embd, f is n_ff, T are tokens, and S tokens of the Gram matrices. *w* is the
expert weight of a token's selected expert, renormalised where the model does it, and *f_j* the expert's output without
it. Letters in brackets are those of the statistics in the literature on pruning and caching.

`statistics_file` stores every array under the name of its field, so the names stay as they are: there, `share` is the
expert weight, a `pick` is a selected expert, a `novice` a constant expert, and the `sketch` has Gram matrices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensor_list import EXPERT_LATENT

Int = NDArray[np.int64]
Double = NDArray[np.float64]
Single = NDArray[np.float32]

N_BINS = 1024
"""Bins of the histograms, which divide 0 to 1 evenly; the last one holds 1 itself."""
N_AHEAD = 3
"""The number of later layers whose experts are predicted."""


@dataclass(frozen=True, slots=True)
class RouterSums:
    """Sums over the routing of tokens, by row of the router. (A1, A2, A3, A6, A7, A8, A11, A12)

    `rank_count` [R, k] is how often a row was selected, by rank. `probability` [R] is the sum of the softmax over all
    tokens; `share`, `share_square` and `picked_probability` [R] are sums of w, w^2 and the softmax over the tokens that
    selected the row. `ratio_bins` [1024] is the histogram of a token's second expert weight over its first, `top_bins`
    [1024] of its first over the sum of all k. `together` [R, R] counts tokens that selected both rows, with a row's own
    tokens on the diagonal. `logit` [R] and `logit_product` [R, R] are sums over all tokens. `ahead_hits` [3, k, k]
    counts the rows that the router q + 1 layers later selected at rank i and has at rank j by its logits on this
    layer's input. `to_next` [R, R of the next layer] counts tokens that selected a row here and one there,
    `to_next_token` [R, R] a row for a token and one for the token after it.
    """

    rank_count: Int
    probability: Double
    share: Double
    share_square: Double
    picked_probability: Double
    ratio_bins: Int
    top_bins: Int
    together: Int
    logit: Double
    logit_product: Double
    ahead_hits: Int
    to_next: Int
    to_next_token: Int


@dataclass(frozen=True, slots=True)
class OutputSums:
    """Sums over the outputs of experts, over the tokens that selected them. (A4, A5)

    [E]: `n_pick` is the number of these tokens; `norm` sums |f|, `norm_square` |f|^2, `share_norm` w |f|,
    `share_square_norm_square` w^2 |f|^2 and `share_square` w^2; `largest` is the greatest absolute value of f. [E, d]:
    `output` sums f, `output_square` f^2, `share_output` w f and `share_square_output` w^2 f.
    """

    n_pick: Int
    norm: Double
    norm_square: Double
    share_norm: Double
    share_square_norm_square: Double
    largest: Double
    share_square: Double
    output: Single
    output_square: Single
    share_output: Single
    share_square_output: Single


def has_plain_attention(spec: ModelSpec, layer: int) -> bool:
    """Whether what mixes tokens in a layer has queries, keys and values of its input: no recurrence, nor MLA.

    Statistics have fields for these three; those of all other matrices are by role.
    """
    return spec.attention.latent is None and not spec.is_recurrent(layer)


@dataclass(frozen=True, slots=True)
class InputSums:
    """Sums of squares of the inputs of each matrix, for importance-weighted quantisation. (A10)

    `expert` [E, d] are those of gate and up of each expert, `hidden` [E, f] of its down; `attention` [d] of q, k and v,
    `mixed` [n_head * n_embd_head] of attn_output; `router` [d] of the router. `others` has those of a dense layer's
    ffn_gate, ffn_up and ffn_down, of a shared expert's ffn_down_shexp, and in place of `attention` of the matrices of
    latent attention or of a recurrence, by role: [n_in], and [n_head, n_in] of stacks with a matrix for each head.
    Arrays of parts that a layer does not have are empty.
    """

    expert: Single
    hidden: Single
    attention: Single
    mixed: Single
    router: Single
    others: Mapping[str, Single] = field(default_factory=dict, kw_only=True)

    def by_role(self) -> dict[str, Single]:
        """The sums of all matrices but those of the experts, by the role of the matrix."""
        found = dict.fromkeys(("attn_q", "attn_k", "attn_v"), self.attention)
        found |= {"attn_output": self.mixed, "ffn_gate_inp": self.router}
        if EXPERT_LATENT[1] in self.others:
            found[EXPERT_LATENT[0]] = self.router
        if "ffn_down_shexp" in self.others:
            found |= dict.fromkeys(("ffn_gate_shexp", "ffn_up_shexp"), self.router)
        return {role: sums for role, sums in (found | dict(self.others)).items() if sums.size}


@dataclass(frozen=True, slots=True)
class SimilaritySums:
    """Sums over tokens of how little the parts of the layer change the residual stream. (A9)

    The cosines are between the stream before and after the block, the attention and the feed-forward part, and between
    the latter's input x and output y. `relative_update` sums |y|^2 over the squared norm of the stream to which y is
    added.
    """

    block_cosine: float
    attention_cosine: float
    ffn_cosine: float
    input_output_cosine: float
    relative_update: float


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """The routing of every token: the rows `picks` [T, k] that it selected, and their weights `shares` [T, k] (A13).

    `received` [T] is the attention from all later tokens, summed over heads, and `norm` [T] the sum of the absolute
    values of the router's input (A14).
    """

    picks: NDArray[np.uint16]
    shares: NDArray[np.float16]
    received: NDArray[np.float16]
    norm: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TypeErrors:
    """Sums over an expert's tokens of w^2 times the squared error of its output, if its matrices had another type. (B3)

    `types` are names of ggml types; `error` [types, E, 4] is that with gate, up or down alone in the type, and with all
    three. It is an estimate if only a sample was tried, infinite if a type does not divide the rows, and 0 for experts
    that no token selected.
    """

    types: tuple[str, ...]
    error: Double


@dataclass(frozen=True, slots=True)
class WidthErrors:
    """Sums over an expert's tokens of w^2 times the squared error of its output, if it were narrower: `error` [W, E].

    `widths` [W] are ascending. The neurons are the best ones, and `down` is fitted to them. `type_share` [W, E] is what
    the same relative errors of all weights then cost over what they cost the whole expert. Of large experts only some
    are measured, and the others have the mean share of their layer.
    """

    widths: Int
    error: Double
    type_share: Double


@dataclass(frozen=True, slots=True)
class GramSample:
    """Gram matrices of all vectors that a policy could add to a token's residual stream, for a sample of tokens. (B4)

    `gram` [S, n, n] has the inner products of the vectors f_1 .. f_E, c_1 .. c_E (the experts' mean outputs weighted by
    w^2) and m, the stream that they are added to, so n = 2 E + 1. `logits` [S, R] are the router's, and `rows` [S] the
    numbers of the tokens.
    """

    gram: Single
    logits: Single
    rows: Int


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How sensitive the model's prediction is to the layer: means over tokens of squared gradients. (C1)

    A token's label is drawn from the model's own prediction, so that half a squared error times the sensitivity is the
    KL divergence in nats, to second order. `update` [d] is by the feed-forward part's output y. The others are by the
    output of each matrix: `gate` and `up` [E, f] and `down` [E, d], with w included and divided by the number of all
    tokens, `q`, `k`, `v` and `attention` (attn_output's), each [n_out], and `others` of a shared expert and of the
    matrices of latent attention or of a recurrence by role, [n_out] or [n_head, n_out]. A dense feed-forward part is
    one expert.
    """

    update: Single
    gate: Single
    up: Single
    down: Single
    q: Single
    k: Single
    v: Single
    attention: Single
    others: Mapping[str, Single] = field(default_factory=dict, kw_only=True)

    def of_role(self, role: str) -> Single:
        """That of a matrix outside the experts [n_out], or of a stack [n_head, n_out], by its role."""
        if role in self.others:
            return self.others[role]
        attention = {"attn_q": self.q, "attn_k": self.k, "attn_v": self.v, "attn_output": self.attention}
        dense = {"ffn_gate": self.gate, "ffn_up": self.up, "ffn_down": self.down}
        if role in dense:
            only: Single = dense[role][0]
            return only
        return attention[role]


@dataclass(frozen=True, slots=True)
class Removals:
    """The KL divergence in nats per token, to second order, if parts of the layer were left out.

    It is half the mean square of the gradient along the removed vector, which knows the directions in which the model
    is sensitive, as `Sensitivity` does not. `attention`, `ffn` and `block` are whole parts. `skipped` [E] is without a
    stored expert, the token's other expert weights renormalised, and `novice` [E] with its best constant in its place.
    """

    attention: float
    ffn: float
    block: float
    skipped: Double
    novice: Double


@dataclass(frozen=True, slots=True)
class MatrixCosts:
    """The KL divergence in nats per token that storing each matrix in each type costs: `nats` [matrices, types].

    It is infinite if a type does not divide the rows. `matrices` are matrix keys as text, `types` names of ggml types.
    """

    types: tuple[str, ...]
    matrices: tuple[str, ...]
    nats: Double


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """The statistics of one layer; None for those of parts that the layer does not have or the pass left out."""

    similarity: SimilaritySums
    inputs: InputSums
    router: RouterSums | None = None
    outputs: OutputSums | None = None
    trace: TokenTrace | None = None
    type_errors: TypeErrors | None = None
    sketch: GramSample | None = None
    sensitivity: Sensitivity | None = None
    removals: Removals | None = None
    widths: WidthErrors | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """The statistics of a model, and the texts that they are from.

    `tokens` are the calibration sequences, `domains` the name of each one's text. `output_input` [d] are sums of
    squares of the output matrix's input; `output_gradient` [n_vocab] and `token_gradient` [d] are as in `Sensitivity`,
    None without it; `token_count` [n_vocab] is how often a token occurs in the texts.
    """

    source_hash: str
    text_hash: str
    tokens: tuple[tuple[int, ...], ...]
    domains: tuple[str, ...]
    layers: tuple[LayerStatistics, ...]
    output_input: Single
    token_count: Int
    output_gradient: Single | None = None
    token_gradient: Single | None = None
    matrix_costs: MatrixCosts | None = None
    notes: Mapping[str, str] | None = None

    @property
    def n_tokens(self) -> int:
        """The number of tokens that the sums run over."""
        return sum(map(len, self.tokens))
