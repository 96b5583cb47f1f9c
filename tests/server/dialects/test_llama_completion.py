"""llama-server's `/completion` over the scripted engine, which answers with the prompt's own tokens."""

import json
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from slimoe.server.api_error import ApiError
from slimoe.server.dialects.llama.completion_body import biases_of
from tests.models.live_server import LiveServer, live_server
from tests.models.tiny_gguf import write_tiny_gguf
from tests.server.dialects.conftest import Post

pytestmark = pytest.mark.asyncio(loop_scope="module")
TEXT = "hello world, this is it"


async def ids_of(post: Post, text: str, *, bos: bool = False) -> list[int]:
    status, document = await post("/tokenize", {"content": text, "add_special": bos})
    assert status == 200
    tokens: list[int] = document["tokens"]
    return tokens


async def pieces(server: LiveServer, **fields: Any) -> list[dict[str, Any]]:
    """The documents of a streamed answer, which no `[DONE]` follows."""
    body = {"prompt": TEXT, "stream": True, **fields}
    async with aiohttp.ClientSession() as session, session.post(f"{server.url}/completion", json=body) as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")
        blocks = (await response.text()).split("\n\n")
    assert blocks[-1] == ""
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


async def test_a_whole_answer(post: Post) -> None:
    status, answer = await post("/completion", {"prompt": TEXT, "return_tokens": True, "n_predict": 64})
    ids = await ids_of(post, TEXT)
    assert status == 200
    assert answer["content"] == f" {TEXT}"
    assert answer["tokens"] == ids
    assert answer["prompt"] == f"<s> {TEXT}"
    assert answer["tokens_evaluated"] == len(ids) + 1
    assert answer["tokens_predicted"] == answer["timings"]["predicted_n"] == len(ids)
    assert (answer["stop"], answer["stop_type"], answer["stopping_word"]) == (True, "eos", "")
    assert (answer["truncated"], answer["has_new_line"], answer["id_slot"], answer["index"]) == (False, False, 0, 0)
    assert answer["model"] == "tiny"
    assert answer["generation_settings"]["n_predict"] == 64
    assert "completion_probabilities" not in answer


@pytest.mark.parametrize(("fields", "n_cached"), [({}, 1), ({"cache_prompt": True}, 1), ({"cache_prompt": False}, 0)])
async def test_a_prompt_is_read_whole_where_that_is_asked(post: Post, fields: dict[str, Any], n_cached: int) -> None:
    _, answer = await post("/completion", {"prompt": TEXT, **fields})
    assert answer["timings"]["cache_n"] == n_cached


@pytest.mark.parametrize("path", ["/completion", "/completions"])
async def test_tokens_are_told_only_if_asked_for(post: Post, path: str) -> None:
    _, answer = await post(path, {"prompt": TEXT})
    assert answer["tokens"] == []
    assert answer["content"]


@pytest.mark.parametrize(
    ("fields", "stop_type", "word", "truncated"),
    [
        ({"n_predict": 2}, "limit", "", False),
        ({"stop": ["none", "world"]}, "word", "world", False),
        ({"stop": "is"}, "word", "is", False),
        ({}, "eos", "", False),
    ],
)
async def test_why_it_ended(post: Post, fields: dict[str, Any], stop_type: str, word: str, truncated: bool) -> None:
    _, answer = await post("/completion", {"prompt": TEXT, **fields})
    assert (answer["stop_type"], answer["stopping_word"], answer["truncated"]) == (stop_type, word, truncated)
    assert word not in answer["content"] or not word


async def test_a_full_window_truncates(post: Post) -> None:
    """The window has 512 tokens; the engine would write for ever."""
    _, answer = await post("/completion", {"prompt": "forever and ever", "n_predict": -1})
    assert (answer["stop_type"], answer["truncated"]) == ("limit", True)
    assert answer["generation_settings"]["n_predict"] == -1


async def test_pieces_make_up_the_whole(server: LiveServer, post: Post) -> None:
    *parts, last = await pieces(server, n_predict=64)
    assert all(part["stop"] is False and part["tokens"] and part["content"] for part in parts)
    assert "".join(part["content"] for part in parts) == f" {TEXT}"
    assert [token for part in (*parts, last) for token in part["tokens"]] == await ids_of(post, TEXT)
    assert (last["stop"], last["content"], last["stop_type"]) == (True, "", "eos")
    assert last["generation_settings"]["stream"] is True
    assert "timings" not in parts[0]


async def test_progress_and_timings_of_pieces(server: LiveServer) -> None:
    documents = await pieces(server, return_progress=True, timings_per_token=True)
    first, second, *_ = documents
    assert [one["prompt_progress"]["processed"] for one in (first, second)] == [0, second["prompt_progress"]["total"]]
    assert first["prompt_progress"]["cache"] == 0
    assert all("timings" in document for document in documents)
    for field in ("prompt_n", "prompt_ms", "predicted_n", "predicted_ms", "prompt_per_second"):
        assert first["timings"][field] == 0
    assert second["timings"]["prompt_n"] == second["prompt_progress"]["total"]
    assert all("prompt_progress" not in document for document in documents[2:])


