"""What each expert is worth keeping in fast memory: rules that see which experts were used, and never a byte.

A cache gives up the lowest valued expert that it may (`residency.SlotCache`). Published measurements agree that such
rules differ by a few points only, once they count per layer and are not led astray by prompts; the default forgets
slowly, because what matters more is to load little.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.use_forecast import UseForecast
from slimoe.offload.errors import UsageError

Values = NDArray[np.float64]
Experts = Sequence[int] | NDArray[np.integer[Any]]
"""Stored experts of one layer."""

HALF_LIFE_TOKENS = 64.0
PROMPT_TOKENS = 64.0
TURN_DISCOUNT = 0.8
"""Of an expert's worth that is gone when its layer has just been computed, and comes back until its turn is next."""
FUTURE_TOKENS = 256
"""Tokens of answers that what is done for later uses must pay within."""
_LEAST_SCALE = 2.0**-256
"""A power of two, so that taking it out of the scale rounds nothing; values fade to it in some ten thousand tokens."""


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
    """Keeps `ranks`, float64 [n_layer, n_expert]: the higher, the better worth having. The array is never replaced.

    A rank times the `scale` of the moment is the expert's value, so that all values fade at once when the scale does,
    however many experts there are. `in_uses_per_token` says that a value is the expected number of steps per token that
    use the expert, so that it can be weighed against seconds (`swap.SwapRule`); otherwise values can only be compared
    with each other. A step that uses an expert raises its rank; whenever anything else may have lowered ranks of a
    layer, the layer's number in `n_falls` [n_layer] grows, and whoever keeps experts sorted has to sort them anew.
    """

    name: str
    in_uses_per_token: bool
    ranks: Values
    scale: float
    n_falls: list[int]

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, and experts of the layer that has most."""

    @property
    def layer_weights(self) -> Values:
        """What a rank of each layer counts to a cache that must give one up now, [n_layer], above 0."""

    @property
    def values(self) -> Values:
        """The value of every expert, [n_layer, n_expert], a new array."""

    @property
    def keeping(self) -> Values:
        """What each expert is worth now to a cache that must give one up, [n_layer, n_expert], a new array."""

    def rank(self, key: tuple[int, int]) -> float:
        """The rank of one expert of a layer."""

    def value(self, key: tuple[int, int]) -> float:
        """The value of one expert of a layer."""

    def foresee(self) -> None:
        """Learns from now on what recent uses say of those to come, for the expectations below; told once or often."""

    def expected(self, key: tuple[int, int]) -> float:
        """The value that one expert of a layer is expected to have in the next `FUTURE_TOKENS` tokens, on average."""

    def uses_within(self, n_tokens: float) -> Values:
        """Expected uses of every expert within `n_tokens` tokens after the last one, a new array."""

    def uses_after_use(self, layer: int, experts: NDArray[np.integer[Any]], n_tokens: float) -> Values:
        """Expected uses of some of a layer's experts, which the token at hand uses, within the tokens after it."""

    def decode(self, layer: int, experts: Experts) -> None:
        """A decode step used these experts in a layer; within one call, an expert counts once."""

    def prompt(self, layer: int, counts: NDArray[np.int64]) -> None:
        """The tokens of a prompt's batch selected the layer's experts this often, int64 [number of its experts]."""

    def end_token(self) -> None:
        """A decode step is over. Not called for prompts."""


