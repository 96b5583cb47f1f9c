"""Asks a server's /health again and again, as a process of its own, until standard input ends.

The last line of stdout is one JSON document: how many answers there were, and how long they took.

    python -m bench.attacks.health_probe http://127.0.0.1:8080
"""

import http.client
import json
import select
import statistics
import sys
import time
from urllib.parse import urlsplit

PAUSE = 0.05
PATIENCE = 30.0


def ask(host: str, port: int) -> tuple[float, int]:
    """The seconds of one answer, and its status: 0 for none."""
    begin = time.perf_counter()
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        response.read()
        status = response.status
    except (OSError, http.client.HTTPException):
        status = 0
    finally:
        connection.close()
    return time.perf_counter() - begin, status


def main() -> None:
    """Ask until the input ends."""
    place = urlsplit(sys.argv[1])
    assert place.hostname is not None
    assert place.port is not None
    seconds: list[float] = []
    bad: dict[str, int] = {}
    while not select.select([sys.stdin], [], [], PAUSE)[0]:
        took, status = ask(place.hostname, place.port)
        seconds.append(took)
        if status != 200:
            bad[str(status)] = bad.get(str(status), 0) + 1
    seconds = sorted(seconds) or [0.0]
    document = {
        "n_asked": len(seconds),
        "not_ok": bad,
        "median_ms": round(1e3 * statistics.median(seconds), 1),
        "p99_ms": round(1e3 * seconds[int(0.99 * (len(seconds) - 1))], 1),
        "max_ms": round(1e3 * seconds[-1], 1),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