async def test_mixed_prompts(post: Post) -> None:
    """Texts among ids are tokenized; the model's first token comes only before a text that begins the prompt."""
    hello, world = await ids_of(post, "hello"), await ids_of(post, "world")
    for prompt, expected in (
        ([5, 6, "hello", 7, "world"], [5, 6, *hello, 7, *world]),
        (["hello", 7], [1, *hello, 7]),
        ({"prompt_string": "hello"}, [1, *hello]),
        ([9, 10], [9, 10]),
    ):
        status, answer = await post("/completion", {"prompt": prompt, "return_tokens": True})
        assert status == 200
        assert answer["tokens_evaluated"] == len(expected)
        assert answer["tokens"] == [token for token in expected if token != 1]


async def test_many_prompts_and_choices(post: Post) -> None:
    prompts = ["one", [5, 6], {"prompt_string": "two"}, [7, "three"]]
    _, answers = await post("/completion", {"prompt": prompts, "n": 2})
    assert [answer["index"] for answer in answers] == list(range(8))
    texts = [answer["content"] for answer in answers]
    assert texts[0::2] == texts[1::2]
    assert (texts[0], texts[4]) == (" one", " two")


async def test_probabilities(server: LiveServer, post: Post) -> None:
    _, answer = await post("/completion", {"prompt": TEXT, "n_probs": 2, "n_predict": 3})
    told = answer["completion_probabilities"]
    assert "".join(one["token"] for one in told) == answer["content"]
    assert [one["id"] for one in told] == (await ids_of(post, TEXT))[:3]
    assert all(len(one["top_logprobs"]) == 2 and one["top_logprobs"][0]["id"] == one["id"] for one in told)
    assert all(bytes(one["bytes"]).decode() == one["token"] for one in told)
    assert all(-1 < one["logprob"] <= 0 for one in told)
    *parts, last = await pieces(server, n_probs=2, n_predict=3)
    assert [part["completion_probabilities"] for part in parts] == [[one] for one in told]
    assert "completion_probabilities" not in last


async def test_only_fields_that_were_asked_for(post: Post) -> None:
    fields = ["content", "generation_settings/n_predict", "prompt", "nothing", "prompt/nothing"]
    _, answer = await post("/completion", {"prompt": "a", "n_predict": 3, "response_fields": fields})
    assert answer == {"content": " a", "generation_settings/n_predict": 3, "prompt": "<s> a"}


async def test_biases_in_their_four_forms(post: Post) -> None:
    (token,) = await ids_of(post, "world")
    expected = [{"token": token, "bias": -100.0}]
    for biases in ([[token, -100]], {str(token): -100}, [[" world", -100]], {" world": -100}):
        status, answer = await post("/completion", {"prompt": "a", "logit_bias": biases})
        assert (status, answer["generation_settings"]["logit_bias"]) == (200, expected)
    _, answer = await post("/completion", {"prompt": "a", "logit_bias": [[token, False]]})
    assert answer["generation_settings"]["logit_bias"] == [{"token": token, "bias": None}]


async def test_ignored_ends_are_told_as_biases(post: Post) -> None:
    _, answer = await post("/completion", {"prompt": "a", "ignore_eos": True})
    assert {"token": 2, "bias": None} in answer["generation_settings"]["logit_bias"]
    _, answer = await post("/completion", {"prompt": "a", "ignore_eos": False})
    assert answer["generation_settings"]["logit_bias"] == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1.5, 2]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True, 1]}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": {"prompt_string": 5}}, "prompt"),
        ({"prompt": {"prompt_string": "a", "multimodal_data": ["x"]}}, "prompt.multimodal_data"),
        ({"prompt": [5, *["a"] * 300]}, "prompt"),
        ({"prompt": "a", "logit_bias": 5}, "logit_bias"),
        ({"prompt": "a", "logit_bias": [5]}, "logit_bias[0]"),
        ({"prompt": "a", "logit_bias": [[5, -1], [True, 5]]}, "logit_bias[1]"),
        ({"prompt": "a", "logit_bias": [[5, True]]}, "logit_bias[0]"),
        ({"prompt": "a", "logit_bias": [["x", 1]] * 300}, "logit_bias"),
        ({"prompt": "a", "logit_bias": [[10**7, 1]]}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"1" * 5000: 1}}, "logit_bias"),
        ({"prompt": "a", "id_slot": 9}, "id_slot"),
        ({"prompt": "a", "n_probs": 1000}, "n_probs"),
        ({"prompt": "a", "n_predict": -2}, "n_predict"),
        ({"prompt": "a", "n": 10**6}, "n"),
        ({"prompt": "a", "response_fields": "content"}, "response_fields"),
        ({"prompt": "a", "post_sampling_probs": True, "n_probs": 2}, "post_sampling_probs"),
        ({"prompt": "a", "t_max_predict_ms": 5}, "t_max_predict_ms"),
        ({"prompt": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"prompt": "a", "tool_choice": "required"}, "tool_choice"),
        ({"prompt": "a", "functions": [{"name": "f"}]}, "functions"),
        ({"prompt": "a", "text": {"format": {"type": "json_object"}}}, "text"),
        ({"prompt": "a", "thinking_budget_tokens": 0}, "thinking_budget_tokens"),
        ({"prompt": "a", "lora": [{"id": 0, "scale": 1}]}, "lora"),
    ],
)
async def test_what_is_refused(post: Post, fields: dict[str, Any], param: str) -> None:
    status, document = await post("/completion", fields)
    message = document["error"]["message"]
    assert status == 400, document
    assert document["error"]["param"] == param or param in message