class Ranked:
    """What all policies have: the ranks that they start from, and the views of them that take time for each expert."""

    def __init__(self, context: PolicyContext) -> None:
        self.ranks = context.start_values()
        self.scale = 1.0
        self.n_falls = [0] * context.n_layer
        self._equal = np.ones(context.n_layer)

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, and experts of the layer that has most."""
        n_layer, n_expert = self.ranks.shape
        return n_layer, n_expert

    @property
    def layer_weights(self) -> Values:
        """All layers count alike."""
        return self._equal

    @property
    def values(self) -> Values:
        """The value of every expert, [n_layer, n_expert], a new array."""
        return self.ranks * self.scale

    @property
    def keeping(self) -> Values:
        """What each expert is worth now to a cache that must give one up, [n_layer, n_expert], a new array."""
        return self.values * self.layer_weights[:, None]

    def rank(self, key: tuple[int, int]) -> float:
        """The rank of one expert of a layer."""
        return float(self.ranks[key])

    def value(self, key: tuple[int, int]) -> float:
        """The value of one expert of a layer."""
        return float(self.ranks[key]) * self.scale

    def foresee(self) -> None:
        """Nothing is learnt: values stay as they are."""

    def expected(self, key: tuple[int, int]) -> float:
        """As now."""
        return self.value(key)

    def uses_within(self, n_tokens: float) -> Values:
        """As many in each token as now."""
        return self.values * n_tokens

    def uses_after_use(self, layer: int, experts: NDArray[np.integer[Any]], n_tokens: float) -> Values:
        """As many in each token as now."""
        uses: Values = self.ranks[layer, experts] * (self.scale * n_tokens)
        return uses


class DecayedLfu(Ranked):
    """Mean use per token, the last tokens counting most; a prompt adds what it can foretell of its own answer.

    Each step's weight halves every `half_life` tokens. A prompt weighs as its number of tokens would, but at most as
    `prompt_tokens`: it is mixed in beside the decoded tokens' mean, fades as they do, and gives way to the next prompt.
    A cache should rather give up an expert of a layer that has just been computed, which has its next chance a whole
    token later, than one of a layer to come: replayed traces hit 1 to 4 points more often for it.

    What an expert was used of late is for the most part chance, and how much of it is not differs between models and
    texts. So what is done for later uses, and costs, goes by a forecast that learns this; see `UseForecast`.
    """

    name = "lfu-decay"
    in_uses_per_token = True

    def __init__(
        self, context: PolicyContext, half_life: float = HALF_LIFE_TOKENS, prompt_tokens: float = PROMPT_TOKENS
    ) -> None:
        super().__init__(context)
        self._decoded = self.ranks.copy()
        self._is_known = context.priors is not None
        self._forecast: UseForecast | None = None
        self._counts = np.zeros_like(self.ranks)
        self._keep = 0.5 ** (1 / half_life)
        self._prompt_tokens = prompt_tokens
        self._n_used = context.n_expert_used
        self._is_open = [False] * context.n_layer
        layers = np.arange(context.n_layer)
        n_until = (layers[None, :] - layers[:, None] - 1) % context.n_layer
        self._nearness = 1 - TURN_DISCOUNT * n_until / context.n_layer
        self._layer = context.n_layer - 1

    @property
    def layer_weights(self) -> Values:
        """Less for layers whose turn is far."""
        weights: Values = self._nearness[self._layer]
        return weights

    def decode(self, layer: int, experts: Experts) -> None:
        """Raises the experts' means."""
        self._layer = layer
        gain = (1 - self._keep) / self.scale
        self._decoded[layer, experts] += gain
        self.ranks[layer, experts] += gain
        if self._forecast is not None:
            self._forecast.decode(layer, np.asarray(experts))

    def prompt(self, layer: int, counts: NDArray[np.int64]) -> None:
        """Mixes in what the prompt so far selected; batches with no decoded token between them are one prompt."""
        self._layer = layer
        self.n_falls[layer] += 1
        seen = self._counts[layer]
        if not self._is_open[layer]:
            seen[:] = 0
            self._is_open[layer] = True
        seen[: len(counts)] += counts
        n_tokens = float(seen.sum()) / self._n_used
        if n_tokens == 0:
            return
        weight = 1 - self._keep ** min(n_tokens, self._prompt_tokens)
        self.ranks[layer] = (1 - weight) * self._decoded[layer] + weight / (n_tokens * self.scale) * seen
        n_tokens = float(counts.sum()) / self._n_used
        if self._forecast is not None and n_tokens:
            self._forecast.prompt(layer, counts / n_tokens, min(n_tokens, self._prompt_tokens))

    def foresee(self) -> None:
        """Begins to learn, from what is expected now."""
        if self._forecast is None:
            self._forecast = UseForecast(self.values, self._n_used, is_known=self._is_known)

    @property
    def forecast(self) -> UseForecast:
        """What has been learnt since `foresee`."""
        assert self._forecast is not None, "nobody has asked to foresee"
        return self._forecast

    def expected(self, key: tuple[int, int]) -> float:
        """As it is foreseen."""
        return self.forecast.mean_use(key, FUTURE_TOKENS)

    def uses_within(self, n_tokens: float) -> Values:
        """As they are foreseen."""
        return self.forecast.uses_within(n_tokens)

    def uses_after_use(self, layer: int, experts: NDArray[np.integer[Any]], n_tokens: float) -> Values:
        """As they are foreseen."""
        return self.forecast.uses_after_use(layer, experts, n_tokens)

    def end_token(self) -> None:
        """Lets everything fade by one token."""
        self.scale *= self._keep
        if self._forecast is not None:
            self._forecast.end_token()
        if self.scale < _LEAST_SCALE:
            self.scale /= _LEAST_SCALE
            self.ranks *= _LEAST_SCALE
            self._decoded *= _LEAST_SCALE
            self.n_falls = [n + 1 for n in self.n_falls]
        self._is_open = [False] * len(self._is_open)


class Static(Ranked):
    """What the file says, whatever happens."""

    name = "static"
    in_uses_per_token = True

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
        self._clock = math.ceil(self.ranks.max())

    def decode(self, layer: int, experts: Experts) -> None:
        """Makes the last named expert the most recent one."""
        self.ranks[layer, experts] = np.arange(self._clock + 1, self._clock + 1 + len(experts))
        self._clock += len(experts)


class LeastFrequentlyUsed(Static):
    """The number of decode steps that used an expert, ever; prompts do not count."""

    name = "lfu"
    in_uses_per_token = False

    def decode(self, layer: int, experts: Experts) -> None:
        """Counts one use."""
        self.ranks[layer, experts] += 1


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
