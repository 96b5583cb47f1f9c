"""What a calibration pass learns of a model: sums over tokens, in arrays that any method turns into its own measure.

Everything is a sum, so that parts of a pass add up. Shapes name E stored experts of the layer, R rows of its router, k
picks per token, d = n_embd, f = n_ff, T tokens, S tokens of the sketch. *share* is a pick's weight, renormalised where
the model does it, *f_j* an expert's output before it. The letters in brackets are those of the statistics in the
literature on pruning and caching. `statistics_file` keeps them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]
Double = NDArray[np.float64]
Single = NDArray[np.float32]

N_BINS = 1024
"""Bins of the histograms, which divide 0 to 1 evenly; the last one holds 1 itself."""
N_AHEAD = 3
"""So many later layers are foreseen."""


@dataclass(frozen=True, slots=True)
class RouterSums:
    """How tokens were routed, by row of the router.

    `rank_count` [R, k] picks by rank; `probability` [R] sum of the softmax over all tokens; `share`, `share_square`,
    `picked_probability` [R] over the picks. `ratio_bins` [1024] of the second share over the first, `top_bins` [1024]
    of the first share over the sum of all k. `together` [R, R] tokens that picked both, itself on the diagonal. `logit`
    [R] and `logit_product` [R, R] over all tokens. `ahead_hits` [3, k, k]: of the picks that the router q + 1 layers
    later made at rank i, those that its logits on this layer's input have at rank j. `to_next` [R, R of the next layer]
    picks of a token here and there; `to_next_token` [R, R] picks of a token and of the one after it. (A1, A2, A3, A6,
    A7, A8, A11, A12)
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
    """What experts answered, over the tokens that picked them.

    [E]: `n_pick`; `norm` of |f|, `norm_square` of |f|^2, `share_norm` of share |f|, `share_square_norm_square`;
    `largest`, the greatest absolute value. [E, d]: sums of f, f^2, share f, share^2 f, and [E] of share^2. (A4, A5)
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


@dataclass(frozen=True, slots=True)
class InputSums:
    """Sums of squares of what each matrix reads, for importance-weighted quantisation. (A10)

    `expert` [E, d] what gate and up of each expert read, `hidden` [E, f] what its down reads; `attention` [d] what q, k
    and v read, `mixed` [n_head * n_embd_head] what attn_output reads; `router` [d] over all tokens. Empty without that
    part.
    """

    expert: Single
    hidden: Single
    attention: Single
    mixed: Single
    router: Single


@dataclass(frozen=True, slots=True)
class SimilaritySums:
    """Sums over tokens that say how little a part of the layer does. (A9)

    Cosines between the stream before and after the block, before and after the attention, before and after the
    feed-forward part; between the latter's input x and output y; and of |y|^2 over the squared norm of the stream that
    it is added to.
    """

    block_cosine: float
    attention_cosine: float
    ffn_cosine: float
    input_output_cosine: float
    relative_update: float


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """Every token's routing: `picks` [T, k] rows and `shares` [T, k] (A13); `received` [T] attention from all later
    tokens, summed over heads, and `norm` [T], the sum of the absolute values of the router's input (A14).
    """

    picks: NDArray[np.uint16]
    shares: NDArray[np.float16]
    received: NDArray[np.float16]
    norm: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TypeErrors:
    """Squared errors of an expert's output times share^2, over its picks, if matrices had another type. (B3)

    `types` are names of ggml types; `error` [types, E, 4]: of gate, up and down alone, and of all three. Estimates
    where only a sample was tried; infinite where a type does not divide the rows; 0 for experts that no token picked.
    """

    types: tuple[str, ...]
    error: Double


@dataclass(frozen=True, slots=True)
class GramSample:
    """Inner products of all that a policy could add to a token's stream, for some tokens. (B4)

    `gram` [S, n, n] of the rows f_1 .. f_E, c_1 .. c_E (the experts' mean outputs weighted by share^2) and m, the
    stream that they are added to, so n = 2 E + 1; `logits` [S, R]; `rows` [S] which tokens these are.
    """

    gram: Single
    logits: Single
    rows: Int


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How the model's answer depends on the layer: means over tokens of squared gradients, a token's label drawn from
    the model's own prediction, so that half a squared error times them is nats of KL divergence, to second order. (C1)

    `update` [d] to the feed-forward part's output y. By the output of each matrix: `gate` and `up` [E, f], `down` [E,
    d] as sums over all tokens divided by all tokens, the share included; `q`, `k`, `v`, `attention` (attn_output's),
    each [n_out].
    """

    update: Single
    gate: Single
    up: Single
    down: Single
    q: Single
    k: Single
    v: Single
    attention: Single


@dataclass(frozen=True, slots=True)
class Removals:
    """What leaving parts of the layer out costs in nats of KL divergence per token, to second order.

    Half the mean square of the gradient along that which goes, so that it counts in which directions the model listens,
    as `Sensitivity` cannot. `attention`, `ffn` and `block` as a whole. For stored experts [E]: `skipped`, where its
    picks are skipped and the token's other shares grow, and `novice`, where the best constant answers in its place.
    """

    attention: float
    ffn: float
    block: float
    skipped: Double
    novice: Double


@dataclass(frozen=True, slots=True)
class MatrixCosts:
    """Nats of KL divergence per token that each matrix costs in each type: `nats` [matrices, types], infinite where a
    type does not divide the rows. `matrices` are keys as text, `types` names of ggml types.
    """

    types: tuple[str, ...]
    matrices: tuple[str, ...]
    nats: Double


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """All of one layer; None for what the layer lacks or the pass left out."""

    similarity: SimilaritySums
    inputs: InputSums
    router: RouterSums | None = None
    outputs: OutputSums | None = None
    trace: TokenTrace | None = None
    type_errors: TypeErrors | None = None
    sketch: GramSample | None = None
    sensitivity: Sensitivity | None = None
    removals: Removals | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """All that a pass learnt, and of what.

    `tokens` are the calibration sequences, `domains` the name of each one's text. `output_input` [d] sums of squares of
    what the output matrix reads; `output_gradient` [n_vocab] and `token_gradient` [d] as in `Sensitivity`, None without
    it; `token_count` [n_vocab] occurrences in the texts.
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
        """Tokens that the sums run over."""
        return sum(map(len, self.tokens))
