"""Counters and gauges of the server for Prometheus; reading them does not disturb the engine."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client import Counter as Total
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from slimoe.offload.text.generation import ExchangeNow, Timings
from slimoe.server.api.backends import Backends
from slimoe.server.messages import Answer, Done, Step
from slimoe.server.process.request_handle import RequestHandle
from slimoe.server.process.supervisor import Supervisor

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BY_UNIT = {
    "bytes": "Bytes that the engine's tiers moved.",
    "seconds": "Seconds that the engine's tiers waited or worked.",
    "events": "What happened in the engine's tiers: selected experts by where they were found, reads, swaps.",
}


MODES = ("static", "swap", "upload")
"""What a device can do with experts that it lacks."""
_LLAMA_COUNTERS = {
    "prompt_tokens": "Prompt tokens computed.",
    "prompt_tokens_cached": "Prompt tokens known from before.",
    "prompt_seconds": "Seconds in which prompts were read.",
    "tokens_predicted": "Tokens generated.",
    "tokens_predicted_seconds": "Seconds in which tokens were generated.",
}
"""The totals by llama-server's names, before `_total`."""
_LLAMA_GAUGES = {
    "prompt_tokens_seconds": "Prompt tokens computed in a second, since this was last read.",
    "predicted_tokens_seconds": "Tokens generated in a second but for the first of each answer, since then.",
    "requests_processing": "Requests the engine works on.",
    "requests_deferred": "Requests that wait for the engine.",
    "n_tokens_max": "The longest conversation, with its answer.",
}


class Metrics:
    """Counts the engine's answers on their way to clients."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"
    start_header = "Process-Start-Time-Unix"

    def __init__(self, backends: Backends) -> None:
        registry = self._registry = CollectorRegistry()
        self.started_at = int(time.time())
        self._pool = backends.pool
        self._llama: defaultdict[str, float] = defaultdict(float)
        self._window: defaultdict[str, float] = defaultdict(float)
        self._n_longest = 0
        self._supervisors = [backend.supervisor for backend in backends.all()]
        self._prompt = Total("slimoe_prompt_tokens", "Prompt tokens computed.", registry=registry)
        self._cached = Total("slimoe_prefix_cache_hits", "Prompt tokens known from before.", registry=registry)
        self._generated = Total("slimoe_generation_tokens", "Tokens generated.", registry=registry)
        text = "Drafted tokens that were verified."
        self._drafted = Total("slimoe_spec_decode_num_draft_tokens", text, registry=registry)
        text = "Drafted tokens that took no step of their own."
        self._accepted = Total("slimoe_spec_decode_num_accepted_tokens", text, registry=registry)
        self._finished = Total(
            "slimoe_request_success", "Generations completed.", ["finished_reason"], registry=registry
        )
        self._first = _histogram("slimoe_time_to_first_token_seconds", "From the request to its first text.", registry)
        self._whole = _histogram("slimoe_e2e_request_latency_seconds", "From the request to its end.", registry)
        self._memory = Gauge("slimoe_memory_used_bytes", "Memory the engine holds.", ["tier"], registry=registry)
        self._token_seconds = Gauge(
            "slimoe_token_seconds",
            "Seconds of an answer's token: as the plan predicts, and as the last answer measured.",
            ["model", "kind"],
            registry=registry,
        )
        self._exchange = ExchangeGauges(registry)
        running = Gauge("slimoe_num_requests_running", "Requests the engine works on.", registry=registry)
        running.set_function(self._n_running)
        waiting = Gauge("slimoe_num_requests_waiting", "Requests that wait for the engine.", registry=registry)
        waiting.set_function(self._n_waiting)
        restarts = Gauge("slimoe_engine_restarts", "Times the engine's process was started again.", registry=registry)
        restarts.set_function(lambda: self._sum(lambda one: one.n_restarts))
        loaded = Gauge("slimoe_models_loaded", "Models whose engine runs, or is starting.", registry=registry)
        loaded.set_function(lambda: len(self._pool.loaded))
        registry.register(TierCollector(lambda: self._totals("counters")))
        registry.register(LlamaCollector(lambda: self._llama, self._llama_gauges))

    def _sum(self, figure: Callable[[Supervisor], int]) -> int:
        return sum(map(figure, self._supervisors))

    def _n_running(self) -> int:
        return self._sum(lambda one: min(one.n_parallel, one.n_busy))

    def _n_waiting(self) -> int:
        return self._pool.n_waiting + self._sum(lambda one: max(0, one.n_busy - one.n_parallel))

    def _llama_gauges(self) -> dict[str, float]:
        """As llama-server has it, throughput is that since the figures were last read."""
        window, self._window = self._window, defaultdict(float)
        return {
            "prompt_tokens_seconds": window["prompt_tokens"] / (window["prompt_seconds"] or 1),
            "predicted_tokens_seconds": window["n_decoded"] / (window["decode_seconds"] or 1),
            "requests_processing": self._n_running(),
            "requests_deferred": self._n_waiting(),
            "n_tokens_max": self._n_longest,
        }

    def _totals(self, name: Literal["counters", "memory"]) -> dict[str, float]:
        """The figures of all models together."""
        totals: Counter[str] = Counter()
        for supervisor in self._supervisors:
            if supervisor.info is not None:
                totals.update(getattr(supervisor.info, name))
        return dict(totals)

    def note(self, handle: RequestHandle, answer: Answer, model: str) -> None:
        """Counts one answer of a model's engine."""
        if isinstance(answer, Step) and not handle.has_begun:
            handle.has_begun = True
            self._first.observe(time.monotonic() - handle.submitted_at)
        elif isinstance(answer, Done):
            self._note_timings(answer.timings)
            self._note_token(answer.timings, model)
            self._exchange.note(answer.tiers.exchange, model)
            self._finished.labels(answer.reason).inc()
            self._whole.observe(time.monotonic() - handle.submitted_at)

    def note_left(self, handle: RequestHandle) -> None:
        """Counts what was computed for a generation that failed, or that nobody waits for any more."""
        self._note_timings(handle.timings_so_far())

    def _note_timings(self, timings: Timings) -> None:
        self._prompt.inc(timings.prompt_n)
        self._cached.inc(timings.cached_n)
        self._generated.inc(timings.predicted_n)
        self._drafted.inc(timings.draft_n)
        self._accepted.inc(timings.draft_n_accepted)
        prompt_seconds, decode_seconds = timings.prompt_ms / 1000, timings.predicted_ms / 1000
        prompt = {"prompt_tokens": timings.prompt_n, "prompt_seconds": prompt_seconds}
        predicted = {"tokens_predicted": timings.predicted_n, "tokens_predicted_seconds": decode_seconds}
        for name, value in {**prompt, **predicted, "prompt_tokens_cached": timings.cached_n}.items():
            self._llama[name] += value
        # An answer's first token comes from the prompt's last logits.
        n_decoded = max(0, timings.predicted_n - 1)
        for name, value in {**prompt, "n_decoded": n_decoded, "decode_seconds": decode_seconds}.items():
            self._window[name] += value
        self._n_longest = max(self._n_longest, timings.cached_n + timings.prompt_n + timings.predicted_n)

    def _note_token(self, timings: Timings, model: str) -> None:
        if timings.expected_per_token_ms is not None:
            self._token_seconds.labels(model, "predicted").set(timings.expected_per_token_ms / 1000)
        if timings.predicted_n > 1:
            self._token_seconds.labels(model, "measured").set(timings.predicted_ms / 1000 / (timings.predicted_n - 1))

    def text(self) -> bytes:
        """The registry in Prometheus' text format."""
        self._memory.clear()
        for tier, n_bytes in self._totals("memory").items():
            self._memory.labels(tier).set(n_bytes)
        return generate_latest(self._registry)


