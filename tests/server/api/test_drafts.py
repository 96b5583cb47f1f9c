"""What clients are told of drafted tokens, under llama-server's names and vLLM's."""

from pathlib import Path
from typing import Any

import aiohttp

from slimoe.offload.plan.engine_config import EngineConfig
from tests.models.live_server import LiveOptions, LiveServer, live_server

BODY = {"prompt": "a b c", "max_tokens": 4}
COUNTERS = ("slimoe_spec_decode_num_draft_tokens_total", "slimoe_spec_decode_num_accepted_tokens_total")


async def told(server: LiveServer) -> tuple[dict[str, Any], list[float]]:
    """The timings of an answer, and the counters of drafted and of accepted tokens after it."""
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{server.url}/v1/completions", json=BODY) as response:
            timings = (await response.json())["timings"]
        async with session.get(f"{server.url}/metrics") as response:
            lines = dict(line.rsplit(" ", 1) for line in (await response.text()).splitlines() if line[0] != "#")
    return timings, [float(lines[name]) for name in COUNTERS]


async def test_what_was_drafted_is_told(model: Path) -> None:
    async with live_server(model, LiveOptions(engine=EngineConfig(Path(), draft="ngram"))) as server:
        for n_answers in (1, 2):
            timings, counters = await told(server)
            assert (timings["draft_n"], timings["draft_n_accepted"]) == (5, 3)
            assert counters == [5 * n_answers, 3 * n_answers]


async def test_where_nothing_was_drafted_nothing_is_told(model: Path) -> None:
    async with live_server(model) as server:
        timings, counters = await told(server)
    assert "draft_n" not in timings
    assert "draft_n_accepted" not in timings
    assert counters == [0, 0]
