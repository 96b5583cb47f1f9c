"""Memory limits for benches: control groups of both versions, and the page cache."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.limits.cgroup import (
    V1,
    V2,
    MemoryGroup,
    NoControlGroupError,
    StillCachedError,
    cached_bytes,
    drop_cached,
    memory_group,
    smallest_check,
)

ROOT = Path(__file__).parents[2]


def make_group(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_version_2_is_limited_and_read(tmp_path: Path) -> None:
    events = "low 0\nhigh 0\nmax 17\noom 2\noom_kill 1\noom_group_kill 0\n"
    path = make_group(
        tmp_path / "g", memory__max="max", memory__swap__max="max", memory__peak="99", memory__events=events
    )
    usage = MemoryGroup(path, V2, 1000).usage()
    assert (path / "memory.max").read_text() == "1000"
    assert (path / "memory.swap.max").read_text() == "0"
    assert (usage.limit_bytes, usage.peak_bytes, usage.n_limit_hits, usage.n_oom_kills) == (1000, 99, 17, 1)


def test_version_1_is_limited_and_read(tmp_path: Path) -> None:
    path = make_group(
        tmp_path / "g",
        memory__limit_in_bytes="9223372036854771712",
        memory__memsw__limit_in_bytes="9223372036854771712",
        memory__max_usage_in_bytes="99",
        memory__failcnt="3",
        memory__memsw__failcnt="14",
        memory__oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
    )
    usage = MemoryGroup(path, V1, 1000).usage()
    assert (path / "memory.limit_in_bytes").read_text() == "1000"
    assert (path / "memory.memsw.limit_in_bytes").read_text() == "1000"
    assert (usage.peak_bytes, usage.n_limit_hits, usage.n_oom_kills) == (99, 17, 1)


@pytest.mark.parametrize("membership", ["0::/user.slice/me\n", "4:memory:/jobs/one\n1:name=systemd:/\n", "", None])
def test_where_nothing_can_be_limited_a_sentence_says_so(tmp_path: Path, membership: str | None) -> None:
    """A plain directory in the control groups' place takes new groups, but they have no limit."""
    mount, own = tmp_path / "cgroup", tmp_path / "self"
    for name in ("user.slice/me", "memory/jobs/one"):
        (mount / name).mkdir(parents=True)
    if membership is not None:
        own.write_text(membership)
    before = sorted(mount.rglob("*"))
    with pytest.raises(NoControlGroupError, match="No memory limit can be set here"), memory_group(1, mount, own):
        pass
    assert sorted(mount.rglob("*")) == before


def test_a_limit_holds_or_is_refused() -> None:
    """On a machine that lets us, the command beyond the limit is killed and the one within it is not."""
    seen = smallest_check()
    if seen["can_limit"]:
        within, beyond = seen["within"], seen["beyond"]
        assert isinstance(within, dict)
        assert isinstance(beyond, dict)
        assert (within["exit_code"], within["n_oom_kills"]) == (0, 0)
        assert within["peak_bytes"] > 16 << 20
        assert (beyond["exit_code"], beyond["n_oom_kills"]) == (-9, 1)
        assert beyond["peak_bytes"] <= beyond["limit_bytes"]
    else:
        assert "Run as root" in str(seen["problem"])


@pytest.mark.parametrize("arguments", [[], ["--mib", "64"], ["--", "true"]])
def test_a_command_and_a_limit_are_needed(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "bench.limits.cgroup", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--mib 1200" in done.stderr
    assert done.stdout == ""


def test_the_page_cache_is_seen_and_dropped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(5 * mmap.PAGESIZE + 1))
    assert path.read_bytes()
    assert cached_bytes(path) == 6 * mmap.PAGESIZE
    drop_cached(path)
    assert cached_bytes(path) == 0


def test_pages_that_stay_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(5 * mmap.PAGESIZE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[0] >= 0
        with pytest.raises(StillCachedError, match="stay in the page cache"):
            drop_cached(path)
