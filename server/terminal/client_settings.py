"""Settings of other programs with which they use a running server: a table, and what to print or start of it."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Template

KEY_VARIABLE = "SLIMOE_API_KEY"
"""The environment variable in which programs find the key that can be told a variable's name."""
NO_KEY = "none"
"""Sent as the key to a server without one: many clients refuse to start with an empty key."""


@dataclass(frozen=True, slots=True)
class Client:
    """A program that talks to the server: environment, command, or a text for a file or dialog of its own.

    All are templates: `$url` is the server's address, `$base` the same with /v1, `$model` the model's name, `$quoted`
    that name as JSON, TOML and YAML write it, `$n_ctx` the context window, `$key` the key.
    """

    title: str
    env: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    where: str = ""
    text: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server; `key_env` is the environment variable that holds its key, None if it asks for none."""

    url: str
    model: str
    n_ctx: int
    key_env: str | None = None


# Each entry names the page that documents its settings.
CLIENTS: Mapping[str, Client] = {
    # https://github.com/openai/openai-python, "Configuring the HTTP client"
    "openai-python": Client(
        "OpenAI's Python library",
        env={"OPENAI_BASE_URL": "$base", "OPENAI_API_KEY": "$key"},
        where="a program of yours",
        text="from openai import OpenAI\n\nanswer = OpenAI().chat.completions.create(\n"
        '    model=$quoted, messages=[{"role": "user", "content": "Hello"}]\n)\n'
        "print(answer.choices[0].message.content)",
    ),
    # https://github.com/openai/openai-node, "baseURL"
    "openai-js": Client(
        "OpenAI's JavaScript library",
        env={"OPENAI_BASE_URL": "$base", "OPENAI_API_KEY": "$key"},
        where="a program of yours",
        text='import OpenAI from "openai";\n\nconst answer = await new OpenAI().chat.completions.create({\n'
        '  model: $quoted,\n  messages: [{ role: "user", content: "Hello" }],\n});\n'
        "console.log(answer.choices[0].message.content);",
    ),
    # https://github.com/anthropics/anthropic-sdk-python
    "anthropic-python": Client(
        "Anthropic's Python library",
        env={"ANTHROPIC_BASE_URL": "$url", "ANTHROPIC_API_KEY": "$key"},
        where="a program of yours",
        text="from anthropic import Anthropic\n\nanswer = Anthropic().messages.create(\n"
        '    model=$quoted, max_tokens=100, messages=[{"role": "user", "content": "Hello"}]\n)\n'
        "print(answer.content[0].text)",
    ),
    # https://code.claude.com/docs/en/env-vars
    "claude-code": Client(
        "Claude Code",
        env={
            "ANTHROPIC_BASE_URL": "$url",
            "ANTHROPIC_AUTH_TOKEN": "$key",
            "ANTHROPIC_MODEL": "$model",
            "ANTHROPIC_DEFAULT_OPUS_MODEL": "$model",
            "ANTHROPIC_DEFAULT_SONNET_MODEL": "$model",
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": "$model",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        },
        command=("claude",),
    ),
    # https://developers.openai.com/codex/config-advanced, "Custom model providers"
    "codex": Client(
        "Codex",
        env={KEY_VARIABLE: "$key"},
        command=(
            "codex",
            "-c",
            'model_provider="slimoe"',
            "-c",
            'model_providers.slimoe={name="slimoe", base_url="$base", wire_api="responses", '
            f'env_key="{KEY_VARIABLE}"}}',
            "-c",
            "model=$quoted",
            # The server has no tools of its own, and refuses those that it is asked for.
            "-c",
            'web_search="disabled"',
        ),
    ),
    # https://opencode.ai/docs/providers, "Custom provider", and https://opencode.ai/docs/config
    "opencode": Client(
        "OpenCode",
        env={
            KEY_VARIABLE: "$key",
            "OPENCODE_CONFIG_CONTENT": '{"provider": {"slimoe": {"npm": "@ai-sdk/openai-compatible", "name": "slimoe", '
            f'"options": {{"baseURL": "$base", "apiKey": "{{env:{KEY_VARIABLE}}}"}}, "models": {{$quoted: {{}}}}}}}}, '
            '"model": $quoted_slimoe}',
        },
        command=("opencode",),
    ),
    # https://aider.chat/docs/llms/openai-compat.html
    "aider": Client(
        "aider",
        env={"OPENAI_API_BASE": "$base", "OPENAI_API_KEY": "$key"},
        command=("aider", "--model", "openai/$model"),
    ),
    # https://block.github.io/goose/docs/guides/environment-variables and .../getting-started/providers
    "goose": Client(
        "goose",
        env={
            "GOOSE_PROVIDER": "openai",
            "GOOSE_MODEL": "$model",
            "OPENAI_HOST": "$url",
            "OPENAI_BASE_PATH": "v1/chat/completions",
            "OPENAI_API_KEY": "$key",
        },
        command=("goose", "session"),
    ),
    # https://docs.continue.dev/customize/model-providers/top-level/openai
    "continue": Client(
        "Continue",
        where="~/.continue/config.yaml",
        text="name: slimoe\nversion: 0.0.1\nschema: v1\nmodels:\n  - name: $quoted\n    provider: openai\n"
        "    model: $quoted\n    apiBase: $base\n    apiKey: none",
        note="Replace none by the server's key if it has one.",
    ),
    # https://docs.cline.bot/provider-config/openai-compatible
    "cline": Client(
        "Cline",
        where="Cline's settings, API Provider: OpenAI Compatible",
        text="Base URL: $base\nAPI Key: the server's, or none\nModel ID: $model",
    ),
    # https://zed.dev/docs/ai/use-api-access, "OpenAI-compatible endpoints"
    "zed": Client(
        "Zed",
        env={KEY_VARIABLE: "$key"},
        command=("zed",),
        where="Zed's settings.json",
        text='{\n  "language_models": {\n    "openai_compatible": {\n      "slimoe": {\n        "api_url": "$base",\n'
        '        "available_models": [{ "name": $quoted, "display_name": $quoted, "max_tokens": $n_ctx }]\n'
        "      }\n    }\n  }\n}",
    ),
    # https://docs.openwebui.com/getting-started/env-configuration
    "open-webui": Client(
        "Open WebUI",
        env={"OPENAI_API_BASE_URL": "$base", "OPENAI_API_KEY": "$key", "ENABLE_OLLAMA_API": "false"},
        command=("open-webui", "serve", "--host", "127.0.0.1", "--port", "3000"),
        note="It takes these from the environment the first time only; afterwards see its Settings, Connections.",
    ),
    # https://www.jan.ai/docs/desktop/remote-models/custom-endpoint
    "jan": Client(
        "Jan",
        where="Jan's Settings, Model Providers, Add Provider, OpenAI-compatible",
        text="Base URL: $base\nAPI Key: the server's, or none\nModel: $model",
    ),
    # https://llm.datasette.io/en/stable/other-models.html, "OpenAI-compatible models"
    "llm": Client(
        "llm",
        command=("llm", "-m", "slimoe"),
        where='extra-openai-models.yaml in the folder that dirname "$$(llm logs path)" prints',
        text="- model_id: slimoe\n  model_name: $quoted\n  api_base: $base",
        note="For a server with a key: llm keys set slimoe, and api_key_name: slimoe in the file.",
    ),
    # https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/API_guide.md
    "lm-eval": Client(
        "lm-evaluation-harness",
        env={"OPENAI_API_KEY": "$key"},
        command=(
            "lm_eval",
            "--model",
            "local-completions",
            "--model_args",
            "model=$model,base_url=$base/completions,tokenizer_backend=remote,max_length=$n_ctx",
            "--tasks",
        ),
        note="Name tasks behind it. It scores without a model's BOS: see docs/evaluating.md, or use slimoe eval.",
    ),
    # https://curl.se/docs/manpage.html, "--config"
    "curl": Client(
        "curl",
        where="a shell",
        text="${key_pipe}curl -s $base/chat/completions${key_flag} -H 'Content-Type: application/json' \\\n"
        '    -d \'{"model": $quoted_in_shell, "messages": [{"role": "user", "content": "Hello"}]}\'',
    ),
}

CLOUD_VARIABLES = (
    *("OPENAI_API_KEY", "OPENAI_ORGANIZATION", "OPENAI_ORG_ID", "OPENAI_PROJECT", "OPENAI_BASE_URL", "OPENAI_API_BASE"),
    *("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_BASE_URL", "CLAUDE_CODE_OAUTH_TOKEN"),
    *("CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX", "CLAUDE_CODE_USE_FOUNDRY", "AWS_BEARER_TOKEN_BEDROCK"),
    *("AZURE_OPENAI_API_KEY", "AZURE_API_KEY", "GEMINI_API_KEY", "GOOGLE_API_KEY", "GOOGLE_AI_API_KEY"),
    *("MISTRAL_API_KEY", "GROQ_API_KEY", "DEEPSEEK_API_KEY", "OPENROUTER_API_KEY", "TOGETHER_API_KEY", "XAI_API_KEY"),
    *("COHERE_API_KEY", "CO_API_KEY", "FIREWORKS_API_KEY", "PERPLEXITY_API_KEY", "CEREBRAS_API_KEY"),
    *("REPLICATE_API_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENCODE_API_KEY"),
)
"""Variables that lead a program to a paid service, or open one; none is left to a program that is started."""


@dataclass(frozen=True, slots=True)
class ClientSettings(Client):
    """A client's settings for one server; the key stands nowhere, `key_names` are the variables that hold it."""

    key_names: tuple[str, ...] = ()


