"""The engine's own decisions on a simulated machine.

Its classes are asked in the order in which a step asks them, with the seconds that it would have measured there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.simulated.caches import Counts, most_used
from bench.simulated.machine import Machine
from bench.simulated.routing import Floats, Ids
from slimoe.offload.cache.policy import PolicyContext, make_policy
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.swap import SlotExchange, SwapRule
from slimoe.offload.experts.layer_uploads import LayerUploads
from slimoe.offload.machine.upload_costs import ExchangeChoice, UploadCosts, choose_exchange


def measured(machine: Machine, n_bytes: float) -> UploadCosts:
    """What the engine measures of a machine: experts one after the other, and a copy beside the CPU's work."""
    of_cpu, of_link = machine.rates(cpu=True, link=True)
    return UploadCosts(
        host=machine.host_seconds(n_bytes),
        device=machine.device_seconds(n_bytes),
        copy=machine.copy_seconds(n_bytes),
        host_beside=n_bytes / of_cpu,
        copy_beside=machine.link_delay + n_bytes / of_link,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Played:
    """What the engine did, and the choice that it made at the start."""

    counts: Counts
    choice: ExchangeChoice


class Residents:
    """The experts on the device, as `swap.Residents`."""

    def __init__(self, is_here: NDArray[np.bool_]) -> None:
        self.is_here = is_here

    def __iter__(self) -> Iterator[Key]:
        return ((layer, expert) for layer, expert in np.argwhere(self.is_here).tolist())

    def __contains__(self, key: Key) -> bool:
        return bool(self.is_here[key])

    def put(self, key: Key, victim: Key) -> None:
        """One expert in another's place."""
        self.is_here[victim], self.is_here[key] = False, True


def played(
    selected: Ids, n_expert: int, priors: Floats | None, n_slots: int, machine: Machine, n_bytes: float
) -> Played:
    """The engine on a machine: `priors` [n_layer, n_expert] are how often the file says that experts are selected."""
    n_tokens, n_layer, n_used = selected.shape
    policy = make_policy("lfu-decay", PolicyContext(n_layer, n_expert, n_used, priors))
    costs = measured(machine, n_bytes)
    choice = choose_exchange(costs, n_used)
    residents, counts = Residents(most_used(policy.values, n_slots)), Counts.empty(n_tokens, n_layer)
    uploads = LayerUploads(policy, costs, np.zeros(policy.shape, np.int32)) if choice.mode == "upload" else None
    exchange = SlotExchange(policy, SwapRule(costs.gain, costs.copy), lambda key: 0) if choice.mode == "swap" else None
    for token in range(n_tokens):
        missed = list[Key]()
        if uploads is not None:
            uploads.begin_token(residents.is_here)
        for layer in range(n_layer):
            experts = selected[token, layer]
            policy.decode(layer, experts)
            is_here = residents.is_here[layer, experts]
            counts.here[token, layer] = np.count_nonzero(is_here)
            absent = experts[~is_here]
            missed += [(layer, expert) for expert in absent.tolist()]
            if uploads is not None and absent.size:
                chosen = uploads.choose(layer, absent, n_used - absent.size)
                counts.uploaded[token, layer] = len(chosen)
                for upload in chosen:
                    if upload.victim is not None:
                        residents.put((layer, upload.expert), upload.victim)
        if exchange is not None:
            swaps = exchange.choose(residents, missed, lambda key: True)
            counts.moved[token] = len(swaps)
            for victim, newcomer in swaps:
                residents.put(newcomer, victim)
        policy.end_token()
    return Played(counts, choice)
