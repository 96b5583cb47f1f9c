"""Which experts a native file stores, in which copies, and what its converter measured of them.

`native_format` says under which keys and names a file has it.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerHints:
    """What a converter measured, None where it did not; a value per stored expert unless it says otherwise.

    `use` is how often a token selects the expert, on average, and `share_square` the mean square of its weight then.
    Errors are rises of the KL divergence from the source model, in nats per token, if in place of the expert there were
    always one of its copies (`error` [stored expert][copy]), its fallback (`fallback_error`) or nothing (`skip_error`).
    With a weight below `low_weight` an expert may use its last copy. `fallback` is the constant that can stand in for
    an expert, or -1. For the layer: `sensitivity` is the rise per squared weight that is skipped; an expert may be
    skipped whose weight is below `skip_ratio` times the token's largest.
    """

    use: tuple[float, ...] | None = None
    share_square: tuple[float, ...] | None = None
    error: tuple[tuple[float, ...], ...] | None = None
    fallback: tuple[int, ...] | None = None
    fallback_error: tuple[float, ...] | None = None
    skip_error: tuple[float, ...] | None = None
    low_weight: tuple[float, ...] | None = None
    sensitivity: float | None = None
    skip_ratio: float | None = None

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
        """The number of buckets."""
        return 1 + max((bucket for copies in self.buckets for bucket in copies), default=-1)

    @property
    def is_plain(self) -> bool:
        """Whether the best copies are one stack in the router's order, as in a stock file."""
        n_stored = len(self.buckets)
        first = {copies[0] for copies in self.buckets}
        return len(first) == 1 and self.target == tuple(range(n_stored)) and self.n_slot(first.pop()) == n_stored

    def n_slot(self, bucket: int) -> int:
        """The number of copies in a bucket."""
        return sum(copies.count(bucket) for copies in self.buckets)

    def slots(self) -> Iterator[tuple[int, int, int, int]]:
        """Yields the expert, the number, the bucket and the slot of every copy."""
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
        """The most copies that an expert of the file has."""
        return max((len(copies) for layer in self.layers for copies in layer.buckets), default=1)
