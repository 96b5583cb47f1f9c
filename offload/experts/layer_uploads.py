"""Which missed experts of a token's layer are copied to a device at once, and which residents they replace for good."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.policy import Policy
from slimoe.offload.cache.residency import Key
from slimoe.offload.machine.upload_costs import UploadCosts

_MOST_VICTIMS = 256
"""Residents of each kind that a single token may replace."""


@dataclass(frozen=True, slots=True)
class Upload:
    """An expert to copy, into the slot of a `victim` or, without one, for this layer only."""

    expert: int
    victim: Key | None


class LayerUploads:
    """Decides by a policy's expected uses per token and by what copies cost.

    An expert that is copied stays if its uses for long are more than those of the one in whose place it comes are soon;
    one that is copied for later uses must also repay the copy by them.

    `kinds` [n_layer, n_expert] number the classes of slots that experts fit, -1 of those that have none on the device.
    """

    def __init__(self, policy: Policy, costs: UploadCosts, kinds: NDArray[np.integer[Any]]) -> None:
        assert policy.in_uses_per_token
        self._policy, self.costs, self._kinds = policy, costs, kinds
        self._numbers = np.unique(kinds[kinds >= 0]).tolist()
        self._victims: dict[int, list[Key]] = {}

    def begin_token(self, is_here: NDArray[np.bool_]) -> None:
        """Looks for the experts that the token to come may replace, of those that are on the device, shaped as `kinds`.

        This takes time for each expert, but once per token; a layer only looks at the first of them.
        """
        soon = self._policy.all_soon
        for number in self._numbers:
            layers, experts = np.nonzero(is_here & (self._kinds == number))
            uses, n_most = soon[layers, experts], min(_MOST_VICTIMS, len(layers))
            lowest = np.argpartition(uses, n_most - 1)[:n_most] if n_most else np.empty(0, np.int64)
            lowest = lowest[np.argsort(uses[lowest], kind="stable")]
            self._victims[number] = list(zip(layers[lowest].tolist(), experts[lowest].tolist(), strict=True))

    def choose(self, layer: int, missed: NDArray[np.integer[Any]], n_here: int, n_host: int = 0) -> list[Upload]:
        """Chooses from `missed` experts of a layer, `n_here` of whose selected experts are on the device.

        `n_host` further ones are the host's in any case. A victim is not chosen again before the next token.
        """
        expected = [(self._policy.expected((layer, expert)), expert) for expert in missed.tolist()]
        pairs, worths = list[Upload](), list[float]()
        places = dict.fromkeys(self._numbers, 0)
        for uses, expert in sorted(expected, reverse=True):
            kind = int(self._kinds[layer, expert])
            victim = self._next_victim(layer, kind, places)
            if victim is None or uses <= self._policy.soon(victim):
                pairs.append(Upload(expert, None))
                worths.append(0.0)
            else:
                pairs.append(Upload(expert, victim))
                more_uses = self._policy.expected((layer, expert)) - self._policy.expected(victim)
                worths.append(self.costs.worth(more_uses))
                places[kind] += 1
        chosen = pairs[: self.costs.best_copies(n_here, worths, n_host)]
        for upload in chosen:
            if upload.victim is not None:
                self._victims[int(self._kinds[layer, upload.expert])].remove(upload.victim)
        return chosen

    def _next_victim(self, layer: int, kind: int, places: dict[int, int]) -> Key | None:
        """The coldest expert of a kind that is not of this layer, whose experts may be in use."""
        victims = self._victims.get(kind, [])
        while places[kind] < len(victims):
            victim = victims[places[kind]]
            if victim[0] != layer:
                return victim
            places[kind] += 1
        return None
