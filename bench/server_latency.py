"""What the HTTP server adds to a token: the time per token over SSE, less the engine's own.

`sse_overhead_ms` compares with what the engine in the server counted meanwhile; `..._over_engine_alone_ms` with an
engine that has the machine to itself, so that it also holds what server and client take from the cores.

Starts `slimoe serve` as a child on a free port and reads completions from it as a client does, in turn with an
engine on the same model in this process. Both read the same prompt and answer greedily, so the text must be the
same. The time per token is the mean over a stream, the first token left out. The last line of stdout is one JSON
document.

    python -m bench.server_latency --shape design8
"""

import asyncio
import json
import statistics
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import click

from bench.baselines.stepping import random_tokens
from bench.limits import machine
from bench.limits.flags import run_flags, threads_flag, type_flag
from bench.limits.victim import victim
from bench.models.random_model import random_model_file
from bench.models.shapes import MODELS
from slimoe.offload.engine import Engine
from slimoe.offload.errors import SlimoeError
from slimoe.offload.plan.engine_config import ContextConfig, EngineConfig
from slimoe.offload.resources.processors import default_threads
from slimoe.offload.text.generation import Finished, GenerationRequest, SamplingParams, TokenStep

N_PROMPT = 16
FIRST_PLAIN_TOKEN = 259  # after the special tokens and the bytes, in every vocabulary of SentencePiece's kind


class ServerFailedError(SlimoeError):
    """The server under test did not answer, or not to the end."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`n_rounds` streams of `n_tokens` each, over the server and from the engine in turn."""

    model: Path
    n_threads: int
    n_rounds: int
    n_tokens: int

    @property
    def n_ctx(self) -> int:
        """The context that both are given, in tokens."""
        return -(-(N_PROMPT + self.n_tokens) // 256) * 256


@dataclass(frozen=True, slots=True)
class Stream:
    """One answer: its text, the seconds from each token to the next, in the mean, and those that the engine itself
    counted meanwhile.
    """

    text: str
    seconds_per_token: float
    engine_seconds_per_token: float


async def stream_from_server(session: aiohttp.ClientSession, url: str, prompt: list[int], n_tokens: int) -> Stream:
    """Reads one completion over SSE; the clock starts at the first text and ends with the finishing chunk."""
    body = {"model": "any", "prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "stream": True}
    body["ignore_eos"] = True
    lines = []
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise ServerFailedError(f"The server answered {response.status}: {await response.text()}")
        # Only read here and parsed afterwards: what the client computes, it takes from the engine's cores.
        async for line in response.content:
            lines.append((time.perf_counter(), line))
    chunks = [(at, json.loads(line[6:])) for at, line in lines if line.startswith(b"data: {")]
    chunks = [(at, chunk) for at, chunk in chunks if chunk.get("choices")]
    if not chunks or not chunks[-1][1]["choices"][0]["finish_reason"]:
        raise ServerFailedError("The server's stream broke off.")
    text = "".join(chunk["choices"][0]["text"] or "" for _, chunk in chunks)
    engine_seconds = chunks[-1][1]["timings"]["predicted_ms"] / 1000
    seconds = chunks[-1][0] - chunks[0][0]
    return Stream(text, seconds / (n_tokens - 1), engine_seconds / (n_tokens - 1))


def stream_from_engine(engine: Engine, prompt: list[int], n_tokens: int) -> Stream:
    """The same completion from an engine in this process."""
    greedy = SamplingParams(temperature=0.0)
    request = GenerationRequest(tuple(prompt), max_tokens=n_tokens, sampling=greedy, ignore_eos=True)
    times, pieces = [], []
    for event in engine.generate(request):
        if isinstance(event, TokenStep | Finished):
            times.append(time.perf_counter())
            pieces.append(event.text)
    seconds = (times[-1] - times[0]) / (n_tokens - 1)
    return Stream("".join(pieces), seconds, seconds)


async def run(plan: Plan, engine: Engine) -> tuple[list[Stream], list[Stream]]:
    """The streams of all rounds, of the server and of the engine; one of each goes before and does not count.

    Raises VictimError where the server does not start, and ServerFailedError where it does not answer.
    """
    served, own = [], []
    n_vocab = engine.gguf.tensors["token_embd.weight"].ne[1]
    patient = aiohttp.ClientTimeout(total=None)
    with victim(plan.model, "--threads", str(plan.n_threads), "--ctx", str(plan.n_ctx)) as server:
        async with aiohttp.ClientSession(timeout=patient) as session:
            for round_no in range(plan.n_rounds + 1):
                tokens = random_tokens(N_PROMPT, n_vocab - FIRST_PLAIN_TOKEN, seed=round_no)
                prompt = [FIRST_PLAIN_TOKEN + token for token in tokens]
                served.append(await stream_from_server(session, server.url, prompt, plan.n_tokens))
                own.append(stream_from_engine(engine, prompt, plan.n_tokens))
    return served[1:], own[1:]


def as_json(plan: Plan, served: list[Stream], own: list[Stream]) -> dict[str, Any]:
    """Medians over the rounds, in milliseconds."""
    over_own = [stream.seconds_per_token - stream.engine_seconds_per_token for stream in served]
    over_alone = [over.seconds_per_token - alone.seconds_per_token for over, alone in zip(served, own, strict=True)]
    return {
        "sse_overhead_ms": 1e3 * statistics.median(over_own),
        "sse_overhead_over_engine_alone_ms": 1e3 * statistics.median(over_alone),
        "sse_ms_per_token": 1e3 * statistics.median(stream.seconds_per_token for stream in served),
        "engine_ms_per_token": 1e3 * statistics.median(stream.seconds_per_token for stream in own),
        "same_text": all(over.text == alone.text for over, alone in zip(served, own, strict=True)),
        "rounds": plan.n_rounds,
        "tokens": plan.n_tokens,
        "threads": plan.n_threads,
    }


@click.command()
@click.option("--shape", type=click.Choice(MODELS), default="design8", show_default=True)
@type_flag
@click.option("--model", type=click.Path(path_type=Path), help="Serve this file instead of a random one.")
@threads_flag
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=128, show_default=True, help="Tokens of a stream.")
@run_flags
def main(
    shape: str,
    kind: str | None,
    model: Path | None,
    threads: int | None,
    rounds: int,
    tokens: int,
    smoke: bool,
    allow_busy: bool,
) -> None:
    """Measure what the HTTP server adds to each token."""
    try:
        with ExitStack() as stack:
            load_before = machine.require_quiet(allow_busy=allow_busy, is_smoke=smoke)
            path = model or stack.enter_context(random_model_file("smoke" if smoke else shape, kind, vocabulary=True))
            plan = Plan(path, threads or default_threads(), 1 if smoke else rounds, 16 if smoke else tokens)
            config = EngineConfig(path, n_threads=plan.n_threads, context=ContextConfig(n_ctx=plan.n_ctx))
            engine = stack.enter_context(closing(Engine.open(config)))
            served, own = asyncio.run(run(plan, engine))
    except SlimoeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    about = {"model": path.name, "other_cores_before": load_before, "machine": machine.describe()}
    print(json.dumps(as_json(plan, served, own) | about))


if __name__ == "__main__":
    main()
