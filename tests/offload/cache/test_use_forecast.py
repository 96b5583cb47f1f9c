"""What a forecast of uses learns: against the same sums over all experts, and on streams made for one habit each."""

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import pytest

from slimoe.offload.cache.use_forecast import (
    HALF_LIVES,
    LASTING_TOKENS,
    PERIOD_TOKENS,
    USUAL_PERIODS,
    UseForecast,
    Values,
)

N_LAYER, N_EXPERT, N_USED = 6, 24, 3
EVEN = np.full((N_LAYER, N_EXPERT), N_USED / N_EXPERT)
Stream = Iterator[np.ndarray]
"""The experts of each token, [N_LAYER, N_USED]."""


class Plain:
    """The same forecast, by looking at all experts in every token."""

    def __init__(self, usual: Values) -> None:
        self.usual, self.keep = usual.ravel().copy(), 0.5 ** (1 / np.array(HALF_LIVES))
        self.windows = np.tile(self.usual, (len(HALF_LIVES), 1))
        share = N_USED / N_EXPERT
        by_chance = self.usual.size * share * (1 - share) * (1 - self.keep) / (1 + self.keep)
        self.squares = 64 * np.diag(by_chance)
        self.products = self.squares @ np.array([0, 0, 0.25])
        self.period: list[Values] = []

    def see(self, used: Values, *, learns: bool) -> None:
        """A token has used each expert so often."""
        unusual = self.windows - self.usual
        if learns:
            self.squares = (1 - 1 / 1024) * self.squares + unusual @ unusual.T
            self.products = (1 - 1 / 1024) * self.products + unusual @ (used - self.usual)
        self.windows = self.keep[:, None] * self.windows + (1 - self.keep)[:, None] * used
        self.period.append(used)
        if len(self.period) == PERIOD_TOKENS:
            self.usual += (np.mean(self.period, axis=0) - self.usual) / USUAL_PERIODS
            self.period = []

    def uses_within(self, n_tokens: int) -> Values:
        """Plays the tokens to come one by one, each as it is expected."""
        shares = np.linalg.solve(self.squares, self.products)
        shares /= max(1, shares.sum())
        unusual, total, kept = self.windows - self.usual, n_tokens * self.usual, 1.0
        for _ in range(5000):
            more = shares @ unusual
            total = total + kept * more
            unusual = self.keep[:, None] * unusual + (1 - self.keep)[:, None] * more
            kept *= 1 - 1 / min(n_tokens, LASTING_TOKENS)
        return total.reshape(N_LAYER, N_EXPERT)


def play(forecast: UseForecast, stream: Stream, n_tokens: int) -> np.ndarray:
    """Shows the tokens of a stream to a forecast; returns the last one's experts."""
    for _ in range(n_tokens):
        token = next(stream)
        for layer, experts in enumerate(token):
            forecast.decode(layer, experts)
        forecast.end_token()
    return token


def by_chance(seed: int) -> Stream:
    rng = np.random.default_rng(seed)
    while True:
        yield np.stack([rng.choice(N_EXPERT, N_USED, replace=False) for _ in range(N_LAYER)])


def by_text(seed: int, n_tokens: int) -> Stream:
    """Each text likes six experts of each layer."""
    rng = np.random.default_rng(seed)
    while True:
        liked = np.stack([rng.permutation(N_EXPERT)[:6] for _ in range(N_LAYER)])
        for _ in range(n_tokens):
            yield np.stack([rng.choice(own, N_USED, replace=False) for own in liked])


def repeating(seed: int) -> Stream:
    """Two of three experts are those of the token before, the third is chance."""
    rng, token = np.random.default_rng(seed), next(by_chance(seed))
    while True:
        for layer in range(N_LAYER):
            kept = rng.permutation(token[layer])[:2]
            others = np.setdiff1d(np.arange(N_EXPERT), kept)
            token[layer] = [*kept, rng.choice(others)]
        yield token.copy()


