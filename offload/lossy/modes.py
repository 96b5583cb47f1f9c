"""The lossy modes by name, as `--lossy NAME[:VALUE]` and `--max-kl X` ask for them."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from slimoe.offload.cache.policy import Values
from slimoe.offload.cache.residency import Key, most_valuable
from slimoe.offload.cache.slots import TierPlan, low_classes
from slimoe.offload.errors import UsageError
from slimoe.offload.lossy.decision import Chooser
from slimoe.offload.lossy.elastic import Elastic, Mix
from slimoe.offload.lossy.limit import (
    low_slots_at,
    low_weights_within,
    lowered_loss,
    price_within,
    slots_of_low_weights,
)
from slimoe.offload.lossy.loss import LossTable, loss_tables
from slimoe.offload.lossy.rules import (
    NEVER,
    SECONDS_PER_BYTE,
    Gate,
    LowWeights,
    NeverWait,
    Rule,
    Sensitivity,
    SmallWeights,
)
from slimoe.offload.model.experts import ExpertLayer, SlotClass

Layers = Sequence[ExpertLayer | None]

_DEFAULT_GATE = 0.6
_WITH_COPIES = (
    "This makes such a file: slimoe convert SRC DST --recipe hobbit --stats STATS, "
    "or --two-copies Q4_K,Q2_K without statistics."
)
_MEASURED = "This makes such a file: slimoe calibrate SRC -o STATS, then slimoe convert SRC DST --stats STATS"


@dataclass(frozen=True, slots=True, eq=False)
class Lossy:
    """A mode, what it knows of each layer's experts, and the KL divergence in nats per token that it may cost at most.

    `limit` is None without a limit. `note` tells a person what was chosen.
    """

    chooser: Chooser
    tables: tuple[LossTable | None, ...]
    note: str
    limit: float | None = None

    @property
    def is_best_that_fits(self) -> bool:
        """Whether the mode is exact where the best copies all fit into memory."""
        return isinstance(self.chooser, Elastic) and self.chooser.share in (None, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A mode's name and values, or a limit, as asked for, and the `layers` of the model's file."""

    name: str
    values: tuple[float, ...]
    max_kl: float | None
    layers: Layers
    tables: tuple[LossTable | None, ...]

    def value(self, most: float = 1.0) -> float | None:
        """The mode's only value, None without; raises UsageError for more values than one, or one out of range."""
        values = self.numbers(1, most)
        return values[0] if values else None

    def numbers(self, most_values: int, most: float = 1.0) -> tuple[float, ...]:
        """The mode's values; raises UsageError for too many values, or one out of range."""
        if len(self.values) > most_values:
            raise UsageError(f"--lossy {self.name} takes at most {most_values} values. Write {EXAMPLES[self.name]}.")
        if not all(0 <= value <= most for value in self.values):
            limits = "from 0 up" if most == math.inf else f"from 0 to {most:g}"
            raise UsageError(f"The values of --lossy {self.name} go {limits}. Write {EXAMPLES[self.name]}.")
        return self.values

    def need(self, is_there: bool, what: str, remedy: str) -> None:
        """Raises UsageError where the file lacks something."""
        if not is_there:
            raise UsageError(f"The model's file has no {what}, which --lossy {self.name} needs. {remedy}")

    def need_low_copies(self) -> None:
        """Raises UsageError for a file of single copies."""
        has_low = any(len(copies) > 1 for layer in self.layers if layer is not None for copies in layer.experts)
        self.need(has_low, "second copies of its experts", _WITH_COPIES)

    def by_layer(self, what: str, values: Sequence[float | None], remedy: str) -> dict[int, float]:
        """A hint for every layer that has experts; raises UsageError where one is missing."""
        found = {index: value for index, value in enumerate(values) if value is not None}
        present = {index for index, layer in enumerate(self.layers) if layer is not None and layer.experts}
        self.need(present <= found.keys(), what, remedy)
        return found


def _low(request: Request) -> Chooser:
    request.numbers(0)
    request.need_low_copies()
    return NeverWait()


