"""From layers that were measured to whole models: formulas, no measurements.

Calibration. A pass takes `per_weight` for each weight, which is read, and `per_product` for each product of a weight
with a token: those that a token's own experts and attention have, and those of the tokens that pass all experts for
their Gram matrix. Both are found from two runs of different length. Prices of types take the same time for each matrix,
since samples of equal size are taken; trying types on an expert takes what it took on one, by its sampled weights. On a
graphics card reading and quantising stay what they are, and products run at the card's published speed: a lower limit.

Conversion. Seconds are the measured ones per weight of the source; peak memory grows with the largest matrix.

Decoding. A file's bits per weight, for experts and for the rest, are those of the measured file, and a token reads the
weights that it uses. The processor gives the bytes per second that it gave when it was measured, whatever bounds it. On
a graphics card what fits beside the rest lies there and is read at the card's published bandwidth, other experts
are computed by the processor: an estimate that nothing here has measured, and an upper limit.
"""

from dataclasses import dataclass
from pathlib import Path

from bench.models.shapes import Shape
from bench.quality.compress_step import Taken
from slimoe.converter.forward.texts import DEFAULT_TOKENS
from slimoe.converter.source.inventory import take_inventory
from slimoe.converter.stats.forward_pass import N_STREAMS, CalibrationSettings
from slimoe.converter.stats.observer import Samples
from slimoe.converter.stats.sums import gram_size
from slimoe.converter.stats.type_errors import sampled_rows

WHOLE = {
    "Mixtral-8x7B": Shape(32, 4096, 14336, 32, 8, 128, 8, 2, 32000),
    "Mixtral-8x22B": Shape(56, 6144, 16384, 48, 8, 128, 8, 2, 32768),
}
CARD = "RTX 4090, 24 GB, by its published figures: an estimate, not measured"
CARD_BANDWIDTH, CARD_FLOPS = 1008e9, 82.6e12
"""Bytes per second, and operations per second in float32, as its maker publishes them."""
CARD_ROOM = 22 << 30
"""What weights can have of its 24 GiB: two are left for the KV cache and what is computed."""
SPARE_BYTES = 1 << 30
"""What a machine must have besides a file to hold it."""


@dataclass(frozen=True, slots=True)
class Weights:
    """How many weights a shape has, in all layers: in experts, in attention, and in the token table.

    The output has as many as the token table. `expert_share` is the part of the experts that a token uses.
    """

    experts: int
    attention: int
    table: int
    n_matrices: int
    expert_share: float

    @classmethod
    def of(cls, shape: Shape) -> "Weights":
        """The weights of all layers of a shape; norms and routers are left out."""
        n_q, n_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
        return cls(
            experts=3 * shape.n_embd * shape.n_ff * shape.n_expert * shape.n_layer,
            attention=2 * shape.n_embd * (n_q + n_kv) * shape.n_layer,
            table=shape.n_vocab * shape.n_embd,
            n_matrices=shape.n_layer * (4 + 3 * shape.n_expert) + 2,
            expert_share=shape.n_expert_used / shape.n_expert,
        )

    @property
    def total(self) -> int:
        """All weights."""
        return self.experts + self.attention + 2 * self.table

    def products(self, n_tokens: int, n_sketch: int = 0) -> float:
        """Products of weights with tokens: `n_tokens` pass the layers, and `n_sketch` of them all experts."""
        return n_tokens * (self.expert_share * self.experts + self.attention) + n_sketch * self.experts


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibration that was measured: of which shape, on how many tokens."""

    shape: Shape
    n_tokens: int
    n_sensitivity: int
    n_sketch: int
    taken: Taken

    def products(self, part: str) -> float:
        """Products of weights with tokens in a part of the calibration, forward."""
        weights = Weights.of(self.shape)
        if part == "sensitivity":
            return weights.products(self.n_sensitivity)
        return weights.products(self.n_tokens, _sketch(self.shape, self.n_sketch, self.n_tokens))


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds for each weight and for each product of a weight with a token."""

    per_weight: float
    per_product: float

    @classmethod
    def between(cls, short: Calibrated, long: Calibrated, part: str) -> "Rates":
        """The rates of the line through two runs, of which neither end may be below 0."""
        weights, first, last = Weights.of(long.shape).total, short.products(part), long.products(part)
        rise = (long.taken.parts[part] - short.taken.parts[part]) / (last - first)
        per_product = min(max(0.0, rise), long.taken.parts[part] / last)
        return cls((long.taken.parts[part] - per_product * last) / weights, per_product)


