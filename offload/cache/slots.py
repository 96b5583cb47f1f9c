"""Decides how a model lies in memory that does not hold it whole: what is fixed, and how many experts have a slot."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from slimoe.offload.cache.host_slots import slot_bytes
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.model.experts import ExpertLayer, SlotClass
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.resources.memory import human

MAX_PREFETCH_DEPTH = 2
"""Later layers whose routers are asked early: what a third one adds is read in vain more often than it helps."""

LowSlots = Literal["none", "shared", "first", "last"]
"""The slots of low-bit copies: none, as many as of best copies, all before any best copy, or what those leave."""


@dataclass(frozen=True, slots=True)
class TierPlan:
    """Bytes of host memory by use, within `budget`, and slots for experts by class.

    `program` is Python and libraries; `weights` everything that is no expert. `low` says which part the slots of
    low-bit copies have. If `is_final`, the slots are these; otherwise as many as there turns out to be room for.
    """

    budget: int
    program: int
    weights: int
    kv: int
    compute: int
    n_slots: tuple[tuple[SlotClass, int], ...]
    n_experts: int
    expert_bytes: int
    prefetch_depth: int
    low: LowSlots = "none"
    is_final: bool = False

    @property
    def fixed(self) -> int:
        """All but the slots."""
        return self.program + self.weights + self.kv + self.compute

    @property
    def host_pool(self) -> int:
        """Bytes of all slots."""
        return sum(n * slot_bytes(kind) for kind, n in self.n_slots)

    @property
    def n_resident(self) -> int:
        """Copies of experts that have a slot."""
        return sum(n for _, n in self.n_slots)


def plan_tiers(
    layers: Sequence[ExpertLayer | None],
    budget: int,
    *,
    program: int,
    weights: int,
    kv: int,
    compute: int,
    what: str,
    low: LowSlots = "none",
) -> TierPlan:
    """The plan for a budget.

    Raises DoesNotFitError, which names the least that does, when not even one token's experts of a layer find room.
    """
    n_slots = fit_slots(layers, budget, program + weights + kv + compute, what, low)
    n_used = max(layer.n_expert_used for layer in layers if layer is not None)
    classes, lows = slot_classes(layers), low_classes(layers, low)
    # Where all have room nobody is driven out, and nothing is read. Low-bit copies are seldom prefetched.
    rooms = [n_slots[kind] // min(n_used, n) for kind, n in classes.items() if n_slots[kind] < n + lows[kind]]
    copies = [copy for layer in layers if layer is not None for copies in layer.experts for copy in copies[:1]]
    return TierPlan(
        budget=budget,
        program=program,
        weights=weights,
        kv=kv,
        compute=compute,
        n_slots=tuple(n_slots.items()),
        n_experts=len(copies),
        expert_bytes=sum(copy.n_bytes for copy in copies),
        prefetch_depth=max(0, min(MAX_PREFETCH_DEPTH, *(room - 1 for room in rooms))) if rooms else 0,
        low=low,
    )


def fit_slots(
    layers: Sequence[ExpertLayer | None], budget: int, taken: int, what: str, low: LowSlots = "none"
) -> dict[SlotClass, int]:
    """Slots by class for what a budget leaves beside `taken` bytes; `low` says which part low-bit copies have of it.

    Raises DoesNotFitError, which names the least that does, when not even one token's experts of a layer find room.
    """
    high, lows = slot_classes(layers), low_classes(layers, low)
    n_used = max(layer.n_expert_used for layer in layers if layer is not None)
    least_high, least_low = (Counter({kind: min(n, n_used) for kind, n in of.items()}) for of in (high, lows))
    least = least_high + least_low
    required = taken + sum(n * slot_bytes(kind) for kind, n in least.items())
    if required > budget:
        raise DoesNotFitError(
            f"{what} needs at least {human(required)} of memory, of which {human(taken)} are for everything but "
            f"experts, but the budget is {human(budget)}.",
            required_bytes=required,
            available_bytes=budget,
        )
    room = budget - taken
    if low == "shared" or not lows:
        return divide_slots(high + lows, least, room)
    in_order = [(lows, least_low), (high, least_high)] if low == "first" else [(high, least_high), (lows, least_low)]
    slots = Counter(least)
    for classes, own in in_order:
        others = slots - own
        others_bytes = sum(n * slot_bytes(kind) for kind, n in others.items())
        slots = others + Counter(divide_slots(classes, own, room - others_bytes))
    return dict(slots)


def slot_classes(layers: Iterable[ExpertLayer | None]) -> Counter[SlotClass]:
    """How many experts there are of each class, by their best copies."""
    return Counter(copies[0].slot_class for layer in layers if layer is not None for copies in layer.experts if copies)


def low_classes(layers: Iterable[ExpertLayer | None], low: LowSlots) -> Counter[SlotClass]:
    """How many low-bit copies (last ones that are not the best) there are of each class, if they have slots at all."""
    layers = () if low == "none" else layers
    return Counter(
        copies[-1].slot_class for layer in layers if layer is not None for copies in layer.experts if len(copies) > 1
    )


def slot_kinds(layers: Sequence[ExpertLayer | None], low: LowSlots) -> Counter[SlotClass]:
    """How many copies of each class may want a slot."""
    return slot_classes(layers) + low_classes(layers, low)


def divide_slots(
    classes: Mapping[SlotClass, int],
    least: Mapping[SlotClass, int],
    room: int,
    size: Callable[[SlotClass], int] = slot_bytes,
) -> dict[SlotClass, int]:
    """Slots by class for `room` bytes: the same part of every class, at least `least`, at most all.

    `size` says what a slot takes. The least must fit.
    """
    total = sum(n * size(kind) for kind, n in classes.items())
    fraction = min(1.0, room / total) if total else 1.0
    n_slots = {kind: max(min(least[kind], n), int(n * fraction)) for kind, n in classes.items()}
    while sum(n * size(kind) for kind, n in n_slots.items()) > room:
        kind = max((kind for kind in n_slots if n_slots[kind] > least[kind]), key=lambda kind: n_slots[kind])
        n_slots[kind] -= 1
    left = room - sum(n * size(kind) for kind, n in n_slots.items())
    for kind in sorted(classes, key=size, reverse=True):
        more = min(classes[kind] - n_slots[kind], left // size(kind))
        n_slots[kind] += more
        left -= more * size(kind)
    return n_slots


def widest(layers: Iterable[ExpertLayer | None]) -> int:
    """The largest n_ff of all experts."""
    widths = (copy.n_ff for layer in layers if layer is not None for one in layer.experts for copy in one)
    return max(widths, default=0)


def tiered_compute_bytes(spec: ModelSpec, n_masked: int, n_batch: int, n_ff: int) -> int:
    """An upper estimate of the buffers that a cut step uses: exchange, segments, and one expert's batch.

    `n_masked` are the cells of a token's row in all masks.
    """
    n_used, d, d_expert = max(1, spec.n_expert_used), spec.n_embd, spec.n_embd_expert
    exchange = n_batch * (4 * (d + d_expert * (1 + n_used)) + 2 * n_masked + 8 * max(1, spec.n_expert) + 40)
    n_attention = max(of.n_at_once for of in spec.attentions)
    n_around = 4 * spec.n_expert_aux * d_expert + 2 * spec.experts.n_latent
    segment = 4 * (n_batch * (6 * d + n_around + n_attention) + spec.n_vocab)
    expert = 4 * max(n_batch, n_used) * (3 * n_ff + 3 * d_expert)
    return exchange + segment + expert + (2 << 20)
