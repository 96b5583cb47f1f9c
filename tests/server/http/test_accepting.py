"""Connections beyond what the system gives: few lines in the log, and limits that avoid it."""

import asyncio
import errno
import resource
from typing import Any

import pytest

from slimoe.server.http.accepting import AcceptFailures, connection_limits, open_file_limit


def test_limits_follow_the_descriptors() -> None:
    for n_descriptors, expected in zip((20, 64, 100, 1024, resource.RLIM_INFINITY), (4, 24, 60, 256, 256), strict=True):
        assert connection_limits(None, n_descriptors).n_most == expected
        assert connection_limits(3, n_descriptors).n_most == connection_limits(3, n_descriptors).n_most_each == 3
        assert connection_limits(None, n_descriptors).n_most_each == min(expected, 64)


def test_the_descriptors_are_the_systems() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (20, 64, before[0]):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
        found = open_file_limit()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert found == limit


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
