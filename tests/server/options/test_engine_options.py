"""Every flag of the engine reaches the engine, from every command and through the server's pipe."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimoe.offload.cache import policy
from slimoe.offload.engine import Engine
from slimoe.offload.errors import UsageError
from slimoe.offload.memory import kv_cache
from slimoe.offload.plan.engine_config import EngineConfig, setting_names
from slimoe.server.cli import run
from slimoe.server.commands import plan, serve
from slimoe.server.messages import Open, decode_to_engine, pack
from slimoe.server.offer import Offer
from slimoe.server.options import engine_options
from slimoe.server.options.serving_memory import running_bytes, serving_bytes
from slimoe.server.process import engine_process
from tests.models.configs import engine_config, reconfigured

FLAGS = [
    "--ctx",
    "64",
    "--batch",
    "32",
    "--parallel",
    "3",
    "--threads",
    "2",
    "--kv-type",
    "q8_0",
    "--weights",
    "copied",
    "--ram",
    "50%",
    "--vram",
    "1GiB,2GB",
    "--vram",
    "auto",
    "--device",
    "CUDA0,RPC0",
    "--rpc",
    "127.0.0.1:50052",
    "--rpc",
    "10.0.0.7:2,host:3",
    "--policy",
    "lfu",
    "--max-kl",
    "0.25",
    "--lossy",
    "skip:0.1",
    "--no-direct-io",
]
TRACE = ["--trace", "router.trace"]
"""A flag of those commands alone that compute with the model."""
PROMPT_FLAGS = ["--prompt-cache", "kept", "--prompt-cache-size", "5GB"]
EXPECTED = engine_config(
    Path("some.gguf"),
    n_ctx=64,
    n_batch=32,
    n_parallel=3,
    n_threads=2,
    kv_type="q8_0",
    weights="copied",
    ram="50%",
    vram=("1GiB", "2GB", "auto"),
    device="CUDA0,RPC0",
    rpc=("127.0.0.1:50052", "10.0.0.7:2", "host:3"),
    trace=Path("router.trace"),
    policy="lfu",
    max_kl=0.25,
    lossy="skip:0.1",
    direct_io=False,
    prompt_cache=Path("kept"),
    prompt_cache_size=5 * 10**9,
    reserve_bytes=running_bytes(),
    draft="auto",
)
DRAFT = ["--draft", "auto"]
"""A flag of those commands alone that write answers, and of their plan."""


class _SeenError(UsageError):
    """Ends a command once its configuration has been seen."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[EngineConfig]:
    """The configurations that engines are opened or planned with."""
    configs: list[EngineConfig] = []

    def see(config: EngineConfig, on_progress: Callable[[int, int], None] | None = None) -> Engine:
        configs.append(config)
        raise _SeenError("Seen.")

    monkeypatch.setattr(Engine, "open", see)
    monkeypatch.setattr(plan, "plan_each", lambda configs: see(configs[0]))
    return configs


def through_the_pipe(config: EngineConfig) -> None:
    message = decode_to_engine(pack(Open(config))[4:])
    assert isinstance(message, Open)
    with pytest.raises(_SeenError):
        engine_process.open_engine(message.config, lambda done, total: None)


def setting(config: EngineConfig, name: str) -> Any:
    groups = (config, config.context, config.memory, config.devices, config.loss, config.prompts)
    (group,) = (group for group in groups if hasattr(group, name))
    return getattr(group, name)


def test_values_differ_from_the_defaults() -> None:
    """Or else this file would show nothing."""
    defaults = EngineConfig(Path("other.gguf"))
    ours = {"reserve_bytes", "held_bytes", "has_all_logits"}
    alike = [name for name in setting_names() if setting(EXPECTED, name) == setting(defaults, name)]
    assert set(alike) <= ours


@pytest.mark.parametrize("command", [["run", "-p", "x", *DRAFT, *TRACE], ["plan", *DRAFT]], ids=lambda words: words[0])
def test_flags_of_a_command_reach_its_engine(command: list[str], seen: list[EngineConfig]) -> None:
    assert run([command[0], "some.gguf", *command[1:], *FLAGS, *PROMPT_FLAGS]) == 2
    assert seen == [EXPECTED if TRACE[0] in command else reconfigured(EXPECTED, trace=None)]


def test_prompts_that_are_timed_are_computed(seen: list[EngineConfig]) -> None:
    assert run(["bench", "some.gguf", *FLAGS, *TRACE]) == 2
    unkept = EngineConfig(Path()).prompts
    assert seen == [dataclasses.replace(EXPECTED, prompts=unkept, draft="none")]
    assert run(["bench", "some.gguf", *PROMPT_FLAGS]) == 2
    assert len(seen) == 1


def test_flags_of_serve_reach_its_engine(
    seen: list[EngineConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    async def instead(config: object, offer: Offer, own: object) -> None:
        through_the_pipe(offer.engine)

    monkeypatch.setattr(serve, "serve_models", instead)
    assert run(["serve", "some.gguf", *FLAGS, *TRACE, *PROMPT_FLAGS, *DRAFT]) == 0
    (config,) = seen
    assert config.model == Path.cwd() / "some.gguf"
    assert config.trace == Path.cwd() / "router.trace"
    assert config.prompts.prompt_cache == Path.cwd() / "kept"
    assert (Path.cwd() / "kept").stat().st_mode & 0o777 == 0o700
    assert config.memory.reserve_bytes == serving_bytes()
    same: dict[str, Any] = {
        "model": EXPECTED.model,
        "trace": EXPECTED.trace,
        "prompt_cache": EXPECTED.prompts.prompt_cache,
        "reserve_bytes": EXPECTED.memory.reserve_bytes,
    }
    assert reconfigured(config, **same) == EXPECTED


def test_what_is_not_said_is_the_engines_to_choose(seen: list[EngineConfig]) -> None:
    config = EngineConfig(Path("/some.gguf"))
    assert run(["run", "/some.gguf", "-p", "x"]) == 2
    through_the_pipe(config)
    assert [reconfigured(one, reserve_bytes=0) for one in seen] == [config, config]


def test_choices_are_those_of_the_engine() -> None:
    """Flags name them once more, so that commands need not load the engine to know them."""
    assert set(engine_options.KV_TYPES) == set(kv_cache.KV_TYPES)
    assert set(engine_options.POLICIES) == set(policy.POLICIES)


def test_the_policy_that_had_another_name(seen: list[EngineConfig]) -> None:
    assert run(["run", "some.gguf", "-p", "x", "--policy", "heat"]) == 2
    assert [config.memory.policy for config in seen] == ["lfu-decay"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--policy", "magic"],
        ["--max-kl", "-1"],
        ["--max-kl", "much"],
        ["--vram", "1GiB,"],
        ["--rpc", ","],
        ["--trace", "."],
        ["--prompt-cache-size", "0"],
        ["--prompt-cache-size", "50%"],
        ["--prompt-cache", __file__],
    ],
    ids=" ".join,
)
def test_flags_that_make_no_sense(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", "some.gguf", "-p", "x", *flags]) == 2
    assert flags[0] in capsys.readouterr().err