def _gate(request: Request) -> Chooser:
    values, layers, tables = request.numbers(2), request.layers, request.tables
    hints = [None if layer is None else layer.hints.low_weight for layer in layers]
    is_known = all(hint or layer is None or not layer.experts for hint, layer in zip(hints, layers, strict=True))
    if request.max_kl is not None or (is_known and not values):
        request.need_low_copies()
        if request.max_kl is not None:
            weights = low_weights_within(request.max_kl, layers, tables)
        else:
            weights = {index: np.array([*(hint or ()), 0.0]) for index, hint in enumerate(hints)}
        return LowWeights(weights, slots_of_low_weights(weights, layers, tables))
    gate = Gate(*(values or (_DEFAULT_GATE,)))
    if gate.low_slots != "none":
        request.need_low_copies()
    return gate


def _skip(request: Request) -> Chooser:
    return SmallWeights(_ratios(request))


def _constant(request: Request) -> Chooser:
    fallbacks = (layer.hints.fallback or () for layer in request.layers if layer is not None)
    has_fallbacks = any(constant >= 0 for fallback in fallbacks for constant in fallback)
    remedy = f"{_MEASURED} --target-size SIZE --constants. --lossy skip does without."
    request.need(has_fallbacks, "constant experts that stand in for others", remedy)
    return SmallWeights(_ratios(request), constants=True)


def _ratios(request: Request) -> dict[int, float]:
    value = request.value()
    if value is not None:
        return dict.fromkeys(range(len(request.layers)), value)
    hints = [None if layer is None else layer.hints.skip_ratio for layer in request.layers]
    remedy = f"Give one, as {EXAMPLES[request.name]}. {_MEASURED} --type Q4_K."
    return request.by_layer("ratios of its own", hints, remedy)


def _adap(request: Request) -> Chooser:
    value = request.value(math.inf)
    hints = [None if layer is None else layer.hints.sensitivity for layer in request.layers]
    remedy = f"{_MEASURED} --type Q4_K. --lossy skip:VALUE does without."
    sensitivities = request.by_layer("sensitivities of its layers", hints, remedy)
    if value is None:
        raise UsageError(f"--lossy adap needs a value. Write {EXAMPLES['adap']}.")
    return Sensitivity(value, sensitivities)


def _rule(request: Request) -> Chooser | None:
    value = request.value(math.inf)
    if request.max_kl is not None:
        return _priced(request.max_kl, request.layers, request.tables, ())
    if value is None:
        what = "the seconds of waiting that one nat of KL divergence is worth"
        raise UsageError(f"--lossy rule needs a value, {what}. Write {EXAMPLES['rule']}.")
    if value == math.inf:
        return None
    hints = [layer.hints for layer in request.layers if layer is not None and layer.experts]
    is_measured = all(hint.error or hint.skip_error or hint.fallback_error for hint in hints)
    remedy = f"{_MEASURED} --recipe hobbit. --lossy low and --lossy gate do without."
    request.need(is_measured, "measured errors", remedy)
    price = SECONDS_PER_BYTE / value if value else NEVER
    return Rule(mu=value, low_slots=low_slots_at(price, request.layers, request.tables))


def _priced(limit: float, layers: Layers, tables: Sequence[LossTable | None], resident: Collection[Key]) -> Rule:
    price = price_within(limit, layers, tables, resident)
    return Rule(price=price, low_slots=low_slots_at(price, layers, tables))


def _elastic(request: Request) -> Chooser:
    share = request.value()
    request.need_low_copies()
    return Elastic(share)


LOSSY: dict[str, Callable[[Request], Chooser | None]] = {
    "low": _low,
    "gate": _gate,
    "skip": _skip,
    "adap": _adap,
    "constant": _constant,
    "rule": _rule,
    "elastic": _elastic,
}
"""Makes each mode by its name; None is the exact engine."""
OLD_NAMES = {"novice": "constant"}
"""Old spellings of modes that are still understood for one version."""
EXAMPLES = {
    "low": "--lossy low",
    "gate": "--lossy gate, --lossy gate:0.6 or --lossy gate:0.6,0.9",
    "skip": "--lossy skip:0.2",
    "adap": "--lossy adap:0.005",
    "constant": "--lossy constant:0.2",
    "rule": "--lossy rule:100 or --lossy rule:inf",
    "elastic": "--lossy elastic or --lossy elastic:0.5",
}
_LIMITED = ("rule", "gate", "elastic")
"""Modes that can keep to a limit."""


