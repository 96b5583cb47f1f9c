"""The server under attack: `slimoe serve` as a child, with what it writes, its memory, and its health watched."""

import contextlib
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.limits.finding import Finding
from slimoe.offload.errors import SlimoeError

START_SECONDS = 300.0
STOP_SECONDS = 30.0
_SAMPLE_SECONDS = 0.02
_TRACEBACK = re.compile(r"Traceback|Fatal Python error|GGML_ASSERT|Task exception was never retrieved")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


class VictimError(SlimoeError):
    """The server under attack did not start, or did not answer a plain question."""


@dataclass(frozen=True, slots=True)
class Victim:
    """A running server: where it listens, its process, and the file that its standard error goes to."""

    url: str
    process: subprocess.Popen[str]
    log_path: Path

    @property
    def place(self) -> tuple[str, int]:
        """The host and port at which the server listens."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    def ask(self, path: str, body: dict[str, Any] | None = None, seconds: float = 60.0) -> dict[str, Any]:
        """The JSON answer to a plain question; raises OSError and ValueError."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=seconds) as response:
            document = json.loads(response.read())
        assert isinstance(document, dict)
        return document

    def greedy(self) -> str:
        """What the model says to a fixed prompt; raises OSError and ValueError."""
        body = {"prompt": "Define the noun river.", "max_tokens": 24, "temperature": 0}
        text = self.ask("/v1/completions", body)["choices"][0]["text"]
        assert isinstance(text, str)
        return text

    def log(self) -> str:
        """What the server has written to standard error until now."""
        return self.log_path.read_text("utf-8", "replace")

    def log_findings(self) -> list[Finding]:
        """Tracebacks and raw control characters in the log, one finding for each kind of line."""
        lines = self.log().splitlines()
        seen: dict[str, str] = {}
        for begin in (n for n, line in enumerate(lines) if _TRACEBACK.search(line)):
            end = next((n for n in range(begin + 1, len(lines)) if lines[n][:1].strip()), len(lines) - 1)
            seen.setdefault(lines[end][:80], " | ".join(lines[max(begin - 1, end - 8) : end + 1]))
        findings = [Finding(f"traceback in the log: {cause}", "log", text) for cause, text in seen.items()]
        raw = next((line for line in lines if _CONTROL.search(line)), None)
        return findings if raw is None else [*findings, Finding("raw control characters in the log", "log", repr(raw))]

    def aftermath(self, expected: str) -> list[Finding]:
        """Findings where the server has ended or no longer gives the answer to `greedy` that it gave before."""
        found = []
        try:
            if self.greedy() != expected:
                found.append(Finding("another answer than before the attack", "after"))
        except (OSError, ValueError) as error:
            found.append(Finding("no answer after the attack", "after", str(error)))
        if self.process.poll() is not None:
            found.append(Finding("the server ended", "after", str(self.process.returncode)))
        return found


@contextmanager
def victim(model: Path | None, *flags: str, wrap: Callable[[Sequence[str]], list[str]] = list) -> Iterator[Victim]:
    """A server of `model`, the demo if None, on a free port; `wrap` turns its command into another, as of a group.

    Raises VictimError when it does not start.
    """
    given = [] if model is None else [str(model)]
    # It ends with this process, whatever ends this one.
    command = [sys.executable, "-m", "slimoe.server.cli", "serve", *given, "--port", "0", "--exit-with-parent", *flags]
    with tempfile.TemporaryDirectory(prefix="slimoe-victim-") as folder:
        log_path = Path(folder) / "log"
        with log_path.open("w") as log:
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                wrap(command), stdin=pipe, stdout=pipe, stderr=log, text=True, start_new_session=True
            )
        try:
            assert process.stdout is not None
            timer = threading.Timer(START_SECONDS, process.kill)
            timer.start()
            line = process.stdout.readline()
            timer.cancel()
            if not line:
                raise VictimError(f"slimoe serve did not start: {log_path.read_text('utf-8', 'replace').strip()}")
            yield Victim(json.loads(line)["url"].rstrip("/"), process, log_path)
        finally:
            stop(process)


def stop(process: subprocess.Popen[str]) -> None:
    """Ends a server, and whatever it leaves behind."""
    if process.poll() is None:
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def tree_bytes(pid: int) -> int:
    """What a process and all its children hold in memory now."""
    total = 0
    with contextlib.suppress(OSError):  # it has ended meanwhile
        total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            total += sum(tree_bytes(int(child)) for child in children.read_text().split())
    return total


@dataclass(slots=True)
class MemoryWatch:
    """The memory of a tree of processes before, at most and after; filled when the watch ends."""

    before: int = 0
    peak: int = 0
    after: int = 0

    def figures(self) -> dict[str, float]:
        """The peak and its growth, and the growth that stays, in MiB."""
        growth = {"peak_growth": self.peak - self.before, "growth": self.after - self.before}
        return {f"{name}_mib": round(n_bytes / 2**20, 1) for name, n_bytes in {"peak": self.peak, **growth}.items()}


@contextmanager
def meanwhile(action: Callable[[], None], pause: float) -> Iterator[None]:
    """Carries out `action` again and again in a thread while the block runs, with `pause` seconds between."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.is_set():
            action()
            ended.wait(pause)

    thread = threading.Thread(target=repeat, name="meanwhile", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def watched_memory(pid: int) -> Iterator[MemoryWatch]:
    """Samples the memory of a process and its children some fifty times a second."""
    watch = MemoryWatch(before=tree_bytes(pid))

    def sample() -> None:
        watch.peak = max(watch.peak, tree_bytes(pid))

    try:
        with meanwhile(sample, _SAMPLE_SECONDS):
            yield watch
    finally:
        watch.after = tree_bytes(pid)
        watch.peak = max(watch.peak, watch.after)


@dataclass(slots=True)
class HealthWatch:
    """What `bench.attacks.health_probe` saw; filled when the watch ends."""

    figures: dict[str, Any] = field(default_factory=dict)

    def findings(self, median_ms: float, max_ms: float) -> list[Finding]:
        """Findings where /health was slower than these milliseconds, in the median or at worst, or not 200."""
        found = []
        if self.figures["median_ms"] > median_ms or self.figures["max_ms"] > max_ms:
            found.append(
                Finding(f"/health slower than {median_ms:g} ms, {max_ms:g} at worst", "health", str(self.figures))
            )
        if self.figures["not_ok"]:
            found.append(Finding("/health not 200", "health", str(self.figures)))
        return found


@contextmanager
def watched_health(url: str) -> Iterator[HealthWatch]:
    """Asks /health from another process meanwhile."""
    watch = HealthWatch()
    command = [sys.executable, "-m", "bench.attacks.health_probe", url]
    probe = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield watch
    finally:
        text = probe.communicate()[0]
    watch.figures = json.loads(text.splitlines()[-1])