def calibration_of(shape: Shape, short: Calibrated, long: Calibrated) -> dict[str, float]:
    """Seconds and peak bytes of a default calibration of a model, here and with a graphics card."""
    weights, settings = Weights.of(shape), CalibrationSettings()
    layers, sensitivity = (Rates.between(short, long, part) for part in ("layers", "sensitivity"))
    multiplied = weights.products(DEFAULT_TOKENS, _sketch(shape, settings.samples.n_gram, DEFAULT_TOKENS))
    back = weights.products(settings.n_sensitivity)
    prices = long.taken.parts["prices"] * weights.n_matrices / Weights.of(long.shape).n_matrices
    tried = long.taken.parts["types"] * shape.n_layer * shape.n_expert * _tried(shape) / _tried(long.shape)
    fixed = (layers.per_weight + sensitivity.per_weight) * weights.total + prices + tried
    # The measured peak less its streams, as much larger as an expert is, and streams up to where they go to disk.
    held = _stream_bytes(long.shape, long.n_tokens, long.n_sensitivity)
    grown = shape.n_embd * shape.n_ff / (long.shape.n_embd * long.shape.n_ff)
    peak = max(0, long.taken.peak_resident - held) * max(1.0, grown)
    # A backward pass is as many forward ones as it took here.
    passes = sensitivity.per_product / layers.per_product if layers.per_product else 0.0
    return {
        "n_tokens": DEFAULT_TOKENS,
        "seconds": fixed + layers.per_product * multiplied + sensitivity.per_product * back,
        "seconds_not_of_products": fixed,
        "seconds_of_trying_types": tried,
        "seconds_with_card": fixed + 2 * (multiplied + passes * back) / CARD_FLOPS,
        "peak_resident": peak + _stream_bytes(shape, DEFAULT_TOKENS, settings.n_sensitivity),
    }


def _stream_bytes(shape: Shape, n_tokens: int, n_sensitivity: int) -> int:
    """Bytes of residual streams in memory, of the pass or of the sensitivity, whichever are more."""
    sizes = (N_STREAMS * n_tokens, (shape.n_layer + 8) * n_sensitivity)
    limit = CalibrationSettings().max_state_bytes
    return max(n_bytes if n_bytes <= limit else 0 for n_bytes in (4 * shape.n_embd * size for size in sizes))


def _tried(shape: Shape) -> int:
    """How many weights of an expert types are tried on."""
    n_rows = sampled_rows(Samples().n_rows, shape.n_embd, shape.n_ff)
    return min(n_rows, shape.n_embd) * shape.n_ff + 2 * min(n_rows, shape.n_ff) * shape.n_embd


def _sketch(shape: Shape, n_sketch: int, n_tokens: int) -> int:
    return gram_size(n_sketch, n_tokens, shape.n_expert, shape.n_embd)


def conversion_of(shape: Shape, measured: Shape, taken: Taken) -> dict[str, float]:
    """Seconds and peak bytes of the same conversion of another model."""
    grown = _largest_matrix(shape) / _largest_matrix(measured)
    seconds = taken.seconds * Weights.of(shape).total / Weights.of(measured).total
    return {"seconds": seconds, "peak_resident": taken.peak_resident * max(1.0, grown)}


def _largest_matrix(shape: Shape) -> int:
    return shape.n_embd * max(shape.n_ff, shape.n_vocab)


@dataclass(frozen=True, slots=True)
class Density:
    """Bytes of a file for each weight of its source: of experts, of the token table, and of all that every token reads.

    What was left out counts as weights of no bytes.
    """

    experts: float
    table: float
    always: float

    @classmethod
    def of(cls, path: Path, shape: Shape) -> "Density":
        """The density of a file made of a model of that shape; raises ModelFileError."""
        weights, n_bytes = Weights.of(shape), {"experts": 0, "embeddings": 0}
        for count in take_inventory(path).counts:
            n_bytes[count.kind] = n_bytes.get(count.kind, 0) + count.n_bytes
        always = sum(count for kind, count in n_bytes.items() if kind not in ("experts", "embeddings"))
        return cls(
            n_bytes["experts"] / weights.experts,
            n_bytes["embeddings"] / weights.table,
            always / (weights.attention + weights.table),
        )

    def n_bytes(self, shape: Shape) -> float:
        """The bytes of the file of a model."""
        weights = Weights.of(shape)
        return self.experts * weights.experts + self.table * weights.table + self.always_bytes(shape)

    def always_bytes(self, shape: Shape) -> float:
        """The bytes that every token reads."""
        weights = Weights.of(shape)
        return self.always * (weights.attention + weights.table)

    def token_bytes(self, shape: Shape) -> float:
        """The bytes that one token reads, its own experts included."""
        weights = Weights.of(shape)
        return self.always_bytes(shape) + weights.expert_share * self.experts * weights.experts


def decoding_of(shape: Shape, density: Density, bandwidth: float, memory: int) -> dict[str, float | None]:
    """Tokens per second of a file of a model: here, None where `memory` does not hold it, and with a graphics card.

    `bandwidth` is what the processor read in bytes per second when a file of this density was measured.
    """
    n_bytes, per_token = density.n_bytes(shape), density.token_bytes(shape)
    always = density.always_bytes(shape)
    experts = density.experts * Weights.of(shape).experts
    on_card = min(1.0, max(0.0, CARD_ROOM - always) / experts) if experts else 1.0
    routed = per_token - always
    with_card = (always + on_card * routed) / CARD_BANDWIDTH + (1 - on_card) * routed / bandwidth
    in_memory = n_bytes + SPARE_BYTES <= memory
    # What does not lie on the card must lie in memory.
    beside = (1 - on_card) * experts + SPARE_BYTES <= memory
    return {
        "n_bytes": n_bytes,
        "tokens_per_s": bandwidth / per_token if in_memory else None,
        "tokens_per_s_with_card": 1 / with_card if beside else None,
        "experts_on_card": on_card,
    }
