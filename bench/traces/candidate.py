"""Who decides what stays in a replayed cache: the engine's policies, and two that know the whole trace beforehand."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from bench.traces.demand import Demand, Visit
from slimoe.offload.cache.policy import Policy, PolicyContext, Ranked, Values
from slimoe.offload.cache.residency import Valued
from slimoe.offload.cache.router_trace import TraceHeader


class Candidate(Valued, Protocol):
    """Values of experts. One that `is_choosy` keeps a missed expert only if it is worth more than a resident one.

    All but what is here is as in `slimoe.offload.cache.policy.Policy`.
    """

    is_choosy: bool

    @property
    def values(self) -> Values:
        """What each expert is worth now, a new array."""

    def observe(self, visit: Visit) -> None:
        """Sees the experts that a layer selects before the cache is asked for them."""

    def end_step(self, demand: Demand) -> None:
        """Called when a step is over."""


class Online:
    """One of the engine's policies, told what the engine tells it."""

    is_choosy = False

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.rank = policy.rank

    @property
    def values(self) -> Values:
        """What each expert is worth to the policy now, a new array."""
        return self.policy.values

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, and experts of the layer that has most."""
        return self.policy.shape

    @property
    def layer_weights(self) -> Values:
        """What a rank of each layer counts to the policy now."""
        return self.policy.layer_weights

    @property
    def n_falls(self) -> Sequence[int]:
        """For each layer a number that grows when the policy's ranks may have fallen."""
        return self.policy.n_falls

    def observe(self, visit: Visit) -> None:
        """Tells the policy of the tokens of answers one by one, and of those of a prompt in sum."""
        for row in visit.selected[visit.is_answer]:
            self.policy.decode(visit.layer, [int(expert) for expert in row if expert >= 0])
        if visit.is_answer.all():
            return
        read = visit.selected[~visit.is_answer]
        self.policy.prompt(visit.layer, np.bincount(read[read >= 0], minlength=self.shape[1]))

    def end_step(self, demand: Demand) -> None:
        """Ages the values after a step of an answer."""
        if demand.has_answer:
            self.policy.end_token()


class _Oracle(Ranked):
    """Ranks that are no policy's."""

    is_choosy = True

    def __init__(self, header: TraceHeader) -> None:
        super().__init__(PolicyContext(header.n_layer, header.n_expert, header.n_expert_used))


class OracleStatic(_Oracle):
    """The experts that are visited most often, all the time: no other fixed set is hit more often."""

    def __init__(self, header: TraceHeader, steps: Sequence[Demand]) -> None:
        super().__init__(header)
        self.ranks[:] = 0
        for key in (key for step in steps for visit in step.visits for key in visit.keys):
            self.ranks[key] += 1

    def observe(self, visit: Visit) -> None:
        """Changes nothing."""

    def end_step(self, demand: Demand) -> None:
        """Changes nothing."""


class Belady(_Oracle):
    """The sooner an expert is visited again, the more it is worth: no cache is hit more often.

    Source: L. A. Belady, A study of replacement algorithms for a virtual-storage computer, 1966.
    """

    def __init__(self, header: TraceHeader, steps: Sequence[Demand]) -> None:
        super().__init__(header)
        self.ranks[:] = -np.inf
        visits = [visit for step in steps for visit in step.visits]
        self._following = [np.empty(0)] * len(visits)
        for at in range(len(visits) - 1, -1, -1):
            keys = visits[at].keys
            self._following[at] = np.array([self.ranks[key] for key in keys])
            for key in keys:
                self.ranks[key] = -at
        self._at = 0

    def observe(self, visit: Visit) -> None:
        """Looks up when each of the visited experts is visited again."""
        for key, value in zip(visit.keys, self._following[self._at], strict=True):
            self.ranks[key] = value
        self.n_falls[visit.layer] += 1
        self._at += 1

    def end_step(self, demand: Demand) -> None:
        """Changes nothing."""
