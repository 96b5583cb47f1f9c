"""The seconds of a layer's two sides against a machine that is played event by event, and the choices by hand."""

from itertools import product

import pytest

from bench.simulated.engine import measured
from bench.simulated.machine import Machine, layer_seconds
from slimoe.offload.machine.upload_costs import ExchangeMode, UploadCosts, choose_exchange

N_BYTES = 1e6
MACHINES = {
    "link beside the CPU": Machine(100e9, 10e9, 40e9, 20e9, 0, 0, 0),
    "one memory for both": Machine(100e9, 30e9, 38e9, 26e9, 0, 0, 0),
    "slow link": Machine(50e9, 60e9, 72e9, 3.5e9, 0, 0, 0),
}


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_a_layer_takes_what_it_takes_event_by_event(machine: Machine) -> None:
    costs = measured(machine, N_BYTES)
    for n_here, n_copied, n_host in product(range(4), range(4), range(4)):
        expected = layer_seconds(machine, N_BYTES, n_here, n_copied, n_host)
        assert costs.layer_seconds(n_here, n_copied, n_host) == pytest.approx(expected, rel=1e-6), (
            n_here,
            n_copied,
            n_host,
        )


def test_copies_are_those_that_end_the_layer_soonest_unless_later_uses_are_worth_more() -> None:
    costs = UploadCosts(host=4.0, device=1.0, copy=2.0, host_beside=4.0, copy_beside=2.0)
    seconds = [costs.layer_seconds(1, n, 4 - n) for n in range(5)]
    assert seconds == [16.0, 12.0, 8.0, 10.0, 13.0]
    assert costs.best_copies(1, [0.0] * 4) == 2
    assert costs.best_copies(1, [3.0] * 4) == 3
    assert costs.best_copies(1, [9.0] * 4) == 4
    assert costs.best_copies(1, [0.0], n_host=3) == 1


def test_what_takes_longer_over_the_link_is_left_to_the_host() -> None:
    costs = UploadCosts(host=1.0, device=0.1, copy=50.0, host_beside=1.0, copy_beside=50.0)
    assert costs.best_copies(2, [0.0] * 6) == 0
    assert costs.best_copies(2, [45.0, 0.0]) == 0
    assert costs.best_copies(2, [60.0, 0.0]) == 1


@pytest.mark.parametrize(
    ("host", "device", "copy", "mode", "words"),
    [
        (1e-3, 2e-3, 1e-3, "static", "one takes 2 ms there, 1 ms on the CPU"),
        (0.3e-3, 0.0, 1.0, "static", "experts on the card stay: an upload takes 1000 ms, saves 0.3 ms per use"),
        (1.6e-3, 0.3e-3, 28e-3, "swap", "between tokens when that pays: an upload takes 28 ms, saves 1.3 ms per use"),
        (4e-3, 0.3e-3, 1.8e-3, "upload", "sooner or pays: an upload takes 1.8 ms, saves 3.7 ms per use"),
    ],
)
def test_the_choice_has_its_reason(host: float, device: float, copy: float, mode: ExchangeMode, words: str) -> None:
    choice = choose_exchange(UploadCosts(host, device, copy, host, copy), n_used=2)
    assert choice.mode == mode
    assert words in choice.reason
