"""The engine's own counters for Prometheus: whatever its tiers count, by unit and name."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

_TEXTS = {
    "bytes": "Bytes that the engine's tiers moved.",
    "seconds": "Seconds that the engine's tiers waited or worked.",
    "events": "What happened in the engine's tiers: picks by where their expert was found, reads, swaps.",
}


class TierCollector(Collector):
    """Running totals as the engine last told them; they begin again at 0 when its process does."""

    def __init__(self, totals: Callable[[], Mapping[str, float]]) -> None:
        self._totals = totals

    def collect(self) -> Iterator[CounterMetricFamily]:
        """One family for each unit, with the counters' names as labels."""
        families = {
            unit: CounterMetricFamily(f"slimoe_tier_{unit}", text, labels=["what"]) for unit, text in _TEXTS.items()
        }
        for name, value in self._totals().items():
            unit, what = _unit(name)
            families[unit].add_metric([what], value)
        yield from (family for family in families.values() if family.samples)


def _unit(name: str) -> tuple[str, str]:
    """What a counter counts, and its name without that."""
    if name.startswith("bytes_"):
        return "bytes", name.removeprefix("bytes_")
    if name.endswith("_seconds"):
        return "seconds", name.removesuffix("_seconds")
    return "events", name.removeprefix("n_")
