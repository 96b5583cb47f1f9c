"""Which experts a native file stores, in which copies, and what its converter knew of them: values without keys.

`native_format` says how they are written.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerHints:
    """What a converter measured, None where it did not; a value per stored expert unless it says otherwise.

    `use` is the expected number of picks per token, `share_square` the mean square of the share at a pick. Errors are
    rises of the KL divergence from the source model, nats per token, if every pick of the expert took an action:
    `error` the use of each copy [stored expert][copy], `fallback_error` that of its fallback, `skip_error` of nothing.
    `fallback` is the novice that can stand in for an expert, or -1. For the layer: `sensitivity`, KL per squared share
    of picks that are skipped; `skip_ratio`, a pick whose share is below this part of the token's largest may be
    skipped; `low_share`, a pick whose share is below it may use the last copy.
    """

    use: tuple[float, ...] | None = None
    share_square: tuple[float, ...] | None = None
    error: tuple[tuple[float, ...], ...] | None = None
    fallback: tuple[int, ...] | None = None
    fallback_error: tuple[float, ...] | None = None
    skip_error: tuple[float, ...] | None = None
    sensitivity: float | None = None
    skip_ratio: float | None = None
    low_share: float | None = None

    @property
    def low_error(self) -> tuple[float, ...] | None:
        """How much the error rises when the last copy replaces the best; 0 for an expert of one copy."""
        return None if self.error is None else tuple(max(0.0, copies[-1] - copies[0]) for copies in self.error)


NO_HINTS = LayerHints()


@dataclass(frozen=True, slots=True)
class NativeLayer:
    """One layer's experts: `target` per router row, `buckets` [stored expert][copy]; both empty without an FFN."""

    target: tuple[int, ...] = ()
    buckets: tuple[tuple[int, ...], ...] = ()
    hints: LayerHints = NO_HINTS

    @property
    def n_bucket(self) -> int:
        """Number of buckets."""
        return 1 + max((bucket for copies in self.buckets for bucket in copies), default=-1)

    @property
    def is_plain(self) -> bool:
        """Whether the best copies are one stack in the router's order, as in a stock file."""
        n_stored = len(self.buckets)
        first = {copies[0] for copies in self.buckets}
        return len(first) == 1 and self.target == tuple(range(n_stored)) and self.n_slot(first.pop()) == n_stored

    def n_slot(self, bucket: int) -> int:
        """Number of copies in a bucket."""
        return sum(copies.count(bucket) for copies in self.buckets)

    def slots(self) -> Iterator[tuple[int, int, int, int]]:
        """(expert, copy, bucket, slot) of every copy."""
        taken = [0] * self.n_bucket
        for expert, copies in enumerate(self.buckets):
            for copy, bucket in enumerate(copies):
                yield expert, copy, bucket, taken[bucket]
                taken[bucket] += 1


@dataclass(frozen=True, slots=True)
class NativeLayout:
    """What a native file holds besides a stock one's contents; `measured_kl` per copy, None if not measured."""

    layers: tuple[NativeLayer, ...]
    measured_kl: tuple[float, ...] | None = None

    @property
    def n_copy(self) -> int:
        """Copies of the experts that have most of them."""
        return max((len(copies) for layer in self.layers for copies in layer.buckets), default=1)
