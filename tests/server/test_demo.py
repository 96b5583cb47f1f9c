"""The demo model that ships with the package."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from slimoe.offload.engine import Engine
from slimoe.offload.text.generation import GenerationRequest, SamplingParams, TokenStep
from slimoe.server.chat.prompts import Prompts
from slimoe.server.messages import ChatPrompt, Turn
from slimoe.server.options.engine_options import DEMO
from slimoe.server.terminal.terminal import generate
from tests.models.configs import engine_config

RIVER = Turn("user", 'Define the noun "river".')
GREEDY = GenerationRequest(prompt_ids=(), max_tokens=48, sampling=SamplingParams(temperature=0))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine.open(engine_config(DEMO, n_ctx=512, n_threads=1))
    yield engine
    engine.close()


def test_it_is_small_and_says_what_it_is_made_of() -> None:
    assert DEMO.stat().st_size < 20_000_000
    assert "WordNet" in DEMO.with_name("LICENSE.md").read_text()


def test_a_definition_reads_like_one_and_ends(engine: Engine) -> None:
    prompts = Prompts(engine.tokenizer, engine.spec.n_vocab, engine.n_ctx)
    outcome = generate(engine, prompts.complete(GREEDY, ChatPrompt((RIVER,))), shows_text=False)
    assert outcome.text.startswith("a ")
    assert outcome.finished.reason == "stop"


def test_the_next_turn_finds_the_answer_in_the_cache(engine: Engine) -> None:
    engine.truncate(0)
    prompts = Prompts(engine.tokenizer, engine.spec.n_vocab, engine.n_ctx)
    first = prompts.complete(GREEDY, ChatPrompt((RIVER,)))
    outcome = generate(engine, first, shows_text=False)
    turns = (RIVER, Turn("assistant", outcome.text), Turn("user", "And a lake?"))
    second = generate(engine, prompts.complete(GREEDY, ChatPrompt(turns)), shows_text=False)
    assert second.finished.timings.cached_n >= len(first.prompt_ids) + len(outcome.tokens)


def test_greedy_tokens_are_llamacpps(engine: Engine) -> None:
    """Until the two best logits are closer than the two programs' rounding."""
    prompt = tuple(engine.tokenizer.encode("In the beginning", add_bos=True)) if engine.tokenizer else ()
    request = GenerationRequest(prompt, max_tokens=32, sampling=SamplingParams(temperature=0), ignore_eos=True)
    ours = [event.token for event in engine.generate(request) if isinstance(event, TokenStep)]
    with closing(LlamaCpp(LlamaCppConfig(DEMO, n_ctx=512, n_threads=1))) as baseline:
        logits = baseline.prefill(prompt)
        for n, token in enumerate(ours):
            second, best = np.sort(logits)[-2:]
            if best - second < 0.05:
                assert n > 4
                break
            assert int(logits.argmax()) == token
            logits = baseline.decode(token)
