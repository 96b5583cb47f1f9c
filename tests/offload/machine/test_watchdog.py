"""When a running engine chooses anew what becomes of missed experts: drift, noise, the way back, and whole tokens."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from slimoe.offload.machine.upload_costs import UploadCosts
from slimoe.offload.machine.watchdog import BLOCK, PARTS, PROBE_SHARE, Part, Watchdog

FAST = UploadCosts(host=4e-3, device=0.3e-3, copy=2e-3, host_beside=5e-3, copy_beside=3e-3)
"""Uploads pay."""
N_USED = 2
LINK_SLOW = replace(FAST, copy=3.0, copy_beside=4.5)


@dataclass
class Played:
    """An engine whose experts take what `now` says: seconds go by as told, and nothing waits."""

    watchdog: Watchdog
    now: UploadCosts = FAST
    token: Callable[[bool], float] = lambda uploads: 0.1
    noise: Callable[[], float] = lambda: 1.0
    seconds: float = 0.0
    probing: float = 0.0
    n_probes: int = 0
    modes: list[str] = field(default_factory=list)

    def run(self, n_tokens: int) -> None:
        for _ in range(n_tokens):
            uploads = self.watchdog.choice.mode == "upload" and not self.watchdog.is_still
            seconds = self.token(uploads) * self.noise()
            self.seconds += seconds
            self.watchdog.step(seconds, is_token=True)
            part = self.watchdog.due()
            if part is not None:
                self.probe(part)
            self.modes.append(self.watchdog.choice.mode)

    def probe(self, part: Part) -> None:
        found = getattr(self.now, part) * self.noise()
        self.probing += 2 * found
        self.n_probes += 1
        self.watchdog.measured(part, found, 2 * found)


def noise_of(seed: int, spread: float, outliers: float = 0.0) -> Callable[[], float]:
    chance = random.Random(seed)
    return lambda: chance.lognormvariate(0, spread) * (4 if chance.random() < outliers else 1)


def test_while_all_is_as_it_was_nothing_changes_and_little_is_measured() -> None:
    played = Played(Watchdog(FAST, N_USED))
    played.run(2000)
    assert set(played.modes) == {"upload"}
    assert played.watchdog.costs == FAST
    assert 0.5 * PROBE_SHARE < played.probing / played.seconds < 1.1 * PROBE_SHARE
    assert played.watchdog.latest == pytest.approx({"copy": FAST.copy, "host": FAST.host, "device": FAST.device})


@pytest.mark.parametrize(("slower", "mode"), [(10, "upload"), (30, "swap"), (1500, "static")])
def test_a_slower_link_is_noticed_within_some_tokens(slower: float, mode: str) -> None:
    """Also where uploads go on, since then fewer of them are worth it."""
    played = Played(Watchdog(FAST, N_USED))
    played.run(200)
    played.now = replace(FAST, copy=slower * FAST.copy)
    played.run(60)
    watchdog = played.watchdog
    assert watchdog.choice.mode == mode
    assert watchdog.costs.copy == pytest.approx(slower * FAST.copy)
    assert watchdog.costs.copy_beside == pytest.approx(slower * FAST.copy_beside)
    assert (watchdog.costs.host, watchdog.costs.host_beside) == (FAST.host, FAST.host_beside)
    assert watchdog.opened == FAST
    if mode == "static":
        assert 200 < watchdog.since <= 260
        assert watchdog.cause == "a copy over the link takes 3000 ms in place of 2 ms"


def test_a_device_that_became_slow_is_left_alone() -> None:
    played = Played(Watchdog(FAST, N_USED), now=replace(FAST, device=9e-3))
    played.run(100)
    assert played.modes[-1] == "static"
    assert played.watchdog.cause == "an expert on the card takes 9 ms in place of 0.3 ms"


def test_after_the_link_is_well_again_experts_move_again_but_not_at_once() -> None:
    played = Played(Watchdog(FAST, N_USED))
    played.run(50)
    for n_before_return in (128, 256, 512):
        played.now = LINK_SLOW
        played.run(60)
        assert played.modes[-1] == "static"
        fell = played.watchdog.since
        played.now = FAST
        # Of so slow a link a single look costs what 60 tokens take, so that it is taken seldom.
        played.run(20_000)
        assert played.modes[-1] == "upload"
        assert fell + n_before_return <= played.watchdog.since < fell + 20_000
    assert played.watchdog.n_changes == 6


def test_looking_for_a_better_link_costs_little_however_slow_it_is() -> None:
    played = Played(Watchdog(FAST, N_USED), now=LINK_SLOW)
    played.run(100)
    before = played.probing, played.seconds
    played.run(20_000)
    assert (played.probing - before[0]) / (played.seconds - before[1]) < 0.02


def test_a_link_that_is_slower_still_is_not_measured_again_where_nothing_is_moved() -> None:
    watchdog = Watchdog(LINK_SLOW, N_USED)
    assert watchdog.choice.mode == "static"
    assert not watchdog.measured("copy", 10 * LINK_SLOW.copy, 1.0)
    assert watchdog.due() is None
    # One over which moving would pay is made sure of at once.
    assert not watchdog.measured("copy", FAST.copy, 1.0)
    assert watchdog.due() == "copy"


def test_what_is_at_the_edge_does_not_go_to_and_fro() -> None:
    """A link half as fast and twice as fast in turn, on either side of what makes uploads pay."""
    edge = replace(FAST, copy=0.039, copy_beside=0.04)
    played = Played(Watchdog(edge, N_USED), now=edge)
    for n in range(60):
        played.now = replace(edge, copy=edge.copy * (1.3, 0.8)[n % 2])
        played.run(200)
    assert set(played.modes) == {"upload"}


@pytest.mark.parametrize("seed", range(5))
def test_noise_changes_nothing(seed: int) -> None:
    """Every tenth measurement takes four times as long, and tokens of one kind differ by a tenth."""
    played = Played(
        Watchdog(FAST, N_USED),
        token=lambda uploads: 0.08 if uploads else 0.1,
        noise=noise_of(seed, 0.1, outliers=0.1),
    )
    played.run(5000)
    assert set(played.modes) == {"upload"}


def test_tokens_that_are_slower_with_uploads_end_them_whatever_experts_take() -> None:
    played = Played(Watchdog(FAST, N_USED), token=lambda uploads: 0.125 if uploads else 0.1, noise=noise_of(1, 0.05))
    played.run(200)
    watchdog = played.watchdog
    assert watchdog.choice.mode == "static"
    assert watchdog.tokens is not None
    assert watchdog.tokens.uploading == pytest.approx(0.125, rel=0.1)
    assert watchdog.tokens.staying == pytest.approx(0.1, rel=0.1)
    assert watchdog.cause.startswith("tokens took ")
    assert watchdog.since <= 32 + 4 * 2 * BLOCK + 1


def test_tokens_that_are_much_slower_end_uploads_sooner() -> None:
    played = Played(Watchdog(FAST, N_USED), token=lambda uploads: 0.5 if uploads else 0.1)
    played.run(32 + 2 * 2 * BLOCK + 1)
    assert played.modes[-1] == "static"


def test_uploads_that_were_slower_are_tried_again_ever_more_seldom() -> None:
    played = Played(Watchdog(FAST, N_USED), token=lambda uploads: 0.125 if uploads else 0.1)
    played.run(10_000)
    n_uploading = played.modes.count("upload")
    assert 3 < played.watchdog.n_changes < 20
    assert n_uploading < 0.06 * 10_000
    played.token = lambda uploads: 0.08 if uploads else 0.1
    played.run(20_000)
    assert played.modes[-1] == "upload"


def test_uploads_that_are_faster_go_on_and_seldom_pause() -> None:
    paused = 0

    def token(uploads: bool) -> float:
        nonlocal paused
        paused += not uploads
        return 0.08 if uploads else 0.1

    played = Played(Watchdog(FAST, N_USED), token=token)
    played.run(4000)
    assert set(played.modes) == {"upload"}
    assert 0 < paused < 0.04 * 4000


def test_what_cannot_be_measured_changes_nothing_and_is_not_asked_for_all_the_time() -> None:
    watchdog = Watchdog(FAST, N_USED)
    n_asked = 0
    for _ in range(100):
        watchdog.step(0.1, is_token=False)
        part = watchdog.due()
        if part is not None:
            n_asked += 1
            assert not watchdog.measured(part, None, 0.01)
    assert n_asked <= 11
    assert watchdog.n_tokens == 0


def test_tokens_that_suddenly_take_longer_have_the_link_measured_at_once() -> None:
    """Where experts are so large that looking takes long, and would not be its turn for hundreds of tokens."""
    large = UploadCosts(host=0.2, device=0.02, copy=0.5, host_beside=0.2, copy_beside=0.5)
    played = Played(Watchdog(large, N_USED), now=large, token=lambda uploads: 0.4)
    played.run(1100)
    played.now = replace(large, copy=5.0, copy_beside=5.0)
    played.token = lambda uploads: 4.0 if uploads else 0.4
    played.run(6)
    assert played.modes[-1] == "swap"


def test_tokens_that_are_slow_by_themselves_do_not_have_the_link_measured() -> None:
    """Between tokens experts move seldom: what was slow while none did was not the link."""
    watchdog = Watchdog(replace(FAST, copy=0.2, copy_beside=0.2), N_USED)
    assert watchdog.choice.mode == "swap"
    for part in PARTS:
        watchdog.measured(part, getattr(watchdog.costs, part), 0.4)
    for number in range(40):
        watchdog.step(0.5 if number > 30 else 0.1, is_token=True, has_moved=number in (33, 34))
        assert watchdog.due() == ("copy" if number >= 34 else None)
