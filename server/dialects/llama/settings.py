"""How answers are generated, in llama-server's names: `generation_settings` of an answer, and `/props`' defaults.

What this server does not do stands there with the value that switches it off.
"""

import math

import msgspec

from slimoe.offload.text.generation import GenerationRequest

SAMPLERS = ("penalties", "top_k", "top_p", "min_p", "temperature")
"""In the order in which they are applied."""
RANDOM_SEED = 2**32 - 1
"""Stands for a seed that is drawn afresh."""


class Bias(msgspec.Struct, frozen=True):
    """One entry of `logit_bias`; null forbids the token."""

    token: int
    bias: float | None


class GenerationSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one request."""

    seed: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_last_n: int
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    max_tokens: int
    n_predict: int
    ignore_eos: bool
    stream: bool
    n_probs: int
    stop: tuple[str, ...]
    logit_bias: list[Bias]
    grammar: str
    timings_per_token: bool
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    typical_p: float = 1.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    adaptive_target: float = -1.0
    adaptive_decay: float = 0.9
    n_keep: int = 0
    n_discard: int = 0
    min_keep: int = 0
    grammar_lazy: bool = False
    grammar_triggers: tuple[str, ...] = ()
    preserved_tokens: tuple[int, ...] = ()
    samplers: tuple[str, ...] = SAMPLERS
    post_sampling_probs: bool = False
    backend_sampling: bool = False
    lora: tuple[str, ...] = ()


def settings_of(
    request: GenerationRequest, *, eog: tuple[int, ...] = (), stream: bool = False, timings: bool = False
) -> GenerationSettings:
    """The settings of a request to a model whose answers end with the tokens `eog`."""
    sampling, constraint = request.sampling, request.constraint
    biases = dict(sampling.logit_bias) | (dict.fromkeys(eog, -math.inf) if request.ignore_eos else {})
    limit = -1 if request.max_tokens is None else request.max_tokens
    return GenerationSettings(
        seed=RANDOM_SEED if sampling.seed is None else sampling.seed % 2**32,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repeat_last_n=sampling.repeat_last_n,
        repeat_penalty=sampling.repeat_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        max_tokens=limit,
        n_predict=limit,
        ignore_eos=request.ignore_eos,
        stream=stream,
        n_probs=request.n_logprobs or 0,
        stop=request.stop,
        logit_bias=[Bias(token, bias if math.isfinite(bias) else None) for token, bias in sorted(biases.items())],
        grammar=constraint.text if constraint is not None else "",
        timings_per_token=timings,
    )
