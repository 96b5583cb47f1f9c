"""One answer alone in its process, with drafted tokens or without: how long its tokens took, and what was drafted.

A job comes as JSON on stdin, the outcome goes as JSON to stdout. `bench.drafts.gain` runs this.
"""

import json
import re
import sys
import time
import zlib
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from slimoe.offload.engine import Engine
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.plan.engine_config import ContextConfig, EngineConfig, MemoryConfig
from slimoe.offload.text.generation import Constraint, Finished, GenerationRequest, SamplingParams, TokenStep

N_CTX = 4096


@dataclass(frozen=True, slots=True)
class DraftJob:
    """A prompt and what the answer is held to, None for what the model says itself, at a `temperature`.

    Each of `n_answers` to the same prompt is `n_tokens` long at most; the first does not count.
    """

    model: str
    draft: str
    prompt: str
    answer: str | None
    n_tokens: int
    n_answers: int
    n_threads: int
    temperature: float = 0.0
    ram: str | None = None


@dataclass(frozen=True, slots=True)
class DraftOutcome:
    """Milliseconds per token of each answer that counts, its first token left out, and sums over all of them.

    `checksum` is of the tokens: equal means the same answers.
    """

    token_ms: list[float]
    n_tokens: int
    n_steps: int
    n_drafted: int
    n_accepted: int
    checksum: int


def carry_out(job: DraftJob) -> DraftOutcome:
    """Answers the prompt several times; raises as `Engine.open` does, and UsageError without a tokenizer."""
    config = EngineConfig(
        Path(job.model),
        n_threads=job.n_threads,
        draft=job.draft,
        context=ContextConfig(n_ctx=N_CTX),
        memory=MemoryConfig(ram=job.ram),
    )
    token_ms, tokens, n_drafted, n_accepted = list[float](), list[int](), 0, 0
    with closing(Engine.open(config)) as engine:
        if engine.tokenizer is None:
            raise UsageError(f"{job.model} has no tokenizer: the bench speaks in text.")
        request = GenerationRequest(
            tuple(engine.tokenizer.encode(job.prompt)),
            job.n_tokens,
            SamplingParams(temperature=job.temperature, seed=1),
            ignore_eos=job.answer is None,
            constraint=None if job.answer is None else Constraint("regex", re.escape(job.answer)),
        )
        for number in range(job.n_answers + 1):
            said, first_at = list[int](), 0.0
            for event in engine.generate(request):
                if isinstance(event, TokenStep):
                    first_at = first_at or time.perf_counter()
                    said.append(event.token)
                if isinstance(event, Finished) and number:
                    token_ms.append(1000 * (time.perf_counter() - first_at) / max(1, len(said) - 1))
                    n_drafted += event.timings.draft_n
                    n_accepted += event.timings.draft_n_accepted
            tokens += said if number else []
    n_steps = len(tokens) - n_accepted
    return DraftOutcome(token_ms, len(tokens), n_steps, n_drafted, n_accepted, zlib.crc32(repr(tokens).encode()))


def main() -> None:
    """Carries out the job on stdin; exits as the `slimoe` command does."""
    try:
        outcome = carry_out(DraftJob(**json.load(sys.stdin)))
    except SlimoeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main()
