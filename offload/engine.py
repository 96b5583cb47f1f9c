"""The engine: a GGUF file, opened within a memory plan, and the sequences of tokens it has read so far."""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache

import numpy as np

from slimoe.offload.errors import (
    ContextOverflowError,
    DeviceError,
    DeviceFullError,
    DoesNotFitError,
    LostModelError,
    UsageError,
)
from slimoe.offload.experts.device_experts import DeviceExperts
from slimoe.offload.gguf.identity import model_hash
from slimoe.offload.graph.batch import Batch, make_batch
from slimoe.offload.graph.runner import Logits
from slimoe.offload.loaded_model import LoadedModel, carried_anew
from slimoe.offload.memory.cells import Cells, common_prefix
from slimoe.offload.memory.prompt_cache import PromptCache
from slimoe.offload.memory.prompt_folder import PromptFolder
from slimoe.offload.memory.prompt_record import LARGEST_BLOCK, RecordForm
from slimoe.offload.model.model_file import check_numbers, has_tokenizer
from slimoe.offload.observation import Observer
from slimoe.offload.open_tiers import Tiers
from slimoe.offload.plan.drafts import draft_note
from slimoe.offload.plan.engine_config import EngineConfig, changed
from slimoe.offload.plan.engine_plan import EnginePlan, plan_engine
from slimoe.offload.plan.machine import Machine
from slimoe.offload.plan.replan import replan
from slimoe.offload.printable import say
from slimoe.offload.requests.drafting import Drafting, draft_mode
from slimoe.offload.requests.mtp_drafts import MtpDrafts
from slimoe.offload.requests.request import Generator, ModelFacts
from slimoe.offload.requests.scheduler import Scheduler
from slimoe.offload.requests.slots import Slots
from slimoe.offload.requests.snapshot import Rebudgeted, Snapshot
from slimoe.offload.requests.step_times import StepTimes
from slimoe.offload.resources.memory import HostMemory, give_back_freed
from slimoe.offload.text.generation import Event, ExchangeNow, Failed, GenerationRequest, Outcome
from slimoe.offload.text.grammars import Grammars
from slimoe.offload.text.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
_CLOCKS = ("cpu_seconds", "device_seconds")
_TIDY_SECONDS = 0.01


