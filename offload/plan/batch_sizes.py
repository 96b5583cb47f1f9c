"""How many tokens of a prompt are computed at once: more take memory that experts would have.

A prompt meets nearly all experts in each batch, so that larger batches read the missing ones less often; a token of an
answer reads only what it selects, and finds more of that the more slots there are.
"""

from collections.abc import Iterable

from slimoe.offload.cache.host_slots import slot_bytes
from slimoe.offload.cache.slots import TierPlan
from slimoe.offload.model.experts import ExpertLayer

TYPICAL_PROMPT, TYPICAL_ANSWER = 512, 128
"""Tokens of the request for which plans are compared."""
_TIERED_BATCH = 256
"""Larger batches gain little on a CPU, and what they take for intermediate results is better spent on experts."""
_SMALLER = (256, 128)


def batch_sizes(n_batch: int, n_parallel: int) -> list[int]:
    """Batches to try, from the largest: a smaller one may be what lets a model stay resident, and costs little."""
    return [n_batch, *(n for n in _SMALLER if max(n_parallel, 1) <= n < n_batch)]


def tiered_batch_sizes(n_batch: int, n_parallel: int) -> list[int]:
    """The same for a model whose experts are read when they are asked for."""
    return batch_sizes(min(n_batch, max(n_parallel, _TIERED_BATCH)), n_parallel)


def request_reads(tiers: TierPlan, layers: Iterable[ExpertLayer | None], n_batch: int) -> float:
    """Bytes of experts that a typical request is expected to read, whose prompt is computed in batches.

    As if tokens selected all experts of a layer alike, and the same part of every layer's lay in the slots.
    """
    missing = 1.0 - min(1.0, tiers.n_resident / max(1, tiers.n_experts))
    return missing * sum(_selected_bytes(layer, n_batch) for layer in layers if layer is not None)


def _selected_bytes(layer: ExpertLayer, n_batch: int) -> float:
    """Bytes of a layer's experts that the batches of a typical prompt and the tokens of an answer select."""
    sizes = [slot_bytes(copies[0].slot_class) for copies in layer.experts if copies]
    if not sizes:
        return 0.0
    share = min(1.0, layer.n_expert_used / len(sizes))
    batches = [min(n_batch, TYPICAL_PROMPT - begin) for begin in range(0, TYPICAL_PROMPT, n_batch)]
    met = sum(1.0 - (1.0 - share) ** n_tokens for n_tokens in batches)
    return sum(sizes) * (met + TYPICAL_ANSWER * share)
