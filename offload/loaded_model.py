"""A model opened as planned: its weights, KV cache and experts in memory, and the runner of its steps."""

from bisect import bisect_right
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Protocol

from slimoe.offload.cache.expert_uses import ExpertUses
from slimoe.offload.experts.carried import Carried
from slimoe.offload.experts.device_experts import DeviceExperts
from slimoe.offload.ggml.cpu_backend import Backend, CpuBackend
from slimoe.offload.graph.batch import Batch
from slimoe.offload.graph.mtp import MtpRunner, MtpWeights, TokenEmbedder
from slimoe.offload.graph.runner import Hidden, Logits, Runner
from slimoe.offload.graph.token_rows import TokenRows
from slimoe.offload.graph.weights import Linear, ModelWeights, WeightStore, WeightSubset, load_weights
from slimoe.offload.memory.kv_cache import KVCache, KVSize
from slimoe.offload.memory.kv_store import HOST, KVPlace, KVStore
from slimoe.offload.model.mtp_block import MtpBlock
from slimoe.offload.model.regrouped import join_layers
from slimoe.offload.model.tensors import LinearSource, ModelSources
from slimoe.offload.open_tiers import Tiers, open_tiers
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.engine_plan import EnginePlan
from slimoe.offload.plan.weight_forms import WeightForms
from slimoe.offload.resources.memory import peak_resident_bytes

Progress = Callable[[int, int], None]


class StepRunner(Protocol):
    """Computes steps of a model."""

    @property
    def compute_bytes(self) -> int:
        """Bytes of all intermediate results in host memory."""

    @property
    def hidden(self) -> Hidden:
        """The last hidden states of all tokens of the step before, [n_tokens, n_embd], where they are wanted."""

    def run(self, batch: Batch, is_cancelled: Callable[[], bool] | None = None) -> Logits:
        """Reads a batch; F32 logits [n_out, n_vocab]."""

    def close(self) -> None:
        """Frees everything."""


class LoadedModel:
    """A model in memory: owns the backend, the weights, the KV cache and the tiers, if there are any.

    `runner` computes its steps; `store` has the weights of a model that is all in host memory, else it is None. `mtp`
    computes those of the block that drafts tokens, None where nothing does.
    """

    runner: StepRunner
    store: WeightStore | None = None
    mtp: MtpRunner | None = None

    def __init__(
        self, config: EngineConfig, plan: EnginePlan, on_progress: Progress, carried: Carried | None = None
    ) -> None:
        """Loads a model; `carried` is what an earlier opening of it has left, and stays the caller's to free."""
        self._plan = plan
        self.tiers: Tiers | None = None
        with ExitStack() as opened:
            if carried is None:
                carried = carried_anew(config, plan)
                opened.callback(carried.kv.close)
            self.backend = opened.enter_context(closing(CpuBackend(plan.n_threads)))
            backend: Backend = self.backend
            counter = _Counter(plan, on_progress)
            rows = self._rows = None
            if plan.weight_forms.mode != "mapped":
                # A step reads the rows of the token table that it needs, which is not in memory, or only as the output
                # matrix, whose rows may be rearranged.
                rows = self._rows = TokenRows(plan.gguf, plan.sources.token_embd, self.backend, plan.n_batch)
                opened.callback(rows.close)
            if plan.is_resident:
                carried.kv.arrange({HOST: KVPlace(self.backend, tuple(range(plan.spec.n_layer)))})
                cache = carried.kv.caches[HOST]
                self.store = opened.enter_context(closing(WeightStore(plan.gguf, plan.sources, counter, self.backend)))
                forms, table = plan.weight_forms, None if rows is None else rows.tensor
                sources = plan.sources if forms.mode == "mapped" else join_layers(plan.sources)
                weights = FormedWeights(self.store, sources, forms, table)
                self.store.release_staging()
                self.runner = Runner(
                    plan.spec,
                    self.backend,
                    cache,
                    weights.of,
                    rows,
                    plan.n_batch,
                    carried.uses,
                    has_hidden=plan.mtp is not None,
                )
                opened.callback(self.runner.close)
                single = weights.of(1)
            else:
                self.tiers = open_tiers(config, plan, self.backend, rows, opened, counter, carried)
                self.runner = self.tiers.runner
                # The part that has the output matrix, which the block makes use of.
                last = self.tiers.runner.parts[-1]
                backend, single = last.backend, last.weights
            if plan.mtp is not None:
                self.mtp = open_mtp(plan, plan.mtp, self.backend, backend, single, opened, counter)
            self._opened = opened.pop_all()

    def memory(self) -> dict[str, int]:
        """Bytes by tier, as planned and allocated, and the process's peak."""
        held = self._plan.host_bytes if self.tiers is None else self.tiers.memory()
        return {**held, "compute": self.runner.compute_bytes, "process_peak": peak_resident_bytes()}

    @property
    def notes(self) -> tuple[str, ...]:
        """What opening has found out that no plan knows."""
        return () if self.tiers is None else self.tiers.notes

    def adapt(self, config: EngineConfig, plan: EnginePlan) -> bool:
        """Carries out another plan for the same model where that takes no opening anew, and returns whether it did."""
        if (plan.mtp is None) != (self._plan.mtp is None):
            return False
        if plan.is_resident and self._plan.is_resident:
            # More memory than a whole model needs changes nothing.
            is_same = self._plan.weight_forms.arrangement == plan.weight_forms.arrangement
        else:
            is_same = self.tiers is not None and self.tiers.resize(plan, str(config.model))
        if is_same:
            self._plan = plan
        return is_same

    def check_files(self) -> None:
        """Raises FileChangedError when a file that is still read from was written to; mapped files are not checked."""
        if self._rows is not None:
            self._rows.check_file()
        if self.tiers is not None and self.tiers.reader is not None:
            self.tiers.reader.check_files()

    def counters(self) -> dict[str, float]:
        """Running totals of the tiers by name: selected experts, bytes and seconds; empty when all is resident."""
        return {} if self.tiers is None else self.tiers.counters()

    @property
    def seconds(self) -> tuple[float, float]:
        """Seconds spent inside the CPU's graphs, and waiting for devices."""
        parts = () if self.tiers is None else self.tiers.runner.parts
        return self.backend.seconds, sum(part.backend.seconds for part in parts if part.backend is not self.backend)

    @property
    def device_experts(self) -> tuple[DeviceExperts, ...]:
        """The slots of each device that has some."""
        devices = () if self.tiers is None else self.tiers.devices
        return tuple(experts for _, experts in devices if experts is not None)

    def close(self) -> None:
        """Frees everything."""
        self._opened.close()


