"""Loops, endings and greedy continuations, these against transformers' own."""

import numpy as np
import pytest
import torch

from slimoe.converter.report.generation_check import Loop, check_continuation, check_generation, find_loop, greedy
from tests.models.held_model import hold, random_mixtral
from tests.models.tiny_checkpoint import TinyConfig

SIZES = TinyConfig(n_layer=2, n_embd=32, n_ff=48, n_vocab=90, n_expert=4, n_expert_used=2)
PROSE = np.random.default_rng(0).permutation(400).tolist()


@pytest.mark.parametrize(
    ("tokens", "loop"),
    [
        (PROSE, None),
        ([], None),
        ([7] * 15, None),
        ([7] * 16, Loop(0, 1, 16)),
        (PROSE[:9] + [1, 2, 3, 4, 5, 6] * 4 + PROSE[9:], Loop(9, 6, 24)),
        (PROSE[:9] + [1, 2, 3, 4, 5, 6] * 3 + PROSE[9:], None),
        (PROSE[:9] + [401, 402, 403, 404, 405] * 5 + [401, 402], Loop(9, 5, 27)),
        (PROSE[:60] * 4, Loop(0, 60, 240)),
    ],
)
def test_loops_are_found(tokens: list[int], loop: Loop | None) -> None:
    assert find_loop(tokens) == loop


def test_continuations_are_checked() -> None:
    done = check_continuation([5, 6, 5, 7, 2], ends={2})
    assert (done.ended, done.loop, done.distinct) == (True, None, 0.75)
    assert check_continuation([], ends={2}).distinct == 0
    assert not check_continuation([2, 5], ends={2}).ended
    check = check_generation(lambda prompts, n: [[9] * n, [1, 2], PROSE[:n]], [[1], [2], [3]], 20, ends={2})
    assert (check.n_looped, check.n_ended) == (1, 1)
    assert check.distinct == pytest.approx((1 / 20 + 1 + 1) / 3)


def test_greedy_continuations_are_those_of_transformers() -> None:
    model = random_mixtral(SIZES, spread=0.3)
    prompts = [[3, 14, 15], [9, 2, 6, 5, 3], [58]]
    free = generated(model, prompts, end=None)
    end = free[1][4]
    expected = generated(model, prompts, end)
    assert any(text[-1] == end and len(text) < 12 for text in expected)
    assert greedy(hold(model), {end})(prompts, 12) == expected


def generated(model: torch.nn.Module, prompts: list[list[int]], end: int | None) -> list[tuple[int, ...]]:
    found = []
    for prompt in prompts:
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
        tokens = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **settings)
        found.append(tuple(tokens[0, len(prompt) :].tolist()))
    return found