def test_it_is_that_of_looking_at_all_experts() -> None:
    """Through periods, prompts, layers that use nothing, and experts that are used twice in a token."""
    rng = np.random.default_rng(5)
    usual = rng.dirichlet(np.ones(N_EXPERT), N_LAYER) * N_USED
    forecast, plain = UseForecast(usual, N_USED, is_known=True), Plain(usual)
    for token, experts in zip(range(150), by_text(5, 40), strict=False):
        is_prompt = token % 60 == 50
        if is_prompt:
            means = rng.random(N_EXPERT)
            forecast.prompt(2, means, 10.0)
            own = plain.windows.reshape(-1, N_LAYER, N_EXPERT)
            kept = plain.keep[:, None] ** 10
            own[:, 2] = kept * own[:, 2] + (1 - kept) * means
        used = np.zeros((N_LAYER, N_EXPERT))
        for layer in range(N_LAYER - token % 2):
            forecast.decode(layer, experts[layer])
            forecast.decode(layer, experts[layer, :1])
            used[layer, experts[layer]] = 1
        forecast.end_token()
        plain.see(used.ravel(), learns=not is_prompt)
    for n_tokens in (5, 300):
        assert forecast.uses_within(n_tokens) == pytest.approx(plain.uses_within(n_tokens))
    after = forecast.uses_after_use(1, experts[1], 30)
    plain.see(used.ravel(), learns=False)
    assert after == pytest.approx(plain.uses_within(30)[1, experts[1]])
    assert forecast.mean_use((3, 4), 300) == pytest.approx(forecast.uses_within(300)[3, 4] / 300)


@pytest.mark.parametrize(("stream", "more"), [(by_chance, (-0.3, 0.3)), (repeating, (1.5, 2.5))])
def test_it_learns_whether_what_was_used_is_used_again(
    stream: Callable[[int], Stream], more: tuple[float, float]
) -> None:
    """An expert that is kept with a probability of 2/3 is used twice more before it is given up."""
    forecast = UseForecast(EVEN, N_USED, is_known=True)
    token = play(forecast, stream(3), 300)
    uses = forecast.uses_within(20)
    used = np.take_along_axis(uses, token, axis=1)
    assert more[0] < used.mean() - (uses.sum() - used.sum()) / (uses.size - used.size) < more[1]


def test_it_follows_a_new_text_within_some_tokens() -> None:
    """What the last text liked and the new one does not is expected less after a dozen tokens."""
    forecast, texts = UseForecast(EVEN, N_USED, is_known=True), list(islice(by_text(7, 120), 360))
    old, new = (np.zeros(EVEN.shape, np.bool_) for _ in range(2))
    for liked, text in ((old, texts[120:240]), (new, texts[240:])):
        np.put_along_axis(liked, np.concatenate(text, axis=1), values=True, axis=1)
    play(forecast, iter(texts), 240)
    before = forecast.uses_within(30)
    assert before[old & ~new].mean() > 3 * before[new & ~old].mean()
    play(forecast, iter(texts[240:]), 12)
    now = forecast.uses_within(30)
    assert now[new & ~old].mean() > 1.5 * now[old & ~new].mean()


def test_what_the_file_tells_counts_more_than_an_even_guess() -> None:
    """After some hundred tokens of one text, another use than usual is taken for that text's, or for usual."""
    known, guessed = (UseForecast(EVEN, N_USED, is_known=is_known) for is_known in (True, False))
    for forecast in (known, guessed):
        play(forecast, by_text(9, 1000), 320)
    assert known.uses_within(5000).max() < 0.7 * guessed.uses_within(5000).max()


def test_where_all_experts_are_always_used_nothing_is_unusual() -> None:
    forecast, every = UseForecast(np.ones((2, 3)), 3, is_known=False), np.arange(3)
    for _ in range(100):
        forecast.decode(0, every)
        forecast.decode(1, every)
        forecast.end_token()
    assert forecast.uses_within(10) == pytest.approx(np.full((2, 3), 10.0))
    assert forecast.uses_after_use(1, every, 10) == pytest.approx(np.full(3, 10.0))