def settings_for(client: Client, server: Server) -> ClientSettings:
    """What a client needs for this server."""
    quoted = json.dumps(server.model)
    values = {
        "url": server.url,
        "base": f"{server.url}/v1",
        "model": server.model,
        "quoted": quoted,
        "quoted_in_shell": quoted.replace("'", "'\\''"),
        "quoted_slimoe": json.dumps(f"slimoe/{server.model}"),
        "n_ctx": str(server.n_ctx),
        "key": NO_KEY,
        "key_pipe": "",
        "key_flag": "",
    }
    if server.key_env is not None:
        # Through a pipe, for everybody sees the arguments of a running command.
        header = "printf 'header = \"Authorization: Bearer %s\"\\n'"
        values |= {"key_pipe": f'{header} "${server.key_env}" | ', "key_flag": " --config -"}

    def filled(text: str) -> str:
        return Template(text).substitute(values)

    return ClientSettings(
        client.title,
        {name: filled(value) for name, value in client.env.items()},
        tuple(map(filled, client.command)),
        filled(client.where),
        filled(client.text),
        client.note,
        tuple(name for name, value in client.env.items() if value == "$key" and server.key_env is not None),
    )


def shell_lines(settings: ClientSettings, server: Server) -> list[str]:
    """The settings as lines for a shell, with comments; the key is taken from its variable."""
    lines = [f"# {settings.title}"]
    for name, value in settings.env.items():
        shown = f'"${server.key_env}"' if name in settings.key_names else shlex.quote(value)
        lines.append(f"export {name}={shown}")
    if settings.text:
        lines += [f"# In {settings.where}:", *settings.text.split("\n")]
    if settings.command:
        lines.append(shlex.join(settings.command))
    return [*lines, f"# {settings.note}"] if settings.note else lines


def child_environment(settings: ClientSettings, key: str | None, own: Mapping[str, str]) -> dict[str, str]:
    """The environment to start the client with: `own`, without what leads to a paid service, and the settings."""
    kept = {name: value for name, value in own.items() if name not in CLOUD_VARIABLES}
    keys = {} if key is None else dict.fromkeys(settings.key_names, key)
    return {**kept, **settings.env, **keys}
