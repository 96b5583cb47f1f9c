"""Who decides what stays in a replayed cache: the engine's policies, and two that know the whole trace beforehand."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from bench.traces.demand import Demand, Visit
from slimoe.offload.cache.policy import Policy, Values
from slimoe.offload.cache.router_trace import TraceHeader


class Candidate(Protocol):
    """Values of experts. One that `is_choosy` keeps a missed expert only if it is worth more than a resident one.

    `values` and `keeping` are as in `slimoe.offload.cache.policy.Policy`.
    """

    is_choosy: bool
    values: Values

    @property
    def keeping(self) -> Values:
        """What each expert is worth now."""

    def observe(self, visit: Visit) -> None:
        """Sees the experts that a layer selects before the cache is asked for them."""

    def end_step(self, demand: Demand) -> None:
        """Called when a step is over."""


class Online:
    """One of the engine's policies, told what the engine tells it."""

    is_choosy = False

    def __init__(self, policy: Policy) -> None:
        self.values = policy.values
        self.policy = policy

    @property
    def keeping(self) -> Values:
        """What each expert is worth to the policy now."""
        return self.policy.keeping

    def observe(self, visit: Visit) -> None:
        """Tells the policy of the tokens of answers one by one, and of those of a prompt in sum."""
        for row in visit.selected[visit.is_answer]:
            self.policy.decode(visit.layer, [int(expert) for expert in row if expert >= 0])
        if visit.is_answer.all():
            return
        read = visit.selected[~visit.is_answer]
        self.policy.prompt(visit.layer, np.bincount(read[read >= 0], minlength=self.values.shape[1]))

    def end_step(self, demand: Demand) -> None:
        """Ages the values after a step of an answer."""
        if demand.has_answer:
            self.policy.end_token()


class OracleStatic:
    """The experts that are visited most often, all the time: no other fixed set is hit more often."""

    is_choosy = True

    def __init__(self, header: TraceHeader, steps: Sequence[Demand]) -> None:
        self.values = np.zeros((header.n_layer, header.n_expert))
        for key in (key for step in steps for visit in step.visits for key in visit.keys):
            self.values[key] += 1

    @property
    def keeping(self) -> Values:
        """What each expert is worth now."""
        return self.values

    def observe(self, visit: Visit) -> None:
        """Changes nothing."""

    def end_step(self, demand: Demand) -> None:
        """Changes nothing."""


class Belady:
    """The sooner an expert is visited again, the more it is worth: no cache is hit more often.

    Source: L. A. Belady, A study of replacement algorithms for a virtual-storage computer, 1966.
    """

    is_choosy = True

    def __init__(self, header: TraceHeader, steps: Sequence[Demand]) -> None:
        self.values = np.full((header.n_layer, header.n_expert), -np.inf)
        visits = [visit for step in steps for visit in step.visits]
        self._following = [np.empty(0)] * len(visits)
        for at in range(len(visits) - 1, -1, -1):
            keys = visits[at].keys
            self._following[at] = np.array([self.values[key] for key in keys])
            for key in keys:
                self.values[key] = -at
        self._at = 0

    @property
    def keeping(self) -> Values:
        """What each expert is worth now."""
        return self.values

    def observe(self, visit: Visit) -> None:
        """Looks up when each of the visited experts is visited again."""
        for key, value in zip(visit.keys, self._following[self._at], strict=True):
            self.values[key] = value
        self._at += 1

    def end_step(self, demand: Demand) -> None:
        """Changes nothing."""
