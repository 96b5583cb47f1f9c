"""An engine that does what the prompt tells it to, run in the server's engine process in place of the real one.

It answers with the prompt's own tokens, so that a test knows the text. Words in the prompt change that: `forever`
writes until it is cancelled, `slowly` reads the prompt until it is cancelled, `abort` ends the process as C code
does, `stuck` never gets on, `bug` raises, `device` finds a device full. A model file named `slow.gguf` is open once a
file `go` lies beside it, `huge.gguf` does not fit, `broken.gguf` ends the process, and `unplugged.gguf` finds no
device but opens without.
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from slimoe.offload.errors import DeviceError, DeviceFullError, DoesNotFitError, LostModelError, UsageError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.plan.engine_config import EngineConfig, changed
from slimoe.offload.requests.slots import SlotAction, SlotChange
from slimoe.offload.requests.snapshot import (
    ExpertFormat,
    ExpertMap,
    LayerMap,
    MemoryPlace,
    MemoryUse,
    Rebudgeted,
    Snapshot,
    Speed,
    Spent,
    Work,
)
from slimoe.offload.text.generation import (
    Event,
    ExchangeNow,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Outcome,
    PromptLogprobs,
    PromptProgress,
    TierUse,
    Timings,
    TokenLogprob,
    TokenStep,
)
from slimoe.offload.text.grammars import Grammars
from slimoe.offload.text.tokenizer import TextStream, Tokenizer
from slimoe.server.process.engine_process import main

TICK_SECONDS = 0.001
LOGPROB = math.log(0.5)
EXCHANGE = ExchangeNow("GPU0", "static", "it does not pay", 70, 1, {"copy": 2.0, "host": 4.0}, {"copy": 500.0})


class ScriptedEngine:
    def __init__(self, config: EngineConfig, on_progress: Callable[[int, int], None]) -> None:
        path = config.model
        if path.name == "huge.gguf":
            raise DoesNotFitError("It needs 9 bytes, but 5 are free.", required_bytes=9, available_bytes=5)
        if path.name == "unplugged.gguf" and config.devices.device != "none":
            raise DeviceError("GPU0 cannot be opened.")
        if path.name == "broken.gguf":
            os.abort()
        while path.name == "slow.gguf" and not path.with_name("go").exists():
            on_progress(3, 7)
            time.sleep(0.01)
        self.config = config
        self.gguf = read_gguf(path)
        self.spec = ModelSpec.from_gguf(self.gguf)
        tokenizer = Tokenizer.open(self.gguf)
        self.tokenizer: Tokenizer | None = tokenizer
        self.grammars: Grammars | None = Grammars(tokenizer)
        self.n_ctx = config.context.n_ctx or self.spec.n_ctx_train
        self._n_parallel = config.context.n_parallel
        self._ids = itertools.count()
        self._n_done = 0
        held_bytes = config.memory.held_bytes
        self.notes = ("It is scripted.", f"Its device is {config.devices.device}.", f"The server holds {held_bytes} B.")
        self._answers: dict[int, Iterator[Event]] = {}

    def memory(self) -> dict[str, int]:
        return {"weights": self.gguf.n_bytes}

    def counters(self) -> dict[str, float]:
        return {"hits": 3.0 * self._n_done, "misses": 1.0 * self._n_done, "bytes_read": 100.0 * self._n_done}

    def rebudget(
        self, ram: str | None, vram: Sequence[str], held_bytes: int, on_progress: Callable[[int, int], None]
    ) -> Rebudgeted:
        """Takes any limit but these: 1MiB is too small, `lost` loses the model, `abort` ends the process."""
        if ram == "1MiB":
            raise DoesNotFitError("It needs at least 9 B. Raise --ram to 9MiB.", required_bytes=9, available_bytes=5)
        if ram == "lost":
            raise LostModelError("It could not be opened within the old limits either.")
        if ram == "abort":
            os.abort()
        if ram == "much":
            raise UsageError("--ram is 'much', which is no size.")
        on_progress(1, 2)
        time.sleep(0.05 if ram == "slow" else 0.0)
        self.config = changed(self.config, {"ram": ram, "vram": tuple(vram)})
        return Rebudgeted(0.25, 100, ram == "same")

    @property
    def slots(self) -> "ScriptedEngine":
        return self

    def change(self, action: SlotAction, slot: int, path: Path) -> SlotChange:
        """Writes the slot's number, and reads any file whose content is that of its slot."""
        if action == "save":
            path.write_text(f"slot {slot}")
        elif action == "restore" and path.read_text() != f"slot {slot}":
            raise UsageError(f"{path.name} is damaged.")
        return SlotChange(10 + slot, 0 if action == "erase" else 6, 0.25)

    def snapshot(self) -> Snapshot:
        """Two layers of four experts, one of which moves with every answer."""
        uses = (self._n_done, 0, 2, 0)
        layers = tuple(LayerMap(layer, "h.d" + "x", (0, 0, 0, -1), (1,), uses, uses) for layer in range(2))
        place = MemoryPlace(
            "host", self.config.memory.ram or "auto", 1 << 30, 1 << 20, {"weights": self.gguf.n_bytes, "kv": 10}
        )
        spent = Spent(2.0, 1.0, 0.5, 0.25, 0.25, 3, 4, 0.75)
        work = Work(len(self._answers), spent, spent, Speed(20.0, 30.0, "cpu", 10.0))
        experts = ExpertMap((ExpertFormat("Q4_K Q4_K Q6_K", 100),), layers)
        return Snapshot(experts, MemoryUse((place,), 100, 200), work)

    def check_files(self) -> None:
        pass

    def tidy(self) -> bool:
        return False

    @property
    def is_idle(self) -> bool:
        return not self._answers

    def submit(self, request: GenerationRequest, is_cancelled: Callable[[], bool]) -> int:
        id = next(self._ids)
        self._answers[id] = self._generate(request, is_cancelled)
        return id

    def step(self) -> list[Outcome]:
        outcomes = []
        for id, events in list(self._answers.items())[: self._n_parallel]:
            try:
                outcomes.append(Outcome(id, next(events)))
            except StopIteration:
                del self._answers[id]
            except (ZeroDivisionError, DeviceFullError) as bug:
                del self._answers[id]
                outcomes.append(Outcome(id, Failed(bug)))
        return outcomes

    def _generate(self, request: GenerationRequest, is_cancelled: Callable[[], bool]) -> Iterator[Event]:
        assert self.tokenizer is not None
        words = self.tokenizer.decode(request.prompt_ids)
        if "abort" in words:
            os.abort()
        if "device" in words:
            raise DeviceFullError("GPU0 gave no 9 B of memory.", required_bytes=9, available_bytes=5)
        while "stuck" in words:
            time.sleep(TICK_SECONDS)
        if "bug" in words:
            raise ZeroDivisionError(words)
        while "slowly" in words and not is_cancelled():
            time.sleep(TICK_SECONDS)
        n_prompt = len(request.prompt_ids)
        yield PromptProgress(n_prompt, n_prompt, 0)
        if request.prompt_logprobs:
            scores = (None, *(_score(token, request) for token in request.prompt_ids[1:]))
            yield PromptLogprobs(scores)
        yield from self._answer(request, is_cancelled, "forever" in words)

    def _answer(
        self, request: GenerationRequest, is_cancelled: Callable[[], bool], never_ends: bool
    ) -> Iterator[Event]:
        assert self.tokenizer is not None
        text = TextStream(self.tokenizer.piece, request.stop)
        n_max = self.n_ctx if request.max_tokens is None else request.max_tokens
        answer = [token for token in request.prompt_ids if token not in self.tokenizer.eog | {self.tokenizer.bos}]
        reason: FinishReason = "stop"
        n_written = 0
        while never_ends or n_written < len(answer):
            if is_cancelled():
                reason = "cancelled"
                break
            if n_written >= n_max:
                reason = "length"
                break
            token = answer[n_written % len(answer)]
            score = None if request.n_logprobs is None else _score(token, request)
            n_written += 1
            yield TokenStep(token, text.feed(token), score, text.piece, text.added)
            if text.stopped:
                break
            if never_ends:
                time.sleep(TICK_SECONDS)
        drafted = (0, 0) if self.config.draft == "none" else (5, 3)
        n_cached = 0 if request.is_read_whole else 1
        timings = Timings(len(request.prompt_ids), 2.0, n_written, 4.0, n_cached, 50.0, *drafted)
        self._n_done += 1
        tiers = TierUse({"hits": 3.0, "misses": 1.0, "bytes_read": 100.0}, exchange=(EXCHANGE,))
        yield Finished(reason, text.finish(), timings, self.memory(), tiers, text.stop_text)


def _score(token: int, request: GenerationRequest) -> TokenLogprob:
    top = ((token, LOGPROB), (5, -2.0), (6, -math.inf))
    return TokenLogprob(token, LOGPROB, top[: request.n_logprobs])


if __name__ == "__main__":
    main(ScriptedEngine)