def open_mtp(
    plan: EnginePlan,
    block: MtpBlock,
    cpu: CpuBackend,
    backend: Backend,
    model: ModelWeights,
    opened: ExitStack,
    count: Callable[[int], None],
) -> MtpRunner:
    """Loads a block that predicts tokens, whole, to be computed by a backend; `opened` closes all of it.

    What it has no output of its own for is the model's, whose weights lie there too. The `cpu` looks tokens up. Raises
    DoesNotFitError and DeviceError.
    """
    rows = TokenRows(plan.gguf, block.sources.token_embd, cpu, plan.n_batch)
    opened.callback(rows.close)
    embedder = TokenEmbedder(block.spec, cpu, rows, plan.n_batch)
    opened.callback(embedder.close)
    size = KVSize(plan.kv.kind, plan.kv.n_cells)
    cache = opened.enter_context(closing(KVCache(block.spec, size, backend, {block.index})))
    store = opened.enter_context(closing(WeightStore(plan.gguf, block.sources, count, backend)))
    sources = join_layers(block.sources)
    weights = load_weights(store, sources, lambda _: "copied", 0, WeightSubset((block.index,), output=False))

    def linear(source: LinearSource) -> Linear:
        return Linear(store.weight(source.weight, "copied"), store.weight(source.bias, "copied") if source.bias else 0)

    ends = replace(
        weights,
        output=linear(sources.output) if block.has_output else model.output,
        output_norm=linear(sources.output_norm) if block.has_output_norm else model.output_norm,
    )
    every = MtpWeights(ends, linear(block.joint), *(store.weight(norm, "copied") for norm in block.norms))
    store.release_staging()
    runner = MtpRunner(block.spec, backend, cache, every, embedder, plan.n_batch, plan.n_parallel)
    opened.callback(runner.close)
    return runner


class FormedWeights:
    """A resident model's weights, each in the forms that steps of some size want; they are loaded at once."""

    def __init__(self, store: WeightStore, sources: ModelSources, forms: WeightForms, table: int | None) -> None:
        """`table` is what stands for the token table, if anything does."""
        # Steps of so many tokens, and of all numbers up to the next of these, take the same weights.
        self._firsts = sorted({1, *(n + 1 for n in forms.repacked_tokens.values() if n < forms.n_batch)})
        self._weights = [
            load_weights(store, sources, lambda source, first=first: forms.form(source, first), table)  # type: ignore[misc]
            for first in self._firsts
        ]

    def of(self, n_tokens: int) -> ModelWeights:
        """The weights for steps of so many tokens."""
        return self._weights[bisect_right(self._firsts, n_tokens) - 1]


def carried_anew(config: EngineConfig, plan: EnginePlan) -> Carried:
    """What a model that was not open before begins with: empty caches, and no expert used yet."""
    uses = ExpertUses([0 if layer is None else len(layer.target) for layer in plan.layers])
    return Carried(KVStore(plan.spec, plan.kv), uses)


class _Counter:
    """Adds up bytes that were made ready, and tells `on_progress` of the sum and the total."""

    def __init__(self, plan: EnginePlan, on_progress: Progress) -> None:
        self._total = plan.load_bytes
        self._done = 0
        self._on_progress = on_progress

    def __call__(self, n_bytes: int) -> None:
        self._done = min(self._total, self._done + n_bytes)
        self._on_progress(self._done, self._total)
