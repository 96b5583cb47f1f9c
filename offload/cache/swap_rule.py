"""When moving an expert to a faster tier pays: never on a miss alone, only if it earns back what moving it costs.

A cache that loads every miss moves more bytes than it saves unless an expert is used two or three times per load, which
models with few large experts do not reach. So the tier's content changes rarely, and each change is accounted for.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.policy import Values
from slimoe.offload.cache.residency import Key


def swap_pays(
    gain_seconds_per_use: float, expected_uses_per_token: float, cost_seconds: float, horizon_tokens: float
) -> bool:
    """Whether so many more uses on the faster tier earn back a move's cost within the horizon."""
    return gain_seconds_per_use * expected_uses_per_token * horizon_tokens > cost_seconds


@dataclass(frozen=True, slots=True)
class SwapRule:
    """Chooses at most `max_swaps` exchanges per step.

    `gain_seconds` is what one use costs less on the faster tier, `cost_seconds` what one move takes from other work.
    `margin`: the expected gain within `horizon_tokens` must exceed the cost by this factor, and the newcomer's value
    the victim's, so that two experts of about equal use do not take turns.
    """

    gain_seconds: float
    cost_seconds: float
    horizon_tokens: float = 256.0
    margin: float = 1.3
    max_swaps: int = 2

    def pays(self, newcomer_uses: float, victim_uses: float) -> bool:
        """Whether one exchange is worth it; uses are expected uses per token."""
        if newcomer_uses <= self.margin * victim_uses:
            return False
        more_uses = newcomer_uses - victim_uses
        return swap_pays(self.gain_seconds, more_uses, self.margin * self.cost_seconds, self.horizon_tokens)

    def choose(self, values: Values, resident: NDArray[np.bool_], movable: NDArray[np.bool_]) -> list[tuple[Key, Key]]:
        """Pairs (victim, newcomer), the most gainful first.

        All arrays are [n_layer, n_expert]: a policy's values in uses per token, what is on the tier, and what may be
        moved now: a victim that is not in use, a newcomer whose copy fits the slots and can be had.
        """
        n_expert = values.shape[1]
        leaving = np.where(resident & movable, values, np.inf).ravel()[::-1]
        coming = np.where(~resident & movable, values, -np.inf).ravel()
        swaps: list[tuple[Key, Key]] = []
        while len(swaps) < self.max_swaps:
            victim, newcomer = int(leaving.argmin()), int(coming.argmax())  # ties: the last leaves, the first comes
            if not self.pays(float(coming[newcomer]), float(leaving[victim])):
                break
            swaps.append((divmod(leaving.size - 1 - victim, n_expert), divmod(newcomer, n_expert)))
            leaving[victim], coming[newcomer] = np.inf, -np.inf
        return swaps