async def test_an_answer_is_held_to_a_form(post: Post) -> None:
    """The form reaches the engine; one that cannot be held is refused, and so are two."""
    grammar = 'root ::= "a"{5,5}'
    _, answer = await post("/completion", {"prompt": "a", "grammar": grammar})
    assert answer["generation_settings"]["grammar"] == grammar
    _, answer = await post("/completion", {"prompt": "a", "json_schema": {"const": 5}})
    assert msgspec.json.decode(answer["generation_settings"]["grammar"]) == {"const": 5}
    wanted = {"type": "json_schema", "json_schema": {"schema": {"const": 5}}}
    _, answer = await post("/completion", {"prompt": "a", "response_format": wanted})
    assert msgspec.json.decode(answer["generation_settings"]["grammar"]) == {"const": 5}
    for fields, param in (
        ({"grammar": "root ::= this is (not"}, "grammar"),
        ({"json_schema": {"type": "hiccup"}}, "json_schema"),
        ({"json_schema": {}, "grammar": grammar}, "json_schema"),
    ):
        status, document = await post("/completion", {"prompt": "a", **fields})
        assert status == 400
        assert param in (document["error"]["param"], document["error"]["message"].split()[0])


async def test_a_prompt_that_is_too_long(post: Post, server: LiveServer) -> None:
    for stream in (False, True):
        status, document = await post("/completion", {"prompt": "the quick brown fox " * 300, "stream": stream})
        error = document["error"]
        assert (status, error["type"], error["n_ctx"]) == (400, "exceed_context_size_error", 512)
        assert error["n_prompt_tokens"] > 512


async def test_infill_needs_a_model_with_its_tokens(post: Post) -> None:
    status, document = await post("/infill", {"input_prefix": "a", "input_suffix": "b"})
    assert (status, document["error"]["type"]) == (501, "not_supported_error")
    assert "prefix, suffix and middle" in document["error"]["message"]
    for fields in ({"input_prefix": "a"}, {"input_suffix": "b"}, {"input_prefix": 5, "input_suffix": "b"}):
        assert (await post("/infill", fields))[0] == 400
    for extra in ({}, {"filename": "ok"}, {"filename": 123, "text": "abc"}, {"text": 456}):
        body = {"input_prefix": "a", "input_suffix": "b", "input_extra": [extra]}
        assert (await post("/infill", body))[0] == 400


async def test_infill(tmp_path: Path, sentencepiece_path: Path) -> None:
    """The model reads what llama-server would give it: other files, the prefix, what is written, and the suffix."""
    marks = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>")
    path = write_tiny_gguf(tmp_path / "code.gguf", sentencepiece_path, added=marks)
    body = {"input_prefix": "def f():", "prompt": "return", "input_suffix": "# end", "n_predict": 1}
    extra = {"input_extra": [{"text": "import this", "filename": "zen.py"}]}
    async with live_server(path) as server, aiohttp.ClientSession() as session:
        async with session.post(f"{server.url}/infill", json={**body, **extra}) as response:
            answer = await response.json()
        async with session.post(f"{server.url}/infill", json={**body, "input_extra": [{"text": "x " * 900}]}) as long:
            cut = await long.json()
    other = "<|repo_name|> myproject\n<|file_sep|> zen.py\n import this<|file_sep|> filename\n"
    own = "<s><|fim_prefix|> def f(): return<|fim_suffix|> # end<|fim_middle|>"
    assert answer["prompt"] == other + own
    assert cut["prompt"].endswith(own)
    assert 200 < cut["tokens_evaluated"] <= 256


@pytest.mark.parametrize(
    ("biases", "param"), [(b'[["\xff", 1]]', None), (b"[[1, 1e999]]", "logit_bias[0][1]"), (b'{"\xff": 1}', None)]
)
async def test_biases_that_cannot_be_read(biases: bytes, param: str | None) -> None:
    with pytest.raises(ApiError) as refusal:
        biases_of(biases)
    assert (refusal.value.status, refusal.value.info.param) == (400, param)
