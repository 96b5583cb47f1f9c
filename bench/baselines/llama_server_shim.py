"""`slimoe serve` under llama-server's flags, so that llama.cpp's own tests of its server can start it.

Every repository of models becomes the demo model. What `slimoe serve` has no word for is left out; a test that needs
it fails by what it then finds. Run as `python -m bench.baselines.llama_server_shim FLAGS`, it becomes the server.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slimoe.server.options.engine_options import DEMO

KEY_VARIABLE = "SLIMOE_SHIM_KEY"
RENAMED = {
    "--host": "--host",
    "--port": "--port",
    "--temp": "--temp",
    "--seed": "--seed",
    "--n-predict": "--n-predict",
    "--parallel": "--parallel",
    "--batch-size": "--batch",
    "--threads": "--threads",
    "--alias": "--alias",
    "--slot-save-path": "--slot-save-path",
    "--models-dir": "--models",
    "--chat-template": "--chat-template",
    "--chat-template-file": "--chat-template",
}
"""Flags with a value that `slimoe serve` has too, by llama-server's name."""
SWITCHES = {"--no-slots": "--no-slots", "--no-ui": "--no-page"}
_LEFT_OUT = """
    --hf-repo --hf-file --model-url --model-draft --models-max --models-preset --ubatch-size --n-gpu-layers --pooling
    --tags -ctk -ctv -fa --grp-attn-n --grp-attn-w --lora --spec-type --spec-draft-n-max --spec-draft-n-min
    --spec-synth-len --spec-synth-rates --reasoning-format --mmproj-url --media-path --cache-ram
    --tools --tools-runtime --mcp-servers-config --mcp-servers-json --cors-origins
"""
LEFT_OUT = frozenset(_LEFT_OUT.split())
"""Flags whose value says nothing here."""


@dataclass(slots=True)
class ServeCommand:
    """The arguments of `slimoe serve`, and the key that goes to it by its environment."""

    model: Path = DEMO
    arguments: list[str] = field(default_factory=list)
    key: str | None = None


def serve_command(flags: Sequence[str]) -> ServeCommand:
    """What llama-server's flags become; the context is divided by the slots, as llama-server does by default."""
    command, n_ctx, n_slots = ServeCommand(), None, 1
    rest = iter(flags)
    for flag in rest:
        if flag in SWITCHES:
            command.arguments.append(SWITCHES[flag])
        elif flag == "--api-key":
            command.key = next(rest)
        elif flag == "--model":
            command.model = Path(next(rest))
        elif flag == "--ctx-size":
            n_ctx = int(next(rest))
        elif flag == "--reasoning":
            # llama-server's `auto` switches reasoning on wherever the template can.
            command.arguments += ["--reasoning", "off" if next(rest) == "off" else "on"]
        elif flag == "--sleep-idle-seconds":
            command.arguments += ["--idle-unload", f"{next(rest)}s"]
        elif flag in RENAMED:
            value = next(rest)
            if flag == "--chat-template" and " " in value:
                value = _template_file(value)
            n_slots = int(value) if flag == "--parallel" else n_slots
            command.arguments += [RENAMED[flag], value]
        elif flag in LEFT_OUT:
            next(rest)
    if n_ctx is not None:
        command.arguments += ["--ctx", str(n_ctx if "--kv-unified" in flags else n_ctx // n_slots)]
    if command.key is not None:
        command.arguments += ["--api-key-env", KEY_VARIABLE]
    return command


def _template_file(text: str) -> str:
    """A file that holds a template which llama-server takes as the flag's value; it outlives this process."""
    with tempfile.NamedTemporaryFile("w", suffix=".jinja", delete=False, encoding="utf-8") as file:
        file.write(text)
    return file.name


def main(flags: Sequence[str]) -> None:
    """Becomes the server."""
    command = serve_command(flags)
    if command.key is not None:
        os.environ[KEY_VARIABLE] = command.key
    arguments = [sys.executable, "-m", "slimoe.server.cli", "serve", str(command.model), *command.arguments]
    os.execv(sys.executable, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
