"""schemathesis against `slimoe serve` with the demo model, by the server's own /openapi.json.

Every endpoint gets values that its description allows, and values that it does not. Asked of each answer: that the
server did not fail, that status, type and document are those described, and that it came in time. Prints what was
found, and as the last line one JSON document. `--smoke` tries little, and without schemathesis only that the server
describes itself. schemathesis goes into an environment of its own:

    python -m venv fuzz && fuzz/bin/pip install schemathesis
    python -m bench.api.fuzz --st fuzz/bin/st
"""

import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click

from bench.limits.victim import victim

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
)
CONFIGURATION = """
[checks]
not_a_server_error.expected-statuses = ["2xx", "4xx", 501, 503]
"""
"""What is not offered has status 501, and 503 is told to who asks for a free slot."""
FLAGS = ("--ctx", "192", "--parallel", "2", "--n-predict", "4", "--queue", "256")
"""Short answers, and room for all that is asked."""
NEVER_ENDS = "/v1/events"
REQUEST_SECONDS = 60
HOW = (
    "schemathesis is not installed: pip install schemathesis, into an environment of its own, and name its st by --st."
)


def fuzz(st: str, url: str, n_examples: int, seconds: int, seed: int) -> dict[str, Any]:
    """Runs schemathesis and returns how many cases there were, and what failed, by check and operation."""
    with tempfile.TemporaryDirectory() as name:
        configuration, report = Path(name, "schemathesis.toml"), Path(name, "report.xml")
        configuration.write_text(CONFIGURATION)
        command = [st, "--config-file", str(configuration), "run", f"{url}/openapi.json", "--checks", ",".join(CHECKS)]
        command += ["--phases", "coverage,fuzzing", "--max-examples", str(n_examples), "--seed", str(seed)]
        command += ["--max-time", str(seconds), "--request-timeout", str(REQUEST_SECONDS), "--workers", "2"]
        command += ["--exclude-path", NEVER_ENDS, "--continue-on-failure", "--no-shrink", "--no-color"]
        command += ["--report", "junit", "--report-junit-path", str(report)]
        done = subprocess.run(command, cwd=name, capture_output=True, text=True, check=False)
        print(done.stdout)
        if not report.exists():
            raise click.ClickException(f"schemathesis did not run: {done.stderr[-1000:] or done.stdout[-1000:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {case.get("name", ""): _messages(case) for case in cases if case.find("failure") is not None}
    n_cases = re.search(r"(\d+) generated", done.stdout)
    return {"operations": len(cases), "cases": int(n_cases[1]) if n_cases else 0, "failed": failed}


def _messages(case: ElementTree.Element) -> list[str]:
    """What an operation's failures say, each once, without the requests."""
    found = [failure.get("message") or failure.text or "" for failure in case.iter("failure")]
    return sorted({" ".join(message.split())[:200] for message in found if message.strip()})


@click.command()
@click.option("--st", default="st", show_default=True, help="The schemathesis command.")
@click.option("--examples", "n_examples", default=100, show_default=True, help="Most cases for each operation.")
@click.option("--seconds", default=600, show_default=True, help="Most seconds in all.")
@click.option("--seed", default=1, show_default=True, help="Seed of the cases.")
@click.option("--smoke", is_flag=True, help="Try little.")
def main(st: str, n_examples: int, seconds: int, seed: int, smoke: bool) -> None:
    """Fuzz the server by its own description."""
    found = shutil.which(st)
    if found is None and not smoke:
        raise click.ClickException(HOW)
    begin = time.monotonic()
    with victim(None, *FLAGS) as server:
        values: dict[str, Any] = {"described": sum(map(len, server.ask("/openapi.json")["paths"].values()))}
        if found is None:
            print(HOW)
        else:
            values |= fuzz(found, server.url, 2 if smoke else n_examples, 20 if smoke else seconds, seed)
        values["health_afterwards"] = server.ask("/health")["status"]
        with urllib.request.urlopen(f"{server.url}/slots", timeout=30) as response:
            values["slots_busy_afterwards"] = sum(slot["is_processing"] for slot in json.load(response))
        values["found_in_log"] = [finding.kind for finding in server.log_findings()]
    values["seconds"] = round(time.monotonic() - begin, 1)
    print(json.dumps(values))


if __name__ == "__main__":
    main()
