from pathlib import Path

import psutil
import pytest

from offload import memory
from offload.errors import DoesNotFitError
from offload.memory import available_bytes, human, peak_resident_bytes, require

GIB = 1 << 30
LITTLE = 1 << 20
"""Less than any machine has, so that the control group decides."""


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A control group's directory without files, in place of the system's."""
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "membership")
    return tmp_path


def write(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def assert_is_the_systems(available: int) -> None:
    assert 0.5 * psutil.virtual_memory().available < available < 2 * psutil.virtual_memory().available


def test_without_a_control_group_the_system_decides(cgroup: Path) -> None:
    assert_is_the_systems(available_bytes())


def test_a_limit_less_what_is_used(cgroup: Path) -> None:
    stat = "anon 1\nfile 5\ninactive_file 0\nactive_file 0\n"
    write(cgroup, {"memory.max": f"{3 * LITTLE}\n", "memory.current": f"{LITTLE}\n", "memory.stat": stat})
    assert available_bytes() == 2 * LITTLE


def test_page_cache_can_be_had(cgroup: Path) -> None:
    stat = f"anon 7\ninactive_file {LITTLE // 2}\nactive_file {LITTLE // 4}\n"
    write(cgroup, {"memory.max": f"{3 * LITTLE}\n", "memory.current": f"{3 * LITTLE}\n", "memory.stat": stat})
    assert available_bytes() == LITTLE // 2 + LITTLE // 4


def test_more_used_than_allowed_is_nothing_left(cgroup: Path) -> None:
    write(cgroup, {"memory.max": "1000\n", "memory.current": "2000\n", "memory.stat": ""})
    assert available_bytes() == 0


@pytest.mark.parametrize("limit", ["max\n", "9223372036854771712\n", "nonsense\n", ""])
def test_no_limit_and_unreadable_limits(cgroup: Path, limit: str) -> None:
    write(cgroup, {"memory.max": limit, "memory.current": "5\n", "memory.stat": ""})
    assert_is_the_systems(available_bytes())


@pytest.mark.parametrize(("limits", "expected"), [((4, 2, 3), 1), ((2, 4, 3), 1), ((3, "max", 3), 2)])
def test_the_tightest_of_the_groups_around_decides(cgroup: Path, limits: tuple[int | str, ...], expected: int) -> None:
    """A service's own limit stands in its own directory, not at the top."""
    write(cgroup, {"membership": "1:name=x:/elsewhere\n0::/user.slice/slimoe.scope\n"})
    (cgroup / "user.slice/slimoe.scope").mkdir(parents=True)
    for group, limit in zip(("", "user.slice/", "user.slice/slimoe.scope/"), limits, strict=True):
        maximum = limit if limit == "max" else int(limit) * LITTLE
        write(cgroup, {f"{group}memory.max": f"{maximum}", f"{group}memory.current": f"{LITTLE}"})
        write(cgroup, {f"{group}memory.stat": ""})
    assert available_bytes() == expected * LITTLE


def test_the_older_kind_of_control_group(cgroup: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": f"{2 * LITTLE}\n",
        "memory/memory.usage_in_bytes": f"{LITTLE}\n",
        "memory/memory.stat": "inactive_file 1000\n",
    }
    write(cgroup, files)
    assert available_bytes() == LITTLE + 1000


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
