"""llama.cpp's own tests of its server, run against `slimoe serve` with the demo model.

The tests are not shipped: they lie in the source package of llama-cpp-python, in vendor/llama.cpp/tools/server/tests,
beside the templates that they read, and need a Python with pytest, pytest-timeout, requests, openai, numpy, filelock,
wget and prometheus_client (`--python`). They start the server by an executable that takes llama-server's flags. Prints
what passed and failed in each file, the failed ones by reason, and as the last line one JSON document. `--smoke` needs
no tests: it starts a server by that executable and asks it a few things.

    pip download --no-binary llama-cpp-python --no-deps llama-cpp-python==0.3.36
    tar xf llama_cpp_python-0.3.36.tar.gz
    python -m bench.api.llama_server_tests --tests llama_cpp_python-0.3.36/vendor/llama.cpp/tools/server/tests
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click

ROOT = Path(__file__).parents[2]
START_SECONDS = 60.0
NOT_OFFERED = {
    "test_embedding": "embeddings",
    "test_rerank": "reranking",
    "test_vision_api": "images",
    "test_lora": "LoRA adapters",
    "test_mcp_servers": "MCP servers and tools inside the server",
    "test_tools_builtin": "MCP servers and tools inside the server",
    "test_proxy": "a proxy to other hosts",
    "test_speculative": "speculative decoding",
    "test_compat_gcp": "Google's prediction route",
    "test_stream": "streams that are taken up again",
    "test_kv_keep_only_active": "llama.cpp's log lines about its cache",
}
"""What whole files are about that `slimoe serve` does not offer."""
OPEN = "open"
REASONS = (
    (r"post_sampling|post_backend", "probabilities after sampling are not offered"),
    (r"^test_metrics_disabled", "asserts that metrics are off unless asked for"),
    (r"llamacpp:n_decode|llamacpp:spec|llamacpp:n_busy", "asserts llama.cpp's counts of its own calls"),
    (r"^test_metrics_embedding", "embeddings are not offered"),
    (r"^test_server_sleep_read_only", "asserts that memory is told as held while asleep"),
    (r"^test_cors_proxy", "a proxy to other hosts is not offered"),
    (r"^test_local_media|multimodal|_vision_|_image|mmproj", "images are not offered"),
    (r"^test_apply_chat_template", "asserts a built-in template that there is not"),
    (r"This is not a chat template", "asserts that a template without the conversation is used"),
    (r"^test_anthropic_empty_messages", "asserts that no message at all is answered, which Anthropic refuses"),
    (r"^test_responses_stream_with_llama_telemetry", "asserts response.completed for an answer that reached its limit"),
    (r"^test_cors", "asserts that every web page is let in, or told nothing, where ours is refused"),
    (r"^test_router", "asserts models by names of a hub's repositories, not of files, and downloads"),
    (r"^test_access_static_assets", "asserts the file names of llama.cpp's page"),
    (r"^test_server_multiple_addresses", "listening on several addresses is not offered"),
    (r"^test_server_model_aliases", "several names and tags of a model are not offered"),
    (r"assert '__verbose' in", "asserts a flag that tells every prompt; here a request asks for its own"),
    (r"^test_ctx_shift", "asserts another model's text or token counts"),
    (r"^test_infill_with", "the demo model has no tokens for infilling"),
    (r"status_code|return code", OPEN),
    (r"startswith\(.b.\)", "asserts llama.cpp's build number"),
    (r"match_regex|re_content|assert \d+ == \d+$|prompt_n|n_prompt", "asserts another model's text or token counts"),
)
"""Why a test fails, by what its failure says."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one test; `failure` is empty when it passed."""

    file: str
    name: str
    outcome: str
    failure: str = ""

    @property
    def reason(self) -> str:
        """Why it failed, `open` where nothing here says."""
        if self.file in NOT_OFFERED:
            return f"not offered: {NOT_OFFERED[self.file]}"
        said = f"{self.name}\n{self.failure}"
        return next((reason for pattern, reason in REASONS if re.search(pattern, said, re.M)), OPEN)


def shim(folder: Path) -> Path:
    """Writes the executable that takes llama-server's flags."""
    path = folder / "llama-server"
    search = os.pathsep.join(entry for entry in sys.path if entry)
    command = f"exec '{sys.executable}' -m bench.baselines.llama_server_shim \"$@\""
    path.write_text(f"#!/bin/sh\nexport PYTHONPATH='{search}'\n{command}\n")
    path.chmod(0o755)
    return path


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_tests(tests: Path, python: str, files: tuple[str, ...], expression: str, seconds: int) -> list[Result]:
    """Runs the tests and reads what pytest reports."""
    with tempfile.TemporaryDirectory() as name:
        report = Path(name, "report.xml")
        # Without this the tests begin by downloading every model.
        Path(name, "no_downloads.py").write_text(
            "import sys\n\ndef pytest_collection_finish(session):\n"
            "    sys.modules['utils'].ServerPreset.load_all = staticmethod(lambda: None)\n"
        )
        environment = {**os.environ, "LLAMA_SERVER_BIN_PATH": str(shim(Path(name))), "PYTHONPATH": name}
        environment["PORT"] = str(free_port())
        command = [python, "-m", "pytest", "-p", "no_downloads", "-q", "-m", "not slow", f"--junitxml={report}"]
        command += ["-o", "junit_logging=no", f"--timeout={seconds}", "-k", expression]
        command += [str(Path("unit", file)) for file in files] or ["unit"]
        subprocess.run(command, cwd=tests, env=environment, stdout=sys.stderr, check=False)
        return [_result(case) for case in ElementTree.parse(report).iter("testcase")]