class Engine:
    """An open model and the sequences of tokens in its KV cache.

    One sequence is the caller's own: `read`, `prefill`, `decode` and `generate` go on from it. `submit` and `step`
    answer several requests at once, each in a sequence of its own, `plan.n_parallel` at a time. The two ways do not mix
    while requests are being answered. It is not for several threads at once. `close` frees everything.
    """

    def __init__(self, config: EngineConfig, plan: EnginePlan, on_progress: Callable[[int, int], None]) -> None:
        self.config, self.plan = config, plan
        self.gguf, self.spec, self.n_ctx = plan.gguf, plan.spec, plan.n_ctx
        # Of what is kept on disk the first block has tokens that no window sees.
        n_more = LARGEST_BLOCK - 1 if config.prompts.prompt_cache else 0
        self.cells = Cells.of(plan.kv, plan.spec.n_window, n_more)
        self._identity = cache(lambda: model_hash(plan.gguf))
        self._own = self.cells.begin()
        self._ids = itertools.count(1)
        self._past: Counter[str] = Counter()
        self._changing = threading.Lock()
        with ExitStack() as opened:
            self.tokenizer = Tokenizer.open(plan.gguf) if has_tokenizer(plan.gguf) else None
            self.grammars = Grammars(self.tokenizer) if self.tokenizer else None
            if self.tokenizer and self.grammars:
                opened.callback(self.tokenizer.close)
                opened.callback(self.grammars.close)
            self._carried = carried_anew(config, plan)
            self._observer = Observer(self._carried.uses, self._totals)
            self._observer.predict(config, plan)
            opened.callback(self._carried.kv.close)
            self._model = LoadedModel(config, plan, on_progress, self._carried)
            opened.callback(lambda: self._model.close())
            told = self.memory, self._tier_counters, self._observer.begin
            watched = self._exchange, self._observer.expected_ms
            self._facts = ModelFacts(plan.n_ctx, plan.spec.n_vocab, self.tokenizer, *told, self.grammars, *watched)
            self._drafting = self._open_drafting()
            self._prompts = self._open_prompts(opened)
            reading = plan.n_parallel, plan.n_batch
            mtp = None
            if self._drafting.mode in ("mtp", "auto"):
                mtp = MtpDrafts(lambda: self._model.mtp, lambda: self._model.runner.hidden, self.cells)
            self._scheduler = Scheduler(self.cells, self._compute, *reading, self._drafting, self._prompts, mtp)
            self.slots = Slots(self._identity, self.cells, self._carried.kv, plan.n_parallel, plan.n_ctx, self._prompts)
            self._opened = opened.pop_all()

    @classmethod
    def open(
        cls,
        config: EngineConfig,
        on_progress: Callable[[int, int], None] | None = None,
        machine: Machine | None = None,
    ) -> "Engine":
        """Opens a model; `on_progress` gets bytes made ready and their total; `machine` is as for `plan_engine`.

        Devices that nobody asked for by name are left out, and a note says so, when they fail. Of those that are full
        after all half as much is tried before. Raises ModelFileError, UnsupportedModelError, UsageError, DeviceError,
        and DoesNotFitError before anything is loaded.
        """
        plan, progress = plan_engine(config, machine), on_progress or (lambda done, total: None)
        if plan.shortfall is not None:
            raise plan.shortfall
        check_numbers(plan.gguf, plan.sources)
        try:
            return cls(config, plan, progress)
        except (DeviceError, DoesNotFitError) as error:
            if not plan.devices or not config.devices.is_automatic:
                raise
            why = error.with_traceback(None)  # whose frames hold what was opened
        if isinstance(why, DeviceFullError) and (smaller := _with_half_of_devices(config, plan, why)):
            try:
                return cls(config, smaller, progress)
            except (DeviceError, DoesNotFitError) as error:
                why = error.with_traceback(None)
        config = changed(config, {"device": "none", "rpc": ()})
        on_cpu = plan_engine(config, machine and replace(machine, devices=()))
        if on_cpu.shortfall is not None:
            raise why
        plan = replace(on_cpu, notes=(*on_cpu.notes, f"Computing on the CPU: {why}"))
        return cls(config, plan, progress)

    def _open_drafting(self) -> Drafting:
        """What becomes of drafts; the plan's notes say where that is not what was asked for. Raises UsageError."""
        mode = draft_mode(self.config.draft)
        if draft_note(self.config, self.plan.mtp) is not None:
            return Drafting()
        return Drafting(mode, StepTimes(self._observer.expected_step_ms))

    def _open_prompts(self, opened: ExitStack) -> PromptCache | None:
        """What is kept of prompts on disk, if anything is."""
        config, loss = self.config.prompts, self.config.loss
        if config.prompt_cache is None:
            return None
        folder = PromptFolder(config.prompt_cache, config.prompt_cache_size, say)
        frequencies = self.plan.sources.rope_freqs
        settings = f"{loss.lossy} {loss.max_kl} {frequencies and frequencies.name}"
        form = RecordForm.of(self._identity(), settings, self._carried.kv)
        prompts = PromptCache(folder, form, self.cells, self._carried.kv, say)
        opened.callback(prompts.close)
        return prompts

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for a person about how the model was opened, to be told once."""
        return (*self.plan.notes, *self._model.notes)

    # --- the caller's own sequence -------------------------------------------------------------------------

    @property
    def n_past(self) -> int:
        """The number of tokens in the caller's own sequence."""
        return len(self._own)

    @property
    def compute_seconds(self) -> float:
        """Seconds spent inside graphs since the model was opened; the rest of a step is this program's own."""
        return self._totals()["cpu_seconds"]

    def truncate(self, n_past: int) -> None:
        """Forgets all but the first `n_past` tokens of the caller's own sequence.

        With recurrent layers or windows it may have to forget more of them: `n_past` then says what is left.
        """
        self.cells.truncate(self._own, n_past)

    def common_prefix(self, tokens: Sequence[int]) -> int:
        """The number of `tokens`, from the first on, that are in the caller's own sequence already."""
        return common_prefix(self._own.tokens, np.asarray(tokens, np.int32))

    def read(self, tokens: Sequence[int], n_out: int = 1, is_cancelled: Callable[[], bool] | None = None) -> Logits:
        """Appends at most `n_batch` tokens; F32 logits [n_out, n_vocab] of the last `n_out`, valid until the next step.

        Raises UsageError for more tokens or logits than a step has and for what is no token of the vocabulary,
        ContextOverflowError, and EngineAbortedError when `is_cancelled` says so between two operations.
        """
        assert self._scheduler.is_idle, "requests are being answered"
        n, n_batch, n_past = len(tokens), self.plan.n_batch, self.n_past
        if not 0 < n <= n_batch:
            raise UsageError(
                f"A step reads 1 to {n_batch} tokens, not {n}. Read more with prefill, or open the model with a larger "
                "n_batch (--batch)."
            )
        if not 0 < n_out <= n:
            raise UsageError(f"A step of {n} tokens has the logits of 1 to {n} of them, not of {n_out}.")
        wrong = next((token for token in tokens if not 0 <= token < self.spec.n_vocab), None)
        if wrong is not None:
            raise UsageError(f"Token {wrong} is not one of the model's {self.spec.n_vocab}.")
        if n_past + n > self.n_ctx:
            raise ContextOverflowError(n_past + n, self.n_ctx)
        self.cells.begin_step()
        self.cells.append(self._own, tokens)
        windows = [self.cells.window(self._own, len(tokens))]
        batch = make_batch([(tokens, self._own.cells)], n_out, self._own.moves, windows=windows)
        try:
            return self._model.runner.run(batch, is_cancelled)
        except BaseException:
            self.truncate(n_past)
            raise

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
        """Answers a request in the caller's own sequence, event by event; the last one is `Finished`.

        The tokens that the sequence shares with the prompt's beginning are not computed again. Raises UsageError for
        parameters out of range and ContextOverflowError for a prompt that does not fit.
        """
        return self._answer(Generator(request, self._facts, is_cancelled))

    def _answer(self, job: Generator) -> Iterator[Event]:
        assert self._scheduler.is_idle, "requests are being answered"
        n_kept = self.common_prefix(job.shareable)
        if self._prompts is not None and n_kept < self.n_past:
            self._prompts.rescue(self._own)
        self.truncate(n_kept)
        self._scheduler.submit(job, self._own)
        try:
            while not job.is_over:
                for _, event in self.step():
                    if isinstance(event, Failed):
                        raise event.error
                    yield event
        finally:
            self._scheduler.drop(job)

    # --- several requests ----------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest, is_cancelled: Callable[[], bool] = lambda: False) -> int:
        """Queues a request and returns its id, which stands beside its events; each step asks `is_cancelled`.

        The tokens that any sequence shares with the prompt's beginning are not computed again. Raises UsageError for
        parameters out of range and ContextOverflowError for a prompt that does not fit.
        """
        job = Generator(request, self._facts, is_cancelled, next(self._ids))
        self.slots.enter(job)
        if self.n_past:
            self.cells.remember(self._own)
            self._own = self.cells.begin()
        self._scheduler.submit(job)
        return job.id

    @property
    def is_idle(self) -> bool:
        """Whether there is no request to answer."""
        return self._scheduler.is_idle

    def step(self) -> list[Outcome]:
        """Computes one step for all requests and returns their events; a request ends with `Finished` or `Failed`."""
        begin = time.perf_counter()
        with self._observer.timed():
            before = self._drafting.n_accepted
            outcomes = self._scheduler.step()
            self._observer.accept(self._drafting.n_accepted - before)
        if self._prompts is not None:
            self._prompts.step_done(time.perf_counter() - begin)
        return outcomes

    def tidy(self) -> bool:
        """Does a little of what can wait until there is no request to answer; whether more of it is left."""
        return self._prompts is not None and self._prompts.tidy(_TIDY_SECONDS)

    def _compute(self, batch: Batch, is_cancelled: Callable[[], bool] | None) -> Logits:
        self._observer.note(batch)
        return self._model.runner.run(batch, is_cancelled)

    # --- memory --------------------------------------------------------------------------------------------

    def rebudget(
        self,
        ram: str | None,
        vram: Sequence[str],
        held_bytes: int = 0,
        on_progress: Progress = lambda *_: None,
    ) -> Rebudgeted:
        """Takes other limits, between two steps: requests go on where they are, and their tokens are the same.

        `held_bytes` are what our other processes hold now. Raises DoesNotFitError, with the least sizes that would do,
        and UsageError before anything has changed. An error while the model is opened anew is raised when it is open
        again within the old limits, or as LostModelError where that failed too.
        """
        begin = time.perf_counter()
        config = changed(self.config, {"ram": ram, "vram": tuple(vram), "held_bytes": held_bytes})
        plan = replan(config, self.plan)
        with self._changing:
            is_kept = self._model.adapt(config, plan)
            if not is_kept:
                self._reopen(config, plan, on_progress)
        self.config, self.plan = config, plan
        self._drafting.times.forget()
        return Rebudgeted(time.perf_counter() - begin, 0 if is_kept else plan.load_bytes, is_kept)

    def _reopen(self, config: EngineConfig, plan: EnginePlan, on_progress: Progress) -> None:
        """Opens the model as planned in place of what is open, or as it was where that fails; then raises the error."""
        self._past = Counter(self._totals())
        self._model.close()
        give_back_freed()
        self._observer.predict(config, plan)
        try:
            self._model = LoadedModel(config, plan, on_progress, self._carried)
        except Exception as error:
            try:
                self._model = LoadedModel(self.config, self.plan, on_progress, self._carried)
            except Exception as worse:
                problem = f"{error} It could not be opened within the old limits either: {worse}"
                raise LostModelError(problem) from error
            raise
        self._scheduler.read_at_most(plan.n_batch)

    def memory(self) -> dict[str, int]:
        """Bytes by tier, by name, as planned and allocated, and the peak of the process."""
        return self._model.memory()

    def check_files(self) -> None:
        """Raises FileChangedError when the model's file was written to since; may be called from any thread."""
        # While the model is opened anew, its files' numbers may be other files'.
        if self._changing.acquire(blocking=False):
            try:
                self._model.check_files()
            finally:
                self._changing.release()

    def counters(self) -> dict[str, float]:
        """Running totals of the tiers and of prompts on disk since the model was first opened, by name.

        Those of tiers are not there if it was always resident.
        """
        return self._tier_counters() | (self._prompts.counters() if self._prompts else {})

    def _tier_counters(self) -> dict[str, float]:
        past = {name: n for name, n in self._past.items() if not name.startswith(_CLOCKS)}
        return _summed(past, self._model.counters())

    def _totals(self) -> dict[str, float]:
        cpu, devices = self._model.seconds
        return _summed(self._past, {**self._model.counters(), "cpu_seconds": cpu, "device_seconds": devices})

    def _exchange(self) -> tuple[ExchangeNow, ...]:
        return () if self._model.tiers is None else self._model.tiers.exchange()

    def snapshot(self) -> Snapshot:
        """What the engine holds and does at this moment; may be called from any thread."""
        return self._observer.snapshot(self.config, self.plan, self._model, self._scheduler.n_active)

    @property
    def tiers(self) -> Tiers | None:
        """The tiers of memory that hold experts in slots; None when all are resident."""
        return self._model.tiers

    @property
    def device_experts(self) -> tuple[DeviceExperts, ...]:
        """The slots of each device that has a part of its experts; empty when there is none."""
        return self._model.device_experts

    def close(self) -> None:
        """Frees weights, cache and threads."""
        self._opened.close()


def _summed(past: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Running totals that go on where those of a model that was closed have ended."""
    return {name: past.get(name, 0) + now.get(name, 0) for name in {**past, **now}}


def _with_half_of_devices(config: EngineConfig, plan: EnginePlan, error: DeviceFullError) -> EnginePlan | None:
    """The plan for devices that give half of what they said is free; None where that is too little."""
    assert plan.machine is not None
    budgets = {device.device.handle: device.budget for device in plan.devices}
    devices = (replace(one, free_bytes=budgets.get(one.handle, one.free_bytes) // 2) for one in plan.machine.devices)
    machine = replace(plan.machine, memory=HostMemory.now(), devices=tuple(devices))
    smaller = plan_engine(config, machine)
    if smaller.shortfall is not None or not smaller.devices:
        return None
    return replace(smaller, notes=(*smaller.notes, f"Half as much is taken of devices: {error}"))
