"""How the next token is chosen from the logits."""

from collections.abc import Mapping
from dataclasses import dataclass, field

BANNING_BIAS = -100.0
"""A bias of so much or less forbids a token, as in OpenAI's API."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The knobs of one request, by the field's usual names; the defaults are llama.cpp's.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch the filter off. `repeat_penalty`
    divides positive logits of the last `repeat_last_n` tokens (-1: all of them); presence and frequency
    penalties subtract, as OpenAI defines them, over the same tokens. `seed` None draws a fresh one.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def forbids_all(self, n_vocab: int) -> bool:
        """Whether `logit_bias` leaves no token of the vocabulary to choose."""
        return len(self.logit_bias) >= n_vocab and max(self.logit_bias.values()) <= BANNING_BIAS
