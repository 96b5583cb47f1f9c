"""What healing takes, said before it begins: memory for one layer at a time and for the whole model, and passes."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from slimoe.converter.forward.pass_time import pass_seconds
from slimoe.converter.forward.recurrent import CHUNK
from slimoe.converter.heal.lesson import N_BATCH, HealTexts
from slimoe.converter.quant.mixes import layer_and_role
from slimoe.converter.source.model_source import ModelSource
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.model.recurrent_spec import RecurrentSpec
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.resources.memory import available_bytes, human

MAX_STATE_BYTES = 1 << 31
"""Residual streams of more bytes lie on disk."""
_STREAMS = 8
"""Those of two models, four each."""
_SPARE_BYTES = 128 << 20
"""What torch and its allocator take beside the tensors."""


@dataclass(frozen=True, slots=True)
class HealCost:
    """Bytes that training takes layer by layer, and of the whole model; `state_bytes` are those of residual streams."""

    layer_bytes: int
    whole_bytes: int
    state_bytes: int

    def is_whole(self, available: int) -> bool:
        """Whether the whole model can be trained in so many bytes.

        Raises DoesNotFitError if not even a layer can.
        """
        if self.layer_bytes > available:
            problem = f"Healing needs {human(self.layer_bytes)} of memory, but {human(available)} are available."
            hint = "Free some memory, calibrate on shorter sequences (--length), or leave --heal out."
            raise DoesNotFitError(problem, required_bytes=self.layer_bytes, available_bytes=available, hint=hint)
        return self.whole_bytes <= available


def heal_cost(source: ModelSource, spec: ModelSpec, sizes: Iterable[tuple[str, int]], texts: HealTexts) -> HealCost:
    """The cost for a file of `spec` whose matrices have names and weights as `sizes` says, each expert's once."""
    weights: Counter[int] = Counter()
    for name, n_weights in sizes:
        weights[layer_and_role(name)[0]] += n_weights
    n_rows = N_BATCH * texts.n_longest
    per_layer = n_rows * _values_of_layer(spec, texts.n_longest)
    # Logits of both models, their logarithms, and the gradients.
    logits = 6 * n_rows * spec.n_vocab
    states = 4 * _STREAMS * texts.sequences.n_rows * spec.n_embd
    held = states if states <= MAX_STATE_BYTES else 0
    heads = spec.n_vocab * spec.n_embd
    per_block = max(math.prod(shape) for key, shape in source.shapes.items() if key.name.startswith("blk."))
    layer = 4 * (max(weights[n] for n in range(spec.n_layer)) + 3 * per_block + per_layer + 2 * heads)
    whole = 4 * (sum(weights.values()) + heads + spec.n_layer * per_layer + logits)
    held += _SPARE_BYTES
    return HealCost(held + layer, held + max(layer, whole), states)


def _values_of_layer(spec: ModelSpec, n_longest: int) -> int:
    """Values of a token that a layer's backward pass needs from its forward pass, at most."""
    attention = 12 * spec.n_embd + 4 * spec.attention.n_output + 4 * spec.n_head * n_longest
    experts = (spec.n_expert_used + 1) * (6 * max(spec.n_ff, spec.experts.n_ff_shared) + 4 * spec.n_embd)
    mixing = attention if spec.recurrent is None else max(attention, _values_of_recurrence(spec, spec.recurrent))
    return mixing + experts + spec.n_expert_aux * 4 * spec.n_embd


def _values_of_recurrence(spec: ModelSpec, recurrent: RecurrentSpec) -> int:
    """The same of a recurrent layer: what its convolution and its heads read, and of the chunks of a delta net or of
    Mamba-2 what tokens mean for each other, and the state.
    """
    n_value = recurrent.n_inner // max(1, recurrent.n_rank)
    per_head = 6 * (recurrent.n_state + n_value) + 6 * CHUNK + 3 * recurrent.n_state * n_value // CHUNK
    return 12 * spec.n_embd + 4 * recurrent.n_channels + recurrent.n_rank * per_head


def pass_estimate(source: ModelSource, texts: HealTexts, device: str) -> float:
    """Seconds in which all texts pass through both models, and the held-out ones once more at the end.

    It tries one of the source's layers for a moment; raises ModelFileError.
    """
    every = texts.sequences
    return 2.5 * pass_seconds(source, every, device)


def memory_of(device: str) -> int:
    """Bytes that are available to train in: of the device, or of the host."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return available_bytes()
