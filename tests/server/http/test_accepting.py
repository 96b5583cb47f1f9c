"""Connections beyond what the system gives: few lines in the log, and limits that avoid it."""

import asyncio
import errno
import resource
from typing import Any

import pytest

from slimoe.server.http.accepting import AcceptFailures, connection_limits


def test_limits_follow_the_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {n: n for n in (20, 64, 100, 1024, resource.RLIM_INFINITY)}
    for n_descriptors, expected in zip(found, (4, 24, 60, 256, 256), strict=True):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, n=n_descriptors: (n, n))
        assert connection_limits(None).n_most == expected
        assert connection_limits(3).n_most == connection_limits(3).n_most_each == 3
        assert connection_limits(None).n_most_each == min(expected, 64)


async def test_failures_to_accept_are_told_once_a_minute(capsys: pytest.CaptureFixture[str], caplog: Any) -> None:
    loop, now = asyncio.get_running_loop(), [0.0]
    failures = AcceptFailures(lambda: now[0])
    error = OSError(errno.EMFILE, "Too many open files")
    for _ in range(1000):
        failures(loop, {"message": "socket.accept() out of system resource", "exception": error})
        now[0] += 0.1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("Too many open files" in line and "--max-connections" in line for line in lines)
    assert caplog.records == []
    failures(loop, {"message": "something else", "exception": ZeroDivisionError()})
    assert len(caplog.records) == 1
