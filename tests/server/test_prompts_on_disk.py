"""`slimoe serve --prompt-cache`: what one server has computed, the next one reads, and says so."""

import json
import time
import urllib.request
from pathlib import Path
from typing import Any

from slimoe.server.cli import run
from slimoe.server.options.engine_options import DEMO
from tests.models.live_server import DEADLINE, serving

PROMPT = [1 + n * n % 499 for n in range(400)]
N_KEPT = 384
"""In blocks of 32 tokens."""


def asked(url: str) -> dict[str, Any]:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 8, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
        read: dict[str, Any] = json.load(answer)
        return read


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=DEADLINE) as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(name)).rpartition(" ")[2])


def test_a_server_that_was_killed_has_kept_its_prompts(tmp_path: Path) -> None:
    flags = (DEMO, "--prompt-cache", tmp_path / "kept", "--device", "none")
    with serving(*flags) as (_, url):
        first = asked(url)
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        until = time.monotonic() + DEADLINE
        while len(list((tmp_path / "kept").glob("*.kv"))) < N_KEPT // 32:
            assert time.monotonic() < until, "nothing was written while the server had nothing to do"
            time.sleep(0.01)
    with serving(*flags) as (process, url):
        again = asked(url)
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == N_KEPT
        assert again["timings"]["prompt_n"] == len(PROMPT) - N_KEPT
        assert again["choices"][0]["text"] == first["choices"][0]["text"]
        assert metric(url, 'slimoe_tier_events_total{what="prompt_cache_tokens"}') == N_KEPT
        assert metric(url, "slimoe_prefix_cache_hits_total") == N_KEPT
        assert metric(url, 'slimoe_tier_bytes_total{what="prompt_cache_read"}') > 0
        process.kill()
        assert process.stderr is not None
        assert f"Prompt cache: {N_KEPT} tokens were read" in process.stderr.read()


def test_run_keeps_them_too(tmp_path: Path, capfd: Any) -> None:
    words = ["run", str(DEMO), "--prompt-ids", ",".join(map(str, PROMPT)), "-n", "4", "--temp", "0", "--json"]
    told = []
    for _ in range(2):
        assert run([*words, "--prompt-cache", str(tmp_path / "kept"), "--device", "none"]) == 0
        told.append(json.loads(capfd.readouterr().out))
    assert [one["timings"]["prompt_n"] for one in told] == [len(PROMPT), len(PROMPT) - N_KEPT]
    assert told[0]["tokens"] == told[1]["tokens"]


def test_what_can_be_no_folder_is_refused_before_anything_is_loaded(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "file").write_text("x")
    for command in (["serve", "--port", "0"], ["run", "-p", "x"]):
        assert run([command[0], str(DEMO), *command[1:], "--prompt-cache", str(tmp_path / "file" / "below")]) == 2
        told = capfd.readouterr().err
        assert "--prompt-cache" in told
        assert str(tmp_path / "file" / "below") in told
