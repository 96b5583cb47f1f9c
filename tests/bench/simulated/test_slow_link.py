"""A simulated link that becomes slow: what the watched engine loses to experts that stay, and that it comes back."""

import json

import pytest
from click.testing import CliRunner

from bench.simulated.grid import TINY
from bench.simulated.machine import Machine
from bench.simulated.slow_link import Course, main, row


def test_a_course_is_slow_in_its_middle() -> None:
    course, machine = Course(n_warm=10, n_slow=20, n_after=5, slower=4), Machine(1e9, 1e9, 1e9, 8e8)
    rates = [course.machine(machine, token).link_rate for token in range(35)]
    assert rates == [8e8] * 10 + [2e8] * 20 + [8e8] * 5


@pytest.mark.parametrize("link", ["3.0 x16", "5.0 x16"])
def test_a_slow_link_costs_little_where_it_is_watched(link: str) -> None:
    """Also on a machine whose experts are so large that a copy takes as long as some tokens."""
    found = row(TINY, "even", "8 GiB", "DDR4", link, Course())
    assert found.modes[0] == "upload"
    assert found.noticed is not None
    assert found.noticed < 128
    assert found.ratios["before"] < 1.02
    assert found.ratios["slow, first 256"] < 1.2
    assert found.ratios["slow, later"] < 1.06
    assert found.unwatched["slow, later"] > found.ratios["slow, later"]
    assert found.ratios["well again, later"] < 1.03


def test_all_machines_are_played() -> None:
    result = CliRunner().invoke(main, ["--smoke"], catch_exceptions=False)
    document = json.loads(result.stdout.splitlines()[-1])
    (only,) = document["rows"]
    assert (only["model"], only["habits"], document["slower"]) == ("tiny", "even", 10)
    assert document["worst"] == only["ratios"]
