"""Clients that others wrote, against the server: what works with each of them.

Each client has an environment of its own below --environments, which `--install` makes (about 2 GB for all). The server
serves the demo model, whose answers are nonsense: what counts is that answers have the form that was asked for.

    python -m bench.api.client_matrix --environments ~/clients --install
"""

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bench.limits import machine
from bench.limits.victim import victim
from slimoe.offload.errors import SlimoeError

ROOT = Path(__file__).parents[2]
HERE = ROOT / "bench" / "clients"
COLUMNS = ("chat", "stream", "tools", "schema", "usage", "errors", "cancel")
SECONDS = 180
_NODE = "node"


class MissingClientError(SlimoeError):
    """A client's environment is not there."""


@dataclass(frozen=True, slots=True)
class Client:
    """A client of `package`, tried by `script`, whose environment holds `installed`."""

    package: str
    script: str
    environment: str
    installed: tuple[str, ...]


CLIENTS = (
    Client("openai", "openai_python", "openai", ("openai",)),
    Client("anthropic", "anthropic_python", "anthropic", ("anthropic",)),
    Client("litellm", "litellm_python", "litellm", ("litellm",)),
    Client("langchain-openai", "langchain_python", "langchain", ("langchain-openai",)),
    Client("instructor", "instructor_python", "instructor", ("instructor",)),
    Client("pydantic-ai", "pydantic_ai_python", "pydantic_ai", ("pydantic-ai-slim[openai]",)),
    Client("ollama", "ollama_python", "ollama", ("ollama",)),
    Client("lm-eval", "lm_eval_python", "lm_eval", ("lm-eval[api]",)),
    Client("openai-js", "openai_js.mjs", _NODE, ()),
    Client("ai-sdk", "ai_sdk.mjs", _NODE, ()),
    Client("anthropic-js", "anthropic_js.mjs", _NODE, ()),
)


def install(client: Client, environments: Path) -> None:
    """Makes the client's environment; raises CalledProcessError."""
    place = environments / client.environment
    if client.environment == _NODE:
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / "package.json", place)
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent"], cwd=place, check=True)
    else:
        venv.create(place, with_pip=True)
        subprocess.run([str(place / "bin" / "pip"), "install", "--quiet", *client.installed], check=True)


def command_of(client: Client, environments: Path) -> list[str]:
    """What runs the client's script; raises MissingClientError."""
    place = environments / client.environment
    if client.environment == _NODE:
        if not (place / "node_modules").is_dir():
            raise MissingClientError(f"{client.package} is not installed in {place}. Add --install.")
        # Modules are searched from where a script lies.
        for script in HERE.glob("*.mjs"):
            shutil.copy(script, place)
        return ["node", str(place / client.script)]
    python = place / "bin" / "python"
    if not python.exists():
        raise MissingClientError(f"{client.package} is not installed in {place}. Add --install.")
    return [str(python), "-m", f"bench.clients.{client.script}"]


def tried(client: Client, environments: Path, url: str) -> dict[str, Any]:
    """What came of every cell, as the client's script reports it."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    try:
        done = subprocess.run(
            [*command_of(client, environments), url],
            cwd=ROOT,
            env={**kept, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"client": client.package, "version": "", "cells": {"start": f"not done after {SECONDS} seconds"}}
    lines = done.stdout.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        end = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        return {"client": client.package, "version": "", "cells": {"start": end[0][:300]}}
    found: dict[str, Any] = json.loads(lines[-1])
    return {**found, "client": client.package}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The matrix in Markdown."""
    lines = ["| client | " + " | ".join(COLUMNS) + " | besides |", "| --- |" + " :-: |" * len(COLUMNS) + " --- |"]
    for row in rows:
        cells = row["cells"]
        marks = ["yes" if cells.get(name) == "works" else "no" if name in cells else "" for name in COLUMNS]
        others = [f"{name}{'' if cells[name] == 'works' else ' (no)'}" for name in cells if name not in COLUMNS]
        lines.append(f"| {row['client']} {row['version']} | " + " | ".join(marks) + f" | {', '.join(others)} |")
    return "\n".join(lines)


@click.command()
@click.option("--environments", type=click.Path(path_type=Path), default=Path("clients"), show_default=True)
@click.option("--install", "installs", is_flag=True, help="Make the clients' environments first.")
@click.option("--client", "names", multiple=True, type=click.Choice([c.package for c in CLIENTS]), help="Only this.")
@click.option("--smoke", is_flag=True, help="No client but this interpreter's own openai, if it has one.")
def main(environments: Path, installs: bool, names: tuple[str, ...], smoke: bool) -> None:
    """Try every client and print the matrix."""
    environments = environments.absolute()
    chosen = [client for client in CLIENTS if not names or client.package in names]
    if smoke:
        environments, chosen = Path(sys.prefix).parent, [Client("openai", "openai_python", Path(sys.prefix).name, ())]
    if installs:
        made = set()
        for client in chosen:
            if client.environment not in made:
                click.echo(f"installing {client.package}", err=True)
                install(client, environments)
                made.add(client.environment)
    rows = []
    with victim(None, "--parallel", "2") as server:
        for client in chosen:
            rows.append(tried(client, environments, server.url))
            for name, outcome in rows[-1]["cells"].items():
                if outcome != "works":
                    click.echo(f"{client.package}: {name}: {outcome}", err=True)
    click.echo(table(rows))
    n_cells = sum(len(row["cells"]) for row in rows)
    n_working = sum(outcome == "works" for row in rows for outcome in row["cells"].values())
    click.echo(json.dumps({"n_working": n_working, "n_cells": n_cells, "rows": rows, **machine.describe()}))


if __name__ == "__main__":
    main()