def _result(case: ElementTree.Element) -> Result:
    file, name = case.get("classname", "").rpartition(".")[2], case.get("name", "")
    for outcome in ("failure", "error", "skipped"):
        found = case.find(outcome)
        if found is not None:
            return Result(file, name, outcome, f"{found.get('message', '')}\n{_asserted(found.text or '')}")
    return Result(file, name, "passed")


def _asserted(text: str) -> str:
    """The lines of a traceback that say what was asserted and what was found."""
    return "\n".join(line for line in text.splitlines() if line.startswith((">", "E")))


def say_results(results: list[Result]) -> dict[str, Any]:
    """Prints the results by file and by reason; returns them as values."""
    by_file = {file: Counter(one.outcome for one in results if one.file == file) for file in {r.file for r in results}}
    print(f"{'file':28} passed failed skipped")
    for file, counts in sorted(by_file.items()):
        print(f"{file:28} {counts['passed']:6} {counts['failure'] + counts['error']:6} {counts['skipped']:7}")
    failed = [one for one in results if one.outcome in ("failure", "error")]
    reasons = Counter(one.reason for one in failed)
    for reason, count in reasons.most_common():
        print(f"\n{count} failed: {reason}")
        for one in failed:
            if one.reason == reason and not reason.startswith("not offered"):
                print(f"  {one.file}::{one.name}  {one.failure.splitlines()[0][:120] if one.failure.strip() else ''}")
    n_passed = sum(one.outcome == "passed" for one in results)
    return {"n_selected": len(results), "n_passed": n_passed, "n_failed": len(failed), "reasons": dict(reasons)}


def smoke() -> dict[str, Any]:
    """Starts a server by llama-server's flags and asks it what the tests ask first."""
    port = free_port()
    flags = "--temp 0.8 --seed 42 --host 127.0.0.1 --offline --hf-repo ggml-org/test-model-stories260K --no-jinja"
    flags += " --batch-size 32 --alias tinyllama-2 --ctx-size 512 --parallel 2 --n-predict 8 --slots --api-key secret"
    with tempfile.TemporaryDirectory() as name:
        command = [str(shim(Path(name))), "--port", str(port), *flags.split()]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + START_SECONDS
            while _status(port, "/health") != 200:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise click.ClickException("The server did not start.")
                time.sleep(0.05)
            props = json.loads(_ask(port, "/props", key="secret"))
            models = json.loads(_ask(port, "/v1/models", key="secret"))
            return {
                "model": models["data"][0]["id"],
                "total_slots": props["total_slots"],
                "n_ctx": props["n_ctx"],
                "without_key": _status(port, "/v1/models"),
            }
        finally:
            server.terminate()
            server.wait(timeout=10)


def _ask(port: int, path: str, key: str = "") -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"X-Api-Key": key})
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(response.read().decode())


def _status(port: int, path: str) -> int:
    """The status of an answer, 0 where nobody listens."""
    try:
        _ask(port, path)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
    return 200


@click.command()
@click.option("--tests", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Folder of the tests.")
@click.option("--python", default=sys.executable, help="Python that has what the tests need.")
@click.option("--file", "files", multiple=True, help="Only this file of unit/. Repeatable.")
@click.option("-k", "expression", default="", help="Only tests of these words, as pytest takes them.")
@click.option("--timeout", "seconds", default=120, show_default=True, help="Seconds that one test may take.")
@click.option("--smoke", "is_smoke", is_flag=True, help="Only start a server by llama-server's flags.")
def main(
    tests: Path | None, python: str, files: tuple[str, ...], expression: str, seconds: int, is_smoke: bool
) -> None:
    """Run llama.cpp's tests of its server against slimoe serve."""
    if tests is None and not is_smoke:
        raise click.UsageError("Give the tests' folder with --tests, or --smoke.")
    values: dict[str, Any] = {"smoke": smoke()} if is_smoke else {}
    if tests is not None:
        begin = time.monotonic()
        results = run_tests(tests.absolute(), python, files, expression, seconds)
        if not results:
            raise click.UsageError("No test was run: look at --file, which takes names as test_basic.py, and -k.")
        values |= say_results(results)
        values["seconds"] = round(time.monotonic() - begin, 1)
    print(json.dumps(values))


if __name__ == "__main__":
    main()
