"""The bookkeeping's cost does not grow with the number of experts, counted in calls; routers retrieve what they say."""

import json
import sys
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from click.testing import CliRunner

from bench.traces.scaling import Bookkeeping, Clock, main
from bench.traces.simulated_routers import LinearRouter, ProductKeys, hidden_states

N_USED, N_TOKENS = 8, 60


def calls_per_selected(tmp_path: Path, n_expert: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """Calls, of Python's and of C's, for each selected expert once half of the experts have been decided about."""
    rng = np.random.default_rng(0)
    routers = [LinearRouter(n_expert, N_USED, rng) for _ in range(4)]
    routed = [[router.route(hidden) for router in routers] for hidden in hidden_states(N_TOKENS, rng)]
    books = Bookkeeping("lfu-decay", len(routers), n_expert, N_USED, tmp_path / f"trace-{n_expert}")
    books.step(routed[0], Clock())
    n_calls = 0

    def count(_frame: FrameType, event: str, _what: object) -> None:
        nonlocal n_calls
        n_calls += event in ("call", "c_call")

    def refuse(_policy: object) -> None:
        raise AssertionError("a step looks at all experts")

    with monkeypatch.context() as patch:
        for name in ("values", "keeping"):
            patch.setattr(f"slimoe.offload.cache.policy.Ranked.{name}", property(refuse))
        sys.setprofile(count)
        try:
            for token in routed[1:]:
                books.step(token, Clock())
        finally:
            sys.setprofile(None)
    books.trace.close()
    books.cache.check()
    assert 0 < books.n_hits < books.n_selected
    return n_calls / (books.n_selected - books.n_selected / N_TOKENS)


def test_a_selected_expert_takes_as_many_calls_among_thousands_as_among_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (calls_per_selected(tmp_path, n_expert, monkeypatch) for n_expert in (16, 2500))
    assert many < 1.2 * few


@pytest.mark.parametrize(("n_side", "n_best"), [(5, 5), (12, 4)])
def test_product_keys_retrieve_the_best_of_all_pairs(n_side: int, n_best: int) -> None:
    """Source: the acceptance test of arXiv 2407.04153's retrieval, brute force over all sums."""
    rng = np.random.default_rng(n_side)
    router = ProductKeys(n_side**2, 3, n_best, rng)
    for hidden in hidden_states(20, rng):
        ids, logits = router.retrieve(hidden)
        for (first, second), own, its_logits in zip(router.sub_logits(hidden), ids, logits, strict=True):
            sums = (first[:, None] + second[None, :]).ravel()
            order = np.argsort(-sums, kind="stable")[:n_best]
            assert own.tolist() == order.tolist()
            np.testing.assert_array_equal(its_logits, sums[order])
        assert set(router.route(hidden).experts.tolist()) == set(ids.ravel().tolist())


def test_the_bench_runs_to_its_end() -> None:
    done = CliRunner().invoke(main, ["--smoke"], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["n_expert"] for row in rows] == [64, 1024] * 2
    assert all(0 < row["hit_share"] < 1 and row["sum"] > 0 for row in rows)
