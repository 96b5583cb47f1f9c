"""`slimoe launch`: what it prints, and what it starts, for clients of a running server."""

import asyncio
import json
import os
import shlex
import stat
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from string import Template

import pytest
import yaml

from slimoe.server.cli import run
from slimoe.server.http.access import AccessRules
from slimoe.server.terminal.client_settings import (
    CLIENTS,
    CLOUD_VARIABLES,
    KEY_VARIABLE,
    Server,
    child_environment,
    settings_for,
    shell_lines,
)
from tests.models.live_server import DEADLINE, LiveOptions, LiveServer, live_server, slimoe

ODD = 'o\'d "name": $(touch x) `y`'
KEY = "a key of ours"
in_the_servers_loop = pytest.mark.asyncio(loop_scope="module")


def server(key_env: str | None = None, model: str = ODD) -> Server:
    return Server("http://127.0.0.1:9", model, 2048, key_env)


@pytest.mark.parametrize("name", CLIENTS)
def test_every_client_has_settings_that_hold_no_key(name: str) -> None:
    settings = settings_for(CLIENTS[name], server("MY_KEY"))
    assert settings.command or settings.text or settings.env
    everything = "\n".join([*settings.env.values(), *settings.command, settings.text])
    assert "http://127.0.0.1:9" in everything or name == "llm"
    assert settings_for(CLIENTS[name], server()).key_names == ()
    environment = child_environment(settings, KEY, {"PATH": "/bin", **dict.fromkeys(CLOUD_VARIABLES, "sk-of-a-cloud")})
    assert "sk-of-a-cloud" not in environment.values()
    assert {value for value in environment.values() if KEY in value} == ({KEY} if settings.key_names else set())
    assert environment["PATH"] == "/bin"


def evaluated(lines: list[str], names: list[str], environment: Mapping[str, str]) -> list[str]:
    """What a shell that is given the lines then holds in variables."""
    exports = [line for line in lines if line.startswith("export ")]
    script = "\n".join([*exports, *(f'printf "%s\\0" "${name}"' for name in names)])
    done = subprocess.run(["sh", "-c", script], env=dict(environment), capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("name", CLIENTS)
def test_a_shell_reads_the_lines_as_they_are_meant(name: str) -> None:
    asked = server("MY_KEY")
    settings = settings_for(CLIENTS[name], asked)
    lines = shell_lines(settings, asked)
    assert KEY not in "\n".join(lines)
    found = evaluated(lines, list(settings.env), {"MY_KEY": KEY})
    wanted = child_environment(settings, KEY, {})
    assert dict(zip(settings.env, found, strict=True)) == wanted
    if settings.command:
        assert shlex.split(next(line for line in lines if line.startswith(settings.command[0]))) == list(
            settings.command
        )


def test_texts_are_what_their_readers_take() -> None:
    """With the name of a model that would end a string anywhere."""
    found = {name: settings_for(client, server()) for name, client in CLIENTS.items()}
    zed = json.loads(found["zed"].text)["language_models"]["openai_compatible"]["slimoe"]
    assert zed["available_models"][0]["name"] == ODD
    assert yaml.safe_load(found["continue"].text)["models"][0]["model"] == ODD
    assert yaml.safe_load(found["llm"].text)[0]["model_name"] == ODD
    opencode = json.loads(found["opencode"].env["OPENCODE_CONFIG_CONTENT"])
    assert opencode["model"] == f"slimoe/{ODD}"
    assert opencode["provider"]["slimoe"]["options"]["apiKey"] == f"{{env:{KEY_VARIABLE}}}"
    assert list(opencode["provider"]["slimoe"]["models"]) == [ODD]
    codex = tomllib.loads("\n".join(found["codex"].command[2::2]))
    assert (codex["model"], codex["model_provider"]) == (ODD, "slimoe")
    assert codex["model_providers"]["slimoe"]["wire_api"] == "responses"
    assert codex["web_search"] == "disabled"
    assert json.loads(shlex.split(found["curl"].text.replace("\\\n", " "))[-1])["model"] == ODD


def test_templates_name_known_values_only() -> None:
    known = settings_for(CLIENTS["curl"], server("K"))
    assert known.text.startswith("printf ")
    for client in CLIENTS.values():
        for text in (*client.env.values(), *client.command, client.where, client.text):
            assert Template(text).is_valid()


# --- with a server -----------------------------------------------------------------------------------------


async def launched(*arguments: str) -> int:
    return await asyncio.to_thread(run, ["launch", *arguments])


@in_the_servers_loop
async def test_the_model_is_the_servers(server: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert await launched("aider", "--url", f"{server.url}/v1", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["env"] == {"OPENAI_API_BASE": f"{server.url}/v1", "OPENAI_API_KEY": "none"}
    assert told["command"] == ["aider", "--model", "openai/tiny"]
    assert await launched("lm-eval", "--url", server.url) == 0
    out = capsys.readouterr().out
    assert f"base_url={server.url}/v1/completions" in out
    assert await launched("aider", "--url", server.url, "--model", "tinny") == 2
    assert "Did you mean tiny?" in capsys.readouterr().err


@in_the_servers_loop
async def test_a_server_with_a_key_asks_for_it(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    async with live_server(model, LiveOptions(rules=AccessRules(KEY))) as locked:
        assert await launched("curl", "--url", locked.url) == 2
        assert "--key-env" in capsys.readouterr().err
        assert await launched("curl", "--url", locked.url, "--key-env", "NOT_THERE") == 2
        assert "NOT_THERE holds no key" in capsys.readouterr().err
        assert await launched("curl", "--url", locked.url, "--key-env", "MY_KEY") == 0
        out = capsys.readouterr().out
        assert KEY not in out
        command = "\n".join(line for line in out.splitlines() if not line.startswith("#"))
        done = await asyncio.to_thread(
            subprocess.run, ["sh", "-c", command], capture_output=True, text=True, timeout=DEADLINE, check=True
        )
    assert json.loads(done.stdout)["choices"][0]["finish_reason"]


@in_the_servers_loop
async def test_a_client_is_started_without_keys_of_clouds(server: LiveServer, tmp_path: Path) -> None:
    program = tmp_path / "claude"
    program.write_text('#!/bin/sh\nenv\necho "arguments: $*"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OPENAI_API_KEY": "sk-of-a-cloud"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        process = slimoe("launch", "claude-code", "--url", server.url, "--run", "--", "-p", "hi")
    out, err = await asyncio.to_thread(process.communicate, None, DEADLINE)
    assert process.returncode == 0, err
    assert "sk-of-a-cloud" not in out
    assert f"ANTHROPIC_BASE_URL={server.url}\n" in out
    assert "ANTHROPIC_MODEL=tiny\n" in out
    assert out.endswith("arguments: -p hi\n")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["cluade-code"], 2, "Did you mean claude-code?"),
        (["word"], 2, "Known: openai-python"),
        (["curl", "--url", "http://127.0.0.1:9"], 1, "Start one with slimoe serve"),
        (["curl", "--url", "here"], 2, "http://127.0.0.1:8080"),
        (["curl", "--url", "http://127.0.0.1:x"], 1, "No server answers"),
        (["curl", "hello"], 2, "Add --run"),
    ],
)
def test_mistakes(arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["launch", *arguments]) == status
    output = capsys.readouterr()
    assert output.out == ""
    assert words in output.err


@in_the_servers_loop
async def test_what_cannot_be_started_says_so(server: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert await launched("cline", "--url", server.url, "--run") == 2
    assert "cannot be started from here" in capsys.readouterr().err


def test_without_a_client_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["launch"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(CLIENTS)
