"""How many threads compute, by the processors that this process may run on and the time that it may have on them."""

import os
import sys
from pathlib import Path

import pytest

from slimoe.offload.resources.processors import default_threads, usable_processors, waits
from tests.offload.resources.control_group_files import ControlGroupFiles


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ControlGroupFiles:
    """Eight cores that this process may run on, and no control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    return ControlGroupFiles(tmp_path)


def test_without_control_groups_every_core_computes(groups: ControlGroupFiles) -> None:
    assert default_threads(groups.system) == 8


def test_processors_that_are_not_for_this_process_do_not_count(
    groups: ControlGroupFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 6})
    assert default_threads(groups.system) == 3


def test_two_threads_of_a_core_are_one(groups: ControlGroupFiles, tmp_path: Path) -> None:
    for cpu in range(8):
        groups.write(tmp_path / f"cpu/cpu{cpu}/topology", {"thread_siblings": f"{0b11 << cpu // 2 * 2:02x}\n"})
    assert default_threads(groups.system) == 4
    assert usable_processors(groups.system) == 8


@pytest.mark.parametrize(
    ("quota", "n_threads"),
    [("max 100000", 8), ("800000 100000", 8), ("1600000 100000", 8), ("350000 100000", 3), ("50000 100000", 1)],
)
def test_a_quota(groups: ControlGroupFiles, quota: str, n_threads: int) -> None:
    groups.mount("", own="/job")
    groups.limit("job", cpu__max=quota)
    assert default_threads(groups.system) == n_threads


@pytest.mark.parametrize(
    ("outer", "middle", "own"),
    [("200000 100000", "max 100000", "max 100000"), ("max 100000", "100000 50000", "max 50000"), ("9 1", "9 1", "2 1")],
)
def test_the_tightest_quota_of_the_groups_around_decides(
    groups: ControlGroupFiles, outer: str, middle: str, own: str
) -> None:
    groups.mount("", own="/user.slice/app.slice/slimoe.scope", at="unified")
    groups.limit("unified/user.slice", cpu__max=outer)
    groups.limit("unified/user.slice/app.slice", cpu__max=middle)
    groups.limit("unified/user.slice/app.slice/slimoe.scope", cpu__max=own)
    groups.limit("unified/system.slice", cpu__max="1 1")  # somebody else's
    assert default_threads(groups.system) == 2


@pytest.mark.parametrize(("outer", "own"), [(200000, -1), (-1, 200000), (200000, 400000), (400000, 200000)])
def test_quotas_of_the_older_kind(groups: ControlGroupFiles, outer: int, own: int) -> None:
    groups.mount("cpu,cpuacct", own="/slurm/job_1")
    groups.limit("cpu,cpuacct", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    groups.limit("cpu,cpuacct/slurm", cpu__cfs_quota_us=outer, cpu__cfs_period_us=100000)
    groups.limit("cpu,cpuacct/slurm/job_1", cpu__cfs_quota_us=own, cpu__cfs_period_us=100000)
    assert default_threads(groups.system) == 2


def test_half_a_processor_of_the_older_kind_has_one_thread(groups: ControlGroupFiles) -> None:
    groups.mount("cpu", own="/half")
    groups.limit("cpu/half", cpu__cfs_quota_us=50000, cpu__cfs_period_us=100000)
    assert default_threads(groups.system) == usable_processors(groups.system) == 1


def test_both_kinds_at_once(groups: ControlGroupFiles) -> None:
    """A mixed system has some controllers in the older kind's trees and the others in the newer one's."""
    groups.mount("memory", own="/x")
    groups.mount("cpu", own="/a")
    groups.mount("", own="/b", at="unified")
    groups.limit("cpu/a", cpu__cfs_quota_us=600000, cpu__cfs_period_us=100000)
    groups.limit("unified/b", cpu__max="300000 100000")
    assert default_threads(groups.system) == 3


def test_a_container_that_sees_its_own_part_of_the_tree(groups: ControlGroupFiles) -> None:
    groups.mount("cpu", own="/docker/0123abcd/inner", root="/docker/0123abcd")
    groups.limit("cpu", cpu__cfs_quota_us=400000, cpu__cfs_period_us=100000)
    groups.limit("cpu/inner", cpu__cfs_quota_us=200000, cpu__cfs_period_us=100000)
    assert default_threads(groups.system) == 2


def test_a_group_outside_of_the_namespace_is_held_to_its_top(groups: ControlGroupFiles) -> None:
    groups.mount("", own="/../elsewhere")
    groups.limit("", cpu__max="200000 100000")
    assert default_threads(groups.system) == 2


@pytest.mark.parametrize("text", ["", "nonsense", "100000", "100000 0", "0 100000"])
def test_a_quota_that_cannot_be_read_is_none(groups: ControlGroupFiles, text: str) -> None:
    groups.mount("")
    groups.limit("", cpu__max=text)
    assert default_threads(groups.system) == 8


def test_what_threads_have_waited_only_grows() -> None:
    """As Linux tells it of this process."""
    before = waits()
    assert before if sys.platform == "linux" else not before
    after = waits()
    assert all(after[thread] >= seconds >= 0 for thread, seconds in before.items() if thread in after)


def test_of_unknown_files_nothing_is_known(groups: ControlGroupFiles, tmp_path: Path) -> None:
    for thread, text in {"1": "", "2": "x y z", "3": "5", "4": "5 2500000000 7"}.items():
        groups.write(tmp_path / f"proc/self/task/{thread}", {"schedstat": text})
    assert waits(groups.system) == {"4": 2.5}
