"""Several answers at once by one candidate, alone in its process: tokens per second of all together.

A job comes as JSON on stdin, the outcome goes as JSON to stdout. `bench.quality.streams` runs this, also in a limit.
llama.cpp decodes one batch with a token of each sequence, as llama-server does for its slots; greedy, without HTTP.
"""

import ctypes
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import llama_cpp.llama_cpp as llama
import numpy as np

from bench.baselines.llama_cpp import SILENT
from bench.limits.isolated_run import BASELINES, OURS
from slimoe.offload.engine import Engine
from slimoe.offload.errors import SlimoeError
from slimoe.offload.plan.engine_config import ContextConfig, EngineConfig, MemoryConfig
from slimoe.offload.text.generation import GenerationRequest, SamplingParams, TokenStep


@dataclass(frozen=True, slots=True)
class StreamJob:
    """Answers of `n_tokens` to `prompts`, which are equally long; the first `n_warm` tokens do not count.

    `ram` is for our engine alone.
    """

    candidate: str
    model: str
    n_threads: int
    prompts: tuple[tuple[int, ...], ...]
    n_tokens: int
    n_warm: int
    ram: str | None = None

    @property
    def n_streams(self) -> int:
        """Answers at once."""
        return len(self.prompts)

    @property
    def n_prompt(self) -> int:
        """Tokens of each prompt."""
        return len(self.prompts[0])


@dataclass(frozen=True, slots=True)
class StreamOutcome:
    """Tokens per second of all streams together, and the first tokens of each answer."""

    tokens_per_second: float
    answers: list[list[int]]


def run_ours(job: StreamJob) -> StreamOutcome:
    """Our engine's requests, one step for all of them; raises as `Engine.open` does.

    It reads a prompt a step, while those that were read already write: all write on until the last one has counted.
    """
    n_most = job.n_tokens + job.n_streams
    context = ContextConfig(n_ctx=job.n_prompt + n_most, n_parallel=job.n_streams)
    config = EngineConfig(Path(job.model), job.n_threads, context=context, memory=MemoryConfig(ram=job.ram))
    with closing(Engine.open(config)) as engine:
        answers: dict[int, list[int]] = {}
        for prompt in job.prompts:
            request = GenerationRequest(tuple(prompt), n_most, SamplingParams(temperature=0), ignore_eos=True)
            answers[engine.submit(request)] = []
        _step(engine, answers, lambda: min(map(len, answers.values())) >= job.n_warm)
        begin, n_steps = time.perf_counter(), iter(range(job.n_tokens - job.n_warm))
        _step(engine, answers, lambda: next(n_steps, None) is None)
        n_timed = job.n_streams * (job.n_tokens - job.n_warm)
        return StreamOutcome(n_timed / (time.perf_counter() - begin), [own[: job.n_tokens] for own in answers.values()])


def _step(engine: Engine, answers: dict[int, list[int]], is_enough: Callable[[], bool]) -> None:
    """Computes steps, and adds what they write to the answers, until it is enough."""
    while not is_enough():
        for number, event in engine.step():
            if isinstance(event, TokenStep):
                answers[number].append(event.token)


class LlamaCppStreams:
    """A llama.cpp context with a sequence for each stream."""

    def __init__(self, job: StreamJob) -> None:
        params = llama.llama_model_default_params()
        params.use_extra_bufts, params.n_gpu_layers = BASELINES[job.candidate], 0
        self._model = llama.llama_model_load_from_file(job.model.encode(), params)
        assert self._model, "llama.cpp cannot load this file"
        context = llama.llama_context_default_params()
        context.n_seq_max = job.n_streams
        context.n_ctx = -(-(job.n_prompt + job.n_tokens) // 256) * 256 * job.n_streams
        context.n_batch = context.n_ubatch = 512
        context.n_threads = context.n_threads_batch = job.n_threads
        context.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_AUTO
        self._context = llama.llama_init_from_model(self._model, context)
        assert self._context, "llama.cpp made no context"
        self._n_vocab = int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model)))
        self._batch = llama.llama_batch_init(512, 0, 1)

    def read(self, rows: Sequence[tuple[int, int, int]]) -> int:
        """Reads (sequence, position, token), of which the last one's logits are wanted; its likeliest token."""
        return self._decode(rows, [len(rows) - 1])[0]

    def step(self, rows: Sequence[tuple[int, int, int]]) -> list[int]:
        """Reads one token of each sequence; the likeliest next token of each."""
        return self._decode(rows, range(len(rows)))

    def _decode(self, rows: Sequence[tuple[int, int, int]], wanted: Sequence[int]) -> list[int]:
        batch = self._batch
        batch.n_tokens = len(rows)
        for at, (sequence, position, token) in enumerate(rows):
            batch.token[at], batch.pos[at] = token, position
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.logits[at] = at in wanted
        status = llama.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode returned {status}"
        logits = (llama.llama_get_logits_ith(self._context, at) for at in wanted)
        return [int(np.ctypeslib.as_array(row, (self._n_vocab,)).argmax()) for row in logits]

    def close(self) -> None:
        """Gives all memory back."""
        llama.llama_batch_free(self._batch)
        llama.llama_free(self._context)
        llama.llama_model_free(self._model)


def run_llama_cpp(job: StreamJob) -> StreamOutcome:
    """llama.cpp's sequences, one batch for all of them."""
    llama.llama_log_set(SILENT, ctypes.c_void_p(0))
    with closing(LlamaCppStreams(job)) as streams:
        prompts = job.prompts
        answers = []
        for n, prompt in enumerate(prompts):
            answers.append([streams.read([(n, at, token) for at, token in enumerate(prompt)])])
        begin = 0.0
        for position in range(job.n_prompt, job.n_prompt + job.n_tokens - 1):
            if len(answers[0]) == job.n_warm:
                begin = time.perf_counter()
            chosen = streams.step([(n, position, answer[-1]) for n, answer in enumerate(answers)])
            for answer, token in zip(answers, chosen, strict=True):
                answer.append(token)
        n_timed = job.n_streams * (job.n_tokens - job.n_warm)
        return StreamOutcome(n_timed / (time.perf_counter() - begin), answers)


def main() -> None:
    """Carries out the job on stdin; exits as the `slimoe` command does."""
    job = StreamJob(**json.load(sys.stdin))
    try:
        outcome = run_ours(job) if job.candidate == OURS else run_llama_cpp(job)
    except SlimoeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main()