def make_lossy(text: str | None, max_kl: float | None, layers: Layers) -> Lossy | None:
    """The mode that `--lossy` (`text`) and `--max-kl` ask for, None for the exact engine.

    Raises UsageError for what cannot be understood, and for modes that need what the file does not have.
    """
    if text is None and max_kl is None:
        return None
    name, colon, values = ("rule" if text is None else text).partition(":")
    name = OLD_NAMES.get(name, name)
    if name not in LOSSY:
        raise UsageError(f"There is no lossy mode {name!r}. Choose one of {', '.join(LOSSY)}.")
    try:
        numbers = tuple(float(part) for part in values.split(",")) if values else ()
    except ValueError:
        raise UsageError(f"{values!r} is no value of --lossy {name}. Write {EXAMPLES[name]}.") from None
    request = Request(name, numbers, max_kl, layers, loss_tables(layers))
    if not any(layer is not None and layer.experts for layer in layers):
        raise UsageError("The model has no experts to save on. Leave --lossy and --max-kl out.")
    if max_kl is not None:
        _check_limit(request, max_kl)
    chooser = LOSSY[name](request)
    if chooser is None or (max_kl == 0 and name != "elastic"):
        return None
    flags = [] if text is None else [f"--lossy {name}{colon}{values}"]
    flags += [f"--max-kl {max_kl:g}"] if max_kl else []
    note = f"Answers are not exact: {' '.join(flags)} is on."
    if isinstance(chooser, Gate) and not numbers:
        note += f" The file has no thresholds of its own, so that it is gate:{_DEFAULT_GATE:g}."
    return Lossy(chooser, request.tables, note, max_kl if name == "rule" else None)


def with_resident(lossy: Lossy, layers: Layers, tiers: TierPlan, priors: Values | None) -> Lossy:
    """The mode when it is known which experts are in memory in their best copies from the start.

    These are the most valuable experts of each class of slots that have one beside the low-bit copies.
    """
    if lossy.limit is None:
        return lossy
    keys: dict[SlotClass, list[Key]] = {}
    for index, layer in enumerate(layers):
        for expert, copies in enumerate(layer.experts if layer is not None else ()):
            keys.setdefault(copies[0].slot_class, []).append((index, expert))
    n_expert = max(len(layer.experts) for layer in layers if layer is not None)
    values = np.zeros((len(layers), n_expert)) if priors is None else priors
    free = Counter(dict(tiers.n_slots)) - low_classes(layers, tiers.low)
    resident = {key for kind, own in keys.items() for key in most_valuable(values, own, free[kind])}
    rule = _priced(lossy.limit, layers, lossy.tables, resident)
    # The slots are planned already.
    return replace(lossy, chooser=replace(rule, low_slots=tiers.low))


def mixed_lossy(lossy: Lossy, mix: Mix, max_kl: float | None) -> Lossy:
    """The elastic mode once its mix is known; raises UsageError if that is expected to cost more than `max_kl`."""
    tables = loss_tables(mix.layers, mix.lowered)
    loss = lowered_loss(tables)
    if max_kl is not None and loss > max_kl:
        raise UsageError(
            f"With this memory --lossy elastic is expected to cost {loss:.3g} nats per token, more than the "
            f"{max_kl:g} of --max-kl. Raise --ram, or leave --lossy out and let --max-kl choose what is read from disk."
        )
    cost = f", expected to cost {loss:.3g} nats per token" if loss < math.inf else ""
    note = f"Elastic mix {mix.share:g}: {mix.n_lowered} of {mix.n_experts} experts in their smaller copy{cost}."
    return replace(lossy, tables=tables, note=note)


def _check_limit(request: Request, max_kl: float) -> None:
    if not max_kl >= 0:
        raise UsageError(f"--max-kl is {max_kl:g}, but must be at least 0.")
    if request.name not in _LIMITED or (request.values and request.name != "elastic"):
        raise UsageError(
            "--max-kl finds a mode's values itself. Use it alone, or with --lossy rule, gate or elastic and no value."
        )
    hints = [layer.hints for layer in request.layers if layer is not None and layer.experts]
    if not all(hint.error and hint.use for hint in hints):
        raise UsageError(
            "The model's file does not say what doing with less of its experts costs, so that --max-kl cannot be kept. "
            f"{_MEASURED} --recipe hobbit. Without it, name a mode and its value with --lossy: {', '.join(LOSSY)}."
        )
