"""`/v1/completions` and the tokenizer's endpoints: what evaluation harnesses live on."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import sentencepiece
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from slimoe.server.api.metrics import MODES
from tests.models.live_server import LiveServer, live_server, until
from tests.models.tiny_gguf import MIXTRAL_TEMPLATE

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def processor(sentencepiece_path: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_path))


async def post(server: LiveServer, path: str, body: object) -> Any:
    async with aiohttp.ClientSession() as session, session.post(server.url + path, json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def test_every_form_of_prompt(client: AsyncOpenAI, processor: Any) -> None:
    ids = [1, *processor.encode("hello world")]
    forms: list[Any] = ["hello world", ids, ["hello world", "tell me"], [ids, ids], ["hello world", ids]]
    for prompt in forms:
        answer = await client.completions.create(model="", prompt=prompt)
        texts = [choice.text for choice in answer.choices]
        assert texts[0] == " hello world"
        assert [choice.index for choice in answer.choices] == list(range(len(texts)))
        assert len(texts) == (1 if prompt in (forms[0], ids) else 2)
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2 * len(ids)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_is_given_back_with_scores(client: AsyncOpenAI, processor: Any, stream: bool) -> None:
    arguments: Any = {"prompt": "hello 日本", "max_tokens": 1, "echo": True, "logprobs": 2, "stream": stream}
    answer: Any = await client.completions.create(model="", **arguments)
    parts = [chunk.choices[0] async for chunk in answer] if stream else [answer.choices[0]]
    text = "".join(part.text for part in parts)
    scores = [part.logprobs for part in parts if part.logprobs]
    tokens = [token for score in scores for token in score.tokens]
    values = [value for score in scores for value in score.token_logprobs]
    tops = [top for score in scores for top in score.top_logprobs]
    offsets = [offset for score in scores for offset in score.text_offset]
    assert text == "hello 日本 hello"
    assert len(tokens) == len(values) == len(tops) == len(offsets) == 2 + len(processor.encode("hello 日本"))
    assert (values[0], tops[0], tokens[0]) == (None, None, "<s>")
    assert all(top[token] == value for token, value, top in zip(tokens[1:], values[1:], tops[1:], strict=True))
    assert offsets == sorted(offsets)
    assert (offsets[0], offsets[1], offsets[-1]) == (0, 0, len("hello 日本"))


@pytest.mark.parametrize("prompt", ["hello world", [364, 5, 6]])
async def test_scoring_without_writing(server: LiveServer, prompt: Any) -> None:
    body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = await post(server, "/v1/completions", body)
    (choice,) = answer["choices"]
    n_tokens = answer["usage"]["prompt_tokens"]
    assert len(choice["logprobs"]["token_logprobs"]) == n_tokens
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


async def test_echo_alone(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="", prompt="tell me", echo=True)
    assert answer.choices[0].text == "tell me tell me"
    assert answer.choices[0].logprobs is None


async def test_control_tokens_may_be_written_out(server: LiveServer, processor: Any) -> None:
    plain = await post(server, "/v1/completions", {"prompt": "hello"})
    once = await post(server, "/v1/completions", {"prompt": "<s>hello</s>"})
    assert once["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"] + 1 == 2 + len(processor.encode("hello"))


async def test_sixteen_tokens_unless_told_otherwise(server: LiveServer) -> None:
    answer = await post(server, "/v1/completions", {"prompt": "forever"})
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_tokenize_in_both_spellings(server: LiveServer, processor: Any) -> None:
    ids = processor.encode("hello 日本")
    llama_cpp = await post(server, "/tokenize", {"content": "hello 日本"})
    assert (llama_cpp["tokens"], llama_cpp["count"]) == (ids, len(ids))
    vllm = await post(server, "/v1/tokenize", {"prompt": "hello 日本"})
    assert (vllm["tokens"], vllm["max_model_len"]) == ([1, *ids], 512)
    harness = await post(server, "/tokenize", {"prompt": "hello 日本", "add_special_tokens": False})
    assert harness["tokens"] == ids
    pieces = (await post(server, "/tokenize", {"content": "😀", "with_pieces": True}))["tokens"]
    assert [piece["piece"] for piece in pieces] == [" ", *([byte] for byte in "😀".encode())]
    text = await post(server, "/detokenize", {"tokens": ids})
    assert text == {"content": "hello 日本", "prompt": "hello 日本"}
    text = await post(server, "/detokenize", {"tokens": [1, *ids, 2]})
    assert text["content"] == text["prompt"] == "<s> hello 日本</s>"


async def test_what_is_told_about_the_model(server: LiveServer) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{server.url}/tokenizer_info") as response:
            info = await response.json()
        assert (info["bos_token"], info["eos_token"], info["chat_template"]) == ("<s>", "</s>", MIXTRAL_TEMPLATE)
        async with session.get(f"{server.url}/props") as response:
            props = await response.json()
        assert (props["n_ctx"], props["total_slots"], props["model_alias"]) == (512, 1, "tiny")
        async with session.get(f"{server.url}/metrics") as response:
            metrics = await response.text()
    assert "slimoe_generation_tokens_total " in metrics
    assert 'slimoe_memory_used_bytes{tier="weights"}' in metrics
    assert {"llamacpp:prompt_tokens_seconds", "llamacpp:requests_deferred"} <= set(metrics.split())
    body = {"messages": [{"role": "user", "content": "a </s>"}]}
    assert await post(server, "/apply-template", body) == {"prompt": "<s>[INST] a </s> [/INST]"}


async def test_metrics_have_what_was_predicted_beside_what_was_measured(server: LiveServer) -> None:
    await post(server, "/completion", {"prompt": "a b c", "n_predict": 3})
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/metrics") as response:
        metrics = await response.text()
    told = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in metrics.splitlines() if line[0] != "#"}
    assert told['slimoe_token_seconds{kind="predicted",model="tiny"}'] == 0.05
    assert told['slimoe_token_seconds{kind="measured",model="tiny"}'] == 0.002
    device = 'device="GPU0"'
    modes = [told[f'slimoe_exchange_mode{{{device},mode="{mode}",model="tiny"}}'] for mode in MODES]
    assert modes == [1, 0, 0]
    assert told[f'slimoe_exchange_since_token{{{device},model="tiny"}}'] == 70
    copies = [
        told[f'slimoe_exchange_seconds{{{device},kind="{kind}",model="tiny",what="copy"}}']
        for kind in ("predicted", "measured")
    ]
    assert copies == [0.002, 0.5]


async def test_llama_servers_metrics_are_the_timings_of_the_answers(server: LiveServer) -> None:
    async def figures() -> dict[str, tuple[str, float]]:
        async with aiohttp.ClientSession() as session, session.get(f"{server.url}/metrics") as response:
            assert 0 < int(response.headers["Process-Start-Time-Unix"]) <= time.time()
            families = text_string_to_metric_families(await response.text())
        return {
            sample.name.removeprefix("llamacpp:"): (family.type, sample.value)
            for family in families
            for sample in family.samples
            if sample.name.startswith("llamacpp:")
        }

    before = await figures()
    answers = [await post(server, "/completion", {"prompt": "a b c", "n_predict": n}) for n in (1, 4, 6)]
    after = await figures()
    timings = [answer["timings"] for answer in answers]
    for name, field, scale in (
        ("prompt_tokens_total", "prompt_n", 1),
        ("prompt_tokens_cached_total", "cache_n", 1),
        ("prompt_seconds_total", "prompt_ms", 1000),
        ("tokens_predicted_total", "predicted_n", 1),
        ("tokens_predicted_seconds_total", "predicted_ms", 1000),
    ):
        expected = sum(one[field] for one in timings) / scale
        kind, value = after[name]
        assert kind == "counter"
        assert value == pytest.approx(before[name][1] + expected, abs=1e-5), name
    decoded = sum(one["predicted_n"] - 1 for one in timings)
    seconds = sum(one["predicted_ms"] for one in timings) / 1000
    assert after["predicted_tokens_seconds"][1] == pytest.approx(decoded / seconds, rel=1e-3)
    assert after["n_tokens_max"][1] >= max(one["cache_n"] + one["prompt_n"] + one["predicted_n"] for one in timings)
    assert (after["requests_processing"][1], after["requests_deferred"][1]) == (0, 0)
    assert (await figures())["predicted_tokens_seconds"] == ("gauge", 0), "nothing since"


@pytest.mark.parametrize("end", ["left", "failed"])
async def test_metrics_count_what_was_computed_for_answers_that_do_not_end(
    model: Path, processor: Any, end: str
) -> None:
    async def counted(session: aiohttp.ClientSession) -> dict[str, float]:
        async with session.get("/metrics") as response:
            families = text_string_to_metric_families(await response.text())
        return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}

    async with live_server(model) as server, aiohttp.ClientSession(server.url) as session:
        before = await counted(session)
        body = {"prompt": "hello forever", "stream": True}
        async with session.post("/v1/completions", json=body) as response:
            n_seen = 0
            while n_seen < 5:
                n_seen += (await response.content.readline()).startswith(b"data: ")
            if end == "failed":
                assert server.supervisor.pid is not None
                os.kill(server.supervisor.pid, signal.SIGKILL)
                assert b"engine_crashed" in await response.read()
        await until(lambda: server.supervisor.n_admitted == 0)
        after = await counted(session)
    n_prompt = after["slimoe_prompt_tokens_total"] - before["slimoe_prompt_tokens_total"]
    assert n_prompt == after["llamacpp:prompt_tokens_total"] == 1 + len(processor.encode("hello forever"))
    assert after["slimoe_generation_tokens_total"] == after["llamacpp:tokens_predicted_total"] >= n_seen
    assert after["llamacpp:tokens_predicted_seconds_total"] > 0
