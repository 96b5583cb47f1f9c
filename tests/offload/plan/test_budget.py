"""What a person writes as a budget, and what it comes to on the machine they have."""

from dataclasses import dataclass

import pytest

from slimoe.offload.errors import UsageError
from slimoe.offload.plan.budget import Budget, decide_budget, parse_size
from slimoe.offload.resources.memory import HostMemory

GIB = 1 << 30
TOTAL = 64 * GIB
FREE = 32 * GIB
LESS_FREE = GIB // 32
"""What a person who names a size may have beyond what is taken without being asked."""


@dataclass(frozen=True, slots=True)
class Card:
    name: str = "CUDA0"
    free_bytes: int = 22 * GIB
    total_bytes: int = 24 * GIB
    shares_host_memory: bool = False


MEMORY = HostMemory(holdable=FREE, grantable=FREE + LESS_FREE, limit=TOTAL)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("8GiB", 8 * GIB),
        ("8G", 8 * GIB),
        ("8gib", 8 * GIB),
        (" 8 GiB ", 8 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        ("500MB", 500 * 10**6),
        ("500MiB", 500 << 20),
        ("64k", 64 << 10),
        ("64KB", 64_000),
        ("2T", 2 << 40),
        ("2TB", 2 * 10**12),
        ("123456789", 123456789),
        ("123456789B", 123456789),
        ("0", 0),
        ("50%", TOTAL // 2),
        ("12.5 %", TOTAL // 8),
        ("100%", TOTAL),
        ("0.1GB", 10**8),
        ("auto", None),
        ("AUTO", None),
    ],
)
def test_sizes(text: str, n_bytes: int | None) -> None:
    assert parse_size(text, TOTAL) == n_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "much",
        "-1",
        "8 GiBs",
        "8GiG",
        "GiB",
        "%",
        "1e9",
        "8,5GiB",
        "0x10",
        "½GiB",
        "٣GiB",
        "nan",
        "8iB",
        "9" * 5000,
        "auto0",
    ],
)
def test_what_is_no_size_gets_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"--vram is .* no size. Write one like 8GiB, 500MB or 50%, or auto."):
        parse_size(text, TOTAL, "--vram")


def test_more_than_all_is_no_share() -> None:
    with pytest.raises(UsageError, match="--ram is 101%, more than there is"):
        parse_size("101%", TOTAL)


@pytest.mark.parametrize(
    ("ram", "expected"),
    [(None, FREE), ("auto", FREE), ("16GiB", 16 * GIB), ("25%", 16 * GIB), ("0", 0)],
)
def test_ram_is_what_was_asked_for_or_what_is_free(ram: str | None, expected: int) -> None:
    assert decide_budget(ram, (), (), MEMORY) == Budget(expected, ())


def test_what_other_processes_of_ours_hold_need_not_be_free() -> None:
    assert decide_budget("16GiB", (), (), MEMORY, held_bytes=GIB).ram == 16 * GIB
    assert decide_budget(None, (), (), MEMORY, held_bytes=GIB).ram == FREE + GIB
    assert decide_budget("48GiB", (), (), MEMORY, held_bytes=GIB).ram == FREE + LESS_FREE + GIB


def test_more_than_is_free_is_not_taken_and_said() -> None:
    decided = decide_budget("48GiB", ("23GiB",), (Card(),), MEMORY)
    assert (decided.ram, decided.vram) == (FREE + LESS_FREE, (22 * GIB,))
    assert decided.notes == (
        "--vram is 23.00 GiB, but CUDA0 has 22.00 GiB to give now: taking no more than that.",
        "--ram is 48.00 GiB, but the host has 32.03 GiB to give now: taking no more than that.",
    )


def test_auto_leaves_a_device_something() -> None:
    small = Card("CUDA1", free_bytes=7 * GIB, total_bytes=8 * GIB)
    assert decide_budget(None, (), (Card(), small), MEMORY).vram == (21 * GIB, 7 * GIB - GIB // 2)
    full = Card(free_bytes=GIB // 4)
    assert decide_budget(None, ("auto",), (full,), MEMORY).vram == (0,)


def test_one_size_for_all_devices_or_one_for_each() -> None:
    cards = (Card(), Card("CUDA1"))
    assert decide_budget(None, ("8GiB",), cards, MEMORY).vram == (8 * GIB, 8 * GIB)
    assert decide_budget(None, ("8GiB", "50%"), cards, MEMORY).vram == (8 * GIB, 12 * GIB)
    assert decide_budget(None, ("auto", "1G"), cards, MEMORY).vram == (21 * GIB, GIB)
    with pytest.raises(UsageError, match=r"--vram has 3 sizes, but the devices are 2 \(CUDA0, CUDA1\)"):
        decide_budget(None, ("1G", "1G", "1G"), cards, MEMORY)


def test_vram_without_a_device() -> None:
    with pytest.raises(UsageError, match="no device"):
        decide_budget(None, ("8GiB",), (), MEMORY)
    assert decide_budget(None, ("auto",), (), MEMORY).vram == ()


def test_memory_that_is_shared_is_given_once() -> None:
    shared = Card("Metal", free_bytes=40 * GIB, total_bytes=48 * GIB, shares_host_memory=True)
    auto = decide_budget(None, (), (shared, Card()), MEMORY)
    assert auto.vram == (24 * GIB, 21 * GIB)
    assert auto.ram + auto.vram[0] == FREE
    assert decide_budget(None, ("10GiB",), (shared,), MEMORY).ram == 22 * GIB
    greedy = decide_budget(None, ("999TiB",), (shared,), MEMORY)
    assert (greedy.ram, greedy.vram) == (FREE - 24 * GIB, (24 * GIB,))
    assert greedy.notes == ("--vram is 1022976.00 GiB, but Metal has 24.00 GiB to give now: taking no more than that.",)
    assert decide_budget("16GiB", ("10GiB",), (shared,), MEMORY) == Budget(16 * GIB, (10 * GIB,))
    assert decide_budget("30GiB", ("10GiB",), (shared,), MEMORY).ram == 22 * GIB + LESS_FREE


def test_devices_that_share_memory_leave_a_quarter_to_the_host_together() -> None:
    pair = [Card(name, 40 * GIB, 48 * GIB, shares_host_memory=True) for name in ("Vulkan0", "RPC0")]
    auto = decide_budget(None, (), (*pair, Card()), MEMORY)
    assert auto.vram == (12 * GIB, 12 * GIB, 21 * GIB)
    assert auto.ram == FREE - 24 * GIB
    asked = decide_budget(None, ("20GiB", "auto"), pair, MEMORY)
    assert asked.vram == (20 * GIB, 4 * GIB)
    assert asked.ram == FREE - 24 * GIB
    greedy = decide_budget("4GiB", ("20GiB", "20GiB"), pair, MEMORY)
    assert (greedy.ram, greedy.vram) == (4 * GIB, (20 * GIB, 4 * GIB))
    assert greedy.notes == ("--vram is 20.00 GiB, but RPC0 has 4.00 GiB to give now: taking no more than that.",)


def test_an_empty_size_is_not_auto() -> None:
    with pytest.raises(UsageError, match="--ram is '', which is no size"):
        decide_budget("", (), (), MEMORY)
