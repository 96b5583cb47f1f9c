"""Clients for JavaScript that others wrote work with the server, where node is installed; test_bench.py has openai."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.api.client_matrix import CLIENTS, table

ROOT = Path(__file__).parents[2]


def outcome(*arguments: str) -> dict[str, Any]:
    """The last line of the bench as an object, with what went wrong in its cells."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.api.client_matrix", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if "npm" in done.stderr and "registry" in done.stderr:
        pytest.skip(f"openai-js, ai-sdk, anthropic-js: npm cannot install them ({done.stderr.strip()[:200]})")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["n_working"] == found["n_cells"] > 0, done.stderr
    return found


def test_openai_js_ai_sdk_and_anthropic_js_work(tmp_path: Path) -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("openai-js, ai-sdk, anthropic-js: node and npm are not installed")
    names = [client.package for client in CLIENTS if client.environment == "node"]
    chosen = [argument for name in names for argument in ("--client", name)]
    rows = outcome("--environments", str(tmp_path), "--install", *chosen)["rows"]
    assert [row["client"] for row in rows] == names


def test_the_table_tells_what_works_and_what_was_not_tried() -> None:
    row = {"client": "x", "version": "1", "cells": {"chat": "works", "stream": "Error: no", "extra": "works"}}
    assert table([row]).splitlines()[-1] == "| x 1 | yes | no |  |  |  |  |  | extra |"
