"""The engine: a GGUF file, opened within a memory plan, and the tokens it has read so far."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing

from offload.backend import CpuBackend
from offload.batch import single_batch
from offload.engine_plan import EngineConfig, EnginePlan, has_tokenizer, plan_engine
from offload.errors import ContextOverflowError
from offload.generation import Event, GenerationRequest
from offload.generator import Generator
from offload.kv_cache import KVCache, kv_type
from offload.memory import peak_resident_bytes, require
from offload.placement import Placement
from offload.runner import Logits, Runner
from offload.tokenizer import Tokenizer
from offload.weight_source import join_layers
from offload.weights import ModelWeights, WeightStore, load_weights


class Engine:
    """An open model and one sequence of tokens in its KV cache.

    Not for several threads at once. `close` gives everything back.
    """

    def __init__(self, config: EngineConfig, plan: EnginePlan, on_progress: Callable[[int, int], None]) -> None:
        self.config, self.plan = config, plan
        self.gguf, self.spec, self.n_ctx = plan.gguf, plan.spec, plan.n_ctx
        self._tokens: list[int] = []
        with ExitStack() as opened:
            self.tokenizer = Tokenizer.open(plan.gguf) if has_tokenizer(plan.gguf) else None
            if self.tokenizer:
                opened.callback(self.tokenizer.close)
            self._backend = opened.enter_context(closing(CpuBackend(plan.n_threads)))
            self._cache = opened.enter_context(closing(KVCache(plan.spec, plan.n_cells, kv_type(config.kv_type))))
            counter = _Counter(plan.placement, on_progress)
            self._store = opened.enter_context(closing(WeightStore(plan.gguf, plan.sources, counter)))
            weights = self._load()
            self._runner = Runner(plan.spec, self._backend, self._cache, *weights, plan.n_batch)
            opened.callback(self._runner.close)
            self._opened = opened.pop_all()

    @classmethod
    def open(cls, config: EngineConfig, on_progress: Callable[[int, int], None] | None = None) -> "Engine":
        """Opens a model; `on_progress` gets bytes made ready and their total.

        Raises ModelFileError, UnsupportedModelError, UsageError, and DoesNotFitError before anything is loaded.
        """
        plan = plan_engine(config)
        require(plan.placement.required, plan.available, f"{config.model} with {plan.n_ctx} tokens of context")
        return cls(config, plan, on_progress or (lambda done, total: None))

    def _load(self) -> tuple[ModelWeights, ModelWeights]:
        """Weights for batches and for single tokens: two arrangements, or twice the same one."""
        placement, sources = self.plan.placement, self.plan.sources
        if placement.mode != "mapped":
            sources = join_layers(sources)
        batched = load_weights(self._store, sources, placement.batch_form)
        single = load_weights(self._store, sources, placement.single_form)
        self._store.release_staging()
        return batched, single

    # --- the sequence --------------------------------------------------------------------------------------

    @property
    def n_past(self) -> int:
        """Tokens in the KV cache."""
        return len(self._tokens)

    @property
    def compute_seconds(self) -> float:
        """Running total of time spent inside graphs; the rest of a step is this program's own."""
        return self._backend.seconds

    def truncate(self, n_past: int) -> None:
        """Forgets all but the first `n_past` tokens."""
        del self._tokens[n_past:]

    def common_prefix(self, tokens: Sequence[int]) -> int:
        """How many of `tokens`, from the first on, are in the KV cache already."""
        n_common = 0
        for ours, theirs in zip(self._tokens, tokens, strict=False):
            if ours != theirs:
                break
            n_common += 1
        return n_common

    def read(self, tokens: Sequence[int], n_out: int = 1, is_cancelled: Callable[[], bool] | None = None) -> Logits:
        """Appends at most `n_batch` tokens; F32 logits [n_out, n_vocab] of the last `n_out`, valid until the next step.

        Raises ContextOverflowError, and EngineAbortedError when `is_cancelled` says so between two operations.
        """
        if self.n_past + len(tokens) > self.n_ctx:
            raise ContextOverflowError(self.n_past + len(tokens), self.n_ctx)
        logits = self._runner.run(single_batch(tokens, self.n_past, n_out), is_cancelled)
        self._tokens.extend(tokens)
        return logits

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Appends any number of tokens in batches; F32 logits [n_vocab] of the last one."""
        assert tokens
        for begin in range(0, len(tokens), self.plan.n_batch):
            logits = self.read(tokens[begin : begin + self.plan.n_batch])
        row: Logits = logits[0]
        return row

    def decode(self, token: int) -> Logits:
        """Appends one token; F32 logits [n_vocab] for the next, valid until the next step."""
        row: Logits = self.read((token,))[0]
        return row

    def generate(self, request: GenerationRequest, is_cancelled: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Answers a request, event by event; the last one is `Finished`.

        What the KV cache shares with the prompt is not computed again. Raises UsageError for parameters out of
        range and ContextOverflowError for a prompt that does not fit.
        """
        return Generator(self, request, is_cancelled).events()

    # --- memory --------------------------------------------------------------------------------------------

    def memory(self) -> dict[str, int]:
        """Bytes by tier: as planned and allocated, and the process's peak."""
        placement = self.plan.placement
        return {
            "mapped": placement.mapped,
            "copied": placement.copied,
            "repacked": placement.repacked,
            "kv": self._cache.n_bytes,
            "compute": self._runner.compute_bytes,
            "process_peak": peak_resident_bytes(),
        }

    def close(self) -> None:
        """Frees weights, cache and threads."""
        self._opened.close()


class _Counter:
    """Turns bytes that were made ready into done and total."""

    def __init__(self, placement: Placement, on_progress: Callable[[int, int], None]) -> None:
        self._total = placement.mapped + placement.copied + placement.repacked
        self._done = 0
        self._on_progress = on_progress

    def __call__(self, n_bytes: int) -> None:
        self._done = min(self._total, self._done + n_bytes)
        self._on_progress(self._done, self._total)
