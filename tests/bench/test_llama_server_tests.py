"""What llama-server's flags become, and why a test of llama.cpp's fails; a server is started by the smoke mode."""

from pathlib import Path

import pytest

from bench.api.llama_server_tests import OPEN, Result
from bench.baselines.llama_server_shim import serve_command
from slimoe.server.options.engine_options import DEMO


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ("--ctx-size 512 --parallel 2", "--parallel 2 --ctx 256"),
        ("--ctx-size 512", "--ctx 512"),
        ("--ctx-size 256 --parallel 4 --kv-unified", "--parallel 4 --ctx 256"),
        ("--hf-repo a/b --hf-file c.gguf --offline --jinja --temp 0.8 --seed 42", "--temp 0.8 --seed 42"),
        ("--no-slots --no-ui --batch-size 32 --ubatch-size 8", "--no-slots --no-page --batch 32"),
        ("--api-key sk-1 --port 8080", "--port 8080 --api-key-env SLIMOE_SHIM_KEY"),
        ("--reasoning auto", "--reasoning on"),
        ("--reasoning off", "--reasoning off"),
        ("--sleep-idle-seconds 1", "--idle-unload 1s"),
        ("--slots --cont-batching --verbose -fa on --lora x.gguf", ""),
    ],
)
def test_flags_of_llama_server(flags: str, arguments: str) -> None:
    command = serve_command(flags.split())
    assert command.arguments == arguments.split()
    assert command.model == DEMO
    assert command.key == ("sk-1" if "sk-1" in flags else None)


def test_a_model_is_taken_by_its_path() -> None:
    assert serve_command(["--model", "x.gguf"]).model == Path("x.gguf")


@pytest.mark.parametrize(
    ("file", "failure", "reason"),
    [
        ("test_embedding", "assert 501 == 200", "not offered: embeddings"),
        ("test_completion", "assert 10 == 18\n>   assert x == n", "asserts another model's text or token counts"),
        (
            "test_completion",
            "assert False\n>  assert match_regex(a, b)",
            "asserts another model's text or token counts",
        ),
        ("test_basic", "assert 501 == 200\n>   assert res.status_code == 200", OPEN),
        ("test_basic", "KeyError: 'aliases'", OPEN),
    ],
)
def test_why_a_test_fails(file: str, failure: str, reason: str) -> None:
    assert Result(file, "test_it", "failure", failure).reason == reason
