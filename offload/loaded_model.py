"""A model opened as planned: its weights, KV cache and experts in memory, and what runs steps over them."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Protocol

from offload.arena import Arena
from offload.backend import CpuBackend
from offload.batch import Batch
from offload.disk_reader import DiskReader
from offload.engine_plan import EngineConfig, EnginePlan
from offload.exchange import Exchange, ExchangeShape
from offload.expert_graph import ExpertGraphs
from offload.expert_source import ExpertCopy
from offload.expert_stage import ExpertStage
from offload.kv_cache import KVCache, kv_type
from offload.memory import peak_resident_bytes
from offload.novice import read_novices
from offload.policy import PolicyContext, make_policy
from offload.residency import Key, most_valuable
from offload.runner import Logits, Runner
from offload.tier_plan import TierPlan
from offload.tiered_runner import TieredRunner
from offload.token_rows import TokenRows
from offload.weight_source import join_layers, without_experts
from offload.weights import ModelWeights, WeightStore, load_weights

Progress = Callable[[int, int], None]


class StepRunner(Protocol):
    """What computes steps."""

    @property
    def compute_bytes(self) -> int:
        """Bytes of all intermediate results."""

    def run(self, batch: Batch, is_cancelled: Callable[[], bool] | None = None) -> Logits:
        """Reads a batch; F32 logits [n_out, n_vocab]."""

    def close(self) -> None:
        """Frees everything."""


class LoadedModel:
    """Owns all that a plan says; `runner` computes."""

    runner: StepRunner

    def __init__(self, config: EngineConfig, plan: EnginePlan, on_progress: Progress) -> None:
        self._plan = plan
        self._arena: Arena | None = None
        self._reader: DiskReader | None = None
        with ExitStack() as opened:
            self.backend = opened.enter_context(closing(CpuBackend(plan.n_threads)))
            self._cache = opened.enter_context(closing(KVCache(plan.spec, plan.n_cells, kv_type(config.kv_type))))
            counter = _Counter(plan, on_progress)
            self._store = opened.enter_context(closing(WeightStore(plan.gguf, plan.sources, counter)))
            rows = self._token_rows(opened)
            if plan.tiers is None:
                batched, single = self._load(rows)
                self.runner = Runner(plan.spec, self.backend, self._cache, batched, single, rows, plan.n_batch)
            else:
                self.runner = self._open_tiers(config, plan.tiers, rows, opened, counter)
            opened.callback(self.runner.close)
            self._opened = opened.pop_all()

    def _token_rows(self, opened: ExitStack) -> TokenRows | None:
        """Room for a step's rows of the token table; none if the table is in memory anyway."""
        plan = self._plan
        if plan.placement.mode == "mapped" or plan.sources.output.weight is plan.sources.token_embd:
            return None
        return opened.enter_context(closing(TokenRows(plan.gguf, plan.sources.token_embd, self.backend, plan.n_batch)))

    def _load(self, rows: TokenRows | None) -> tuple[ModelWeights, ModelWeights]:
        """Weights for batches and for single tokens: two arrangements, or twice the same one."""
        placement, sources = self._plan.placement, self._plan.sources
        if placement.mode != "mapped":
            sources = join_layers(sources)
        table = None if rows is None else rows.tensor
        batched = load_weights(self._store, sources, placement.batch_form, table)
        single = load_weights(self._store, sources, placement.single_form, table)
        self._store.release_staging()
        return batched, single

    def _open_tiers(
        self,
        config: EngineConfig,
        tiers: TierPlan,
        rows: TokenRows | None,
        opened: ExitStack,
        on_progress: Callable[[int], None],
    ) -> TieredRunner:
        plan, layers = self._plan, self._plan.layers
        sources = join_layers(without_experts(plan.sources))
        weights = load_weights(self._store, sources, lambda _: "copied", None if rows is None else rows.tensor)
        cut = [index for index, layer in enumerate(layers) if layer is not None]
        n_expert = max(len(layer.target) for layer in layers if layer is not None)
        n_used = plan.spec.n_expert_used
        shape = ExchangeShape(plan.spec.n_embd, plan.n_batch, plan.n_cells, n_expert, n_used, tiers.n_ahead)
        exchange = Exchange(self.backend, shape)
        classes = {kind for kind, _ in tiers.n_slots}
        graphs = ExpertGraphs(self.backend, exchange, plan.spec.n_embd, n_used, plan.n_batch, classes)
        policy = make_policy(config.policy, PolicyContext(len(layers), n_expert, n_used, plan.priors))
        self._reader = DiskReader(plan.gguf, direct=config.direct_io)
        opened.callback(self._reader.close)
        self._arena = Arena(self._reader, policy, dict(tiers.n_slots))
        copies: dict[Key, ExpertCopy] = {
            (index, expert): copies[0]
            for index, layer in enumerate(layers)
            if layer is not None
            for expert, copies in enumerate(layer.experts)
        }
        best = most_valuable(policy.values, copies, len(copies))
        self._arena.fill(((key, copies[key]) for key in best), on_progress)
        novices = read_novices(plan.gguf, layers)
        stage = ExpertStage(layers, cut, exchange, graphs, self._arena, policy, tiers.n_ahead, novices)
        return TieredRunner(plan.spec, self.backend, self._cache, weights, exchange, stage, rows, plan.n_batch)

    def memory(self) -> dict[str, int]:
        """Bytes by tier: as planned and allocated, and the process's peak."""
        placement = self._plan.placement
        arena = {} if self._arena is None else {"arena": self._arena.n_bytes}
        return {
            "mapped": placement.mapped,
            "copied": placement.copied,
            "repacked": placement.repacked,
            **arena,
            "kv": self._cache.n_bytes,
            "compute": self.runner.compute_bytes,
            "process_peak": peak_resident_bytes(),
        }

    def counters(self) -> dict[str, float]:
        """Running totals by name, empty when everything is resident: picks, bytes and seconds of the tiers."""
        if self._arena is None or self._reader is None:
            return {}
        reader = self._reader
        return {
            **asdict(self._arena.counters),
            "bytes_read": reader.n_read,
            "bytes_wasted": reader.n_wasted,
            "read_seconds": reader.busy_seconds,
        }

    def close(self) -> None:
        """Frees everything."""
        self._opened.close()
        if self._arena is not None:
            self._arena.close()


class _Counter:
    """Turns bytes that were made ready into done and total."""

    def __init__(self, plan: EnginePlan, on_progress: Progress) -> None:
        placement = plan.placement
        arena = 0 if plan.tiers is None else plan.tiers.arena
        self._total = placement.mapped + placement.copied + placement.repacked + arena
        self._done = 0
        self._on_progress = on_progress

    def __call__(self, n_bytes: int) -> None:
        self._done = min(self._total, self._done + n_bytes)
        self._on_progress(self._done, self._total)
