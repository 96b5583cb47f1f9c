"""Prompts on simulated machines: a pipeline by hand, and that the engine's choice is none of the worse ways."""

import json

import pytest
from click.testing import CliRunner

from bench.simulated.prompts import LENGTHS, Side, main, streamed


def test_an_expert_is_computed_while_the_next_is_on_its_way() -> None:
    assert streamed([2.0, 1.0], [], 5.0) == 3.0
    assert streamed([4.0], [1.0, 1.0], 5.0) == 5 + 5 + 1
    assert streamed([20.0], [1.0, 1.0], 5.0) == 22
    assert streamed([], [3.0, 3.0], 1.0) == 1 + 3 + 3


def test_an_expert_takes_as_long_as_reading_it_or_its_arithmetic() -> None:
    side = Side(bytes_per_second=100.0, flops=1000.0 * 2 * 256 / 144)
    assert [side.seconds(200.0, n) for n in (1, 10, 20)] == pytest.approx([2, 2, 4])


def test_the_whole_in_small() -> None:
    done = CliRunner().invoke(main, ["--smoke"])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout.splitlines()[-1])
    assert {row["n_tokens"] for row in figures["rows"]} == set(LENGTHS)
    assert figures["chosen_vs_never"] > 0.98
    assert figures["chosen_vs_always"] > 0.98
    assert figures["chosen_vs_op_offload"] > 1