def _histogram(name: str, text: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(name, text, buckets=_SECONDS, registry=registry)


class ExchangeGauges:
    """How devices exchange experts, as the last answer of each model has told it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        where, text = ["model", "device"], "What becomes of experts that a device lacks: 1 for the mode of now."
        self._mode = Gauge("slimoe_exchange_mode", text, [*where, "mode"], registry=registry)
        text = "Tokens of answers that had been computed when the mode was chosen."
        self._since = Gauge("slimoe_exchange_since_token", text, where, registry=registry)
        text = "Seconds of an expert as measured at opening, which the mode was predicted by, and as measured last."
        self._seconds = Gauge("slimoe_exchange_seconds", text, [*where, "what", "kind"], registry=registry)

    def note(self, exchange: Sequence[ExchangeNow], model: str) -> None:
        """Takes the figures of an answer's end."""
        for now in exchange:
            for mode in MODES:
                self._mode.labels(model, now.device, mode).set(mode == now.mode)
            self._since.labels(model, now.device).set(now.since_token)
            for kind, figures in (("predicted", now.expected_ms), ("measured", now.measured_ms)):
                for what, ms in figures.items():
                    self._seconds.labels(model, now.device, what, kind).set(ms / 1000)


class LlamaCollector(Collector):
    """Totals and throughput under the names that dashboards for llama-server look for."""

    def __init__(self, totals: Callable[[], Mapping[str, float]], gauges: Callable[[], Mapping[str, float]]) -> None:
        self._totals, self._gauges = totals, gauges

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """One family for each name."""
        totals, gauges = self._totals(), self._gauges()
        for name, text in _LLAMA_COUNTERS.items():
            yield CounterMetricFamily(f"llamacpp:{name}", text, totals.get(name, 0.0))
        for name, text in _LLAMA_GAUGES.items():
            yield GaugeMetricFamily(f"llamacpp:{name}", text, gauges[name])


class TierCollector(Collector):
    """The engine's tier counters as it last reported them; they restart at 0 with its process."""

    def __init__(self, totals: Callable[[], Mapping[str, float]]) -> None:
        self._totals = totals

    def collect(self) -> Iterator[CounterMetricFamily]:
        """One family for each unit, with the counters' names as labels."""
        families = {
            unit: CounterMetricFamily(f"slimoe_tier_{unit}", text, labels=["what"]) for unit, text in _BY_UNIT.items()
        }
        for name, value in self._totals().items():
            if name.startswith("bytes_"):
                families["bytes"].add_metric([name.removeprefix("bytes_")], value)
            elif name.endswith("_seconds"):
                families["seconds"].add_metric([name.removesuffix("_seconds")], value)
            else:
                families["events"].add_metric([name.removeprefix("n_")], value)
        yield from (family for family in families.values() if family.samples)
