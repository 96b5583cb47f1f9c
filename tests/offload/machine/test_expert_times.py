"""Which experts of a batch are copied to a device: arithmetic on seconds that are given."""

import itertools

import pytest

from slimoe.offload.machine.expert_times import ExpertTimes, LinkTimes, choose_streams


def times(host: float, device: float, copy: float, *, is_apart: bool) -> LinkTimes:
    """Seconds for one token and each further one."""
    return LinkTimes(ExpertTimes((1, 2), (host, 2 * host)), ExpertTimes((1, 2), (device, 2 * device)), copy, is_apart)


def layer_seconds(host: list[int], there: list[int], copied: list[int], link: LinkTimes) -> float:
    """How long a layer takes, played step by step."""
    left = sum(link.host.seconds(n) for index, n in enumerate(host) if index not in copied)
    free, arrived = sum(link.device.seconds(n) for n in there), 0.0
    for index in copied:
        arrived = (arrived if link.is_apart else free) + link.copy_seconds
        free = max(free, arrived) + link.device.seconds(host[index])
    return max(left, free)


def test_tokens_between_and_beyond_the_measured_ones() -> None:
    assert ExpertTimes((1, 5), (1.0, 5.0)).seconds(3) == 3.0
    assert ExpertTimes((1, 5), (1.0, 5.0)).seconds(9) == 9.0
    assert ExpertTimes((1,), (2.0,)).seconds(4) == 8.0
    convex = ExpertTimes((1, 8, 64), (1.0, 1.0, 8.0))
    assert [convex.seconds(n) for n in (1, 3, 8, 16, 64, 128)] == [1.0, 1.0, 1.0, 2.0, 8.0, 16.0]
    assert convex.at(3.0) == ExpertTimes((1, 8, 64), (3.0, 3.0, 24.0))
    assert ExpertTimes((1, 2), (1.0, 0.5)).seconds(9) == 0.0


@pytest.mark.parametrize("is_apart", [False, True])
def test_copies_are_chosen_so_that_the_layer_ends_soonest(is_apart: bool) -> None:
    """No worse than any other number of the experts with most tokens."""
    for host, device, copy in itertools.product((1.0, 0.2), (0.5, 0.01), (0.0, 1.0, 3.0, 40.0)):
        link = times(host, device, copy, is_apart=is_apart)
        for n_host, n_device in (([5, 1, 9, 7, 2, 6], []), ([4, 4, 4], [9, 9]), ([30], [1, 1, 1]), ([], [3])):
            chosen = choose_streams(n_host, n_device, link)
            order = sorted(range(len(n_host)), key=lambda index: -n_host[index])
            assert chosen == order[: len(chosen)]
            best = min(layer_seconds(n_host, n_device, order[:n], link) for n in range(len(order) + 1))
            assert layer_seconds(n_host, n_device, chosen, link) == pytest.approx(best)


def test_a_link_of_its_own_is_worth_more_copies() -> None:
    """While the device computes what it has, copies cost nothing."""
    n_host, n_device = [8, 8, 8, 8], [8, 8]
    together = choose_streams(n_host, n_device, times(1.0, 0.5, 4.0, is_apart=False))
    apart = choose_streams(n_host, n_device, times(1.0, 0.5, 4.0, is_apart=True))
    assert len(together) < len(apart)


def test_nothing_is_copied_over_a_slow_link() -> None:
    assert choose_streams([50, 50], [], times(1.0, 0.1, 1e6, is_apart=True)) == []
    assert sorted(choose_streams([50, 50], [], times(1.0, 0.0, 1e-9, is_apart=True))) == [0, 1]
