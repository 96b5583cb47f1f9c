import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.resources import memory
from slimoe.offload.resources.memory import (
    LEAST_FREE_BYTES,
    LEFT_FREE_BYTES,
    available_bytes,
    grantable_bytes,
    holdable_bytes,
    human,
    memory_limit_bytes,
    peak_resident_bytes,
    require,
)
from slimoe.offload.resources.system_files import SystemFiles

ROOT = Path(__file__).parents[3]
GIB = 1 << 30
LITTLE = 1 << 20
"""Less than any machine has, so that the control group decides."""


@pytest.fixture
def cgroup(tmp_path: Path) -> Path:
    """Where control groups of both kinds are mounted in place of the system's, without files."""
    mounts = [(tmp_path, "cgroup2 cgroup2 rw"), (tmp_path / "memory", "cgroup cgroup rw,memory")]
    mountinfo = "".join(f"31 22 0:28 / {point} rw,nosuid shared:4 - {kind}\n" for point, kind in mounts)
    write(tmp_path, {"proc/self/mountinfo": mountinfo, "proc/self/cgroup": "4:memory:/\n0::/\n"})
    return tmp_path


def system_of(cgroup: Path) -> SystemFiles:
    return SystemFiles(proc=cgroup / "proc")


def write(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def assert_is_the_systems(available: int) -> None:
    assert 0.5 * psutil.virtual_memory().available < available < 2 * psutil.virtual_memory().available


def test_without_a_control_group_the_system_decides(cgroup: Path) -> None:
    assert_is_the_systems(available_bytes(system_of(cgroup)))


def test_a_limit_less_what_is_used(cgroup: Path) -> None:
    stat = "anon 1\nfile 5\ninactive_file 0\nactive_file 0\n"
    write(cgroup, {"memory.max": f"{3 * LITTLE}\n", "memory.current": f"{LITTLE}\n", "memory.stat": stat})
    assert available_bytes(system_of(cgroup)) == 2 * LITTLE


def test_page_cache_can_be_had(cgroup: Path) -> None:
    stat = f"anon 7\ninactive_file {LITTLE // 2}\nactive_file {LITTLE // 4}\n"
    write(cgroup, {"memory.max": f"{3 * LITTLE}\n", "memory.current": f"{3 * LITTLE}\n", "memory.stat": stat})
    assert available_bytes(system_of(cgroup)) == LITTLE // 2 + LITTLE // 4


def test_more_used_than_allowed_is_nothing_left(cgroup: Path) -> None:
    write(cgroup, {"memory.max": "1000\n", "memory.current": "2000\n", "memory.stat": ""})
    assert available_bytes(system_of(cgroup)) == 0


@pytest.mark.parametrize("limit", ["max\n", "9223372036854771712\n", "nonsense\n", ""])
def test_no_limit_and_unreadable_limits(cgroup: Path, limit: str) -> None:
    write(cgroup, {"memory.max": limit, "memory.current": "5\n", "memory.stat": ""})
    assert_is_the_systems(available_bytes(system_of(cgroup)))


@pytest.mark.parametrize(("limits", "expected"), [((4, 2, 3), 1), ((2, 4, 3), 1), ((3, "max", 3), 2)])
def test_the_tightest_of_the_groups_around_decides(cgroup: Path, limits: tuple[int | str, ...], expected: int) -> None:
    """A service's own limit stands in its own directory, not at the top."""
    write(cgroup, {"proc/self/cgroup": "1:name=x:/elsewhere\n0::/user.slice/slimoe.scope\n"})
    (cgroup / "user.slice/slimoe.scope").mkdir(parents=True)
    for group, limit in zip(("", "user.slice/", "user.slice/slimoe.scope/"), limits, strict=True):
        maximum = limit if limit == "max" else int(limit) * LITTLE
        write(cgroup, {f"{group}memory.max": f"{maximum}", f"{group}memory.current": f"{LITTLE}"})
        write(cgroup, {f"{group}memory.stat": ""})
    assert available_bytes(system_of(cgroup)) == expected * LITTLE


def test_where_processes_are_slowed_down_is_a_limit_too(cgroup: Path) -> None:
    files = {"memory.high": f"{2 * LITTLE}\n", "memory.current": f"{LITTLE}\n", "memory.stat": ""}
    write(cgroup, {**files, "memory.max": "max\n"})
    assert (available_bytes(system_of(cgroup)), memory_limit_bytes(system_of(cgroup))) == (LITTLE, 2 * LITTLE)
    write(cgroup, {"memory.max": f"{3 * LITTLE}\n"})
    assert memory_limit_bytes(system_of(cgroup)) == 2 * LITTLE
    write(cgroup, {"memory.high": "max\n"})
    assert memory_limit_bytes(system_of(cgroup)) == 3 * LITTLE


def older(group: str, limit: int, used: int, stat: str = "") -> dict[str, str]:
    """The files of a group of version 1."""
    return {
        f"memory{group}/memory.limit_in_bytes": f"{limit}\n",
        f"memory{group}/memory.usage_in_bytes": f"{used}\n",
        f"memory{group}/memory.stat": stat,
    }


def test_the_older_kind_of_control_group(cgroup: Path) -> None:
    write(cgroup, older("", 2 * LITTLE, LITTLE, "inactive_file 1000\n"))
    assert available_bytes(system_of(cgroup)) == LITTLE + 1000
    assert memory_limit_bytes(system_of(cgroup)) == 2 * LITTLE


@pytest.mark.parametrize(("limits", "expected"), [((4, 2, 3), 1), ((2, 4, 3), 1), ((3, 1 << 42, 3), 2)])
def test_the_older_kind_inside_others(cgroup: Path, limits: tuple[int, ...], expected: int) -> None:
    """The limit of a batch system's job stands some directories below the top."""
    write(cgroup, {"proc/self/cgroup": "9:name=systemd:/\n4:cpuset,memory:/slurm/job_1\n0::/\n"})
    for group, limit in zip(("", "/slurm", "/slurm/job_1"), limits, strict=True):
        write(cgroup, older(group, limit * LITTLE, LITTLE))
    write(cgroup, older("/slurm/job_2", 1, 1))
    assert available_bytes(system_of(cgroup)) == expected * LITTLE
    assert memory_limit_bytes(system_of(cgroup)) == min(limits) * LITTLE


def test_a_path_that_is_not_mounted_here(cgroup: Path) -> None:
    """A container sees its own group at the top, but may read its path outside."""
    write(
        cgroup, {"proc/self/cgroup": "4:memory:/docker/0123abcd\n0::/docker/0123abcd\n"} | older("", 5 * LITTLE, LITTLE)
    )
    assert available_bytes(system_of(cgroup)) == 4 * LITTLE


def test_page_cache_of_groups_inside_can_be_had(cgroup: Path) -> None:
    stat = f"inactive_file 0\nactive_file 0\ntotal_inactive_file {LITTLE // 2}\ntotal_active_file {LITTLE // 4}\n"
    write(cgroup, older("", 3 * LITTLE, 3 * LITTLE, stat))
    assert available_bytes(system_of(cgroup)) == LITTLE // 2 + LITTLE // 4


def test_the_limit_is_the_systems_without_a_control_group(cgroup: Path) -> None:
    assert memory_limit_bytes(system_of(cgroup)) == psutil.virtual_memory().total
    write(cgroup, {"memory.max": f"{LITTLE}", "memory.current": "0", "memory.stat": ""})
    assert memory_limit_bytes(system_of(cgroup)) == LITTLE


@pytest.fixture
def held(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """What this process holds, on a machine of 100 GiB of which 80 are available and nothing is mapped."""
    memory_now = SimpleNamespace(total=100 * GIB, available=80 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory_now)
    monkeypatch.setattr(memory, "resident_bytes", lambda: GIB)
    write(cgroup, {"proc/meminfo": "MemTotal:  104857600 kB\nMapped:        0 kB\n"})
    return GIB


def holdable(room: int, held: int) -> int:
    """`room` less what is always left and page tables, and what is held."""
    room -= LEFT_FREE_BYTES
    return room - room // 512 + held


@pytest.mark.parametrize(
    ("meminfo", "mapped"), [("Mapped: 0 kB", 0), ("Mapped:  3145728 kB\nShmem: 1 kB", 3 * GIB), ("", 100 * GIB // 16)]
)
def test_what_the_system_has_mapped_is_not_for_holding(cgroup: Path, held: int, meminfo: str, mapped: int) -> None:
    write(cgroup, {"proc/meminfo": meminfo})
    assert holdable_bytes(system_of(cgroup)) == holdable(80 * GIB - mapped, held)


def test_what_a_control_group_has_mapped_is_not_for_holding(cgroup: Path, held: int) -> None:
    write(cgroup, older("", 20 * GIB, 4 * GIB, f"mapped_file 1\ntotal_mapped_file {2 * GIB}\ntotal_active_file {GIB}"))
    assert holdable_bytes(system_of(cgroup)) == holdable(15 * GIB, held)
    write(cgroup, {"memory.max": f"{10 * GIB}", "memory.current": "0", "memory.stat": f"file_mapped {GIB}"})
    assert holdable_bytes(system_of(cgroup)) == holdable(9 * GIB, held)


def test_a_full_control_group_lets_us_hold_no_more(cgroup: Path, held: int) -> None:
    write(cgroup, {"memory.max": f"{GIB}", "memory.current": f"{2 * GIB}", "memory.stat": f"file_mapped {GIB // 2}"})
    assert 0 < holdable_bytes(system_of(cgroup)) < held
    write(cgroup, {"memory.stat": f"file_mapped {3 * GIB}"})
    assert holdable_bytes(system_of(cgroup)) == 0


def test_a_size_that_was_named_may_fill_its_control_group(cgroup: Path, held: int) -> None:
    system = 80 * GIB - LEAST_FREE_BYTES
    assert grantable_bytes(system_of(cgroup)) == system - system // 512 + held
    write(cgroup, {"memory.max": f"{10 * GIB}", "memory.current": f"{GIB}", "memory.stat": "file_mapped 0"})
    room = 9 * GIB
    assert grantable_bytes(system_of(cgroup)) == room - room // 512 + held
    assert holdable_bytes(system_of(cgroup)) == room - LEFT_FREE_BYTES - (room - LEFT_FREE_BYTES) // 512 + held


def test_what_does_not_fit_is_refused_with_both_numbers() -> None:
    require(GIB, GIB, "this")
    with pytest.raises(DoesNotFitError, match=r"this needs 1\.50 GiB of memory, but 1\.00 GiB are available") as caught:
        require(GIB + GIB // 2, GIB, "this")
    assert (caught.value.required_bytes, caught.value.available_bytes) == (GIB + GIB // 2, GIB)


def test_bytes_for_people() -> None:
    assert [human(n) for n in (0, 1023, 1536, 5 << 20, 3 * GIB // 2)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "1.50 GiB",
    ]


def test_the_peak_is_at_least_what_is_resident_now() -> None:
    assert peak_resident_bytes() >= 0.9 * psutil.Process().memory_info().rss


def test_the_peak_of_a_child_is_not_its_parents() -> None:
    held = np.ones(256 << 20, np.uint8)
    code = "from slimoe.offload.resources.memory import peak_resident_bytes; print(peak_resident_bytes())"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 1 << 20 < int(told) < held.nbytes


def test_the_peak_where_the_system_keeps_no_other(cgroup: Path) -> None:
    assert peak_resident_bytes(system_of(cgroup)) >= 0.9 * psutil.Process().memory_info().rss
