"""What each expert is worth keeping in fast memory: rules that see which experts were used, and never a byte.

A cache gives up the lowest valued expert that it may (`residency.SlotCache`). Published measurements agree that such
rules differ by a few points only, once they count per layer and are not led astray by prompts; the default forgets
slowly, because what matters more is to load little.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.errors import UsageError

Values = NDArray[np.float64]
Experts = Sequence[int] | NDArray[np.int64]
"""Stored experts of one layer."""

HALF_LIFE_TOKENS = 64.0
PROMPT_TOKENS = 64.0
TURN_DISCOUNT = 0.8
"""Of an expert's worth that is gone when its layer has just been computed, and comes back until its turn is next."""


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy knows at the start.

    `n_expert` is the largest number of any layer. `priors` [n_layer, n_expert] say how many times per token each expert
    is expected to be selected, as the file tells it; without, all experts of a layer are alike.
    """

    n_layer: int
    n_expert: int
    n_expert_used: int
    priors: Values | None = None

    def start_values(self) -> Values:
        """How many times per token each expert is expected to be selected, float64 [n_layer, n_expert], a new array."""
        shape = (self.n_layer, self.n_expert)
        if self.priors is None:
            return np.full(shape, self.n_expert_used / self.n_expert)
        assert self.priors.shape == shape
        return np.array(self.priors, np.float64)


class Policy(Protocol):
    """Keeps `values`, float64 [n_layer, n_expert]: the higher, the better worth having. The array is never replaced.

    `in_uses_per_token` says that a value is the expected number of steps per token that use the expert, so that it can
    be weighed against seconds (`swap.SwapRule`); otherwise values can only be compared with each other.
    """

    name: str
    in_uses_per_token: bool
    values: Values

    @property
    def keeping(self) -> Values:
        """What each expert is worth at this point of the step, to a cache that must give one up; read it each time."""

    def decode(self, layer: int, experts: Experts) -> None:
        """A decode step used these experts in a layer; within one call, an expert counts once."""

    def prompt(self, layer: int, counts: NDArray[np.int64]) -> None:
        """The tokens of a prompt's batch selected the layer's experts this often, int64 [number of its experts]."""

    def end_token(self) -> None:
        """A decode step is over. Not called for prompts."""


class DecayedLfu:
    """Mean use per token, the last tokens counting most; a prompt adds what it can foretell of its own answer.

    Each step's weight halves every `half_life` tokens. A prompt weighs as its number of tokens would, but at most as
    `prompt_tokens`: it is mixed in beside the decoded tokens' mean, fades as they do, and gives way to the next prompt.
    A cache should rather give up an expert of a layer that has just been computed, which has its next chance a whole
    token later, than one of a layer to come: replayed traces hit 1 to 4 points more often for it.
    """

    name = "lfu-decay"
    in_uses_per_token = True

    def __init__(
        self, context: PolicyContext, half_life: float = HALF_LIFE_TOKENS, prompt_tokens: float = PROMPT_TOKENS
    ) -> None:
        self.values = context.start_values()
        self._decoded = self.values.copy()
        self._counts = np.zeros_like(self.values)
        self._keep = 0.5 ** (1 / half_life)
        self._prompt_tokens = prompt_tokens
        self._n_used = context.n_expert_used
        self._is_open = [False] * context.n_layer
        layers = np.arange(context.n_layer)
        n_until = (layers[None, :] - layers[:, None] - 1) % context.n_layer
        self._nearness = 1 - TURN_DISCOUNT * n_until / context.n_layer
        self._layer = context.n_layer - 1

    @property
    def keeping(self) -> Values:
        """The values, less for layers whose turn is far."""
        worth: Values = self.values * self._nearness[self._layer][:, None]
        return worth

    def decode(self, layer: int, experts: Experts) -> None:
        """Raises the experts' means."""
        self._layer = layer
        self._decoded[layer, experts] += 1 - self._keep
        self.values[layer, experts] += 1 - self._keep

    def prompt(self, layer: int, counts: NDArray[np.int64]) -> None:
        """Mixes in what the prompt so far selected; batches with no decoded token between them are one prompt."""
        self._layer = layer
        seen = self._counts[layer]
        if not self._is_open[layer]:
            seen[:] = 0
            self._is_open[layer] = True
        seen[: len(counts)] += counts
        n_tokens = float(seen.sum()) / self._n_used
        if n_tokens == 0:
            return
        weight = 1 - self._keep ** min(n_tokens, self._prompt_tokens)
        self.values[layer] = (1 - weight) * self._decoded[layer] + weight * seen / n_tokens

    def end_token(self) -> None:
        """Lets everything fade by one token."""
        self._decoded *= self._keep
        self.values *= self._keep
        self._is_open = [False] * len(self._is_open)


class Static:
    """What the file says, whatever happens."""

    name = "static"
    in_uses_per_token = True

    def __init__(self, context: PolicyContext) -> None:
        self.values = context.start_values()

    @property
    def keeping(self) -> Values:
        """The values."""
        return self.values

    def decode(self, layer: int, experts: Experts) -> None:
        """Changes nothing."""

    def prompt(self, layer: int, counts: NDArray[np.int64]) -> None:
        """Changes nothing."""

    def end_token(self) -> None:
        """Changes nothing."""


class LeastRecentlyUsed(Static):
    """The longer ago its last use by a decoded token, the less an expert is worth; prompts do not count."""

    name = "lru"
    in_uses_per_token = False

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._clock = math.ceil(self.values.max())

    def decode(self, layer: int, experts: Experts) -> None:
        """Makes the last named expert the most recent one."""
        self.values[layer, experts] = np.arange(self._clock + 1, self._clock + 1 + len(experts))
        self._clock += len(experts)


class LeastFrequentlyUsed(Static):
    """The number of decode steps that used an expert, ever; prompts do not count."""

    name = "lfu"
    in_uses_per_token = False

    def decode(self, layer: int, experts: Experts) -> None:
        """Counts one use."""
        self.values[layer, experts] += 1


POLICIES: dict[str, Callable[[PolicyContext], Policy]] = {
    "lfu-decay": DecayedLfu,
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
    "static": Static,
}


def make_policy(name: str, context: PolicyContext) -> Policy:
    """The policy of that name; raises UsageError with the names there are."""
    if name not in POLICIES:
        raise UsageError(f"There is no cache policy {name!r}. Choose one of {', '.join(POLICIES)}.")
    return POLICIES[name](context)
