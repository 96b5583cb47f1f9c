"""Which missed experts of a token's layer are copied to a device at once, and which residents they replace for good."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.policy import FUTURE_TOKENS, Policy
from slimoe.offload.cache.residency import Key
from slimoe.offload.machine.upload_costs import UploadCosts

_MOST_VICTIMS = 256
"""Residents of each kind that a single token may replace."""
_COMING_TOKENS = 16
"""Tokens that experts are counted over that come to stay."""
_LEAST_STAY = 4.0
"""Tokens that an expert is thought to stay at least."""


@dataclass(frozen=True, slots=True)
class Upload:
    """An expert to copy, into the slot of a `victim` or, without one, for this layer only."""

    expert: int
    victim: Key | None


class LayerUploads:
    """Decides by a policy's expected uses and by what copies cost.

    An expert that is copied stays if it will be used more than the one in whose place it comes; one that is copied for
    later uses must also repay the copy by them. Uses count as long as experts stay on average: in few slots, in which
    many come and go, those soon to come.

    `kinds` [n_layer, n_expert] number the classes of slots that experts fit, -1 of those that have none on the device.
    """

    def __init__(self, policy: Policy, costs: UploadCosts, kinds: NDArray[np.integer[Any]]) -> None:
        assert policy.in_uses_per_token
        policy.foresee()
        self._policy, self.costs, self._kinds = policy, costs, kinds
        self._numbers = np.unique(kinds[kinds >= 0]).tolist()
        self._victims: dict[int, list[tuple[float, Key]]] = {}
        self._stay, self._come, self._n_come = float(FUTURE_TOKENS), 0.0, 0

    def begin_token(self, is_here: NDArray[np.bool_]) -> None:
        """Looks for the experts that the token to come may replace, of those that are on the device, shaped as `kinds`.

        This takes time for each expert, but once per token; a layer only looks at the first of them.
        """
        self._come += (self._n_come - self._come) / _COMING_TOKENS
        self._n_come, n_here = 0, float(np.count_nonzero(is_here))
        self._stay = min(FUTURE_TOKENS, max(_LEAST_STAY, n_here / max(self._come, n_here / FUTURE_TOKENS)))
        every = self._policy.uses_within(self._stay)
        for number in self._numbers:
            layers, experts = np.nonzero(is_here & (self._kinds == number))
            uses, n_most = every[layers, experts], min(_MOST_VICTIMS, len(layers))
            lowest = np.argpartition(uses, n_most - 1)[:n_most] if n_most else np.empty(0, np.int64)
            lowest = lowest[np.argsort(uses[lowest], kind="stable")]
            keys = zip(layers[lowest].tolist(), experts[lowest].tolist(), strict=True)
            self._victims[number] = list(zip(uses[lowest].tolist(), keys, strict=True))

    def choose(self, layer: int, missed: NDArray[np.integer[Any]], n_here: int, n_host: int = 0) -> list[Upload]:
        """Chooses from `missed` experts of a layer, `n_here` of whose selected experts are on the device.

        `n_host` further ones are the host's in any case. A victim is not chosen again before the next token.
        """
        expected = self._policy.uses_after_use(layer, missed, self._stay).tolist()
        pairs, worths, left = list[Upload](), list[float](), list[tuple[int, tuple[float, Key]]]()
        places = dict.fromkeys(self._numbers, 0)
        for uses, expert in sorted(zip(expected, missed.tolist(), strict=True), reverse=True):
            kind = int(self._kinds[layer, expert])
            victim = self._next_victim(layer, kind, places)
            if victim is None or uses <= victim[0]:
                pairs.append(Upload(expert, None))
                worths.append(0.0)
            else:
                pairs.append(Upload(expert, victim[1]))
                worths.append(self.costs.worth(uses - victim[0]))
                left.append((kind, victim))
                places[kind] += 1
        chosen = pairs[: self.costs.best_copies(n_here, worths, n_host)]
        n_come = sum(upload.victim is not None for upload in chosen)
        for kind, victim in left[:n_come]:
            self._victims[kind].remove(victim)
        self._n_come += n_come
        return chosen

    def _next_victim(self, layer: int, kind: int, places: dict[int, int]) -> tuple[float, Key] | None:
        """The coldest expert of a kind that is not of this layer, whose experts may be in use."""
        victims = self._victims.get(kind, [])
        while places[kind] < len(victims):
            victim = victims[places[kind]]
            if victim[1][0] != layer:
                return victim
            places[kind] += 1
        return None
