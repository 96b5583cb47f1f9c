"""The simulated link: when bytes arrive, by hand, and that all of them do."""

import hashlib
import socket
import threading

import pytest

from bench.baselines.shaped_link import Direction, Link, parse_link, shaped_link
from slimoe.offload.errors import UsageError


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("1Gbit,0.2ms", Link(125e6, 2e-4)),
        ("10Gbit,2ms", Link(1.25e9, 2e-3)),
        ("2.5Gbit,50us", Link(312.5e6, 5e-5)),
        ("100Mbit,0ms", Link(12.5e6, 0.0)),
    ],
)
def test_links_are_written_as_bandwidth_and_delay(text: str, link: Link) -> None:
    read = parse_link(text)
    assert (read.bytes_per_second, read.seconds) == pytest.approx((link.bytes_per_second, link.seconds))
    again = parse_link(str(read))
    assert (again.bytes_per_second, again.seconds) == pytest.approx((link.bytes_per_second, link.seconds))


@pytest.mark.parametrize("text", ["", "1Gbit", "0Gbit,1ms", "1GB,1ms", "1Gbit, 1ms", "-1Gbit,1ms", "1Gbit,1s"])
def test_other_words_are_no_link(text: str) -> None:
    with pytest.raises(UsageError, match=r"Write them as 10Gbit,0\.2ms"):
        parse_link(text)


def test_bytes_arrive_one_after_the_other_and_a_delay_later() -> None:
    """1000 bytes a second, 5 seconds away: what is sent meanwhile queues, what is sent later does not."""
    direction = Direction(Link(1000.0, 5.0))
    assert direction.arrival(10.0, 2000) == 17.0
    assert direction.arrival(10.5, 1000) == 18.0
    assert direction.free_at == 13.0
    assert direction.arrival(13.0, 0) == 18.0
    assert direction.arrival(20.0, 1000) == 26.0


def test_a_link_carries_its_bytes_however_they_are_cut() -> None:
    whole, pieces = Direction(Link(1e6, 0.25)), Direction(Link(1e6, 0.25))
    last = [pieces.arrival(0.001 * number, 1000 * number) for number in range(50)][-1]
    assert last == pytest.approx(whole.arrival(0.001, sum(1000 * number for number in range(50))))


def test_every_byte_passes_both_ways_until_one_side_ends() -> None:
    sent = bytes(range(256)) * 2000
    with socket.create_server(("127.0.0.1", 0)) as server:

        def echo() -> None:
            connection, _ = server.accept()
            with connection:
                while piece := connection.recv(1 << 16):
                    connection.sendall(piece)

        thread = threading.Thread(target=echo)
        thread.start()
        with shaped_link(f"127.0.0.1:{server.getsockname()[1]}", Link(12.5e9, 1e-4)) as near:
            host, _, port = near.endpoint.rpartition(":")
            with socket.create_connection((host, int(port)), 30) as connection:
                connection.sendall(sent[: len(sent) // 2])
                near.change(Link(1e9, 1e-4))
                connection.sendall(sent[len(sent) // 2 :])
                received = b""
                while len(received) < len(sent):
                    received += connection.recv(1 << 16)
            thread.join(30)
    assert not thread.is_alive()
    assert hashlib.sha256(received).digest() == hashlib.sha256(sent).digest()


def test_no_server_behind_the_link_is_a_closed_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with shaped_link(f"127.0.0.1:{port}", Link(1e9, 0.0)) as near:
        host, _, own = near.endpoint.rpartition(":")
        with socket.create_connection((host, int(own)), 30) as connection:
            assert connection.recv(1) == b""
